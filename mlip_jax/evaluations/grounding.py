"""Visual grounding: where in an image a model sees what an expression asks for.

The model's saliency map (Grad-CAM of the image-text score) is held against the true box in two
ways: the pointing game (Zhang et al. 2018, arXiv 1608.00507), and the intersection over union with
a box around what the map marks, as CLIP-Lite has it (arXiv 2112.07133, which does not state its
threshold).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict
from PIL import Image

from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.progress import track
from mlip_jax.data.images import orientation
from mlip_jax.data.images.preprocessing import Preprocessing, decode_as_stored, flatten
from mlip_jax.data.regions.base import Box, Regions
from mlip_jax.data.regions.opening import open_region_set
from mlip_jax.evaluations.boxes import areas, hits, iou, predicted_boxes
from mlip_jax.evaluations.family import Family
from mlip_jax.evaluations.interface import Encoder, Outcome
from mlip_jax.evaluations.sets import Sets, short_name
from mlip_jax.models import building

_SHIFTS = 8  # other queries' boxes that stand for chance


class Grounder(Encoder, Protocol):
    """A model that tells where it sees what a text says."""

    def saliency(
        self, images: UInt8[np.ndarray, "images size size 3"], texts: list[str]
    ) -> Float[np.ndarray, "images rows columns"]:
        """How much each cell of image i speaks for text i, at least 0."""


class Maps(NamedTuple):
    """The saliency maps of a dataset's queries, and the true boxes as shares of the image.

    Both are of the image as the model sees it: upright, or as it is stored.
    """

    indices: Int[np.ndarray, " queries"]  # place in the dataset
    maps: Float[np.ndarray, "queries rows columns"]
    boxes: Float[np.ndarray, "queries 4"]
    unreadable: tuple[str, ...]  # names of images


@dataclass(frozen=True)
class Example:
    """A query with what the model found; boxes are left, top, right, bottom as shares.

    Boxes and map are of the upright image.
    """

    image: bytes
    expression: str
    box: Box
    predicted: Box | None  # None: the map marks nothing
    saliency: Float[np.ndarray, "rows columns"]
    hit: bool  # in the pointing game
    iou: float


def open_set(spec: str, config: ConfigDict) -> Regions:
    """Opens a dataset of regions as a config's model takes it.

    Raises:
      UserError: for an unknown spec, or a dataset that cannot be opened.
    """
    return open_region_set(
        spec,
        cache_dir=config.data.cache_dir,
        cleaning=config.model.text.cleaning,
        max_skipped_share=config.data.max_skipped_share,
    )


def check(sets: Sets, spec: str) -> None:
    """Raises UserError for a dataset that cannot be opened."""
    open_set(spec, sets.config)


def score(sets: Sets, spec: str) -> Outcome:
    """Grounds every query of a dataset.

    Raises:
      UserError: for a dataset that cannot be opened, of which too much cannot be read, or a model
        without saliency maps.
      RunError: for NaN or infinity in a map.
    """
    regions, config = open_set(spec, sets.config), sets.config
    name = _name(spec, config.evaluation.grounding)
    threshold = config.evaluation.box_threshold
    grounded = saliency_maps(sets.model, regions, config, name=name, progress=sets.progress)
    boxes = predicted_boxes(grounded.maps, threshold, sets.model.preprocess.image_size)
    overlap, pointed = iou(boxes, grounded.boxes), hits(grounded.maps, grounded.boxes)
    figures = {"pointing_game": float(pointed.mean()), **_box_figures(overlap)}
    shifts = [_shifted(len(boxes), number) for number in range(1, _SHIFTS + 1)]
    by_boxes = [_box_figures(iou(boxes[order], grounded.boxes)) for order in shifts]
    chance = {"pointing_game": float(np.mean(areas(grounded.boxes)))} | {
        key: float(np.mean([by[key] for by in by_boxes])) for key in by_boxes[0]
    }
    elsewhere = np.mean([hits(grounded.maps[order], grounded.boxes).mean() for order in shifts])
    box = f"IoU with the box at {threshold:g} of the maximum"
    protocols = {
        "pointing_game": "Grad-CAM, pointing game, no tolerance",
        "box_accuracy@0.5": f"Grad-CAM, IoU >= 0.5, box at {threshold:g} of the maximum",
        "mean_iou": f"Grad-CAM, {box}",
    }
    note = (
        f"{regions.about} The image is squashed to the model's square. Grad-CAM of the image-text "
        "score; a hit: the centre of the strongest cell lies in the true box, and so do those of "
        "all that tie with it; chance there is the boxes' mean share of the image, and the maps of "
        f"other queries hit {elsewhere:.1%}{_same_image(regions, grounded)}. The predicted box is "
        "tight around the largest connected part of the bilinear map that reaches "
        f"{threshold:g} of its maximum; chance there is the boxes of {_SHIFTS} other queries. A "
        "map that is constant misses."
    )
    return Outcome(
        name,
        figures,
        chance,
        dict.fromkeys(figures, len(boxes)),
        protocols,
        note + _omissions(regions, grounded),
    )


def examples(
    model: Encoder, regions: Regions, config: ConfigDict, count: int, among: int = 256
) -> list[Example]:
    """Queries at even steps from the best IoU to the worst.

    Args:
      model: what grounds them.
      regions: an open dataset.
      config: the run's config.
      count: how many to give.
      among: no more than this many queries, at even steps through the dataset, are tried.

    Raises:
      UserError: as `score`.
      RunError: as `score`.
    """
    indices = _evenly(len(regions), among)
    grounded = saliency_maps(model, regions, config, indices, progress=False)
    threshold, size = config.evaluation.box_threshold, model.preprocess.image_size
    boxes = predicted_boxes(grounded.maps, threshold, size)
    overlap, pointed = iou(boxes, grounded.boxes), hits(grounded.maps, grounded.boxes)
    order = np.argsort(-overlap, kind="stable")
    chosen = []
    for row in order[_evenly(len(order), count)]:
        region = regions[int(grounded.indices[row])]
        _, of_image = decode_as_stored(region.image, at_least=size)
        of_model = orientation.UPRIGHT if model.preprocess.orientation == "exif" else of_image
        predicted = None if np.isnan(boxes[row, 0]) else tuple(boxes[row].tolist())
        chosen.append(
            Example(
                region.image,
                region.expression,
                orientation.turned_box(region.box, of_image),
                predicted and orientation.turned_box(predicted, of_model),
                orientation.turned_pixels(grounded.maps[row], of_model),
                bool(pointed[row]),
                float(overlap[row]),
            )
        )
    return chosen


def saliency_maps(
    model: Encoder,
    regions: Regions,
    config: ConfigDict,
    indices: Iterable[int] | None = None,
    *,
    name: str = "",
    progress: bool = True,
) -> Maps:
    """The maps of a dataset's queries, or of some of them; leaves unreadable images out.

    Args:
      model: what grounds them.
      regions: an open dataset.
      config: the run's config.
      indices: which queries; None: all.
      name: what errors and the bar call the dataset.
      progress: whether to draw a bar.

    Raises:
      UserError: when too many images or all of them cannot be read, or the model has no maps.
      RunError: for NaN or infinity in a map.
    """
    if not hasattr(model, "saliency"):
        raise UserError(
            "config.evaluation.grounding: this model gives no saliency maps; leave the datasets out"
        )
    grounder = cast(Grounder, model)
    queries = list(range(len(regions)) if indices is None else indices)
    image = config.model.image
    size = config.evaluation.batch_size
    reader = _Reader(regions, model.preprocess, building.seen(config) / image.image_size)
    parts, read_indices, boxes = [], [], []
    starts = range(0, len(queries), size)
    for start in track(starts, f"Grounding {name}", shown=progress):
        batch = [query for index in queries[start : start + size] if (query := reader(index))]
        if not batch:
            continue
        rows, pixels, texts, batch_boxes = zip(*batch, strict=True)
        parts.append(np.asarray(grounder.saliency(np.stack(pixels), list(texts)), np.float32))
        read_indices.extend(rows)
        boxes.extend(batch_boxes)
    if not read_indices:
        raise UserError(f"none of the {len(queries):,} queries of the dataset {name!r} can be read")
    if reader.skipped > config.data.max_skipped_share * len(queries):
        raise UserError(
            f"the images of {reader.skipped:,} of {len(queries):,} queries of the dataset {name!r} "
            f"cannot be read, the first: {next(iter(reader.unreadable))}; more than "
            f"config.data.max_skipped_share={config.data.max_skipped_share:g} allows"
        )
    maps = np.concatenate(parts)
    damaged = np.flatnonzero(~np.isfinite(maps).all(axis=(1, 2)))
    if damaged.size:
        raise RunError(
            f"{damaged.size} of {len(maps)} saliency maps hold NaN or infinity; the first is of "
            f"the query {read_indices[damaged[0]]} of the dataset {name!r}"
        )
    return Maps(np.array(read_indices), maps, np.array(boxes, np.float64), tuple(reader.unreadable))


class _Reader:
    """Reads queries; decodes an image once for those that follow one another."""

    def __init__(self, regions: Regions, preprocess: Preprocessing, seen: float) -> None:
        self._regions = regions
        self._preprocess = preprocess
        self._seen = seen
        self._latest: tuple[str, UInt8[np.ndarray, "size size 3"], int] | None = None
        self.unreadable: dict[str, None] = {}
        self.skipped = 0

    def __call__(self, index: int) -> tuple[int, np.ndarray, str, Box] | None:
        try:
            region = self._regions[index]
            if self._latest is None or self._latest[0] != region.name:
                self._latest = region.name, *squash(region.image, self._preprocess, self._seen)
        except OSError:
            self.unreadable[self._regions.name_of(index)] = None
            self.skipped += 1
            return None
        _, pixels, turn = self._latest
        return index, pixels, region.expression, orientation.turned_box(region.box, turn)


def squash(
    image: bytes, preprocess: Preprocessing, seen: float = 1.0
) -> tuple[UInt8[np.ndarray, "size size 3"], int]:
    """All of an image at the model's size, whatever its aspect: no box is cut off.

    Also the orientation by which it is turned, and its boxes must be.

    Args:
      image: an encoded one.
      preprocess: the model's.
      seen: the share of a side that the model's patches cover. The image fills that: the map is
        then one of the whole image. The rest is black.

    Raises:
      UnreadableImage: when it cannot be decoded.
    """
    size = preprocess.image_size
    picture, turn = decode_as_stored(image, at_least=size)
    if preprocess.orientation != "exif":
        turn = orientation.UPRIGHT
    picture = flatten(orientation.turned(picture, turn), preprocess.transparency)
    side = round(seen * size)
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[:side, :side] = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
    return pixels, turn


def _box_figures(overlap: Float[np.ndarray, " queries"]) -> Mapping[str, float]:
    return {"box_accuracy@0.5": float(np.mean(overlap >= 0.5)), "mean_iou": float(overlap.mean())}


def _shifted(count: int, number: int) -> Int[np.ndarray, " count"]:
    """Each query's partner in one of the shifts, which are spread over the dataset."""
    return np.roll(np.arange(count), max(1, count * number // (_SHIFTS + 1)))


def _evenly(total: int, count: int) -> Int[np.ndarray, " count"]:
    return np.linspace(0, total - 1, min(total, count)).round().astype(int)


def _same_image(regions: Regions, grounded: Maps) -> str:
    """How often the map of another region's expression on the same image hits, for the note."""
    by_image: dict[str, list[int]] = {}
    for row, index in enumerate(grounded.indices):
        by_image.setdefault(regions.name_of(int(index)), []).append(row)
    first_rows, partner_rows = [], []
    for rows in by_image.values():
        for place, row in enumerate(rows):
            following = [*rows[place + 1 :], *rows[:place]]
            different = (o for o in following if (grounded.boxes[o] != grounded.boxes[row]).any())
            partner = next(different, None)
            if partner is not None:
                first_rows.append(row)
                partner_rows.append(partner)
    if not first_rows:
        return ""
    share = hits(grounded.maps[partner_rows], grounded.boxes[first_rows]).mean()
    return f", those of other regions of the same image {share:.1%}"


def _omissions(regions: Regions, grounded: Maps) -> str:
    sentences = [f" {note.rstrip('.')}." for note in regions.notes]
    if grounded.unreadable:
        sentences.append(
            f" {len(grounded.unreadable):,} unreadable images are left out, the first: "
            f"{grounded.unreadable[0]}."
        )
    return "".join(sentences)


def _name(spec: str, specs: Iterable[Any]) -> str:
    """What figures call the dataset: a number is added where the name is that of an earlier one."""
    name = short_name(spec)
    alike = [other for other in specs if short_name(other) == name]
    number = alike.index(spec) + 1 if spec in alike else 1
    return name if number == 1 else f"{name}-{number}"


FAMILY = Family(score, check, default_set="compositions", needs_joint_space=False)
