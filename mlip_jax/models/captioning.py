"""A decoder that writes an image's caption, a token after the other, from the image's tokens."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from mlip_jax.core.errors import choose
from mlip_jax.core.schema import ACTIVATIONS
from mlip_jax.models.attention import attend_with
from mlip_jax.models.dropout import Dropout, row_keys
from mlip_jax.models.encoders import check_sizes
from mlip_jax.models.layers import MLP, TOKEN_INIT, Dense, add, half_logits, layer_norm, recomputed
from mlip_jax.models.predictions import Prediction
from mlip_jax.models.text import TextViews, spans
from mlip_jax.models.vit import ImageViews

HeadRows = Float[Array, "batch heads tokens head"]


class Memory(NamedTuple):
    """What a block looks up in an image: keys and values of its tokens, of every head."""

    keys: HeadRows
    values: HeadRows


class Written(NamedTuple):
    """Keys and values that a block has of the places of a caption; zeros where nothing is yet."""

    keys: HeadRows
    values: HeadRows


class CrossAttention(nn.Module):
    """Multi-head attention of some rows to the tokens of an image."""

    width: int
    heads: int
    dtype: jnp.dtype

    def setup(self) -> None:
        self.query_projection = Dense(self.width, self.dtype)
        self.key_value_projection = Dense(2 * self.width, self.dtype)
        self.out = Dense(self.width, self.dtype)

    def remember(self, tokens: Float[Array, "batch tokens image_width"]) -> Memory:
        """Keys and values of the tokens."""
        keys_values = self.key_value_projection(tokens)
        return Memory(*rearrange(keys_values, "b t (two h d) -> two b h t d", two=2, h=self.heads))

    def __call__(
        self,
        x: Float[Array, "batch places width"],
        memory: Memory,
        size: Float[Array, "batch tokens"] | None,
    ) -> Float[Array, "batch places width"]:
        """Attends; the log of `size`, patches behind each token, is added to the logits."""
        q = rearrange(self.query_projection(x), "b t (h d) -> b h t d", h=self.heads)
        out = attend_with(q, memory.keys, memory.values, size=size)
        return self.out(rearrange(out, "b h t d -> b t (h d)"))


class AttentionalPooler(nn.Module):
    """Some learned queries that attend to the tokens of an image (CoCa, arXiv 2205.01917).

    A norm before, of queries and tokens, and one after, as open_clip has it.
    """

    queries: int
    width: int
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens image_width"],
        size: Float[Array, "batch tokens"],
    ) -> Float[Array, "batch queries width"]:
        probes = self.param("probes", TOKEN_INIT, (self.queries, self.width))
        probes = layer_norm("norm_probes", self.dtype)(jnp.asarray(probes).astype(self.dtype))
        x = jnp.broadcast_to(probes, (len(tokens), *probes.shape))
        attention = CrossAttention(self.width, self.heads, self.dtype, name="attention")
        return layer_norm("norm", self.dtype)(attention(x, attention.remember(tokens), size))


class DecoderBlock(nn.Module):
    """Pre-LN: attention to the caption so far, attention to the image, MLP."""

    width: int
    heads: int
    mlp_ratio: float
    activation: str
    dropout: float
    dtype: jnp.dtype

    def setup(self) -> None:
        self.norm_attention = layer_norm(None, self.dtype)
        self.qkv = Dense(3 * self.width, self.dtype)
        self.out = Dense(self.width, self.dtype)
        self.norm_image = layer_norm(None, self.dtype)
        self.image = CrossAttention(self.width, self.heads, self.dtype)
        self.norm_mlp = layer_norm(None, self.dtype)
        self.mlp = MLP(self.mlp_ratio, self.activation, self.dropout, self.dtype)
        self.drop = Dropout(self.dropout)

    def __call__(
        self,
        x: Float[Array, "batch places width"],
        tokens: Float[Array, "batch tokens image_width"],
        size: Float[Array, "batch tokens"] | None,
        mask: Bool[Array, "#batch 1 places places"],
        deterministic: bool,
    ) -> Float[Array, "batch places width"]:
        """Goes through the block.

        Args:
          x: the caption's places.
          tokens: of the image.
          size: patches behind each; None: as many behind every one.
          mask: True where a place (third axis) may look at another.
          deterministic: no dropout.
        """
        q, k, v = self._heads(x)
        x = x + self.drop(self._out(attend_with(q, k, v, mask=mask)), deterministic)
        return self._rest(x, self.image.remember(tokens), size, deterministic)

    def write(
        self,
        x: Float[Array, "batch 1 width"],
        place: Int[Array, ""],
        written: Written,
        memory: Memory,
        size: Float[Array, "batch tokens"] | None,
    ) -> tuple[Float[Array, "batch 1 width"], Written]:
        """The block at one place of a caption, of which the places before are written."""
        q, k, v = self._heads(x)
        keys = jax.lax.dynamic_update_slice_in_dim(written.keys, k, place, axis=2)
        values = jax.lax.dynamic_update_slice_in_dim(written.values, v, place, axis=2)
        mask = (jnp.arange(keys.shape[2]) <= place)[None, None, None]
        x = x + self._out(attend_with(q, keys, values, mask=mask))
        return self._rest(x, memory, size, True), Written(keys, values)

    def remember(self, tokens: Float[Array, "batch tokens image_width"]) -> Memory:
        """What `write` takes of the image."""
        return self.image.remember(tokens)

    def _heads(self, x: Array) -> tuple[HeadRows, HeadRows, HeadRows]:
        qkv = self.qkv(self.norm_attention(x))
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.heads)
        return q, k, v

    def _out(self, heads: HeadRows) -> Array:
        return self.out(rearrange(heads, "b h t d -> b t (h d)"))

    def _rest(self, x: Array, memory: Memory, size: Array | None, deterministic: bool) -> Array:
        x = x + self.drop(self.image(self.norm_image(x), memory, size), deterministic)
        return x + self.mlp(self.norm_mlp(x), deterministic)


class CaptionDecoder(nn.Module):
    """A causal transformer over a caption's tokens whose blocks also attend to the image's tokens.

    Merged tokens count for the patches behind them: the log of their number is added to the logits.
    The input is the caption shifted right by one, so that each place predicts the next token, the
    end of text included; padding is neither predicted nor looked at. A tokenizer without a start of
    text has its end of text there. The last product is with the table of the tokens' embeddings
    (arXiv 1608.05859), a choice of ours; CapPa, CoCa and SigLIP 2 have one of its own.

    With `parallel` above 0 that share of the examples, drawn anew at each step, is predicted as in
    CapPa (arXiv 2306.07915, section 3): from places that are all one mask token, and see each
    other. In evaluation there is none. With `queries` above 0 an `AttentionalPooler` stands between
    the image's tokens and the blocks.
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
    dropout: float
    queries: int
    parallel: float
    dtype: jnp.dtype
    remat: bool = False

    def setup(self) -> None:
        self.embedding = self.param("embedding", TOKEN_INIT, (self.vocab_size, self.width))
        self.position = self.param(
            "position", nn.initializers.normal(0.01), (self.context_length, self.width)
        )
        if self.parallel:
            self.mask_token = self.param("mask_token", TOKEN_INIT, (self.width,))
        self.norm_image = layer_norm(None, self.dtype)
        if self.queries:
            self.pooler = AttentionalPooler(self.queries, self.width, self.heads, self.dtype)
        # The numbers count `self`.
        block = recomputed(DecoderBlock, self.remat, deterministic=5)
        self.blocks = [
            block(
                self.width,
                self.heads,
                self.mlp_ratio,
                self.activation,
                self.dropout,
                self.dtype,
                name=f"block_{layer}",
            )
            for layer in range(self.depth)
        ]
        self.norm = layer_norm(None, self.dtype)
        self.drop = Dropout(self.dropout)

    def __call__(
        self,
        image: ImageViews,
        text: TextViews | None,
        token_ids: Int[Array, "batch context"],
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch"], Int[Array, "batch"]]:
        """The sum of each caption's losses, -log of the tokens' probabilities, and their number."""
        del text
        inputs, labels, counted = shifted_right(token_ids, self.start_id, self.end_id)
        tokens, size = self._image_tokens(image)
        x = jnp.take(self.embedding, inputs, axis=0).astype(self.dtype)
        places = jnp.arange(inputs.shape[1])
        mask = (places[:, None] >= places)[None, None]
        if self.parallel and not deterministic:
            keys = row_keys(self, len(x))
            chosen = jax.vmap(lambda key: jax.random.bernoulli(key, self.parallel))(keys)
            nothing = add(jnp.zeros_like(x), jnp.asarray(self.mask_token))
            x = jnp.where(chosen[:, None, None], nothing, x)
            mask = mask | chosen[:, None, None, None]
        x = add(x, jnp.asarray(self.position)[: x.shape[1]])
        x = self.drop(x, deterministic)
        for block in self.blocks:
            x = block(x, tokens, size, mask, deterministic)
        logits = self._logits(x)
        right = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - right
        losses = jnp.sum(jnp.where(counted, losses, 0.0), axis=-1)
        return losses, jnp.sum(counted, axis=-1, dtype=jnp.int32)

    def look(self, image: ImageViews) -> tuple[tuple[Memory, ...], Array | None]:
        """What `write` takes of some images."""
        tokens, size = self._image_tokens(image)
        return tuple(block.remember(tokens) for block in self.blocks), size

    def write(
        self,
        token_ids: Int[Array, "batch"],
        place: Int[Array, ""],
        written: tuple[Written, ...],
        memory: tuple[Memory, ...],
        size: Float[Array, "batch tokens"] | None,
    ) -> tuple[Float[Array, "batch vocabulary"], tuple[Written, ...]]:
        """The logits, float32, of the tokens that may follow.

        Args:
          token_ids: the last tokens of some captions; at place 0 what a text starts with.
          place: of these tokens.
          written: of the places before, from this method or `nothing_written`.
          memory: from `look`.
          size: from `look`.

        Returns:
          The logits, and what is written with this place.
        """
        x = jnp.take(self.embedding, token_ids[:, None], axis=0).astype(self.dtype)
        x = add(x, jnp.asarray(self.position)[place])
        after = []
        for block, before, remembered in zip(self.blocks, written, memory, strict=True):
            x, now = block.write(x, place, before, remembered, size)
            after.append(now)
        return self._logits(x)[:, 0], tuple(after)

    def nothing_written(self, rows: int) -> tuple[Written, ...]:
        """What `write` takes at place 0."""
        shape = (rows, self.heads, self.context_length, self.width // self.heads)
        zeros = jnp.zeros(shape, self.dtype)
        return (Written(zeros, zeros),) * self.depth

    def _image_tokens(self, image: ImageViews) -> tuple[Array, Array | None]:
        """The tokens that the blocks attend to, and the patches behind each."""
        tokens = self.norm_image(image.spatial_tokens)
        if self.queries:
            return self.pooler(tokens, image.sizes), None
        return tokens, image.sizes

    def _logits(self, x: Array) -> Float[Array, "batch places vocabulary"]:
        x, table = self.norm(x), jnp.asarray(self.embedding)
        if self.dtype == jnp.bfloat16:
            return half_logits(x, table)
        return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)


def shifted_right(
    token_ids: Int[Array, "batch context"], start_id: int, end_id: int
) -> tuple[Int[Array, "batch places"], Int[Array, "batch places"], Bool[Array, "batch places"]]:
    """Inputs, labels, and which labels count: those up to the first end of text.

    The first input is the start of text, or where texts have none (`start_id` below 0), its end.
    """
    counted = spans(token_ids, start_id, end_id).valid
    if start_id >= 0:
        return token_ids[:, :-1], token_ids[:, 1:], counted[:, 1:]
    first = jnp.full_like(token_ids[:, :1], end_id)
    return jnp.concatenate([first, token_ids[:, :-1]], axis=1), token_ids, counted


def _fields(config: ConfigDict) -> dict[str, object]:
    sizes = config.model.caption.to_dict()
    del sizes["remat"]
    return {
        **sizes,
        "context_length": config.model.text.context_length,
        "parallel": config.perspectives.caption.parallel,
    }


def _check(config: ConfigDict) -> None:
    choose("model.caption.activation", config.model.caption.activation, ACTIVATIONS)
    check_sizes(config, "caption")


def _describe(config: ConfigDict) -> str:
    caption = config.model.caption
    words = f"causal decoder, depth {caption.depth}, {caption.width} wide, {caption.heads} heads"
    return f"{words}, from {caption.queries} pooled tokens" if caption.queries else words


CAPTION = Prediction(CaptionDecoder, _fields, _check, _describe)
