"""The losses that a config can name: for each, all that anybody asks about it in one entry.

A loss compares paired embeddings, of whole images and texts or of their tokens. Most score all
pairs of a batch: `over_all_pairs` makes the entry from one function of the scores. The
Jensen-Shannon bound scores few: `over_shifts`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mlip_jax.objectives import blocks, contrastive, ring, sharded, tokenwise
from mlip_jax.objectives.contrastive import Scalar, jsd_of_scores, sigmoid_of_scores
from mlip_jax.objectives.equality import Keys, equal_to_all, without_equal
from mlip_jax.objectives.tokenwise import ImageTokens, Mask, TextTokens, Weights

# The most bytes of scores that the plain form may hold on a device; on 8 devices a batch of 5,792.
# Our choice: up to it the plain form takes fewer cycles by the compiler for TPU v5e, collectives
# aside (softmax on 8 devices, 2,048 pairs: 0.13 against 0.37 million; 4,096: 0.44 against 0.72),
# and little memory beside the encoders. On 8 virtual devices of two CPU cores the plain form was
# faster up to 1,024 pairs, and neither clearly so from 2,048 to 8,192.
PLAIN_BYTES = 16 * 2**20


class Scoring(NamedTuple):
    """How pairs are scored, and where."""

    scale: Float[Array, ""] | float  # multiplies cosines
    bias: Float[Array, ""] | float = 0.0  # is added, where one is learned
    shifts: int = 1  # negatives a positive, of losses that score few pairs
    chunk: int = 32  # texts a block of the token-level scores
    blocks: str = "auto"  # see `in_blocks`
    mesh: Mesh | None = None  # the devices that the rows lie on; None: one
    keys: Keys | None = None  # of the rows; equal ones are no negatives; None: all are
    odds: float = 1.0  # what the negatives weigh, of losses that score few pairs


class Tokens(NamedTuple):
    """Both sides of the token level; see `tokenwise.tokenwise_similarity`."""

    image: ImageTokens
    text: TextTokens
    weights: Weights
    mask: Mask


# Scaled scores image to text and text to image [batch, batch] -> the loss. Of whole images and
# texts both are the same array.
OfScores = Callable[[Array, Array], Scalar]
# Scores [1 + shifts, batch], the first row of the pairs themselves, and the odds -> the loss.
OfPairs = Callable[[Array, float], Scalar]


@dataclass(frozen=True)
class Loss:
    """One loss.

    Attributes:
      of_embeddings: image and text embeddings [batch, width], L2-normalised -> the mean loss.
      of_tokens: the same of the token level.
      of_pairs: of a loss that scores the pairs of each image with its own and the next `shifts`
        texts: (their scores [1 + shifts, batch], the odds) -> the mean loss. None: it scores all
        pairs.
      learns_bias: whether a bias is added to the scores, learned from the perspective's init_bias.
        A loss that scores few pairs learns one where the perspective says learn_bias.
    """

    of_embeddings: Callable[[Array, Array, Scoring], Scalar]
    of_tokens: Callable[[Tokens, Scoring], Scalar]
    of_pairs: OfPairs | None = None
    learns_bias: bool = False

    def scored_pairs(self, batch: int, shifts: int) -> int:
        """Pairs that are scored, of a batch."""
        return batch * (batch if self.of_pairs is None else shifts + 1)


def over_all_pairs(
    of_scores: OfScores, *, in_ring: Callable[..., Scalar] | None = None, learns_bias: bool = False
) -> Loss:
    """A loss on the scores of all pairs.

    Args:
      of_scores: the loss. Where a row's text is as right as the image's own, its score is
        `equality.LOWEST`.
      in_ring: the same in blocks around the devices, as `blocks.softmax`, or `blocks.sigmoid` where
        a bias is learned; None: all scores exist at once, whatever the batch.
      learns_bias: see `Loss`.
    """

    def shared(scoring: Scoring) -> tuple[Any, ...]:
        return (scoring.scale, scoring.bias) if learns_bias else (scoring.scale,)

    def scored(similarity: Array, scoring: Scoring) -> Array:
        scores = scoring.scale * similarity
        scores = scores + scoring.bias if learns_bias else scores
        if scoring.keys is None:
            return scores
        others = ~jnp.eye(len(scores), dtype=bool)
        return without_equal(scores, equal_to_all(scoring.keys, scoring.keys) & others)

    def around(batch: int, matrices: int, scoring: Scoring) -> bool:
        return bool(in_ring) and in_blocks(scoring.blocks, batch, matrices, scoring.mesh)

    def of_embeddings(image: Array, text: Array, scoring: Scoring) -> Scalar:
        if in_ring and around(len(image), 1, scoring):
            return in_ring(
                sharded.paired,
                image,
                text,
                None,
                *shared(scoring),
                mesh=scoring.mesh,
                keys=scoring.keys,
            )
        scores = scored(contrastive.similarity(image, text), scoring)
        return of_scores(scores, scores)

    def of_tokens(tokens: Tokens, scoring: Scoring) -> Scalar:
        if in_ring and around(len(tokens.image), 2, scoring):
            return in_ring(
                sharded.tokens_paired,
                (tokens.image, tokens.weights),
                tokens.text,
                tokens.mask,
                *shared(scoring),
                chunk=scoring.chunk,
                mesh=scoring.mesh,
                keys=scoring.keys,
            )
        both = tokenwise.tokenwise_similarity(*tokens, chunk=scoring.chunk)
        return of_scores(*(scored(similarity, scoring) for similarity in both))

    return Loss(of_embeddings, of_tokens, learns_bias=learns_bias)


def over_shifts(of_pairs: OfPairs) -> Loss:
    """A loss on each image's scores with its own text and with the next few of the batch.

    Args:
      of_pairs: the loss. The scores of equal rows are `equality.LOWEST`.
    """

    def weighed(scoring: Scoring) -> Callable[[Array], Scalar]:
        return lambda scores: of_pairs(scores, scoring.odds)

    def of_embeddings(image: Array, text: Array, scoring: Scoring) -> Scalar:
        return sharded.over_shifts(
            weighed(scoring),
            image,
            text,
            scoring.scale,
            scoring.bias,
            scoring.shifts,
            mesh=scoring.mesh,
            keys=scoring.keys,
        )

    def of_tokens(tokens: Tokens, scoring: Scoring) -> Scalar:
        return sharded.tokens_over_shifts(
            weighed(scoring),
            *tokens,
            scoring.scale,
            scoring.bias,
            scoring.shifts,
            mesh=scoring.mesh,
            keys=scoring.keys,
        )

    return Loss(of_embeddings, of_tokens, of_pairs)


def in_blocks(form: str, batch: int, matrices: int, mesh: Mesh | None) -> bool:
    """Whether a loss over all pairs is computed in blocks around a ring, not plainly.

    Args:
      form: "always", "never", or "auto": where the plain form's scores would take more than
        `PLAIN_BYTES` of a device.
      batch: pairs in the global batch.
      matrices: of scores that the plain form keeps; the token level has one a direction.
      mesh: the devices that the rows lie on; None: one.
    """
    if form != "auto":
        return form == "always"
    return matrices * batch // ring.shards(mesh) * batch * 4 > PLAIN_BYTES


def _sigmoid(image_to_text: Array, text_to_image: Array) -> Scalar:
    if image_to_text is text_to_image:
        return sigmoid_of_scores(image_to_text)
    return (sigmoid_of_scores(image_to_text) + sigmoid_of_scores(text_to_image)) / 2


SOFTMAX = over_all_pairs(contrastive.softmax_of_scores, in_ring=blocks.softmax)
SIGMOID = over_all_pairs(_sigmoid, in_ring=blocks.sigmoid, learns_bias=True)
JSD = over_shifts(jsd_of_scores)
