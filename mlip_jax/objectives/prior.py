"""Prior matching as CLIP-Lite's public code has it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def prior_matching(
    prior: Float[Array, "batch"], features: Float[Array, "batch"]
) -> Float[Array, ""]:
    """-mean log D(prior) - mean log (1 - D(features)), from the discriminator's logits.

    In Deep InfoMax (arXiv 1808.06670) the encoder works against the discriminator. In CLIP-Lite's
    code, and here, both minimise this one loss.
    """
    return jnp.mean(jax.nn.softplus(-prior)) + jnp.mean(jax.nn.softplus(features))
