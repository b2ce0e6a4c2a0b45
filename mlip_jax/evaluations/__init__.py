"""What a trained model is worth: figures beside chance, from one table of evaluations."""

from mlip_jax.evaluations.results import Results, read_results, write_results
from mlip_jax.evaluations.sheets import table
from mlip_jax.evaluations.suites import evaluate
from mlip_jax.evaluations.verb import evaluate_workdir

__all__ = ["Results", "evaluate", "evaluate_workdir", "read_results", "table", "write_results"]
