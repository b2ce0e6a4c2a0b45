"""What StableHLO and ONNX share: two programs, what goes in and out, a check by running them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from mlip_jax.core.errors import RunError
from mlip_jax.data.text.tokenizer import OWN_FILE
from mlip_jax.inference import Model
from mlip_jax.interop.foreign import MissingTokenizer

SIGNATURE = "signature.json"
_ROWS = (1, 15)  # batches that a program is tried on
_TOLERANCE = 1e-4  # of embeddings of norm 1


def examples(model: Model, name: str, rows: int) -> np.ndarray:
    """Arrays as a program of `Model.programs` takes them, by chance."""
    program = model.programs()[name]
    high = 256 if program.dtype == np.uint8 else model.tokenizer.vocab_size
    rng = np.random.default_rng(rows)
    inputs = rng.integers(0, high, (rows, *program.shape)).astype(program.dtype)
    if program.dtype != np.uint8:
        inputs[:, -1] = model.tokenizer.eot  # a text ends
    return inputs


class Agreement(NamedTuple):
    """How far a written program is from the model, on rows by chance."""

    worst: float  # difference, of the rows that agree
    rows: int
    flipped: int  # rows that do not, as another token was merged


def check(model: Model, name: str, run: Callable[[np.ndarray], ArrayLike]) -> Agreement:
    """Runs a written program beside the model.

    Where the model merges tokens and two are about equally similar, rounding decides which of them
    is merged: a few images may differ, a quarter at most (a choice of ours).

    Raises:
      RunError: when the difference is more than that.
    """
    row_differences = []
    for rows in _ROWS:
        inputs = examples(model, name, rows)
        expected = np.asarray(model.programs()[name].function(inputs))
        actual = np.asarray(run(inputs))
        if actual.shape != expected.shape:
            raise RunError(
                f"the program {name} was written but gives {actual.shape} in place of "
                f"{expected.shape}; nothing is kept"
            )
        row_differences.append(np.abs(actual - expected).max(axis=1))
    differences = np.concatenate(row_differences)
    agrees = differences <= _TOLERANCE
    merges = name == "encode_image" and model.config.model.image.merging.rate > 0
    flipped = int((~agrees).sum())
    if not agrees.any() or flipped > (len(agrees) // 4 if merges else 0):
        raise RunError(
            f"the program {name} was written but does not give what the model gives: embeddings "
            f"differ by {differences.max():.1e}; nothing is kept"
        )
    return Agreement(float(differences[agrees].max()), len(agrees), flipped)


def decoder_notes(model: Model) -> list[str]:
    """That a format has no place for the caption decoder, where the model has one, in words."""
    return ["its caption decoder is left out; --format=mlip keeps it"] if model.writes else []


def finish(
    folder: Path, model: Model, files: dict[str, str], agreement: dict[str, Agreement]
) -> list[str]:
    """Writes `SIGNATURE` and the tokenizer beside the programs.

    Args:
      folder: of the programs.
      model: that they compute.
      files: by program, its file.
      agreement: by program, what `check` found.

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
    notes = decoder_notes(model)
    for name, (worst, rows, flipped) in agreement.items():
        but = f", but for {flipped}, where rounding merged another token" if flipped else ""
        notes.append(f"{name}: run on {rows} rows, equal to the model within {worst:.1e}{but}")
    if isinstance(model.tokenizer, MissingTokenizer):
        values["tokenizer"] = None
        notes.append(model.tokenizer.reason)
    else:
        (folder / OWN_FILE).write_text(model.tokenizer.to_json(), encoding="utf-8")
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / SIGNATURE).write_text(text + "\n", encoding="utf-8")
    return notes
