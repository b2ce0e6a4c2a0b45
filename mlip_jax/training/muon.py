"""Muon, equal to optax.contrib's and about twice as fast on CPUs.

optax maps its products over an axis of length 1, which XLA turns into transposed copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonState

_STEPS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, by Jordan et al. 2024
_MOMENTUM = 0.95

Labels = Callable[[Any], Any]


def orthogonalize(
    matrix: Float[Array, "rows columns"], coefficients: Float[Array, "3"], eps: float
) -> Float[Array, "rows columns"]:
    """About the nearest orthogonal matrix, by the Newton-Schulz iteration (Jordan et al. 2024).

    The iteration is x <- a x + (b s + c s s) x with s = x x', of the matrix or, where that has
    fewer rows, its transpose. Singular values end between about 0.7 and 1.2.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (jnp.linalg.norm(x) + eps)
    for _ in range(_STEPS):
        square = jax.lax.dot_general(x, x, (((1,), (1,)), ((), ())))
        polynomial = coefficients[1] * square + coefficients[2] * (square @ square)
        x = coefficients[0] * x + polynomial @ x
    return x.T if tall else x


def scale_by_muon(eps: float, rms: float) -> optax.GradientTransformation:
    """Nesterov momentum made orthogonal, scaled so that its elements have this RMS.

    A parameter is a map from all axes but its last to the last one.

    Args:
      eps: added to the norm.
      rms: of an element of the update of a square matrix; arXiv 2502.16982.
    """

    def init(params: optax.Params) -> MuonState:
        return MuonState(
            jnp.zeros([], jnp.int32), optax.tree.zeros_like(params), jnp.asarray(_COEFFICIENTS)
        )

    def update(
        gradient: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        del params
        count = optax.safe_increment(state.count)
        momentum = optax.tree.update_moment(gradient, state.mu, _MOMENTUM, 1)
        ahead = optax.tree.bias_correction(momentum, _MOMENTUM, optax.safe_increment(count))
        now = optax.tree.bias_correction(gradient, _MOMENTUM, count)

        def step(ahead: Array, now: Array) -> Array:
            mean = _MOMENTUM * ahead + (1 - _MOMENTUM) * now
            matrix = mean.reshape(-1, mean.shape[-1])
            orthogonal = orthogonalize(matrix, state.ns_coeffs, eps).reshape(mean.shape)
            return math.sqrt(max(matrix.shape)) * rms * orthogonal

        updates = jax.tree.map(step, ahead, now)
        return updates, MuonState(count, momentum, state.ns_coeffs)

    return optax.GradientTransformation(init, update)


def muon(
    rate: optax.ScalarOrSchedule,
    others: optax.GradientTransformation,
    labels: Labels,
    *,
    eps: float,
    rms: float,
    weight_decay: float,
    mask: Callable[[Any], Any],
) -> optax.GradientTransformation:
    """Muon for some parameters, with decoupled weight decay, and another optimizer for the rest.

    Args:
      rate: the learning rate of the former.
      others: the latter.
      labels: of parameters, "muon" or "adam" for each.
      eps: see `scale_by_muon`.
      rms: see `scale_by_muon`.
      weight_decay: of the former.
      mask: of parameters, whether each decays.
    """
    ours = optax.chain(
        scale_by_muon(eps, rms),
        optax.identity(),  # optax's place of the scale: checkpoints keep their shape
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(rate),
    )
    return optax.partition({"muon": ours, "adam": others}, labels)
