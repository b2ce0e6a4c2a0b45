"""Several runs side by side; those that differ in their seed alone are one column."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax.core import places, schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import write_atomically
from mlip_jax.evaluations.results import Results, read_results
from mlip_jax.evaluations.sheets import Sheet, formatted, html, markdown, names, terminal

FILE_STEM = "comparison"
_KEYS_SHOWN = 3


@dataclass(frozen=True)
class Run:
    """A workdir with results."""

    workdir: Path
    config: ConfigDict
    results: Results


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
      workdirs: folders, or patterns such as "runs/mlip*".
      folder: where the files go; None: the folder that holds all the workdirs.

    Returns:
      0.

    Raises:
      UserError: for a folder without results, or a pattern that no folder fits.
    """
    runs = [_read(path) for path in _expand(workdirs)]
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
    console.print(terminal(comparison))
    console.print(f"comparison: {places.shown(path)} (also .md, .html)")
    return 0


def group(runs: Sequence[Run]) -> list[Column]:
    """Puts runs whose configs differ in the seed alone, or in what moves no parameter, together."""
    groups: list[list[Run]] = []
    for run in runs:
        column_runs = next((other for other in groups if not _differences(other[0], run)), None)
        if column_runs is None:
            groups.append([run])
        else:
            column_runs.append(run)
    return [Column(_label(column_runs, groups), tuple(column_runs)) for column_runs in groups]


def compare(columns: Sequence[Column]) -> Sheet:
    """The figures of the columns, mean and standard deviation over the runs of each."""
    runs = [run for column in columns for run in column.runs]
    keys = dict.fromkeys(key for run in runs for key in run.results.figures)
    rows, unlike = [], []
    for key in keys:
        chances = {run.results.chance.get(key) for run in runs if key in run.results.figures}
        expected = chances.pop() if len(chances) == 1 else None
        if not _alike(runs, key):
            unlike.append(" · ".join(names(key)))
        cells = [_cell(key, column.values(key)) for column in columns]
        rows.append((*names(key), *cells, "" if expected is None else formatted(key, expected)))
    notes = [
        f"{column.label}: {', '.join(places.shown(run.workdir) for run in column.runs)}"
        for column in columns
    ]
    notes.append("± is the standard deviation over runs that differ in their seed alone.")
    if unlike:
        notes.append(
            f"Not to be compared, for they rest on other examples or protocols: {'; '.join(unlike)}"
        )
    labels = (column.label for column in columns)
    return Sheet("Comparison", ("Dataset", "Figure", *labels, "Chance"), rows, notes)


def _expand(workdirs: Sequence[str]) -> list[Path]:
    paths: dict[Path, None] = {}
    for pattern in workdirs:
        fitting = places.matching(pattern)
        if not fitting:
            raise UserError(f"--compare: there is no folder {pattern}")
        paths |= dict.fromkeys(fitting)
    if len(paths) < 2:
        raise UserError("--compare needs at least two workdirs: --compare=runs/a,runs/b")
    return list(paths)


def _read(workdir: Path) -> Run:
    file = workdir / "config.json"
    if not file.is_file():
        raise UserError(f"--compare: {workdir} is no workdir of a run: it has no config.json")
    results = read_results(workdir)
    if not results.figures:
        raise UserError(
            f"--compare: {workdir} has no results: run evaluate --workdir={workdir} first"
        )
    return Run(workdir, schema.from_file(file), results)


def _differences(one: Run, other: Run) -> list[str]:
    lines = schema.differences(one.config, other.config)
    return [line for line in lines if line.partition(":")[0] not in ("seed", "name")]


def _label(column_runs: list[Run], groups: list[list[Run]]) -> str:
    """The config's name, what sets it apart from others of that name, and how many seeds."""
    config = column_runs[0].config
    flat = schema.flatten(config.to_dict())
    namesakes = [other[0] for other in groups if other[0].config.name == config.name]
    keys = dict.fromkeys(
        line.partition(":")[0]
        for other in namesakes
        for line in _differences(column_runs[0], other)
    )
    parts = [
        config.name,
        *(f"{key.split('.')[-1]}={flat[key]}" for key in list(keys)[:_KEYS_SHOWN]),
    ]
    seeds = f" ({len(column_runs)} seeds)" if len(column_runs) > 1 else ""
    return ", ".join(parts) + seeds


def _alike(runs: Sequence[Run], key: str) -> bool:
    having = [run.results for run in runs if key in run.results.figures]
    return len({(result.examples.get(key), result.protocols.get(key)) for result in having}) == 1


def _cell(key: str, values: Sequence[float]) -> str:
    if not values:
        return ""
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
