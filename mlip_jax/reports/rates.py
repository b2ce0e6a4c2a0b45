"""What a model reaches, and how fast it is, at several rates of token merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_json
from mlip_jax.evaluations.merging_rates import FILE_NAME
from mlip_jax.evaluations.sheets import names
from mlip_jax.reports.style import INK, SERIES

_HEADLINES = ("_recall@1", "/top1", "/accuracy")


def read_rates(workdir: Path) -> list[Mapping[str, Any]]:
    """The rows that `evaluate --rates` has kept, from the lowest rate; none where it was not run.

    Raises:
      UserError: when the file is damaged.
    """
    path = workdir / f"{FILE_NAME}.json"
    rows = read_json(path, list, missing=[], advice="remove it, or run evaluate --rates again")
    wanted = {"rate", "images_per_second", "results"}
    if not all(isinstance(row, dict) and wanted <= row.keys() for row in rows):
        raise UserError(f"{path} is damaged: remove it, or run evaluate --rates again")
    return sorted(rows, key=lambda row: float(row["rate"]))


def draw_rates(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The first figures of each dataset over the rate, and the speed; None for fewer than two."""
    if len(rows) < 2:
        return None
    rates = [row["rate"] for row in rows]
    keys = [key for key in rows[0]["results"] if key.endswith(_HEADLINES)]
    figure = Figure(figsize=(11.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set_title("Results over the merging rate")
    for position, key in enumerate(keys):
        values = [row["results"].get(key, float("nan")) for row in rows]
        label = " ".join(names(key))
        left.plot(rates, values, color=SERIES[position % len(SERIES)], marker="o", label=label)
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    if keys:
        left.set_ylim(bottom=0)
        left.legend(loc="lower left")
    right.set_title("Images a second over the merging rate")
    right.plot(rates, [row["images_per_second"] for row in rows], color=INK, marker="o")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xticks(rates)
        axes.set_xlabel("share of the patch tokens gone at the end")
        axes.xaxis.set_major_formatter("{x:g}")
    return figure
