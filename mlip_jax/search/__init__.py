"""A folder of images, searched by words or by an image: on the command line and in a browser."""

from mlip_jax.search.verb import search

__all__ = ["search"]
