"""metrics.jsonl as a reader wants it: each step once, damaged lines gone."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mlip_jax.core.files import NotJson, decode_json

Line = dict[str, Any]


@dataclass
class History:
    """The lines of a run in order of steps."""

    training: list[Line] = field(default_factory=list)
    evaluation: list[Line] = field(default_factory=list)


def read_history(path: str | os.PathLike[str]) -> History:
    """Reads metrics.jsonl; an absent file is an empty history.

    A resumed run writes again what lay past its checkpoint, so a line removes all earlier lines of
    its kind at its step or later. A line that is damaged, such as one cut short by a kill, is
    passed over, and so is a value that is no number; null stands for one that is not finite.
    """
    history = History()
    path = Path(path)
    if not path.exists():
        return history
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = {key: value for key, value in decode_json(text).items() if _is_value(value)}
        except NotJson:
            continue
        if line.get("step") is None or line.get("samples") is None:
            continue
        step = line["step"]
        lines = history.training if "loss" in line else history.evaluation
        while lines and lines[-1]["step"] >= step:
            lines.pop()
        lines.append(line)
    return history


def training_seconds(history: History) -> float | None:
    """How long the steps took, evaluations and pauses left out; None where no speed is recorded."""
    seconds = before = 0.0
    for line in history.training:
        rate = line.get("images_per_second")
        if isinstance(rate, int | float) and rate > 0:
            seconds += (line["samples"] - before) / rate
        before = line["samples"]
    return seconds or None


def _is_value(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and abs(value) <= sys.float_info.max)


def series(
    lines: list[Line], key: str
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Samples seen and values of the lines that carry a key."""
    carried = [line for line in lines if isinstance(line.get(key), int | float)]
    return (
        np.array([line["samples"] for line in carried], np.float64),
        np.array([line[key] for line in carried], np.float64),
    )


def keys(lines: list[Line], prefix: str) -> list[str]:
    """Every key that starts with a prefix, in order of appearance."""
    return list(dict.fromkeys(key for line in lines for key in line if key.startswith(prefix)))
