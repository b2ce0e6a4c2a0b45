"""Which patches became one token, drawn over the images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from mlip_jax.reports.style import picture

_ACROSS = 2  # images a row
COARSE_GRID = 10  # patches a side: of more, an image has a row to itself
_TINT = 0.38


def is_merged(source: Int[np.ndarray, "images patches"]) -> bool:
    """Whether any two patches of any image share a token."""
    return any(len(np.unique(row)) < len(row) for row in source)


def draw_merging(
    images: UInt8[np.ndarray, "images size size 3"],
    source: Int[np.ndarray, "images patches"],
    importance: Float[np.ndarray, "images patches"] | None,
    grid: tuple[int, int],
) -> Figure:
    """Each image beside its merged tokens and, if there is one, its guidance as a heat map.

    Patches of one merged token have its mean colour under one tint, inside one outline; a patch
    that is a token by itself stays as it is.

    Args:
      images: as the model saw them.
      source: for each patch the index of its token at the end.
      importance: the guidance of each patch before merging; None when there is none.
      grid: rows and columns of patches.
    """
    panels = 2 if importance is None else 3
    across = min(1 if max(grid) > COARSE_GRID else _ACROSS, len(images))
    rows = -(-len(images) // across)
    panel_width = 11.5 / (across * (panels + 0.15))
    figure = Figure(figsize=(11.5, rows * (panel_width + 0.5)), layout="constrained")
    blocks = np.ravel(figure.subfigures(rows, across, squeeze=False, wspace=0.03))
    for number, (image, token_of_patch) in enumerate(zip(images, source, strict=True)):
        row = blocks[number].subplots(1, panels)
        tokens = len(np.unique(token_of_patch))
        row[0].set_title("image", fontweight="normal", fontsize=9)
        row[1].set_title(f"{len(token_of_patch)} → {tokens} tokens", fontsize=9)
        extent = (0, grid[1], grid[0], 0)
        row[0].imshow(image, extent=extent, interpolation="nearest")
        row[1].imshow(_tinted(image, token_of_patch, grid), extent=extent, interpolation="nearest")
        _outline(row[1], token_of_patch.reshape(grid))
        if importance is not None:
            row[2].set_title("guidance", fontweight="normal", fontsize=9)
            row[2].imshow(importance[number].reshape(grid), cmap="magma", extent=extent, vmin=0)
        for axes in row:
            picture(axes)
    return figure


def _tinted(
    image: UInt8[np.ndarray, "size size 3"],
    source: Int[np.ndarray, " patches"],
    grid: tuple[int, int],
) -> Float[np.ndarray, "size size 3"]:
    """The image with each merged token's area in its mean colour, tinted by the token."""
    pixels = image.astype(np.float64) / 255
    height, width = (pixels.shape[axis] // grid[axis] for axis in (0, 1))
    token_of_pixel = np.kron(source.reshape(grid), np.ones((height, width), np.int64))
    for order, token in enumerate(_merged(source)):
        area = token_of_pixel == token
        hue = (order * 0.61803398875) % 1  # the golden ratio keeps neighbours in order far apart
        tint = np.array(colorsys.hls_to_rgb(hue, 0.55, 0.85))
        pixels[area] = (1 - _TINT) * pixels[area].mean(axis=0) + _TINT * tint
    return pixels


def _merged(source: Int[np.ndarray, " patches"]) -> Sequence[int]:
    tokens, counts = np.unique(source, return_counts=True)
    return tokens[counts > 1].tolist()


def _outline(axes: Axes, source: Int[np.ndarray, "rows columns"]) -> None:
    """Lines between neighbours of different tokens where one of them is merged."""
    columns = source.shape[1]
    merged = np.isin(source, _merged(source))
    beside = (source[:, 1:] != source[:, :-1]) & (merged[:, 1:] | merged[:, :-1])
    below = (source[1:] != source[:-1]) & (merged[1:] | merged[:-1])
    segments = [[(x + 1, y), (x + 1, y + 1)] for y, x in np.argwhere(beside)]
    segments += [[(x, y + 1), (x + 1, y + 1)] for y, x in np.argwhere(below)]
    # Dark on white, to be seen on any picture; thinner where the grid is fine.
    width = min(1.1, 9 / columns)
    axes.add_collection(LineCollection(segments, colors="white", linewidths=2.3 * width))
    axes.add_collection(LineCollection(segments, colors="#111827", linewidths=width))
