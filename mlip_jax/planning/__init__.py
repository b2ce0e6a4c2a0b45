"""Plans a run for devices that one does not have: memory, time and traffic, by the compiler."""

from mlip_jax.planning.estimates import Estimate, estimate, largest_batch
from mlip_jax.planning.verb import plan
from mlip_jax.training.step_cost import Memory

__all__ = ["Estimate", "Memory", "estimate", "largest_batch", "plan"]
