"""Calibration of zero-shot classification: whether a confidence of 80 % is right in 80 %."""

from __future__ import annotations

from functools import partial
from typing import Protocol, cast

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import logsumexp

from mlip_jax.core.errors import UserError
from mlip_jax.evaluations.family import Family
from mlip_jax.evaluations.interface import Encoder, Outcome
from mlip_jax.evaluations.scores import on_grid
from mlip_jax.evaluations.sets import Sets
from mlip_jax.evaluations.zero_shot import check, class_embeddings, has_classes

_BINS = 15  # as Guo et al.


class Scaled(Encoder, Protocol):
    """A model that says by what it multiplies cosines."""

    @property
    def logit_scale(self) -> float:
        """The factor."""


def score(sets: Sets, spec: str) -> Outcome | None:
    """The expected calibration error of zero-shot classification, and the mean confidence.

    Returns:
      None for "validation" where it has no images of one class each.

    Raises:
      UserError: for a dataset that has none, or a class folder without images.
      RunError: for NaN or infinity among the embeddings.
    """
    embedded = sets.evaluation(spec)
    if embedded is None or not has_classes(embedded) or embedded.multi_label:
        if spec == "validation":
            return None
        raise UserError(
            f"config.evaluation.calibration: the dataset {spec!r} has no images of one class each"
        )
    prompted = class_embeddings(sets, spec, embedded)
    labelled = embedded.labels >= 0
    assert embedded.embeddings is not None  # `evaluation` was asked for them
    images = on_grid(embedded.embeddings[labelled], "image embeddings")
    scale = cast(Scaled, sets.model).logit_scale
    logits = scale * (images @ on_grid(prompted.embeddings, "class embeddings").T)
    confidence = np.exp(logits.max(axis=1) - logsumexp(logits, axis=1))
    right = logits.argmax(axis=1) == embedded.labels[labelled]
    figures = {
        "expected_calibration_error": expected_error(confidence, right),
        "mean_confidence": float(confidence.mean()),
    }
    note = (
        f"A confidence is the largest softmax over {len(prompted.names):,} classes of the cosines "
        f"times the learned scale, {scale:.4g}. The error is the mean over {_BINS} bins of equal "
        "width of the gap between confidence and accuracy, each bin weighed by its images; less is "
        "better."
    )
    return Outcome(
        embedded.name,
        figures,
        {"expected_calibration_error": 0.0, "mean_confidence": 1 / len(prompted.names)},
        dict.fromkeys(figures, len(right)),
        dict.fromkeys(figures, f"zero-shot, {prompted.words}"),
        note + embedded.omissions(),
    )


def expected_error(
    confidence: Float[np.ndarray, " images"], right: Bool[np.ndarray, " images"]
) -> float:
    """The expected calibration error (Guo et al. 2017, arXiv 1706.04599).

    Args:
      confidence: of each answer, in [0, 1].
      right: whether it is right.
    """
    # A confidence of k / 15 belongs to the bin that ends with it.
    bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    gaps = np.bincount(bins, weights=confidence - right, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


FAMILY = Family(score, partial(check, family="calibration"))
