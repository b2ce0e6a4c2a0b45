"""How well a critic that scores pairs tells them from mismatches: all it can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from mlip_jax.core.errors import RunError, UserError
from mlip_jax.data.batches.training import evaluation_batches
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.sets.records import Source
from mlip_jax.data.text.equality import equal_ids
from mlip_jax.evaluations.interface import Outcome
from mlip_jax.evaluations.sets import short_name


class PairScorer(Protocol):
    """A model that scores image i with text i."""

    @property
    def preprocess(self) -> Preprocessing:
        """Brings an image to the size and the colours that the model takes."""

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "texts context"]:
        """Token ids of texts, all that the model sees of them."""

    def score_pairs(self, images: Sequence[Any], texts: Sequence[str]) -> Float[np.ndarray, "n"]:
        """Scores, the higher the likelier a pair."""


def accuracy(model: PairScorer, source: Source, batch_size: int) -> tuple[float, int]:
    """The share of images whose first caption scores above that of the next image.

    The next is the next readable one of the batch with other bytes and a caption of other token
    ids, the first after the last; ties count against the model.

    Returns:
      The share and the number of images it rests on.

    Raises:
      UserError: when no batch has two images with different captions.
      RunError: for NaN among the scores.
    """
    right = total = 0
    for batch in evaluation_batches(source, model.preprocess, batch_size):
        rows = [row for row in np.flatnonzero(batch.readable) if any(batch.captions[row])]
        texts = [batch.captions[row][0] for row in rows]
        if not texts:
            continue
        kinds = [(batch.digests[row] for row in rows), equal_ids(model.tokenize(texts)).tolist()]
        sides = list(zip(*kinds, strict=True))
        other_texts = {
            place: texts[other]
            for place in range(len(texts))
            if (other := _next_other(sides, place)) is not None
        }
        if not other_texts:
            continue
        images = [batch.images[rows[place]] for place in other_texts]
        matched = model.score_pairs(images, [texts[place] for place in other_texts])
        mismatched = model.score_pairs(images, list(other_texts.values()))
        if not (np.isfinite(matched).all() and np.isfinite(mismatched).all()):
            raise RunError(
                f"the dataset {source.name!r}: NaN or infinity among the scores of pairs"
            )
        right += int(np.sum(matched > mismatched))
        total += len(other_texts)
    if not total:
        raise UserError(f"the dataset {source.name!r} has no two images with different captions")
    return right / total, total


def score(model: PairScorer, source: Source, batch_size: int) -> Outcome:
    """`accuracy` as an evaluation's outcome."""
    share, total = accuracy(model, source, batch_size)
    return Outcome(
        short_name(source.name),
        {"accuracy": share},
        {"accuracy": 0.5},
        {"accuracy": total},
        {"accuracy": "own caption against another"},
        "an image's own caption against that of the next image; ties count against the model.",
    )


def _next_other(sides: Sequence[tuple[bytes, int]], place: int) -> int | None:
    """The next place of another image and another text."""
    image, text = sides[place]
    after = ((place + step) % len(sides) for step in range(1, len(sides)))
    return next((o for o in after if sides[o][0] != image and sides[o][1] != text), None)
