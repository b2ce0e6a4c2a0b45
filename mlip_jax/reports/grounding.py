"""Where the model sees what it is asked for, drawn over the images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from mlip_jax.data.images.preprocessing import decode, flatten
from mlip_jax.data.regions.base import Box
from mlip_jax.evaluations.boxes import strongest
from mlip_jax.evaluations.grounding import Example
from mlip_jax.reports.style import INK, QUIET, SERIES, picture

_ACROSS = 6  # images a row
_PIXELS = 256  # of an image's longer side
_WORDS = 26  # letters a line
_LINES = 2
_TRUE, _FOUND = SERIES[2], SERIES[1]
_DASHED = (0, (3, 1.5))
_HEAT = ListedColormap([SERIES[3]])
_DEPTH = 0.8  # of the colour at the map's maximum


def draw_grounding(examples: Sequence[Example]) -> Figure:
    """Each image under its saliency map, with the true box and the predicted one.

    The pinker a place, the more it speaks for the expression, which stands above. Below stands
    whether the pointing game is a hit, and the boxes' intersection over union.

    Args:
      examples: at least one; they are drawn in their order.
    """
    across = min(_ACROSS, len(examples))
    rows = -(-len(examples) // across)
    width = 11.5 / _ACROSS
    figure = Figure(
        figsize=(max(across * width, 4.5), rows * (width + 0.45) + 0.3),
        layout=ConstrainedLayoutEngine(h_pad=0.03, hspace=0.02),
    )
    grid = figure.subplots(rows, across, squeeze=False)
    for axes in grid.flat[len(examples) :]:
        axes.set_axis_off()
    for axes, example in zip(grid.flat, examples, strict=False):
        _draw(axes, example)
    figure.legend(
        handles=[
            Line2D([], [], color=_TRUE, linewidth=2, label="true box"),
            Line2D([], [], color=_FOUND, linewidth=2, linestyle=_DASHED, label="predicted"),
            Line2D([], [], color=INK, marker="+", linestyle="", label="strongest point"),
        ],
        loc="outside upper left",
        ncols=3,
        borderaxespad=0.2,
    )
    return figure


def _draw(axes: Axes, example: Example) -> None:
    picture(axes)
    image = flatten(decode(example.image, at_least=_PIXELS, upright=True), "white")
    scale = _PIXELS / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    size = (width, height)
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    extent = (0, size[0], size[1], 0)
    axes.imshow(pixels, extent=extent)
    heat = _enlarged(example.saliency, size)
    axes.imshow(np.ones_like(heat), extent=extent, cmap=_HEAT, vmin=0, vmax=1, alpha=_DEPTH * heat)
    _outline(axes, example.box, size, _TRUE)
    if example.predicted is not None:
        _outline(axes, example.predicted, size, _FOUND, dashed=True)
        rows, columns = np.nonzero(strongest(example.saliency[None])[0])
        x = (columns + 0.5) / example.saliency.shape[1] * size[0]
        y = (rows + 0.5) / example.saliency.shape[0] * size[1]
        axes.plot(x, y, "+", color="white", markersize=9, markeredgewidth=3.2)
        axes.plot(x, y, "+", color=INK, markersize=7.5, markeredgewidth=1.4)
    lines = textwrap.wrap(example.expression, _WORDS, max_lines=_LINES, placeholder=" …")
    axes.set_title("\n".join(lines), fontsize=8.5, fontweight="normal", pad=4)
    verdict, color = ("hit", _TRUE) if example.hit else ("miss", QUIET)
    axes.set_xlabel(
        f"{verdict}, IoU {example.iou:.2f}", fontsize=8.5, color=color, loc="left", labelpad=3
    )


def _enlarged(
    saliency: Float[np.ndarray, "rows columns"], size: tuple[int, int]
) -> Float[np.ndarray, "height width"]:
    """The map by shares of its maximum, as the predicted box takes it."""
    share = saliency / max(float(saliency.max()), float(np.finfo(np.float32).tiny))
    smooth = Image.fromarray(share.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(smooth)


def _outline(axes: Axes, box: Box, size: tuple[int, int], color: str, dashed: bool = False) -> None:
    left, right = (edge * size[0] for edge in box[::2])
    top, bottom = (edge * size[1] for edge in box[1::2])
    # White below, to be seen on any picture.
    for edge, width, line in (("white", 3.2, "-"), (color, 1.7, _DASHED if dashed else "-")):
        axes.add_patch(
            Rectangle(
                (left, top),
                right - left,
                bottom - top,
                fill=False,
                clip_on=False,
                joinstyle="miter",
                edgecolor=edge,
                linewidth=width,
                linestyle=line,
            )
        )
