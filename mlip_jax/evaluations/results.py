"""Figures beside what chance would give and how many examples they rest on, kept in a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlip_jax.core import places
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import is_number, kind_of, read_json, write_atomically
from mlip_jax.evaluations.interface import Outcome

FILE_NAME = "results.json"
_ADVICE = "mend it or remove it"
_NUMBERS = (int, float)


@dataclass
class Results:
    """What evaluations found. Keys of the first four are "family/dataset/figure"."""

    figures: dict[str, float] = field(default_factory=dict)  # see `Outcome`
    chance: dict[str, float] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    protocols: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(
        default_factory=dict
    )  # "family/dataset" -> what was done and left out
    step: int | None = None  # of the checkpoint
    left_out: dict[str, str] = field(default_factory=dict)  # family -> why; not kept in the file
    done: list[str] = field(default_factory=list)  # "family=spec", figures found or not

    def add(self, family: str, outcome: Outcome) -> None:
        """Files an outcome under "family/dataset", in place of what was there."""
        group = f"{family}/{outcome.name}"
        self.discard(group)
        for name, value in outcome.figures.items():
            key = f"{group}/{name}"
            self.figures[key] = value
            self.chance[key] = outcome.chance[name]
            self.examples[key] = outcome.examples[name]
            self.protocols[key] = outcome.protocols[name]
        self.notes[group] = outcome.note

    def discard(self, group: str) -> None:
        """Forgets a "family/dataset"."""
        for key in [key for key in self.figures if key.startswith(f"{group}/")]:
            for values in (self.figures, self.chance, self.examples, self.protocols):
                values.pop(key, None)
        self.notes.pop(group, None)

    def beside_figures(self) -> dict[str, dict[str, Any]]:
        """What is known beside the figures, by the word that its keys begin with in a file."""
        return {
            "chance": self.chance,
            "examples": self.examples,
            "protocol": self.protocols,
            "note": self.notes,
        }

    def update(self, other: Results) -> None:
        """Takes over the groups of `other`, each in place of one of the same name."""
        for group in other.notes:
            self.discard(group)
        self.figures |= other.figures
        self.chance |= other.chance
        self.examples |= other.examples
        self.protocols |= other.protocols
        self.notes |= other.notes
        self.left_out |= other.left_out

    def check(self) -> None:
        """Raises ValueError, in words, for what `evaluate` cannot have found."""
        if self.step is not None and type(self.step) is not int:
            raise ValueError(f"step is {kind_of(self.step)}, not a whole number")
        if self.step is not None and not is_number(self.step):
            raise ValueError("step is more than a float can hold")
        kinds = {"figures": _NUMBERS, "chance": _NUMBERS, "examples": _NUMBERS}
        for name, kind in (kinds | {"protocols": str, "notes": str}).items():
            values = getattr(self, name)
            if not isinstance(values, dict):
                raise ValueError(f"{name} is {kind_of(values)}, not an object")
            for key, value in values.items():
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise ValueError(f"{key!r} of {name} is {kind_of(value)}")
                if isinstance(value, int) and not is_number(value):
                    raise ValueError(f"{key!r} of {name} is more than a float can hold")
        for key in self.figures:
            if key.count("/") < 2:
                raise ValueError(f"{key!r} is no FAMILY/DATASET/FIGURE")
        if not isinstance(self.done, list) or not all(isinstance(each, str) for each in self.done):
            raise ValueError("done is no list of texts")


def write_results(
    workdir: str | os.PathLike[str], results: Results, file_name: str = FILE_NAME
) -> Path:
    """Writes results.json, whole or not at all: one flat key a figure.

    Beside each "family/dataset/figure" stand "chance/...", "examples/..." and "protocol/..." of the
    same key; "note/family/dataset" is a text, "step" the checkpoint's.
    """
    flat: dict[str, float | str | list[str]] = dict(results.figures)
    for kind, values in results.beside_figures().items():
        flat |= {f"{kind}/{key}": value for key, value in values.items()}
    if results.step is not None:
        flat["step"] = results.step
    path = places.local(workdir) / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(flat, indent=2, ensure_ascii=False) + "\n")
    return path


def read_results(workdir: str | os.PathLike[str], file_name: str = FILE_NAME) -> Results:
    """The inverse of `write_results`; empty where no results have been written.

    Raises:
      UserError: when the file cannot be read, or is damaged.
    """
    path = places.local(workdir) / file_name
    results = Results()
    by_kind = results.beside_figures()
    for key, value in read_json(path, missing={}, advice=_ADVICE).items():
        kind, _, figure_key = key.partition("/")
        if key == "step":
            results.step = value
        elif kind in by_kind:
            by_kind[kind][figure_key] = value
        else:
            results.figures[key] = value
    try:
        results.check()
    except ValueError as error:
        raise UserError(f"{path}: {error}; {_ADVICE}") from None
    return results
