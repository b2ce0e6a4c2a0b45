"""The bar of a long evaluation."""

from mlip_jax.progress import track

__all__ = ["track"]
