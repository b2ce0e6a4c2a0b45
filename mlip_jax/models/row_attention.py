"""Attention of short rows as one Pallas kernel for TPUs: scores never leave a core's memory.

A core holds all tokens of a few examples at a time. Queries, keys and values are read where the
dense layer before wrote them, and the output is written where the next one reads it, so that
nothing is transposed. Heads narrower than 128 lanes share them and are told apart by zeros in the
lanes of the others, which a matrix unit of 128 lanes multiplies in the same time. The gradient
computes the weights again and keeps queries, keys and values alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

_ROWS = PartitionSpec(("data", "fsdp"))  # the mesh axes that a batch's rows lie on
LANES = 128
LONGEST = 512  # tokens: a head's scores are then 1 MiB, of which some are in memory at a time
_BLOCK = 3 * 2**20  # bytes of queries, keys and values that a core holds at a time
_MEMORY = 96 * 2**20  # that the kernel may take of the 128 MiB of a core
_TOGETHER = 3  # strips of heads whose gradients are computed side by side
_LOWEST = float(jnp.finfo(jnp.float32).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attend_rows(
    qkv: Float[Array, "batch tokens qkv"],
    bias: Float[Array, "batch tokens"] | None,
    heads: int,
    causal: bool,
) -> Float[Array, "batch tokens width"]:
    """Multi-head attention over all tokens; TPUs compute it in one kernel, others interpret it.

    Args:
      qkv: queries, keys and values, one after the other, each with its heads in a row.
      bias: float32, added to the logits of each key. No gradient flows to it.
      heads: how many there are.
      causal: a token attends to those before it and to itself.

    Raises:
      ValueError: for more than `LONGEST` tokens, or for heads that do not fill 128 lanes evenly.
    """
    operands = _given(qkv, bias)
    return _on_each_device(_forward_kernel, heads, causal, bias is not None, operands)


def _forward(
    qkv: Array, bias: Array | None, heads: int, causal: bool
) -> tuple[Array, tuple[Array, Array | None]]:
    return attend_rows(qkv, bias, heads, causal), (qkv, bias)


def _backward(
    heads: int, causal: bool, kept: tuple[Array, Array | None], gradient: Array
) -> tuple[Array, Array | None]:
    qkv, bias = kept
    operands = (*_given(qkv, bias), gradient.astype(qkv.dtype))
    for_qkv = _on_each_device(_backward_kernel, heads, causal, bias is not None, operands)
    return for_qkv, None if bias is None else jnp.zeros_like(bias)


attend_rows.defvjp(_forward, _backward)


def _given(qkv: Array, bias: Array | None) -> tuple[Array, ...]:
    return (qkv,) if bias is None else (qkv, bias[:, None])


def _on_each_device(
    kernel: Callable[..., None], heads: int, causal: bool, biased: bool, operands: tuple[Array, ...]
) -> Array:
    """The kernel on the examples that a device has; a compiler cannot divide it by itself."""
    call = functools.partial(_call, kernel, heads, causal, biased)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:  # one device, or its part already
        return call(*operands)
    spread = jax.shard_map(call, mesh=mesh, in_specs=_ROWS, out_specs=_ROWS, check_vma=False)
    return spread(*operands)


def _call(
    kernel: Callable[..., None], heads: int, causal: bool, biased: bool, *operands: Array
) -> Array:
    qkv = operands[0]
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    head = width // heads
    if tokens > LONGEST or width % LANES or (LANES % head and head % LANES):
        raise ValueError(
            f"attention as one kernel takes at most {LONGEST} tokens and heads that fill "
            f"{LANES} lanes evenly, not {tokens} tokens and {heads} heads of {head}"
        )
    row = tokens * 3 * width * qkv.dtype.itemsize
    rows = max(n for n in range(1, batch + 1) if batch % n == 0 and n * row <= max(_BLOCK, row))

    def block(array: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec((rows, *array.shape[1:]), lambda index: (index, 0, 0))

    backward = kernel is _backward_kernel
    out = jax.ShapeDtypeStruct((batch, tokens, (3 if backward else 1) * width), qkv.dtype)
    products = 5 if backward else 2
    call = functools.partial(
        pl.pallas_call,
        functools.partial(kernel, head=head, causal=causal, biased=biased),
        out_shape=out,
        grid=(batch // rows,),
        in_specs=[block(operand) for operand in operands],
        out_specs=block(out),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=_MEMORY
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * batch * tokens**2 * width,
            transcendentals=batch * heads * tokens**2,
            bytes_accessed=math.prod(out.shape) * out.dtype.itemsize
            + sum(operand.size * operand.dtype.itemsize for operand in operands),
        ),
        name=kernel.__name__.strip("_"),
    )
    return jax.lax.platform_dependent(*operands, tpu=call(), default=call(interpret=True))


def _forward_kernel(qkv: Any, *refs: Any, head: int, causal: bool, biased: bool) -> None:
    *bias, out = refs

    def row(index: Array, _: None) -> None:
        keys = bias[0][index] if biased else None
        for at, q, k, v, own in _strips(qkv, index, head):
            weights = [_weights(_only(lanes, q), k, keys, causal) for lanes in own]
            parts = [_product(one.astype(v.dtype), v, 1, 0) / _row_sum(one) for one in weights]
            out[index, :, at] = _joined(own, parts).astype(out.dtype)

    jax.lax.fori_loop(0, qkv.shape[0], row, None)


def _backward_kernel(qkv: Any, *refs: Any, head: int, causal: bool, biased: bool) -> None:
    *bias, gradient, out = refs
    width = gradient.shape[2]

    def row(index: Array, _: None) -> None:
        strips = list(_strips(qkv, index, head))
        keys = bias[0][index] if biased else None
        for first in range(0, len(strips), _TOGETHER):
            together = strips[first : first + _TOGETHER]
            upstream = [gradient[index, :, strip.at].astype(jnp.float32) for strip in together]
            # Stage by stage for several heads, so that one computes while another waits.
            heads = [
                (strip, lanes, rows)
                for strip, rows in zip(together, upstream, strict=True)
                for lanes in strip.own
            ]
            weights = [_weights(_only(lanes, at.q), at.k, keys, causal) for at, lanes, _ in heads]
            # Weights are divided by their sums where they are fewest: in the upstream's rows.
            inverse = [1.0 / _row_sum(one) for one in weights]
            shares = [
                _only(lanes, (rows * one).astype(qkv.dtype))
                for (_, lanes, rows), one in zip(heads, inverse, strict=True)
            ]
            for_weights = [
                _product(share, at.v, 1, 1) for (at, _, _), share in zip(heads, shares, strict=True)
            ]
            means = [
                _row_sum(one * other) * inv
                for one, other, inv in zip(weights, for_weights, inverse, strict=True)
            ]
            for_scores = [
                (one * (other - mean)).astype(qkv.dtype)
                for one, other, mean in zip(weights, for_weights, means, strict=True)
            ]
            for_q = [
                _product(one, at.k, 1, 0) for (at, _, _), one in zip(heads, for_scores, strict=True)
            ]
            for_k = [
                _product(one, at.q, 0, 0) for (at, _, _), one in zip(heads, for_scores, strict=True)
            ]
            for_v = [
                _product(one.astype(qkv.dtype), share, 0, 0)
                for one, share in zip(weights, shares, strict=True)
            ]
            for number, strip in enumerate(together):
                of_strip = slice(number * len(strip.own), (number + 1) * len(strip.own))
                totals = [_joined(strip.own, part[of_strip]) for part in (for_q, for_k, for_v)]
                totals[0] *= head**-0.5  # keys were multiplied with scaled queries
                for place, total in enumerate(totals):
                    lanes = pl.ds(place * width + strip.at.start, strip.at.size)
                    out[index, :, lanes] = total.astype(out.dtype)

    jax.lax.fori_loop(0, qkv.shape[0], row, None)


class _Strip(NamedTuple):
    """Heads that share lanes: which, scaled queries, keys, values, and the lanes of each head."""

    at: Any  # a slice
    q: Array
    k: Array
    v: Array
    own: list[Array | None]


def _strips(qkv: Any, index: Array, head: int) -> Iterator[_Strip]:
    width = qkv.shape[2] // 3
    size = max(LANES, head)
    lane = jax.lax.broadcasted_iota(jnp.int32, (qkv.shape[1], size), 1)
    own: list[Array | None] = [
        None if head == size else (lane >= first) & (lane < first + head)
        for first in range(0, size, head)
    ]
    for start in range(0, width, size):
        q, k, v = (qkv[index, :, pl.ds(part * width + start, size)] for part in range(3))
        yield _Strip(pl.ds(start, size), q * jnp.asarray(head**-0.5, q.dtype), k, v, own)


def _joined(own: list[Array | None], parts: list[Array]) -> Array:
    """Each head's part in its lanes."""
    total = parts[0]
    for lanes, part in zip(own[1:], parts[1:], strict=True):
        total = total if lanes is None else jnp.where(lanes, part, total)
    return total


def _only(lanes: Array | None, x: Array) -> Array:
    return x if lanes is None else jnp.where(lanes, x, jnp.zeros_like(x))


def _weights(q: Array, k: Array, bias: Array | None, causal: bool) -> Array:
    """exp(logits - their maximum), a row for each query."""
    logits = _product(q, k, 1, 1)
    if bias is not None:
        logits = logits + bias
    if causal:
        place = [jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1)]
        logits = jnp.where(place[0] >= place[1], logits, _LOWEST)
    return jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))


def _row_sum(x: Array) -> Array:
    return jnp.sum(x, axis=1, keepdims=True)


def _product(x: Array, y: Array, over_x: int, over_y: int) -> Array:
    axes = (((over_x,), (over_y,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)
