"""Guidance of token merging: whether what it calls important is what an image shows.

Every way of `models.guidance` that the model has is scored, whether the model merges by it or not:
on drawings against the object itself, on photographs against where the model sees what the caption
says. All of this is our choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol, cast

import numpy as np
from jaxtyping import Bool, Float, UInt8
from ml_collections import ConfigDict
from scipy.stats import rankdata

from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.progress import track
from mlip_jax.data.batches.training import evaluation_batches
from mlip_jax.data.sets.opening import split_spec
from mlip_jax.data.sets.records import Source
from mlip_jax.evaluations.family import Family
from mlip_jax.evaluations.grounding import Grounder, open_set, squash
from mlip_jax.evaluations.interface import Outcome
from mlip_jax.evaluations.sets import Sets, short_name
from mlip_jax.models import building

COMPOSITIONS = "compositions"
_APART = 24  # of 255: a pixel differs by more in a channel from the background, or belongs to it
_PLAIN = 0.6  # share of the border's pixels that are of the background's colour, at least
_ON_OBJECT = 0.1  # share of a patch's pixels that are the object's, at least
_SALIENT = 0.25  # share of the patches, those of the highest saliency


class Guided(Grounder, Protocol):
    """A model that tells what each way of guidance says of the patches."""

    def guides(
        self, images: UInt8[np.ndarray, "images size size 3"]
    ) -> Mapping[str, Float[np.ndarray, "images patches"]]:
        """By name, the importance of each patch: the higher, the more; only its order counts."""


class _Batch(NamedTuple):
    images: UInt8[np.ndarray, "images size size 3"]
    captions: list[str]  # "": none


def check(sets: Sets, spec: str) -> None:
    """Raises UserError for a dataset that cannot be opened, or a model without patch tokens."""
    if not fits(sets.config):
        raise UserError(
            "config.evaluation.guidance: the image encoder "
            f"{sets.config.model.image.architecture!r} has no patch tokens to merge; leave the "
            "datasets out"
        )
    if split_spec(spec)[0] == COMPOSITIONS:
        open_set(spec, sets.config)
    else:
        sets.source(spec)


def fits(config: ConfigDict) -> bool:
    """Whether the model has patch tokens."""
    return building.image_encoder(config).patch_tokens


def score(sets: Sets, spec: str) -> Outcome | None:
    """The area under the ROC curve of every way of guidance, the mean over the images.

    Returns:
      None for "validation" where the run has none.

    Raises:
      UserError: as `check`, or where no image can be scored.
      RunError: for NaN or infinity among the scores.
    """
    config = sets.config
    if split_spec(spec)[0] == COMPOSITIONS:
        name, omitted, batches = short_name(spec), "", _canvases(sets, spec)
    else:
        source = sets.source(spec)
        if source is None:
            return None
        name, batches = sets.name(spec), _dataset(sets, spec, source)
        omitted = "".join(f" {note.rstrip('.')}." for note in source.notes)
    model = cast(Guided, sets.model)
    side = building.grid(config)
    objects: dict[str, list[float]] = {}
    salient: dict[str, list[float]] = {}
    for batch in batches:
        guides = model.guides(batch.images)
        for guide, values in guides.items():
            if not np.isfinite(values).all():
                raise RunError(f"the guidance {guide!r} holds NaN or infinity on {name!r}")
        seen = batch.images[:, : building.seen(config), : building.seen(config)]
        masks, plain = object_masks(seen)
        shares = masks.reshape(len(masks), side, masks.shape[1] // side, side, -1).mean(axis=(2, 4))
        _collect(objects, guides, shares.reshape(len(masks), -1) >= _ON_OBJECT, plain)
        photographs = ~plain & np.array([bool(caption) for caption in batch.captions])
        if photographs.any():
            maps = np.asarray(model.saliency(batch.images, batch.captions)).reshape(len(masks), -1)
            _collect(salient, guides, top(maps, _SALIENT), photographs & (np.ptp(maps, axis=1) > 0))
    return _outcome(name, objects, salient, omitted)


def object_masks(
    images: UInt8[np.ndarray, "images rows columns 3"],
) -> tuple[Bool[np.ndarray, "images rows columns"], Bool[np.ndarray, " images"]]:
    """What stands out from a background of one colour, and whether an image has such a background.

    The background is the median colour of the outermost pixels.
    """
    border = np.concatenate(
        [images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]], axis=1
    ).astype(np.int16)
    color = np.median(border, axis=1)[:, None]
    plain = (np.abs(border - color).max(axis=-1) <= _APART).mean(axis=1) >= _PLAIN
    masks = np.abs(images - color[:, None]).max(axis=-1) > _APART
    return masks, plain


def top(
    scores: Float[np.ndarray, "images patches"], share: float
) -> Bool[np.ndarray, "images patches"]:
    """The patches of the highest scores: a share of them, and more where some tie with the last."""
    count = max(1, round(share * scores.shape[1]))
    return scores >= np.sort(scores, axis=1)[:, -count][:, None]


def roc_area(
    scores: Float[np.ndarray, "images patches"], positive: Bool[np.ndarray, "images patches"]
) -> Float[np.ndarray, " images"]:
    """The chance that a positive patch scores above another; ties count half. NaN of one kind."""
    ranks = rankdata(scores, axis=1)
    count = positive.sum(axis=1)
    others = positive.shape[1] - count
    with np.errstate(invalid="ignore"):
        return (np.sum(ranks * positive, axis=1) - count * (count + 1) / 2) / (count * others)


def _collect(
    into: dict[str, list[float]],
    guides: Mapping[str, np.ndarray],
    positive: Bool[np.ndarray, "images patches"],
    counts: Bool[np.ndarray, " images"],
) -> None:
    for name, scores in guides.items():
        areas = roc_area(scores, positive)
        into.setdefault(name, []).extend(areas[counts & np.isfinite(areas)].tolist())


def _canvases(sets: Sets, spec: str) -> Iterator[_Batch]:
    """The images of the compositions, each once, in batches of one size, the last filled up."""
    regions, size = open_set(spec, sets.config), sets.config.evaluation.batch_size
    seen = building.seen(sets.config) / sets.config.model.image.image_size
    of_canvas: dict[str, int] = {}
    for index in range(len(regions)):
        of_canvas.setdefault(regions.name_of(index), index)
    indices = list(of_canvas.values())
    for start in range(0, len(indices), size):
        rows = [
            squash(regions[index].image, sets.model.preprocess, seen)[0]
            for index in indices[start : start + size]
        ]
        # What fills the last batch is black all over: without an object, it counts for nothing.
        rows += [np.zeros_like(rows[0])] * (size - len(rows))
        yield _Batch(np.stack(rows), [""] * size)


def _dataset(sets: Sets, spec: str, source: Source) -> Iterator[_Batch]:
    size = sets.config.evaluation.batch_size
    batches = evaluation_batches(source, sets.model.preprocess, size)
    total = range(-(-len(source) // size))
    shown = track(total, f"Guidance {sets.name(spec)}", shown=sets.progress)
    for _, batch in zip(shown, batches, strict=False):
        # An unreadable image is black all over.
        yield _Batch(batch.images, [next(iter(captions), "") for captions in batch.captions])


def _outcome(
    name: str, objects: Mapping[str, list[float]], salient: Mapping[str, list[float]], omitted: str
) -> Outcome:
    figures, examples, protocols = {}, {}, {}
    for areas, ending, protocol in (
        (objects, "object_auc", f"ROC area, patches with {_ON_OBJECT:.0%} of an object or more"),
        (salient, "saliency_auc", f"ROC area, the {_SALIENT:.0%} of highest caption saliency"),
    ):
        for guide, values in areas.items():
            if values:
                key = f"{guide}_{ending}"
                figures[key] = float(np.mean(values))
                examples[key], protocols[key] = len(values), protocol
    if not figures:
        raise UserError(
            f"config.evaluation.guidance: no image of {name!r} has an object on a background of "
            "one colour, nor a caption: there is nothing to hold the guidance against"
        )
    note = (
        "How well each way of guidance tells patches that matter from the others: the area under "
        "the ROC curve within an image, the mean over the images. Of images on a background of one "
        "colour (the median of the border, which most of the border has), a patch matters where "
        f"{_ON_OBJECT:.0%} of its pixels or more differ from it. Of the others, it matters where "
        f"Grad-CAM of the score with the first caption is among the {_SALIENT:.0%} highest: an "
        "agreement with the model itself, no truth. Images whose patches are all of one kind do "
        "not count. The scores are those of the first block that merges, or of the first."
    )
    return Outcome(name, figures, dict.fromkeys(figures, 0.5), examples, protocols, note + omitted)


FAMILY = Family(
    score,
    check,
    default_set="compositions",
    needs_joint_space=False,
    wants=("images", "folder:DIR"),
    fits=fits,
)
