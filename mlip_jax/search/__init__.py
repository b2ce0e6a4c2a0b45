"""A folder of images, searched by words or by an image: on the command line and in a browser."""

from mlip_jax.search.index import Index
from mlip_jax.search.query import nearest
from mlip_jax.search.verb import find_index, search

__all__ = ["Index", "find_index", "nearest", "search"]
