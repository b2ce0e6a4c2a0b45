"""The linear probe by SGD: the protocol of MoCo (He et al., 2020, section 4.1) on kept features.

CLIP-Lite's probe on ImageNet follows it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from mlip_jax.core.progress import track
from mlip_jax.evaluations.classifiers import Linear

_EPOCHS, _DROPS = 100, (60, 80)
_BATCH, _LEARNING_RATE, _MOMENTUM = 256, 30.0, 0.9

_Parameters = tuple[Array, Array]  # weights and bias
_Carry = tuple[_Parameters, optax.OptState]


def sgd(
    features: Float[np.ndarray, "images width"],
    labels: Int[np.ndarray, " images"],
    classes: int,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Linear, str]:
    """Softmax regression by SGD with momentum, for 100 epochs from a learning rate of 30.

    Features are of one view of each image, where MoCo takes a new crop an epoch; they are of unit
    length, to which that learning rate fits.

    Args:
      features: L2-normalised.
      labels: their classes.
      classes: how many there are.
      seed: of the order of the images.
      progress: whether to draw a bar.

    Returns:
      The classifier, and how it was trained, as a part of a sentence.
    """
    images, width = features.shape
    size = min(_BATCH, images)
    steps = -(-images // size)
    rate = optax.piecewise_constant_schedule(
        _LEARNING_RATE, {epoch * steps: 0.1 for epoch in _DROPS}
    )
    optimizer = optax.sgd(rate, momentum=_MOMENTUM)
    inputs, targets = jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.int32)

    # All arrays are arguments: captured, the features would be constants of the program.
    @jax.jit
    def epoch(carry: _Carry, inputs: Array, targets: Array, rows: Array, counted: Array) -> _Carry:
        def step(carry: _Carry, batch: tuple[Array, Array]) -> tuple[_Carry, None]:
            parameters, state = carry
            rows, counted = batch

            def loss(parameters: _Parameters) -> Array:
                weights, bias = parameters
                logits = inputs[rows] @ weights + bias
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets[rows])
                return jnp.sum(losses * counted) / jnp.sum(counted)

            updates, state = optimizer.update(jax.grad(loss)(parameters), state)
            return (optax.apply_updates(parameters, updates), state), None

        return jax.lax.scan(step, carry, (rows, counted))[0]

    # The last batch is filled up with images that do not count, as a scan's batches are alike.
    counted = jnp.asarray((np.arange(steps * size) < images).reshape(steps, size), jnp.float32)
    parameters = (jnp.zeros((width, classes)), jnp.zeros(classes))
    carry = parameters, optimizer.init(parameters)
    rng = np.random.default_rng(seed)
    for _ in track(range(_EPOCHS), "Training", shown=progress):
        # An array of its own each time: the epochs before may still be reading theirs.
        rows = np.zeros(steps * size, np.int32)
        rows[:images] = rng.permutation(images)
        carry = epoch(carry, inputs, targets, rows.reshape(steps, size), counted)
    weights, bias = (np.asarray(part, np.float64) for part in carry[0])
    bias[np.bincount(labels, minlength=classes) == 0] = -np.inf
    return Linear(weights, bias), (
        f"{_EPOCHS} epochs of batches of {size}, learning rate {_LEARNING_RATE:g}, a tenth of it "
        f"from epochs {_DROPS[0]} and {_DROPS[1]} on, without augmentation"
    )
