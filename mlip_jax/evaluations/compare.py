"""Several runs side by side; those that differ in their seed alone are one column."""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlip_jax.core import places, schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import write_atomically
from mlip_jax.core.history import read_history, training_seconds
from mlip_jax.core.tables import make_table
from mlip_jax.evaluations.results import Results, read_results
from mlip_jax.evaluations.sheets import Sheet, formatted, html, markdown, names
from mlip_jax.storage.saved import count_parameters, saved_steps

FILE_STEM = "comparison"
_DASH = "\u2014"  # a figure that a column does not have
_TRAINING = "Training"  # the rows above the figures
_LABEL = 18  # characters of a label in a line; longer ones go on in the next
_KEYS_SHOWN = 6


@dataclass(frozen=True)
class Run:
    """A workdir, or results of it under other prompts or rates."""

    workdir: Path
    config: ConfigDict
    results: Results
    name: str  # the user's, or the folder's
    variant: str = ""  # what an evaluation has changed, as its file's name says it


@dataclass(frozen=True)
class Column:
    """Runs of one config, whatever their seeds."""

    label: str
    runs: tuple[Run, ...]

    def values(self, key: str) -> list[float]:
        """A figure's value in each run that has it."""
        return [run.results.figures[key] for run in self.runs if key in run.results.figures]


def compare_workdirs(workdirs: Sequence[str], folder: str | Path | None = None) -> int:
    """Prints the results of several workdirs side by side and writes comparison.{json,md,html}.

    Args:
      workdirs: folders, or patterns such as "runs/mlip*"; "NAME=DIR" gives one a name.
      folder: where the files go; None: the folder that holds all the workdirs.

    Returns:
      0.

    Raises:
      UserError: for a folder that holds no run, or a pattern that no folder fits.
    """
    runs = [run for path, name in _expand(workdirs) for run in read_runs(path, name)]
    columns = group(runs)
    comparison = compare(columns)
    if folder is None:
        folder = _common_folder([run.workdir for run in runs])
    path = places.local(folder) / f"{FILE_STEM}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(_as_json(columns), indent=2, ensure_ascii=False) + "\n")
    write_atomically(path.with_suffix(".md"), markdown(comparison))
    write_atomically(path.with_suffix(".html"), html(comparison))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for drawn in tables(comparison, console.width):
        console.print(drawn)
    console.print("\n".join(comparison.notes))
    console.print(f"comparison: {places.shown(path)} (also .md, .html)")
    return 0


def group(runs: Sequence[Run]) -> list[Column]:
    """Puts runs whose configs differ in the seed alone together.

    What moves no parameter may differ as well. A run of the same seed again is a column of its own.
    """
    groups: list[list[Run]] = []
    for run in runs:
        column_runs = next((others for others in groups if _belongs(run, others)), None)
        if column_runs is None:
            groups.append([run])
        else:
            column_runs.append(run)
    labels = [_label(column_runs) for column_runs in groups]
    return [
        Column(label if labels.count(label) == 1 else f"{label} {number}", tuple(column_runs))
        for number, (label, column_runs) in enumerate(zip(labels, groups, strict=True), 1)
    ]


def compare(columns: Sequence[Column]) -> Sheet:
    """The figures of the columns, mean and standard deviation over the runs of each."""
    runs = [run for column in columns for run in column.runs]
    keys = dict.fromkeys(key for run in runs for key in run.results.figures)
    rows = [
        (_TRAINING, words, *(_over_runs(measure, column) for column in columns), "")
        for words, measure in (
            ("samples", _samples),
            ("parameters", _parameters),
            ("time", _time),
        )
    ]
    unlike = []
    for key in sorted(keys, key=lambda key: list(dict.fromkeys(map(_set, keys))).index(_set(key))):
        chances = {run.results.chance.get(key) for run in runs if key in run.results.figures}
        expected = chances.pop() if len(chances) == 1 else None
        if not _alike(runs, key):
            unlike.append(" \u00b7 ".join(names(key)))
        cells = [spread_of(key, column.values(key)) for column in columns]
        rows.append((*names(key), *cells, "" if expected is None else formatted(key, expected)))
    notes = [f"{column.label}: {_described(column, columns)}" for column in columns]
    if any(len(column.runs) > 1 for column in columns):
        notes.append("\u00b1 is the standard deviation over runs that differ in their seed alone.")
    for column in columns:
        if not any(run.results.figures for run in column.runs):
            workdir = places.shown(column.runs[0].workdir)
            notes.append(f"{column.label} has no results: run evaluate --workdir={workdir}")
    if unlike:
        notes.append(
            f"Not to be compared, for they rest on other examples or protocols: {'; '.join(unlike)}"
        )
    labels = (column.label for column in columns)
    return Sheet("Comparison", ("Dataset", "Figure", *labels, "Chance"), rows, notes)


def tables(comparison: Sheet, width: int) -> list[Table]:
    """The comparison as tables that are no wider than `width`, each with some of its columns."""
    figures_width = max(len(row[1]) for row in comparison.rows) + 6  # indent, edges, space
    needed = [
        max(min(len(heading), _LABEL), *(len(row[place]) for row in comparison.rows)) + 3
        for place, heading in enumerate(comparison.headings)
    ]
    blocks: list[list[int]] = [[]]
    for place in range(2, len(comparison.headings) - 1):
        taken = figures_width + sum(needed[column] for column in blocks[-1]) + needed[-1]
        if blocks[-1] and taken + needed[place] > width:
            blocks.append([])
        blocks[-1].append(place)
    return [_block(comparison, [*block, len(comparison.headings) - 1]) for block in blocks]


def _block(comparison: Sheet, columns: Sequence[int]) -> Table:
    drawn = make_table(("Figure", *(comparison.headings[place] for place in columns)))
    last = None
    for row in comparison.rows:
        if row[0] != last:
            if last is not None:
                drawn.add_section()
            drawn.add_row(Text(row[0], style="bold"))
            last = row[0]
        drawn.add_row(Text(f"  {row[1]}"), *(Text(row[place]) for place in columns))
    return drawn


def _expand(workdirs: Sequence[str]) -> list[tuple[Path, str]]:
    """The folders, each with what the user calls it or its own name."""
    paths: dict[Path, str] = {}
    for given in workdirs:
        pattern, name = given, ""
        if "=" in given and not places.is_url(given) and not places.matching(given):
            name, _, pattern = given.partition("=")
        fitting = places.matching(pattern)
        if not fitting:
            raise UserError(f"--compare: there is no folder {pattern}")
        for path in fitting:
            if path.is_dir():
                paths.setdefault(path, name)
    if not paths:
        raise UserError("--compare needs workdirs: --compare=runs/a,runs/b")
    return [(path, name or _own_name(path, list(paths))) for path, name in paths.items()]


def _own_name(path: Path, others: Sequence[Path]) -> str:
    """As many of a folder's last parts as tell it from the others."""
    parts = _parts(path)
    for count in range(1, len(parts)):
        name = "/".join(parts[-count:])
        if sum("/".join(_parts(other)[-count:]) == name for other in others) == 1:
            return name
    return places.shown(path)


def _parts(path: Path) -> list[str]:
    return places.shown(path.absolute()).split("/")


def read_runs(workdir: Path, name: str) -> list[Run]:
    """A workdir's own results, even if there are none, and those under other settings."""
    file = workdir / "config.json"
    if not file.is_file():
        raise UserError(f"--compare: {workdir} is no workdir of a run: it has no config.json")
    config = schema.from_file(file)
    runs = [Run(workdir, config, read_results(workdir), name)]
    for changed in sorted(workdir.glob("results,*.json")):
        variant = changed.name.removeprefix("results,").removesuffix(".json")
        runs.append(Run(workdir, config, read_results(workdir, changed.name), name, variant))
    return runs


def _belongs(run: Run, others: Sequence[Run]) -> bool:
    return (
        run.variant == others[0].variant
        and not _differences(run, others[0])
        and run.config.seed not in [other.config.seed for other in others]
    )


def _differences(one: Run, other: Run) -> list[str]:
    lines = schema.differences(one.config, other.config)
    return [line for line in lines if line.partition(":")[0] not in ("seed", "name")]


def _label(column_runs: Sequence[Run]) -> str:
    """The runs' common name, what an evaluation has changed, and how many seeds."""
    run_names = [run.name for run in column_runs]
    shared = os.path.commonprefix(run_names) if len(set(run_names)) > 1 else run_names[0]
    label = shared.rstrip("0123456789-_./ ") or run_names[0]
    if len(column_runs) == 1:
        label = run_names[0]
    variant = column_runs[0].variant
    if variant:
        # Of "evaluation.templates=plain" the last word of the key says enough.
        label += ", " + re.sub(r"(?:^|(?<=,))[\w.]*\.(\w+=)", r"\1", variant)
    return f"{label} ({len(column_runs)} seeds)" if len(column_runs) > 1 else label


def _described(column: Column, columns: Sequence[Column]) -> str:
    """Its folders, and what sets its config apart from the first column's."""
    folders = ", ".join(dict.fromkeys(places.shown(run.workdir) for run in column.runs))
    config = schema.flatten(column.runs[0].config.to_dict())
    keys = dict.fromkeys(
        line.partition(":")[0]
        for other in columns
        for line in _differences(column.runs[0], other.runs[0])
    )
    words = [config["name"], *(f"{key}={config.get(key)}" for key in list(keys)[:_KEYS_SHOWN])]
    more = ", ..." if len(keys) > _KEYS_SHOWN else ""
    return f"{folders} ({', '.join(words)}{more})"


def _set(key: str) -> str:
    return key.rpartition("/")[0]


def _over_runs(measure: Callable[[Run], float | None], column: Column) -> str:
    values = [value for run in column.runs if (value := measure(run)) is not None]
    if not values:
        return _DASH
    mean = statistics.fmean(values)
    if measure is not _time:
        return f"{mean:,.0f}"
    return f"{mean / 3600:,.1f} h" if mean >= 3600 else f"{mean / 60:,.1f} min"


def _samples(run: Run) -> float | None:
    if run.results.step is not None:
        return float(run.results.step * run.config.batch_size)
    steps = saved_steps(run.workdir)
    return float(steps[0] * run.config.batch_size) if steps else None


def _parameters(run: Run) -> float | None:
    return count_parameters(run.workdir)


def _time(run: Run) -> float | None:
    """Seconds of training, without evaluations and pauses."""
    return training_seconds(read_history(run.workdir / "metrics.jsonl"))


def _alike(runs: Sequence[Run], key: str) -> bool:
    having = [run.results for run in runs if key in run.results.figures]
    return len({(result.examples.get(key), result.protocols.get(key)) for result in having}) == 1


def spread_of(key: str, values: Sequence[float]) -> str:
    """A figure's mean and, of several values, their standard deviation; a dash of none."""
    if not values:
        return _DASH
    mean = formatted(key, statistics.fmean(values))
    if len(values) == 1:
        return mean
    spread = formatted(key, statistics.stdev(values))
    return f"{mean.removesuffix(' %')} ± {spread}"


def _as_json(columns: Sequence[Column]) -> dict[str, object]:
    """Per figure, a value for each column: its mean, its standard deviation and the runs'."""
    keys = dict.fromkeys(
        key for column in columns for run in column.runs for key in run.results.figures
    )
    return {
        "columns": [
            {
                "label": column.label,
                "workdirs": [places.shown(run.workdir) for run in column.runs],
                "changed": column.runs[0].variant,
                "seeds": [run.config.seed for run in column.runs],
            }
            for column in columns
        ],
        "figures": {
            key: [
                {
                    "mean": statistics.fmean(values) if values else None,
                    "deviation": statistics.stdev(values) if len(values) > 1 else None,
                    "values": values,
                }
                for values in (column.values(key) for column in columns)
            ]
            for key in keys
        },
    }


def _common_folder(workdirs: Sequence[Path]) -> str:
    """The innermost folder that holds all of them: a path, or a URL where all are in one bucket."""
    parents = [places.shown(workdir.absolute()).split("/")[:-1] for workdir in workdirs]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
    shared = "/".join(parts[0] for parts in same)
    if shared.endswith(":"):
        raise UserError("--compare: the workdirs share no folder: add --workdir=DIR for the result")
    return shared or "/"
