"""How well a model's decoder writes captions: their loss a token, CIDEr-D and BLEU-4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.progress import track
from mlip_jax.data.batches.training import evaluation_batches
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.sets.records import Source
from mlip_jax.evaluations.caption_scores import bleu_4, cider_d
from mlip_jax.evaluations.family import Family
from mlip_jax.evaluations.interface import Outcome
from mlip_jax.evaluations.sets import Sets, captions_that_count, omissions


class Captioner(Protocol):
    """A model that writes captions."""

    @property
    def preprocess(self) -> Preprocessing:
        """Brings an image to the size and the colours that the model takes."""

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "texts context"]:
        """Token ids of texts."""

    def caption_pixels(self, images: UInt8[np.ndarray, "images size size 3"]) -> list[str]:
        """A caption of each image, written greedily."""

    def caption_losses(
        self,
        images: UInt8[np.ndarray, "images size size 3"],
        token_ids: Int[np.ndarray, "images context"],
    ) -> Float[np.ndarray, "images 2"]:
        """The sum of the losses of image i's caption i, and how many tokens they are of."""


def writes(config: ConfigDict) -> bool:
    """Whether a config's model has a decoder."""
    return bool(config.perspectives.caption.weight > 0)


def check(sets: Sets, spec: str) -> None:
    """Raises UserError for a model without a decoder, or a dataset that cannot be opened."""
    if not writes(sets.config):
        raise UserError(
            f"config.evaluation.captioning: {spec!r}: the model has no caption decoder "
            "(config.perspectives.caption.weight=0)"
        )
    sets.source(spec)


def score(sets: Sets, spec: str) -> Outcome | None:
    """Writes a caption of each image that has some, and compares.

    The loss is of each image's first caption. Chance is what the same captions reach for the next
    image; of the loss, what the next caption of the batch has.

    Returns:
      None for "validation" without captions, or a model without a decoder.

    Raises:
      UserError: for a dataset without captions, or with a single image, or as `check`.
      RunError: for NaN among the losses.
    """
    if spec == "validation" and not writes(sets.config):
        return None
    check(sets, spec)
    source = sets.source(spec)
    if source is None:
        return None
    name = sets.name(spec)
    # A model whose config has a decoder has these methods.
    found = _write(cast(Captioner, sets.model), source, name, sets)
    if len(found.written) < 2:
        if spec == "validation":
            return None
        raise UserError(
            f"config.evaluation.captioning: the dataset {spec!r} has not two images with captions"
        )
    if not np.isfinite(found.losses).all():
        raise RunError(f"the dataset {name!r}: NaN or infinity among the losses of its captions")
    rolled = [*found.references[1:], found.references[0]]
    figures, chance = (
        {
            "caption_loss": float(losses[:, 0].sum() / losses[:, 1].sum()),
            "cider_d": cider_d(found.written, references),
            "bleu_4": bleu_4(found.written, references),
        }
        for losses, references in (
            (found.losses, found.references),
            (found.losses_of_others, rolled),
        )
    )
    count = len(found.written)
    return Outcome(
        name,
        figures,
        chance,
        dict.fromkeys(figures, count),
        {
            "caption_loss": "nats a token, the first caption",
            "cider_d": "greedy, from 0 to 10",
            "bleu_4": "greedy",
        },
        f"{count:,} images. Chance is what the same captions reach for the next image. "
        f"Written of the first: {found.written[0]!r}." + omissions(source, found.unreadable),
    )


class _Found(NamedTuple):
    """What a decoder wrote of the images that have captions, and what people had."""

    written: list[str]
    references: list[tuple[str, ...]]
    losses: Float[np.ndarray, "images 2"]  # sums and counts, of the first captions
    losses_of_others: Float[np.ndarray, "images 2"]  # of the next image of the batch
    unreadable: list[str]


def _write(model: Captioner, source: Source, name: str, sets: Sets) -> _Found:
    written: list[str] = []
    references: list[tuple[str, ...]] = []
    unreadable: list[str] = []
    losses, of_others = [np.zeros((0, 2))], [np.zeros((0, 2))]
    size = sets.config.evaluation.batch_size
    batches = evaluation_batches(source, model.preprocess, size)
    count = track(range(-(-len(source) // size)), f"Captioning {name}", shown=sets.progress)
    for _, batch in zip(count, batches, strict=False):
        captions = [captions_that_count(source, each) for each in batch.captions]
        rows = [row for row in np.flatnonzero(batch.readable) if any(captions[row])]
        unreadable += batch.unreadable
        if not rows:
            continue
        images = batch.images[rows]
        texts = [next(filter(None, captions[row])) for row in rows]
        token_ids = model.tokenize(texts)
        written += model.caption_pixels(images)
        references += [captions[row] for row in rows]
        losses.append(model.caption_losses(images, token_ids))
        of_others.append(model.caption_losses(images, np.roll(token_ids, -1, axis=0)))
    return _Found(
        written, references, np.concatenate(losses), np.concatenate(of_others), unreadable
    )


FAMILY = Family(
    score,
    check,
    needs_joint_space=False,
    wants=("captions, or the model a decoder", "karpathy:DIR"),
    fits=writes,
)
