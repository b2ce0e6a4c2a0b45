"""Losses on paired embeddings: softmax (CLIP), sigmoid (SigLIP), jsd (CLIP-Lite).

Each takes L2-normalised embeddings [batch, width] whose rows are pairs, and computes in float32
whatever their type. The `*_of_scores` forms take the scaled scores themselves, so that the token
level shares them. All scores exist at once; `blocks` has the same losses a tile at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

Scalar = Float[Array, ""]
_PRECISE = jax.lax.Precision.HIGHEST


def similarity(
    image: Float[Array, "images width"], text: Float[Array, "texts width"]
) -> Float[Array, "images texts"]:
    """The dot products of all images with all texts, in float32 at its full precision."""
    image, text = image.astype(jnp.float32), text.astype(jnp.float32)
    return jnp.einsum("id,jd->ij", image, text, precision=_PRECISE)


def softmax_contrastive(
    image: Float[Array, "batch width"],
    text: Float[Array, "batch width"],
    scale: Float[Array, ""] | float,
) -> Scalar:
    """CLIP's symmetric cross-entropy (arXiv 2103.00020): mean over pairs and both directions."""
    scores = scale * similarity(image, text)
    return softmax_of_scores(scores, scores)


def softmax_of_scores(
    image_to_text: Float[Array, "images texts"], text_to_image: Float[Array, "images texts"]
) -> Scalar:
    """Cross-entropy of the rows of one score matrix and of the columns of another; their mean."""
    rows = jax.nn.logsumexp(image_to_text, axis=1) - _of_pairs(image_to_text)
    columns = jax.nn.logsumexp(text_to_image, axis=0) - _of_pairs(text_to_image)
    return (jnp.mean(rows) + jnp.mean(columns)) / 2


def _of_pairs(scores: Float[Array, "pairs pairs"]) -> Float[Array, "pairs"]:
    """The diagonal. The gradient of jnp.diagonal is a scatter: on a mesh it gathers the rows."""
    return jnp.sum(jnp.where(jnp.eye(len(scores), dtype=bool), scores, 0.0), axis=1)


def sigmoid_contrastive(
    image: Float[Array, "batch width"],
    text: Float[Array, "batch width"],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
) -> Scalar:
    """SigLIP's pairwise loss (arXiv 2303.15343): summed over all pairs, divided by the batch."""
    return sigmoid_of_scores(scale * similarity(image, text) + bias)


def sigmoid_of_scores(scores: Float[Array, "batch batch"]) -> Scalar:
    """-log sigmoid of the diagonal, -log sigmoid(-) of all others; the sum over the batch size."""
    sign = 2 * jnp.eye(scores.shape[0], dtype=scores.dtype) - 1
    return jnp.sum(jax.nn.softplus(-sign * scores)) / scores.shape[0]


def jsd(
    image: Float[Array, "batch width"],
    text: Float[Array, "batch width"],
    scale: Float[Array, ""] | float,
    shifts: int = 1,
    *,
    odds: float = 1.0,
    bias: Float[Array, ""] | float = 0.0,
) -> Scalar:
    """The Jensen-Shannon bound with `shifts` negatives a positive (CLIP-Lite, arXiv 2112.07133).

    mean softplus(-T(x_i, y_i)) + odds * mean softplus(T(x_i, y_(i+k mod n))), over k = 1..shifts.
    The paper has one shift, odds of 1 and no bias; the rest is our choice.

    Args:
      image: L2-normalised.
      text: L2-normalised.
      scale: multiplies cosines.
      shifts: negatives a positive.
      odds: what the negatives weigh, see `jsd_of_scores`.
      bias: T is scale * cosine + bias.

    Raises:
      ValueError: unless 1 <= shifts < batch; past it, a pair would be its own negative.
    """
    check_shifts(shifts, image.shape[0])
    scores = shifted_scores(image, followed(text, shifts), scale, shifts)
    return jsd_of_scores(scores + bias, odds)


def followed(rows: Shaped[Array, "batch *rest"], count: int) -> Shaped[Array, "more *rest"]:
    """The rows, and after them the first `count` of them again."""
    return jnp.concatenate([rows, rows[:count]])


def shifted_scores(
    image: Float[Array, "batch width"],
    text: Float[Array, "more width"],
    scale: Float[Array, ""] | float,
    shifts: int,
) -> Float[Array, "shifts1 batch"]:
    """Scores of image i with text i + k, for k = 0..shifts; `text` has `shifts` rows more."""
    batch = image.shape[0]
    image, text = image.astype(jnp.float32), text.astype(jnp.float32)
    pairs = [jnp.sum(image * text[shift : shift + batch], axis=-1) for shift in range(shifts + 1)]
    return scale * jnp.stack(pairs)


def check_shifts(shifts: int, batch: int) -> None:
    """Raises ValueError unless 1 <= shifts < batch."""
    if not 1 <= shifts < batch:
        raise ValueError(
            f"jsd with {shifts} shifts needs a batch of at least {max(shifts, 1) + 1}, not {batch}"
        )


def jsd_of_scores(scores: Float[Array, "shifts1 batch"], odds: float = 1.0) -> Scalar:
    """mean softplus(-positive) + odds * mean softplus(negative).

    Args:
      scores: the first row is the positives'.
      odds: how many negatives there are for a positive, as far as the loss knows. It is the
        cross-entropy of telling the two apart, whose optimum is the log of p(x, y) / (p(x) p(y))
        less the log of the odds: a skewed Jensen-Shannon bound.
    """
    negative = jnp.mean(jax.nn.softplus(scores[1:]))
    return jnp.mean(jax.nn.softplus(-scores[0])) + odds * negative
