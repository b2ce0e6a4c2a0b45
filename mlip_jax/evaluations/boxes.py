"""Saliency maps against boxes. Boxes are left, top, right, bottom as shares of the image."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from scipy import ndimage

# Of values nearer to the maximum than rounding moves them, none is the maximum.
_TIE = 1e-5


def hits(
    maps: Float[np.ndarray, "queries rows columns"], boxes: Float[np.ndarray, "queries 4"]
) -> Bool[np.ndarray, " queries"]:
    """Whether the centre of the strongest cell lies in the box, and those of all that tie with it.

    The maximum of a bilinear map is at such a centre. A constant map is a miss.
    """
    _, rows, columns = maps.shape
    x, y = (np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows
    left, top, right, bottom = boxes.T[:, :, None]
    inside = ((top <= y) & (y < bottom))[:, :, None] & ((left <= x) & (x < right))[:, None, :]
    return ~(strongest(maps) & ~inside).any(axis=(1, 2)) & ~_constant(maps)


def strongest(
    maps: Float[np.ndarray, "queries rows columns"],
) -> Bool[np.ndarray, "queries rows columns"]:
    """The strongest cell of each map, and all that tie with it."""
    return maps >= maps.max(axis=(1, 2), keepdims=True) * (1 - _TIE)


def predicted_boxes(
    maps: Float[np.ndarray, "queries rows columns"], threshold: float, size: int
) -> Float[np.ndarray, "queries 4"]:
    """The box around the largest connected part of what reaches a share of the maximum.

    Args:
      maps: they are enlarged bilinearly.
      threshold: of each map's maximum.
      size: pixels a side of the enlarged map.

    Returns:
      Left, top, right, bottom as shares; NaN where the map is constant.
    """
    boxes = np.full((len(maps), 4), np.nan)
    for row in np.flatnonzero(~_constant(maps)):
        picture = Image.fromarray(maps[row] / maps[row].max())
        enlarged = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
        # Enlarging lowers the maximum of a grid that is finer than the pixels.
        parts, _ = ndimage.label(enlarged >= (threshold - _TIE) * enlarged.max())
        largest = 1 + np.argmax(np.bincount(parts.ravel())[1:])
        rows, columns = ndimage.find_objects(parts)[largest - 1]
        boxes[row] = columns.start, rows.start, columns.stop, rows.stop
    return boxes / size


def iou(
    one: Float[np.ndarray, "queries 4"], other: Float[np.ndarray, "queries 4"]
) -> Float[np.ndarray, " queries"]:
    """Intersection over union of boxes; 0 for NaN."""
    corner = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    common = np.prod(np.maximum(corner, 0), axis=1)
    return np.nan_to_num(common / (areas(one) + areas(other) - common))


def areas(boxes: Float[np.ndarray, "queries 4"]) -> Float[np.ndarray, " queries"]:
    """Shares of the image."""
    return np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)


def _constant(maps: Float[np.ndarray, "queries rows columns"]) -> Bool[np.ndarray, " queries"]:
    highest, lowest = maps.max(axis=(1, 2)), maps.min(axis=(1, 2))
    return lowest >= highest * (1 - _TIE)
