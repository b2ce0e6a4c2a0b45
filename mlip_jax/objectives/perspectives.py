"""The objective of a run: a weighted sum of losses.

Each is between two views of the same example, or of what is predicted of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mlip_jax.core.registry import LOSSES, PREDICTIONS
from mlip_jax.core.schema import PERSPECTIVES
from mlip_jax.objectives import sharded
from mlip_jax.objectives.equality import Keys
from mlip_jax.objectives.losses import Scoring, Tokens
from mlip_jax.objectives.prior import prior_matching

# (perspective, one side, other side shifted) -> scores [shifts + 1, batch]
PairCritic = Callable[[str, Array, Array], Array]


class Term(NamedTuple):
    """One perspective: which view against which, by which loss, how strongly.

    One that predicts has neither a loss of the table nor shifts.
    """

    view: str
    loss: str
    weight: float
    shifts: int
    warmup_samples: int
    odds: float = 1.0

    @property
    def predicts(self) -> bool:
        """Whether it predicts something, and compares no views."""
        return self.view in PREDICTIONS


def terms(config: ConfigDict) -> tuple[Term, ...]:
    """The perspectives of a config whose weight is above 0."""
    in_order = [(view, config.perspectives[view]) for view in PERSPECTIVES]
    comparing = (
        Term(
            view,
            p.loss,
            float(p.weight),
            p.shifts,
            p.warmup_samples,
            float(p.odds or config.batch_size - 1),
        )
        for view, p in in_order
        if p.weight > 0
    )
    predicting = (
        Term(name, "", float(p.weight), 0, p.warmup_samples)
        for name in PREDICTIONS
        if (p := config.perspectives[name]).weight > 0
    )
    return (*comparing, *predicting)


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
    keys: Keys | None = None,
) -> Float[Array, ""]:
    """The loss of one perspective, without its weight.

    Args:
      term: the perspective.
      embeddings: by view, float32, L2-normalised unless there is a critic; token views come with
        "text_mask" and, for "spatial_tokens", "sizes" [batch, merged]. Of what is predicted the
        sum of each example's losses [batch], and under "..._count" their number [batch].
      scale: multiplies cosines.
      bias: added to scaled cosines, where one is learned.
      chunk, blocks, mesh, keys: see `Scoring`.
      critic: scores pairs of global features in place of the scaled cosine, for losses that score
        few pairs.
    """
    if term.predicts:
        return mean_of_all(embeddings[term.view], embeddings[f"{term.view}_count"])
    one, other = embeddings[term.view], embeddings[PERSPECTIVES[term.view]]
    loss = LOSSES[term.loss]
    scoring = Scoring(scale, bias, term.shifts, chunk, blocks, mesh, keys, term.odds)
    if one.ndim == 3:
        weights = _token_weights(term.view, one, embeddings)
        return loss.of_tokens(Tokens(one, other, weights, embeddings["text_mask"]), scoring)
    if critic:
        if loss.of_pairs is None:
            raise ValueError(f"the loss {term.loss!r} scores all pairs; a critic scores some")
        scores = critic(term.view, one, sharded.shifted(other, term.shifts, mesh))
        equals = sharded.equal_at_shifts(keys, term.shifts, mesh)
        return loss.of_pairs(sharded.distinct(scores, equals), term.odds)
    return loss.of_embeddings(one, other, scoring)


def mean_of_all(sums: Float[Array, " batch"], counts: Int[Array, " batch"]) -> Float[Array, ""]:
    """The mean over all losses of a batch, of each example's sum and number of them.

    So an example counts for what there is to predict of it, wherever it is computed. Without any
    it is 0.
    """
    return jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1).astype(jnp.float32)


def _token_weights(
    view: str, tokens: Float[Array, "batch tokens width"], embeddings: Mapping[str, Array]
) -> Float[Array, "batch tokens"]:
    """The share of each token in its image: merged ones count for what they stand for."""
    if view == "spatial_tokens":
        sizes = embeddings["sizes"]
        return sizes / jnp.sum(sizes, axis=-1, keepdims=True)
    return jnp.full(tokens.shape[:2], 1.0 / tokens.shape[1], jnp.float32)


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
    keys: Keys | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum, and each part's loss without its weight, by view and "prior".

    Args:
      all_terms: from `terms`.
      embeddings: see `term_loss`; with a prior weight also "image_prior" and "text_prior"
        [2, batch], the discriminators' logits of the prior and of the features.
      scales, biases: by view; a view without a bias has none.
      samples_seen: pairs seen before this batch, for terms whose weight warms up.
      prior_weight: of prior matching; the perspectives' sum is weighted by what is left of 1.
      chunk, blocks, mesh, critic, keys: see `term_loss`.
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
            keys=keys,
        )
        losses[view] = loss
        weight = jnp.float32(term.weight)
        if term.warmup_samples:
            weight = weight * jnp.minimum(samples_seen / float(term.warmup_samples), 1.0)
        total = total + weight * loss
    if prior_weight:
        losses["prior"] = prior_matching(*embeddings["image_prior"].T) + prior_matching(
            *embeddings["text_prior"].T
        )
        total = (1.0 - prior_weight) * total + prior_weight * losses["prior"]
    return total, losses
