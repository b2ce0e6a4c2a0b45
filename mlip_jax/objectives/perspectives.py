"""The objective of a run: a weighted sum of losses, each between an image view and a text view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mlip_jax.config import IMAGE_VIEWS
from mlip_jax.objectives.contrastive import jsd, sigmoid_contrastive, softmax_contrastive
from mlip_jax.objectives.tokenwise import tokenwise_loss


class Term(NamedTuple):
    """One perspective: which image view, by which loss, how strongly."""

    view: str
    loss: str
    weight: float
    shifts: int
    warmup_samples: int


def terms(config: ConfigDict) -> tuple[Term, ...]:
    """The perspectives of a config whose weight is above 0."""
    in_order = [(view, config.perspectives[view]) for view in IMAGE_VIEWS]
    return tuple(
        Term(view, p.loss, float(p.weight), p.shifts, p.warmup_samples)
        for view, p in in_order
        if p.weight > 0
    )


def term_loss(
    term: Term,
    embeddings: Mapping[str, Array],
    scale: Float[Array, ""],
    bias: Float[Array, ""] | float,
    chunk: int,
) -> Float[Array, ""]:
    """The loss of one perspective, without its weight.

    Args:
      term: the perspective.
      embeddings: by view, L2-normalised float32; token views come with "text_mask" and, for
        "spatial_tokens", "sizes" [batch, merged].
      scale: multiplies cosines.
      bias: added to scores by the sigmoid loss.
      chunk: see `tokenwise_similarity`.
    """
    image = embeddings[term.view]
    if image.ndim == 3:
        if term.view == "spatial_tokens":
            sizes = embeddings["sizes"]
            weights = sizes / jnp.sum(sizes, axis=-1, keepdims=True)
        else:
            weights = jnp.full(image.shape[:2], 1.0 / image.shape[1], jnp.float32)
        return tokenwise_loss(
            term.loss,
            image,
            embeddings["text_tokens"],
            weights,
            embeddings["text_mask"],
            scale,
            bias,
            shifts=term.shifts,
            chunk=chunk,
        )
    text = embeddings["text_global"]
    if term.loss == "softmax":
        return softmax_contrastive(image, text, scale)
    if term.loss == "sigmoid":
        return sigmoid_contrastive(image, text, scale, bias)
    return jsd(image, text, scale, term.shifts)


def total_loss(
    all_terms: tuple[Term, ...],
    embeddings: Mapping[str, Array],
    scales: Mapping[str, Array],
    biases: Mapping[str, Array],
    samples_seen: Float[Array, ""],
    chunk: int,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum, and each perspective's loss without its weight, by view.

    Args:
      all_terms: from `terms`.
      embeddings: see `term_loss`.
      scales, biases: by view; a view without a bias has none.
      samples_seen: pairs seen before this batch, for terms whose weight warms up.
      chunk: see `tokenwise_similarity`.
    """
    losses = {}
    total = jnp.zeros((), jnp.float32)
    for term in all_terms:
        loss = term_loss(term, embeddings, scales[term.view], biases.get(term.view, 0.0), chunk)
        losses[term.view] = loss
        weight = jnp.float32(term.weight)
        if term.warmup_samples:
            weight = weight * jnp.minimum(samples_seen / term.warmup_samples, 1.0)
        total = total + weight * loss
    return total, losses
