"""The text encoder: token ids -> one global view and one view a word."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlip_jax.models.dropout import Dropout
from mlip_jax.models.layers import EPSILON, TOKEN_INIT, Block, add, layer_norm, recomputed


class TextViews(NamedTuple):
    """What the text encoder says. Words are the tokens between start and end of text."""

    text_global: Float[Array, "batch width"]
    text_tokens: Float[Array, "batch context width"]
    mask: Bool[Array, "batch context"]  # True at words


class Spans(NamedTuple):
    """Which tokens are which in ids of [start, words..., end, padding...]."""

    end: Int[Array, " batch"]  # index of the first end
    valid: Bool[Array, "batch context"]  # all but padding
    spoken: Bool[Array, "batch context"]  # words and end
    words: Bool[Array, "batch context"]


def spans(token_ids: Int[Array, "batch context"], start_id: int, end_id: int) -> Spans:
    """Finds the end of each text, and by it the words and the padding."""
    end = jnp.argmax(token_ids == end_id, axis=-1)
    index = jnp.arange(token_ids.shape[1])
    valid = index <= end[:, None]
    spoken = valid & (token_ids != start_id)
    return Spans(end, valid, spoken, spoken & (index < end[:, None]))


def pool(
    x: Float[Array, "batch context width"], pooling: str, tokens: Spans
) -> Float[Array, "batch width"]:
    """The token at the end ("last"), a mean, or a fixed place.

    The mean is over words and end ("mean"), or over the start as well ("mean_all"). The first place
    is "first", the last one, padding or not, "final".
    """
    if pooling in ("first", "final"):
        return x[:, 0 if pooling == "first" else -1]
    if pooling == "last":
        return jnp.take_along_axis(x, tokens.end[:, None, None], axis=1)[:, 0]
    counted = tokens.valid if pooling == "mean_all" else tokens.spoken
    weight = counted.astype(jnp.float32)
    weight = weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1.0)
    return jnp.einsum("bt,btd->bd", weight, x.astype(jnp.float32)).astype(x.dtype)


class TextEncoder(nn.Module):
    """CLIP's pre-LN transformer over token ids, causal or bidirectional.

    Ids are [start, words..., end, padding...]. The global view is the token at `end_id`
    (pooling "last", as CLIP), the token whose id is the highest ("highest", as CLIP's first
    code), the last place ("final", as SigLIP), or the mean over the words and the end ("mean").
    `drop_path` is the same in every block.
    """

    vocab_size: int
    start_id: int
    end_id: int
    context_length: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    causal: bool
    pooling: str
    activation: str
    dropout: float
    drop_path: float
    dtype: jnp.dtype
    remat: bool = False  # blocks are computed again for their gradient
    attend_padding: bool = False  # padding is attended to like words
    norm_epsilon: float = EPSILON
    attention_form: str = "plain"  # see `models.attention`

    @nn.compact
    def __call__(
        self, token_ids: Int[Array, "batch context"], deterministic: bool = True
    ) -> TextViews:
        """Encodes token ids; `deterministic` means no dropout and no stochastic depth."""
        tokens = spans(token_ids, self.start_id, self.end_id)
        lengths = None if self.attend_padding else tokens.end + 1
        embedding = self.param("embedding", TOKEN_INIT, (self.vocab_size, self.width))
        position = self.param(
            "position", nn.initializers.normal(0.01), (self.context_length, self.width)
        )
        x = jnp.take(embedding, token_ids, axis=0).astype(self.dtype)
        x = add(x, position[: token_ids.shape[1]])
        x = Dropout(self.dropout)(x, deterministic)
        for layer in range(self.depth):
            x = recomputed(Block, self.remat, deterministic=2)(
                heads=self.heads,
                mlp_ratio=self.mlp_ratio,
                activation=self.activation,
                dropout=self.dropout,
                drop_path=self.drop_path,
                dtype=self.dtype,
                epsilon=self.norm_epsilon,
                attention_form=self.attention_form,
                causal=self.causal,
                name=f"block_{layer}",
            )(x, deterministic, lengths)
        x = layer_norm("norm", self.dtype, self.norm_epsilon)(x)
        if self.pooling == "highest":
            end = tokens._replace(end=jnp.argmax(token_ids, axis=-1))
            return TextViews(pool(x, "last", end), x, tokens.words)
        return TextViews(pool(x, self.pooling, tokens), x, tokens.words)
