"""Multi-head attention as a function, in several forms: equal up to rounding, not in speed.

`mlip_jax.training.attention_choice` says which form a run trains with.
"""

from __future__ import annotations

from typing import Literal, cast

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from mlip_jax.models.row_attention import attend_rows

Implementation = Literal["xla", "cudnn"]


@jax.custom_vjp
def half_scores(
    q: Float[Array, "batch heads queries head"], k: Float[Array, "batch heads keys head"]
) -> Float[Array, "batch heads queries keys"]:
    """The products of all queries with all keys, in float32, of bfloat16 arrays.

    On GPUs their gradient is rounded to bfloat16 first. It comes in float32, and would have them
    multiply in float32 for the gradients of queries and keys.
    """
    return jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)


def _half_scores_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    def products(q: Array, k: Array, gradient: Array) -> tuple[Array, Array]:
        for_q = jnp.einsum("bhqk,bhkd->bhqd", gradient, k, preferred_element_type=jnp.float32)
        for_k = jnp.einsum("bhqk,bhqd->bhkd", gradient, q, preferred_element_type=jnp.float32)
        return for_q.astype(q.dtype), for_k.astype(k.dtype)

    def rounded(q: Array, k: Array, gradient: Array) -> tuple[Array, Array]:
        return products(q, k, gradient.astype(q.dtype))

    # TPUs multiply float32 in bfloat16 as it is, and CPUs bfloat16 in float32.
    return jax.lax.platform_dependent(*kept, gradient, cuda=rounded, rocm=rounded, default=products)


half_scores.defvjp(lambda q, k: (half_scores(q, k), (q, k)), _half_scores_backward)


def attend(
    qkv: Float[Array, "batch tokens qkv"],
    heads: int,
    form: str = "plain",
    causal: bool = False,
    lengths: Int[Array, "batch"] | None = None,
    size: Float[Array, "batch tokens"] | None = None,
) -> tuple[
    Float[Array, "batch tokens width"],
    Float[Array, "batch tokens head"],
    Float[Array, "batch tokens"],
    Float[Array, "batch tokens"],
]:
    """Attends over all tokens.

    Args:
      qkv: queries, keys and values, one after the other, each with its heads in a row.
      heads: how many there are.
      form: one of `schema.ATTENTIONS`: "plain", an implementation of JAX's
        `dot_product_attention`, or "pallas", the kernel of `models.row_attention`.
      causal: a token attends to those before it and to itself.
      lengths: how many of the first tokens are attended to; None: all. Written like this, and not
        as a mask, both need no array of queries and keys in cuDNN's kernels.
      size: patches behind each token; its log is added to the logits (proportional attention).
        "pallas" passes no gradient to it.

    Returns:
      The output, the head-mean keys, and the head-mean attention on each token: of the first token,
      and the mean over all tokens. What is not used is not computed.
    """
    q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=heads)
    mask = _mask(q.shape[2], causal, lengths)
    if form == "plain":
        weights = _weights(q, k, mask, size)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(qkv.dtype), v)
        first, of_all = weights[:, :, 0], weights
    else:
        if form == "pallas":
            out = attend_rows(qkv, _key_bias(q.shape[2], lengths, size), heads, causal)
            out = rearrange(out, "b t (h d) -> b h t d", h=heads)
        else:
            out = _by_jax(q, k, v, cast(Implementation, form), causal, lengths, size)
        of_all = _weights(q, k, mask, size)
        mask = None if mask is None else mask[:, :, :1]
        first = _weights(q[:, :, :1], k, mask, size)[:, :, 0]
    out = rearrange(out, "b h t d -> b t (h d)")
    keys = jnp.mean(k.astype(jnp.float32), axis=1)
    return out, keys, jnp.mean(first, axis=1), jnp.mean(of_all, axis=(1, 2))


def attend_with(
    q: Float[Array, "batch heads queries head"],
    k: Float[Array, "batch heads keys head"],
    v: Float[Array, "batch heads keys head"],
    mask: Bool[Array, "#batch 1 #queries keys"] | None = None,
    size: Float[Array, "batch keys"] | None = None,
) -> Float[Array, "batch heads queries head"]:
    """Attends with queries that may be of other tokens than keys and values.

    Args:
      q: the queries.
      k: the keys.
      v: the values.
      mask: True where a query may look at a key; None: everywhere.
      size: patches behind each key; its log is added to the logits.
    """
    weights = _weights(q, k, mask, size)
    return jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v)


def _mask(
    tokens: int, causal: bool, lengths: Int[Array, "batch"] | None
) -> Bool[Array, "#batch 1 #tokens tokens"] | None:
    """True where a query may look at a key; None where all may."""
    index = jnp.arange(tokens)
    mask = None if lengths is None else (index < lengths[:, None])[:, None, None]
    if not causal:
        return mask
    before = (index[:, None] >= index[None, :])[None, None]
    return before if mask is None else mask & before


def _key_bias(
    tokens: int, lengths: Int[Array, "batch"] | None, size: Float[Array, "batch tokens"] | None
) -> Float[Array, "batch tokens"] | None:
    """What is added to the logits of each key; None where it is nothing."""
    bias = None if size is None else jnp.log(size)
    if lengths is None:
        return bias
    attended = jnp.arange(tokens) < lengths[:, None]
    return jnp.where(attended, 0.0 if bias is None else bias, jnp.finfo(jnp.float32).min)


def _weights(
    q: Float[Array, "batch heads queries head"],
    k: Float[Array, "batch heads keys head"],
    mask: Bool[Array, "#batch 1 #queries keys"] | None,
    size: Float[Array, "batch keys"] | None,
) -> Float[Array, "batch heads queries keys"]:
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    if q.dtype == jnp.bfloat16:
        logits = half_scores(q, k)
    else:
        logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    if size is not None:
        logits = logits + jnp.log(size)[:, None, None, :]
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


def _by_jax(
    q: Float[Array, "batch heads tokens head"],
    k: Float[Array, "batch heads tokens head"],
    v: Float[Array, "batch heads tokens head"],
    implementation: Implementation,
    causal: bool,
    lengths: Int[Array, "batch"] | None,
    size: Float[Array, "batch tokens"] | None,
) -> Float[Array, "batch heads tokens head"]:
    batch, _, tokens, _ = q.shape
    bias = None if size is None else jnp.log(size)[:, None, None, :]
    if implementation == "cudnn":
        # In training it takes even numbers of tokens alone.
        odd = tokens % 2
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, odd), (0, 0))) for x in (q, k, v))
        if bias is not None:
            # It adds an array in the queries' type, and that is to be whole.
            bias = jnp.broadcast_to(bias, (batch, 1, tokens, tokens)).astype(q.dtype)
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, odd), (0, odd)))
        if odd and lengths is None:
            lengths = jnp.full(batch, tokens, jnp.int32)
    q, k, v = (rearrange(x, "b h t d -> b t h d") for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return rearrange(out[:, :tokens], "b t h d -> b h t d")
