"""Curves of a run over samples seen, a panel a question; a panel without data is not drawn."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from mlip_jax.core.history import History, Line, keys, series
from mlip_jax.reports.style import INK, PERSPECTIVES, QUIET, SERIES

COLUMNS = 3
_LABEL_HEIGHT = 0.085  # of a panel: names at the ends of lines keep that distance


def draw_curves(history: History) -> Figure | None:
    """Every curve that the history has data for, or None when it has none."""
    training, evaluation = history.training, history.evaluation
    panels: list[tuple[str, Callable[[Axes], None]]] = []
    if training:
        panels.append(("Loss, total", functools.partial(_lines, lines=training, names=["loss"])))
    for title, prefix in (("Loss of each perspective", "loss/"), ("Logit scales", "scale/")):
        metric_keys = keys(training, prefix)
        if metric_keys:
            panels.append((title, functools.partial(_lines, lines=training, names=metric_keys)))
    for title, metric_keys in _share_panels(evaluation):
        panels.append((title, functools.partial(_shares, lines=evaluation, names=metric_keys)))
    for key, title in (
        ("learning_rate", "Learning rate"),
        ("gradient_norm", "Gradient norm"),
        ("images_per_second", "Images a second"),
    ):
        if series(training, key)[1].size:
            panels.append((title, functools.partial(_lines, lines=training, names=[key])))
    if series(training, "data_wait")[1].size:
        draw_wait = functools.partial(_wait, lines=training)
        panels.append(("Time spent waiting for data", draw_wait))
    if not panels:
        return None

    rows = -(-len(panels) // COLUMNS)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.03, hspace=0.04)
    figure = Figure(figsize=(11.5, 2.9 * rows), layout=layout)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, (title, draw) in zip(grid, panels, strict=False):
        axes.set_title(title)
        draw(axes)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlim(left=0)
        axes.set_xlabel("samples seen")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def _share_panels(evaluation: list[Line]) -> list[tuple[str, list[str]]]:
    """Title and keys of each panel of shares: of retrieval, one a dataset and direction."""
    panels: dict[str, list[str]] = {}
    for family in ("retrieval/", "zero_shot/"):
        for key in keys(evaluation, family):
            _, name, figure = key.split("/", 2)
            direction, is_recall, _ = figure.partition("_recall@")
            if figure.endswith("rank"):
                continue
            words = direction.replace("_", " ").capitalize() if is_recall else "Zero-shot"
            panels.setdefault(f"{words}, {name}", []).append(key)
    return list(panels.items())


def _lines(axes: Axes, lines: list[Line], names: list[str]) -> None:
    for position, name in enumerate(names):
        samples, values = series(lines, name)
        label = name.split("/", 1)[-1]
        color = PERSPECTIVES.get(label, SERIES[position % len(SERIES)])
        smooth = _moving_average(values)
        if smooth is not None:
            axes.plot(samples, values, color=color, alpha=0.25, linewidth=1)
        axes.plot(
            samples,
            values if smooth is None else smooth,
            color=color,
            label=label.replace("_", " "),
            marker="o" if len(values) == 1 else "",
        )
    if len(names) > 1:
        axes.legend()
    if names == ["learning_rate"]:
        axes.yaxis.set_major_formatter("{x:.2g}")


def _shares(axes: Axes, lines: list[Line], names: list[str]) -> None:
    """Each line with its name at its end, apart from the others' names."""
    ends: list[tuple[float, float, str, str]] = []
    for position, name in enumerate(names):
        samples, values = series(lines, name)
        figure = name.split("/")[-1]
        _, is_recall, k = figure.partition("_recall@")
        label = f"R@{k}" if is_recall else figure.replace("top", "top-").replace("_", " ")
        color = SERIES[position % len(SERIES)]
        axes.plot(samples, values, color=color, marker="o", markersize=3, label=label)
        ends.append((float(values[-1]), float(samples[-1]), label, color))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    highest = max(axes.dataLim.y1, 0.01)
    ticks = MaxNLocator(5).tick_values(0, highest)
    axes.set_yticks([tick for tick in ticks if tick <= min(1, 1.1 * highest)])
    axes.set_ylim(0, 1.08 * highest)
    above = -math.inf
    for value, last, label, color in sorted(ends):
        above = max(value, above + _LABEL_HEIGHT * highest)
        axes.annotate(
            label,
            (last, above),
            xytext=(5, 0),
            textcoords="offset points",
            color=color,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


def _wait(axes: Axes, lines: list[Line]) -> None:
    samples, values = series(lines, "data_wait")
    axes.fill_between(samples, values, color=QUIET, alpha=0.25, linewidth=0)
    axes.plot(samples, values, color=INK, linewidth=1.2)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_ylim(0, max(0.1, 1.15 * float(values.max())))


def _moving_average(values: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"] | None:
    """A centred mean over a fortieth of the run; None for a curve too short to need one."""
    if len(values) < 80:
        return None
    width = len(values) // 40 * 2 + 1
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")
