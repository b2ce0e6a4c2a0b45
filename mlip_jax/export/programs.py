"""What StableHLO and ONNX share: two programs, what goes in and out, a check by running them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.config import RunError
from mlip_jax.data.text import OWN_FILE
from mlip_jax.inference import Model
from mlip_jax.interop.foreign import MissingTokenizer

SIGNATURE = "signature.json"
_ROWS = (1, 3)  # batches that a program is tried on
_TOLERANCE = 1e-4  # of embeddings of norm 1


def examples(model: Model, name: str, rows: int) -> np.ndarray:
    """Arrays as a program of `Model.programs` takes them, by chance."""
    program = model.programs()[name]
    high = 256 if program.dtype == np.uint8 else model.tokenizer.vocab_size
    rng = np.random.default_rng(rows)
    found = rng.integers(0, high, (rows, *program.shape)).astype(program.dtype)
    if program.dtype != np.uint8:
        found[:, -1] = model.tokenizer.eot  # a text ends
    return found


def check(model: Model, name: str, run: Callable[[np.ndarray], np.ndarray]) -> float:
    """The largest difference between a written program, run, and the model.

    Raises:
      RunError: when it is more than rounding.
    """
    worst = 0.0
    for rows in _ROWS:
        inputs = examples(model, name, rows)
        wanted = np.asarray(model.programs()[name].function(inputs))
        found = np.asarray(run(inputs))
        difference = np.abs(found - wanted).max() if found.shape == wanted.shape else np.inf
        worst = max(worst, float(difference))
    if not worst <= _TOLERANCE:
        raise RunError(
            f"the program {name} was written but does not give what the model gives: embeddings "
            f"differ by {worst:.1e}; nothing is kept"
        )
    return worst


def finish(folder: Path, model: Model, files: dict[str, str], worst: dict[str, float]) -> list[str]:
    """Writes `SIGNATURE` and the tokenizer beside the programs.

    Args:
      folder: of the programs.
      model: that they compute.
      files: by program, its file.
      worst: by program, what `check` found.

    Returns:
      What the user should know.
    """
    outputs = model.config.model.embed_dim
    described = {
        name: {
            "file": files[name],
            "input": ["batch", *program.shape],
            "dtype": str(np.dtype(program.dtype)),
            "output": ["batch", outputs],
        }
        for name, program in model.programs().items()
    }
    values: dict[str, Any] = {
        "programs": described,
        "preprocessing": model.preprocess.to_dict(),
        "context_length": model.config.model.text.context_length,
        "tokenizer": OWN_FILE,
        "logit_scale": model.logit_scale,
        "logit_bias": model.logit_bias,
    }
    notes = [
        f"{name}: run on batches of {' and '.join(map(str, _ROWS))}, equal to the model within "
        f"{value:.1e}"
        for name, value in worst.items()
    ]
    if isinstance(model.tokenizer, MissingTokenizer):
        values["tokenizer"] = None
        notes.append(model.tokenizer.reason)
    else:
        (folder / OWN_FILE).write_text(model.tokenizer.to_json(), encoding="utf-8")
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / SIGNATURE).write_text(text + "\n", encoding="utf-8")
    return notes
