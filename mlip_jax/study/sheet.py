"""What came of a study, as Markdown: a table of means over the seeds, and one of all runs."""

from __future__ import annotations

import fnmatch
import statistics
from collections.abc import Mapping, Sequence

from mlip_jax.core.history import read_history, training_seconds
from mlip_jax.evaluations.compare import Run, read_runs, spread_of
from mlip_jax.evaluations.sheets import formatted, names
from mlip_jax.study.runs import Logged
from mlip_jax.study.table import Planned, StudyTable

_DASH = "\u2014"


def markdown(table: StudyTable, log: Mapping[str, Logged]) -> str:
    """The study's tables: complete runs count, the others are named."""
    read = {run.key: _read(run, log) for run in table.runs}
    complete = {key: run for key, run in read.items() if run is not None}
    keys = _chosen(table.figures, list(complete.values()))
    headings = [_words(key, keys) for key in keys]
    lines = [
        "# Study",
        "",
        "Means over the seeds, \u00b1 the standard deviation. Time: of the steps alone, without "
        "evaluations and pauses; CPU: of the whole processes, over all cores.",
        "",
        *_table(
            ["Row", "Seeds", "Samples", "Time", "CPU", *headings],
            [_row(name, table, complete, log, keys) for name in table.rows],
            words=1,
        ),
        "",
        "## All runs",
        "",
        *_table(
            ["Run", "Samples", "Time", "CPU", "Starts", *headings, "Command"],
            [_single(run, complete.get(run.key), log.get(run.key), keys) for run in table.runs],
            words=1,
        ),
    ]
    missing = [run.key for run in table.runs if run.key not in complete]
    if missing:
        lines += ["", f"Not complete: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _read(planned: Planned, log: Mapping[str, Logged]) -> Run | None:
    if planned.key not in log or log[planned.key].code != 0:
        return None
    return read_runs(planned.workdir, planned.key)[0]


def _chosen(patterns: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """The figures that fit the patterns, in their order."""
    known = dict.fromkeys(key for run in runs for key in run.results.figures)
    chosen = (key for pattern in patterns for key in known if fnmatch.fnmatchcase(key, pattern))
    return list(dict.fromkeys(chosen))


def _words(key: str, keys: Sequence[str]) -> str:
    """A column's heading; the dataset only where figures are of several."""
    group, figure = names(key)
    several = len({one.rpartition("/")[0] for one in keys}) > 1
    return f"{group} {figure}" if several else figure


def _row(
    name: str,
    table: StudyTable,
    complete: Mapping[str, Run],
    log: Mapping[str, Logged],
    keys: Sequence[str],
) -> list[str]:
    planned = [run for run in table.runs if run.row == name]
    runs = {run.key: complete[run.key] for run in planned if run.key in complete}
    samples = {_samples(run) for run in runs.values()}
    seconds = [value for run in runs.values() if (value := _seconds(run)) is not None]
    cpu = [log[key].cpu_seconds for key in runs]
    return [
        name,
        f"{len(runs)} of {len(planned)}",
        ", ".join(f"{count:,}" for count in sorted(samples)) or _DASH,
        _minutes(statistics.fmean(seconds) if seconds else None),
        _minutes(statistics.fmean(cpu) if cpu else None),
        *(
            spread_of(
                key,
                [run.results.figures[key] for run in runs.values() if key in run.results.figures],
            )
            for key in keys
        ),
    ]


def _single(
    planned: Planned, run: Run | None, logged: Logged | None, keys: Sequence[str]
) -> list[str]:
    figures = {} if run is None else run.results.figures
    return [
        planned.key,
        _DASH if run is None else f"{_samples(run):,}",
        _minutes(None if run is None else _seconds(run)),
        _minutes(None if logged is None else logged.cpu_seconds),
        str(0 if logged is None else logged.starts),
        *(formatted(key, figures[key]) if key in figures else _DASH for key in keys),
        f"`{planned.command}`",
    ]


def _samples(run: Run) -> int:
    return int((run.results.step or 0) * run.config.batch_size) or int(run.config.samples)


def _seconds(run: Run) -> float | None:
    return training_seconds(read_history(run.workdir / "metrics.jsonl"))


def _minutes(seconds: float | None) -> str:
    return _DASH if seconds is None else f"{seconds / 60:,.1f} min"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """A Markdown table whose first `words` columns are of words, the others of numbers."""
    rule = ["---"] * words + ["---:"] * (len(headings) - words)
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]
