"""The objective of a run: a weighted sum of losses, each between two views of the same example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mlip_jax.config import PERSPECTIVES
from mlip_jax.objectives import contrastive, ring, sharded, tokenwise
from mlip_jax.objectives.contrastive import jsd_of_scores
from mlip_jax.objectives.prior import prior_matching

# (perspective, one side, other side shifted) -> scores [shifts + 1, batch]
PairCritic = Callable[[str, Array, Array], Array]

# The most bytes of scores that the plain form may hold on a device; on 8 devices a batch of 5,792.
# Our choice: up to it the plain form takes fewer cycles by the compiler for TPU v5e, collectives
# aside (softmax on 8 devices, 2,048 pairs: 0.13 against 0.37 million; 4,096: 0.44 against 0.72),
# and little memory beside the encoders. On 8 virtual devices of two CPU cores the plain form was
# faster up to 1,024 pairs, and neither clearly so from 2,048 to 8,192.
PLAIN_BYTES = 16 * 2**20


class Term(NamedTuple):
    """One perspective: which view against which, by which loss, how strongly."""

    view: str
    loss: str
    weight: float
    shifts: int
    warmup_samples: int


def terms(config: ConfigDict) -> tuple[Term, ...]:
    """The perspectives of a config whose weight is above 0."""
    in_order = [(view, config.perspectives[view]) for view in PERSPECTIVES]
    return tuple(
        Term(view, p.loss, float(p.weight), p.shifts, p.warmup_samples)
        for view, p in in_order
        if p.weight > 0
    )


def in_blocks(blocks: str, batch: int, matrices: int, mesh: Mesh | None) -> bool:
    """Whether a loss over all pairs is computed in blocks around a ring, not plainly.

    Args:
      blocks: "always", "never", or "auto": where the plain form's scores would take more than
        `PLAIN_BYTES` of a device.
      batch: pairs in the global batch.
      matrices: of scores that the plain form keeps; the token level has one a direction.
      mesh: the devices that the rows lie on; None: one.
    """
    if blocks != "auto":
        return blocks == "always"
    return matrices * batch // ring.shards(mesh) * batch * 4 > PLAIN_BYTES


def term_loss(
    term: Term,
    embeddings: Mapping[str, Array],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    *,
    chunk: int = 32,
    blocks: str = "auto",
    mesh: Mesh | None = None,
    critic: PairCritic | None = None,
) -> Float[Array, ""]:
    """The loss of one perspective, without its weight.

    Args:
      term: the perspective.
      embeddings: by view, float32, L2-normalised unless there is a critic; token views come with
        "text_mask" and, for "spatial_tokens", "sizes" [batch, merged].
      scale: multiplies cosines.
      bias: added to scores by the sigmoid loss.
      chunk: see `tokenwise_similarity`.
      blocks: see `in_blocks`.
      mesh: what devices the rows of the batch lie on; None: one.
      critic: scores pairs of global features in place of the scaled cosine; jsd only.
    """
    one, other = embeddings[term.view], embeddings[PERSPECTIVES[term.view]]
    if one.ndim == 3:
        if term.view == "spatial_tokens":
            sizes = embeddings["sizes"]
            weights = sizes / jnp.sum(sizes, axis=-1, keepdims=True)
        else:
            weights = jnp.full(one.shape[:2], 1.0 / one.shape[1], jnp.float32)
        tokens = (one, other, weights, embeddings["text_mask"], scale)
        if term.loss == "jsd" or in_blocks(blocks, len(one), 2, mesh):
            return sharded.tokenwise_loss(
                term.loss, *tokens, bias, shifts=term.shifts, chunk=chunk, mesh=mesh
            )
        return tokenwise.tokenwise_loss(term.loss, *tokens, bias, chunk=chunk)
    if critic:
        scores = critic(term.view, one, sharded.shifted(other, term.shifts, mesh))
        return jsd_of_scores(scores[0], scores[1:])
    if term.loss == "jsd":
        return sharded.jsd(one, other, scale, term.shifts, mesh=mesh)
    around = in_blocks(blocks, len(one), 1, mesh)
    if term.loss == "sigmoid":
        if around:
            return sharded.sigmoid_contrastive(one, other, scale, bias, mesh=mesh)
        return contrastive.sigmoid_contrastive(one, other, scale, bias)
    if around:
        return sharded.softmax_contrastive(one, other, scale, mesh=mesh)
    return contrastive.softmax_contrastive(one, other, scale)


def total_loss(
    all_terms: tuple[Term, ...],
    embeddings: Mapping[str, Array],
    scales: Mapping[str, Array],
    biases: Mapping[str, Array],
    samples_seen: Float[Array, ""],
    *,
    prior_weight: float = 0.0,
    chunk: int = 32,
    blocks: str = "auto",
    mesh: Mesh | None = None,
    critic: PairCritic | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum, and each part's loss without its weight, by view and "prior".

    Args:
      all_terms: from `terms`.
      embeddings: see `term_loss`; with a prior weight also "image_prior" and "text_prior"
        [2, batch], the discriminators' logits of the prior and of the features.
      scales, biases: by view; a view without a bias has none.
      samples_seen: pairs seen before this batch, for terms whose weight warms up.
      prior_weight: of prior matching; the perspectives' sum is weighted by what is left of 1.
      chunk, blocks, mesh, critic: see `term_loss`.
    """
    losses = {}
    total = jnp.zeros((), jnp.float32)
    for term in all_terms:
        view = term.view
        loss = term_loss(
            term,
            embeddings,
            scales.get(view, 1.0),
            biases.get(view, 0.0),
            chunk=chunk,
            blocks=blocks,
            mesh=mesh,
            critic=critic,
        )
        losses[view] = loss
        weight = jnp.float32(term.weight)
        if term.warmup_samples:
            weight = weight * jnp.minimum(samples_seen / term.warmup_samples, 1.0)
        total = total + weight * loss
    if prior_weight:
        losses["prior"] = prior_matching(*embeddings["image_prior"].T) + prior_matching(
            *embeddings["text_prior"].T
        )
        total = (1.0 - prior_weight) * total + prior_weight * losses["prior"]
    return total, losses
