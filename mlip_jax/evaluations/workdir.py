"""The evaluate verb: a finished or running workdir, scored again, perhaps by another config."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax import config as schema
from mlip_jax.config import UserError
from mlip_jax.evaluations.results import FILE_NAME, table, write_results
from mlip_jax.evaluations.run import evaluate
from mlip_jax.inference import load

_MOVE_A_FIGURE = (
    "compute_dtype",
    "data.train",  # whose validation split may be what is evaluated on
    "data.validation",
    "evaluation.",
    "model.",
    "perspectives.",  # the first global one in use gives the embeddings
)
_LONGEST_NAME = 160  # bytes; file systems take 255 of a whole name


def evaluate_workdir(config: ConfigDict, workdir: str | Path) -> int:
    """Evaluates a workdir's newest checkpoint, prints the table and writes the results.

    What the config changes about the model or the evaluation goes into the file's name, so that
    results.json stays that of the run as trained.

    Args:
      config: the workdir's config with the overrides of the command line.
      workdir: of a run.

    Returns:
      0.

    Raises:
      UserError: for a folder without a checkpoint, or a config that does not fit it.
    """
    model = load(workdir, config=config)
    trained = schema.from_json((Path(workdir) / "config.json").read_text(encoding="utf-8"))
    changed = changes(trained, config)
    results = evaluate(model, config)
    if not results.figures:
        raise UserError(
            f"{workdir} names no set to evaluate on: add --config.data.validation=jsonl:PATH or "
            "--config.evaluation.retrieval"
        )
    path = write_results(workdir, results, results_name(changed))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table(results))
    console.print(f"results: {path}")
    return 0


def changes(trained: ConfigDict, config: ConfigDict) -> list[str]:
    """Every key that moves a figure and differs from how the run was trained: "key=value"."""
    before, now = schema.flatten(trained.to_dict()), schema.flatten(config.to_dict())
    return [
        f"{key}={now[key]}"
        for key in sorted(now)
        if key.startswith(_MOVE_A_FIGURE)
        and key != "evaluation.batch_size"
        and now[key] != before[key]
    ]


def results_name(changed: list[str]) -> str:
    """The file for the results under these changes; results.json when there are none."""
    if not changed:
        return FILE_NAME
    name = re.sub(r"[^\w.,=+-]+", "_", ",".join(changed))
    if len(name.encode()) > _LONGEST_NAME:
        digest = hashlib.sha256(",".join(changed).encode()).hexdigest()[:8]
        name = f"{name.encode()[:_LONGEST_NAME].decode(errors='ignore')},{digest}"
    return f"results,{name}.json"
