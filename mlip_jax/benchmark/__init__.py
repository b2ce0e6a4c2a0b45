"""How fast a config trains here: step time, utilisation, input, and beside other programs."""

from mlip_jax.benchmark.verb import benchmark

__all__ = ["benchmark"]
