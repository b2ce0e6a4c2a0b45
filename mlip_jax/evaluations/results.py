"""Figures beside what chance would give and how many examples they rest on: kept and printed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

FILE_NAME = "results.json"


@dataclass
class Results:
    """What an evaluation found. Keys of the first three are "family/set/figure"."""

    figures: dict[str, float] = field(default_factory=dict)  # shares in [0, 1], or ranks from 1
    chance: dict[str, float] = field(default_factory=dict)  # the same figure for a random order
    examples: dict[str, int] = field(default_factory=dict)  # queries or images behind the figure
    notes: dict[str, str] = field(default_factory=dict)  # "family/set" -> protocol and omissions

    def add(
        self,
        group: str,
        figures: Mapping[str, float],
        chance: Mapping[str, float],
        examples: Mapping[str, int],
        note: str,
    ) -> None:
        """Files the figures of one "family/set"; the mappings share their keys."""
        for name, value in figures.items():
            self.figures[f"{group}/{name}"] = value
            self.chance[f"{group}/{name}"] = chance[name]
            self.examples[f"{group}/{name}"] = examples[name]
        self.notes[group] = note


def write_results(
    workdir: str | os.PathLike[str], results: Results, file_name: str = FILE_NAME
) -> Path:
    """Writes results.json, whole or not at all: one flat key a figure.

    Beside each "family/set/figure" stand "chance/family/set/figure" and
    "examples/family/set/figure"; "note/family/set" is the only kind whose value is a text.
    """
    flat: dict[str, float | str] = dict(results.figures)
    flat |= {f"chance/{key}": value for key, value in results.chance.items()}
    flat |= {f"examples/{key}": value for key, value in results.examples.items()}
    flat |= {f"note/{key}": value for key, value in results.notes.items()}
    path = Path(workdir) / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{file_name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(flat, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def read_results(workdir: str | os.PathLike[str]) -> Results:
    """The inverse of `write_results`; empty where no results have been written."""
    path = Path(workdir) / FILE_NAME
    results = Results()
    if not path.exists():
        return results
    parts = {"chance": results.chance, "examples": results.examples, "note": results.notes}
    for key, value in json.loads(path.read_text(encoding="utf-8")).items():
        kind, _, rest = key.partition("/")
        if kind in parts:
            parts[kind][rest] = value
        else:
            results.figures[key] = value
    return results


def rows(results: Results) -> list[tuple[str, str, str, str, str]]:
    """The results for people: family and set, figure, value, chance, number of examples."""
    found = []
    for key, value in results.figures.items():
        family, name, figure = key.split("/", 2)
        group = f"{family.replace('_', '-')} · {name}"
        words = figure.replace("_recall@", " R@").replace("top", "top-").replace("_", " ")
        expected, examples = results.chance.get(key), results.examples.get(key)
        found.append(
            (
                group,
                words,
                _format(figure, value),
                "" if expected is None else _format(figure, expected),
                "" if examples is None else f"{examples:,}",
            )
        )
    return found


def table(results: Results) -> Table:
    """The results as a table for the terminal, notes below it."""
    title = "Results" if results.figures else "No set to evaluate on"
    drawn = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        caption=Text("\n".join(f"{group}: {note}" for group, note in results.notes.items())),
        caption_justify="left",
    )
    drawn.add_column("Set")
    drawn.add_column("Figure", no_wrap=True)
    for heading in ("Value", "Chance", "Examples"):
        drawn.add_column(heading, justify="right")
    last = None
    for group, *cells in rows(results):
        if last is not None and group != last:
            drawn.add_section()
        drawn.add_row(Text("" if group == last else group), *cells)
        last = group
    return drawn


def _format(figure: str, value: float) -> str:
    return f"{value:,.1f}" if figure.endswith("rank") else f"{100 * value:.2f} %"
