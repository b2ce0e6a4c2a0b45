"""What a trained model is worth: retrieval and zero-shot classification, beside chance."""

from mlip_jax.evaluations.results import Results, read_results, table, write_results
from mlip_jax.evaluations.run import evaluate
from mlip_jax.evaluations.workdir import evaluate_workdir

__all__ = ["Results", "evaluate", "evaluate_workdir", "read_results", "table", "write_results"]
