"""Studies: a table of configs, each trained with several seeds, and what came of it."""

from mlip_jax.study.verb import study

__all__ = ["study"]
