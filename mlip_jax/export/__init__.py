"""Models out: folders for this package, for other libraries, and for programs without either."""

from mlip_jax.export.verb import export

__all__ = ["export"]
