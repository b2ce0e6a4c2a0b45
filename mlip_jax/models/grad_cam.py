"""Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) of a score on the outputs of any layers.

The layers are named from outside and intercepted: a module knows nothing of it, and a program that
does not ask for it is the same as without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Path = tuple[str, ...]  # names of modules, from the outermost
Tokens = Callable[[Array], Array]  # a layer's output -> [batch, tokens, width]


def grad_cam(
    score: Callable[[], Float[Array, " batch"]], layers: Mapping[Path, Tokens]
) -> dict[Path, Float[Array, "batch tokens"]]:
    """How much each token of each layer adds to the score, before the ReLU (equations 1 and 2).

    sum over channels of A[token, channel] times the mean over tokens of d score / d A[., channel].
    The maps of two layers that a score reads side by side may be added: to the first order the
    score is the sum of what it reads.

    Args:
      score: applies modules; the score of an example depends on that example alone.
      layers: which outputs to take by the path of their module, and how to bring an output to
        [batch, tokens, width]; it must be linear, such as a slice or a change of shape.
    """

    def run(offsets: Mapping[Path, Array]) -> tuple[Array, dict[Path, Array]]:
        outputs = {}

        def intercept(
            call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
        ) -> Any:
            output = call(*args, **kwargs)
            path = context.module.path
            if path not in layers or context.method_name != "__call__":
                return output
            outputs[path] = output
            # Zero: what the gradient is taken with respect to.
            return output + offsets[path] if path in offsets else output

        with nn.intercept_methods(intercept):
            total = jnp.sum(score())
        return total, outputs

    _, shapes = jax.eval_shape(lambda: run({}))
    zeros = {path: jnp.zeros(shape.shape, shape.dtype) for path, shape in shapes.items()}
    gradients, outputs = jax.grad(run, has_aux=True)(zeros)
    maps = {}
    for path, tokens in layers.items():
        output, gradient = (
            tokens(array[path]).astype(jnp.float32) for array in (outputs, gradients)
        )
        maps[path] = jnp.einsum("bd,btd->bt", jnp.mean(gradient, axis=1), output)
    return maps
