"""The table of a study: the configs to train, the seeds of each and the figures to show."""

from __future__ import annotations

import runpy
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlip_jax.cli import command_line
from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.files import read_json

FIGURES = ("*_recall@1", "*/top1", "*/accuracy")  # where the table names none
_VARIABLE = "STUDY"  # of a Python file
_KEYS = ("rows", "overrides", "seeds", "figures")
_ROW_KEYS = ("name", "config", "overrides", "seeds")


@dataclass(frozen=True)
class Planned:
    """One run that the table asks for."""

    row: str
    seed: int
    workdir: Path
    arguments: tuple[str, ...]  # of the subcommand train, the workdir last

    @property
    def key(self) -> str:
        """What the log calls it."""
        return f"{self.row}/seed{self.seed}"

    @property
    def command(self) -> str:
        """What does the same by hand."""
        return shlex.join(["mlip", "train", *self.arguments])


@dataclass(frozen=True)
class StudyTable:
    """What a file says.

    Attributes:
      runs: seed by seed: every row has its first run before any has its second.
      rows: the names, in order.
      figures: keys of results.json, or patterns of them, in order.
    """

    runs: tuple[Planned, ...]
    rows: tuple[str, ...]
    figures: tuple[str, ...]


def read_table(file: str, folder: Path) -> StudyTable:
    """Reads a table, and checks every config of it.

    Args:
      file: JSON, or Python that sets STUDY to the same: {"rows": [{"name": ..., "config": ...,
        "overrides": {KEY: VALUE}, "seeds": [...]}], "overrides": {...}, "seeds": [0, 1],
        "figures": [...]}. A row's overrides come after the common ones; its seeds replace them.
      folder: of the study; the runs' workdirs are ROW/seedN in it.

    Raises:
      UserError: for a file that is no such table, or a config that cannot be trained.
    """
    values = _values(Path(file))
    _check_keys(file, values, _KEYS, needed=("rows",))
    rows, common = values["rows"], values.get("overrides", {})
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: rows must be a list of at least one row")
    by_row: dict[str, list[Planned]] = {}
    for number, row in enumerate(rows, 1):
        where = f"{file}: row {number}"
        _check_keys(where, row, _ROW_KEYS, needed=("name", "config"))
        name = row["name"]
        if not isinstance(name, str) or not name or Path(name).name != name or name in by_row:
            raise UserError(f"{where}: name={name!r} must be a folder's name of its own")
        seeds = row.get("seeds", values.get("seeds", [0]))
        if not isinstance(seeds, list | tuple) or not seeds or len({*seeds}) < len(seeds):
            raise UserError(f"{where}: seeds={seeds!r} must be a list of different numbers")
        overrides = _flags(where, common) + _flags(where, row.get("overrides", {}))
        by_row[name] = []
        for seed in seeds:
            workdir = folder / name / f"seed{seed}"
            arguments = (
                f"--config={row['config']}",
                *overrides,
                f"--config.seed={seed}",
                f"--workdir={workdir}",
            )
            try:
                command_line.parse(["train", *arguments])
            except UserError as error:
                raise UserError(f"{where}, {name}: {error}") from error
            by_row[name].append(Planned(name, seed, workdir, arguments))
    most = max(map(len, by_row.values()))
    runs = [runs[turn] for turn in range(most) for runs in by_row.values() if turn < len(runs)]
    figures = values.get("figures", FIGURES)
    if not isinstance(figures, list | tuple) or not all(isinstance(one, str) for one in figures):
        raise UserError(f"{file}: figures={figures!r} must be a list of keys of results.json")
    return StudyTable(tuple(runs), tuple(by_row), tuple(figures))


def _values(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"--table: there is no file {path}")
    if path.suffix != ".py":
        read: Mapping[str, Any] = read_json(path)
        return read
    try:
        values = runpy.run_path(str(path)).get(_VARIABLE)
    except Exception as error:  # the file is the user's: whatever it raises is theirs to mend
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(values, Mapping):
        raise UserError(f"{path} must set {_VARIABLE} to a dict")
    return values


def _check_keys(where: str, values: Any, known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be an object")
    for key in values:
        if key not in known:
            raise UserError(
                f"{where}: unknown key {key!r}: expected {', '.join(known)}{suggestion(key, known)}"
            )
    for key in needed:
        if key not in values:
            raise UserError(f"{where} has no {key}")


def _flags(where: str, overrides: Any) -> tuple[str, ...]:
    if not isinstance(overrides, Mapping):
        raise UserError(f"{where}: overrides must be an object of config keys and values")
    flags = []
    for key, value in overrides.items():
        if isinstance(value, list | tuple):
            value = tuple(value)
        flags.append(f"--config.{key}={value}")
    return tuple(flags)
