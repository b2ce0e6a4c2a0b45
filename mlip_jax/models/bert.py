"""BERT as a text encoder: token ids -> one global view and one view a word."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from mlip_jax.models.dropout import Dropout
from mlip_jax.models.layers import ACTIVATIONS, TOKEN_INIT, dense, recomputed
from mlip_jax.models.text import TextViews, pool, spans

EPSILON = 1e-12
TOKEN_TYPES = 2


def _layer_norm(name: str, dtype: jnp.dtype) -> nn.LayerNorm:
    # With so small an epsilon E[x^2] - E[x]^2 would not do.
    return nn.LayerNorm(epsilon=EPSILON, dtype=dtype, use_fast_variance=False, name=name)


class BertBlock(nn.Module):
    """A post-LN transformer block: each norm is on the sum of a branch and what went into it."""

    heads: int
    mlp_ratio: float
    activation: str
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        deterministic: bool,
        mask: Bool[Array, "batch 1 1 tokens"],
    ) -> Float[Array, "batch tokens width"]:
        def linear(x: Array, features: int, name: str) -> Array:
            return dense(x, features, name, self.dtype, kernel_init=TOKEN_INIT)

        def join(x: Array, y: Array, name: str) -> Array:
            y = Dropout(self.dropout)(y, deterministic)
            return _layer_norm(name, self.dtype)(x + y)

        width = x.shape[-1]
        qkv = linear(x, 3 * width, "qkv")
        q, k, v = rearrange(qkv, "b t (three h d) -> three b t h d", three=3, h=self.heads)
        y = rearrange(jax.nn.dot_product_attention(q, k, v, mask=mask), "b t h d -> b t (h d)")
        x = join(x, linear(y, width, "out"), "norm_attention")
        y = ACTIVATIONS[self.activation](linear(x, round(width * self.mlp_ratio), "up"))
        return join(x, linear(y, width, "down"), "norm_mlp")


class BertEncoder(nn.Module):
    """BERT (arXiv 1810.04805) over token ids: post-LN, every token sees all but the padding.

    Ids are [start, words..., end, padding...], which BERT calls [CLS], [SEP] and [PAD]; all are of
    the first token type. The global view (`pooling`) is BERT's pooler, a tanh of a linear map of
    the first token ("tanh"), the first token itself ("first"), the end ("last"), the mean over the
    words and the end ("mean") or over all but the padding ("mean_all"), which sentence-transformers
    take. Dropout is on the embedding and on the output of each branch,
    not on the attention, which is our choice.
    """

    vocab_size: int
    start_id: int
    end_id: int
    context_length: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    activation: str
    pooling: str
    dropout: float
    dtype: jnp.dtype
    remat: bool = False  # blocks are computed again for their gradient

    @nn.compact
    def __call__(
        self, token_ids: Int[Array, "batch context"], deterministic: bool = True
    ) -> TextViews:
        """Encodes token ids; `deterministic` means no dropout."""
        tokens = spans(token_ids, self.start_id, self.end_id)
        mask = tokens.valid[:, None, None, :]
        embedding = self.param("embedding", TOKEN_INIT, (self.vocab_size, self.width))
        position = self.param("position", TOKEN_INIT, (self.context_length, self.width))
        token_type = self.param("token_type", TOKEN_INIT, (TOKEN_TYPES, self.width))
        x = jnp.take(embedding, token_ids, axis=0) + (
            position[: token_ids.shape[1]] + token_type[0]
        )
        x = _layer_norm("norm_embedding", self.dtype)(x.astype(self.dtype))
        x = Dropout(self.dropout)(x, deterministic)
        for layer in range(self.depth):
            x = recomputed(BertBlock, self.remat, deterministic=2)(
                heads=self.heads,
                mlp_ratio=self.mlp_ratio,
                activation=self.activation,
                dropout=self.dropout,
                dtype=self.dtype,
                name=f"block_{layer}",
            )(x, deterministic, mask)
        if self.pooling == "tanh":
            text_global = dense(x[:, 0], self.width, "pooler", self.dtype, kernel_init=TOKEN_INIT)
            text_global = jnp.tanh(text_global)
        elif self.pooling == "first":
            text_global = x[:, 0]
        else:
            text_global = pool(x, self.pooling, tokens)
        return TextViews(text_global, x, tokens.words)
