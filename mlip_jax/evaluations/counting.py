"""Counts of the scores that reach a threshold, exact, over millions of rows and columns.

The bulk is float32 products, with a bound on their error that holds for any order of summation.
What lies within the bound of a threshold, some ten scores in a million, is computed again on the
grid of `scores`, so that the counts are those of the grid.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Float64, Int, Int32, Int64
from threadpoolctl import threadpool_limits

from mlip_jax.core.cores import cores
from mlip_jax.core.progress import track
from mlip_jax.evaluations.scores import products

# 512 x 1,024 float32 scores are 2 MB: they stay in the cache while they are counted.
_ROWS, _COLUMNS = 512, 1024
_BLOCKS = 64  # in one call
_SEGMENT = 16  # scores that share an integer, see _codes
_BITS = 5  # of a count up to 16
_COUNT = (1 << _BITS) - 1
# Above this share of scores to compute again, a product of whole blocks in float64 is faster.
_MOST_ALONE = 1 / 32


@dataclass(frozen=True)
class Side:
    """Rows of `scores.grid_integers`, and what the other side's scores are compared with.

    The first len(thresholds[t]) rows have a threshold number t: an exact product of two rows.
    """

    grid: Int32[np.ndarray, "rows width"]
    thresholds: tuple[Float64[np.ndarray, " first_rows"], ...]

    def levels(self, rows: slice) -> Float64[np.ndarray, "levels rows"]:
        """The thresholds of some rows; infinity, which nothing reaches, where a row has none."""
        levels = [level[rows] for level in self.thresholds if len(level) > rows.start]
        filled = np.full((max(1, len(levels)), rows.stop - rows.start), np.inf)
        for row, level in zip(filled, levels, strict=False):
            row[: len(level)] = level
        return filled

    def rounded(self, rows: slice) -> Float32[np.ndarray, "rows width"]:
        """Some rows in float32; NaN, which reaches no threshold, beyond the last."""
        part = self.grid[rows].astype(np.float32)
        missing = rows.stop - rows.start - len(part)
        return np.pad(part, [(0, missing), (0, 0)], constant_values=np.nan)


_Placed = tuple[Array, tuple[Array, Array]]  # columns and their bounds


class _Cut(NamedTuple):
    """How the table of scores is cut: a call computes some blocks side by side."""

    segment: int
    height: int  # of a block; a multiple of `segment`, as `width` is
    width: int
    blocks: int


def count_reaching(
    left: Side, right: Side, chunk: int = _COLUMNS, progress: bool = False
) -> tuple[list[Int64[np.ndarray, " first_rows"]], list[Int64[np.ndarray, " first_rows"]]]:
    """How many rows of the other side have a product with a row that reaches its threshold.

    Args:
      left: one side.
      right: the other.
      chunk: the most rows and columns of a block, which change nothing but speed and memory.
      progress: whether to draw a bar.

    Returns:
      For each side, counts in the layout of its thresholds.
    """
    segment = min(_SEGMENT, chunk)
    width = chunk // segment * segment
    blocks = -(-len(right.grid) // width)
    cut = _Cut(segment, min(_ROWS, width), width, blocks=-(-blocks // -(-blocks // _BLOCKS)))
    left_counts, right_counts = (
        [np.zeros(len(level), np.int64) for level in side.thresholds] for side in (left, right)
    )
    calls = -(-len(left.grid) // cut.height) * -(-len(right.grid) // (cut.width * cut.blocks))
    pool = ThreadPoolExecutor(cores())
    try:
        with threadpool_limits(1, "blas"):  # the pool's threads are as many as the cores
            finished_calls = _run(pool, left, right, cut, (left_counts, right_counts))
            for _ in track(finished_calls, "Ranking", total=calls, shown=progress):
                pass
    finally:
        pool.shutdown(cancel_futures=True)
    return left_counts, right_counts


def _run(
    pool: ThreadPoolExecutor,
    left: Side,
    right: Side,
    cut: _Cut,
    counts: tuple[list[Int64[np.ndarray, " first_rows"]], ...],
) -> Iterator[None]:
    """Adds to the counts, call by call."""
    tops = range(0, len(left.grid), cut.height)
    stripe = cut.width * cut.blocks
    for start in range(0, len(right.grid), stripe):
        columns = slice(start, start + stripe)
        placed = _place(right, columns, cut)
        call = functools.partial(_count, left, right, columns, placed, cut)
        for top, call_counts in zip(tops, pool.map(call, tops), strict=True):
            parts = slice(top, top + cut.height), columns
            for side_counts, part, side_added in zip(counts, parts, call_counts, strict=True):
                for level, added in zip(side_counts, side_added, strict=False):
                    level[part] += added[: len(level[part])]
            yield


def _place(right: Side, columns: slice, cut: _Cut) -> _Placed:
    """Columns and their bounds, block by block, where they are to be multiplied.

    That is the CPU: the error bound holds for its float32, and threads share it. Where JAX is
    set to see an accelerator alone, that one is used.
    """
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    vectors = right.rounded(columns).reshape(cut.blocks, cut.width, -1).swapaxes(1, 2)
    bounds = (
        bound.reshape(len(bound), cut.blocks, cut.width).swapaxes(0, 1)
        for bound in _bounds(right, columns)
    )
    return jax.device_put((vectors, tuple(bounds)), device)


def _bounds(
    side: Side, rows: slice
) -> tuple[Float32[np.ndarray, "levels rows"], Float32[np.ndarray, "levels rows"]]:
    """What a float32 score is surely below the threshold below, and surely reaches it from.

    Rounding both factors and adding `width` products in any order, with or without fused steps,
    moves a score by at most ((1 + u)^2 / (1 - width u) - 1) sum |a_i b_i|, u = 2^-24 (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1); the sum is at most |a| |b|, that
    is 2^52 on the grid.
    """
    margin = 1.01 * (side.grid.shape[1] + 2) * 2.0**-24 * 2.0**52
    exact = side.levels(rows)
    least, most = exact - margin, exact + margin
    lower, upper = least.astype(np.float32), most.astype(np.float32)
    infinity = np.float32(np.inf)
    return (
        np.where(lower > least, np.nextafter(lower, -infinity), lower),
        np.where(upper < most, np.nextafter(upper, infinity), upper),
    )


@functools.partial(jax.jit, static_argnames="segment")
def _block_codes(
    rows: Float[Array, "height width"],
    row_bounds: tuple[Float[Array, "row_levels height"], Float[Array, "row_levels height"]],
    columns: Float[Array, "blocks width columns"],
    column_bounds: tuple[
        Float[Array, "blocks levels columns"], Float[Array, "blocks levels columns"]
    ],
    segment: int,
) -> tuple[
    Int[Array, "blocks row_levels height lanes"],
    Int[Array, "blocks levels groups columns"],
    Int[Array, "row_levels height"],
    Int[Array, "blocks levels columns"],
]:
    """Codes of all segments, and the certain counts of rows and columns."""
    height = len(rows)

    # Lower and upper bounds in one array would make the comparisons six times as slow: XLA's loops
    # over its slices are not vectorised.
    def block(_: None, part: _Placed) -> tuple[None, tuple[Array, Array]]:
        vectors, bounds = part
        scores = jnp.matmul(rows, vectors, precision=jax.lax.Precision.HIGHEST)
        # Neighbours along the last axis are in different segments: the sums are over vectors.
        by_row = scores.reshape(height, segment, -1)
        by_column = scores.reshape(height // segment, segment, -1)
        return None, (
            _codes(by_row, *(bound[:, :, None, None] for bound in row_bounds)),
            _codes(by_column, *(bound[:, None, None] for bound in bounds)),
        )

    _, (of_rows, of_columns) = jax.lax.scan(block, None, (columns, column_bounds))
    sure_rows = (of_rows & _COUNT).sum(0).sum(-1)
    return of_rows, of_columns, sure_rows, (of_columns & _COUNT).sum(2)


def _codes(
    scores: Float[Array, "x segment y"],
    lower: Float[Array, "levels ..."],
    upper: Float[Array, "levels ..."],
) -> Int[Array, "levels x y"]:
    """What a segment's scores are to a threshold, in one integer and so in one sum.

    From the lowest bits: how many surely reach it, how many are uncertain, and the sum of the
    places of those, which is the place of a single one.
    """
    uncertain = (jnp.arange(scores.shape[1])[:, None] << 2 * _BITS) + (1 << _BITS)
    return jnp.stack(
        [
            jnp.where(scores >= sure, 1, jnp.where(scores >= near, uncertain, 0)).sum(1)
            for near, sure in zip(lower, upper, strict=True)
        ]
    )


def _count(
    left: Side, right: Side, columns: slice, placed: _Placed, cut: _Cut, top: int
) -> tuple[Int64[np.ndarray, "row_levels rows"], Int64[np.ndarray, "column_levels columns"]]:
    """The exact counts of one call."""
    rows = slice(top, top + cut.height)
    codes_and_counts = _block_codes(
        left.rounded(rows), _bounds(left, rows), *placed, segment=cut.segment
    )
    of_rows, of_columns, sure_rows, sure_columns = map(np.asarray, codes_and_counts)

    (block, level, row, lane), code = _uncertain(of_rows)
    lanes = of_rows.shape[-1]
    segments = _Segments(code, level, row, block * cut.width + lane, lanes, cut.segment)
    row_counts = _settle(left, rows, right, columns, sure_rows, segments)

    (block, level, group, column), code = _uncertain(of_columns)
    query = block * cut.width + column
    segments = _Segments(code, level, query, group * cut.segment, 1, cut.segment)
    sure_columns = sure_columns.swapaxes(0, 1).reshape(of_columns.shape[1], -1)
    return row_counts, _settle(right, columns, left, rows, sure_columns, segments)


class _Segments(NamedTuple):
    """Segments with uncertain scores: candidates first, first + step, ... of a query."""

    code: Int[np.ndarray, " segments"]
    level: Int[np.ndarray, " segments"]
    query: Int[np.ndarray, " segments"]
    first: Int[np.ndarray, " segments"]
    step: int
    size: int


def _uncertain(
    codes: Int[np.ndarray, "a b c d"],
) -> tuple[tuple[Int[np.ndarray, " segments"], ...], Int[np.ndarray, " segments"]]:
    """Where the segments with uncertain scores are, and their codes."""
    flat = np.flatnonzero(codes > _COUNT)
    return np.unravel_index(flat, codes.shape), codes.ravel()[flat]


def _settle(
    queries: Side,
    rows: slice,
    candidates: Side,
    columns: slice,
    sure: Int[np.ndarray, "levels rows"],
    segments: _Segments,
) -> Int64[np.ndarray, "levels rows"]:
    """The certain counts, and what the uncertain scores turn out to be."""
    query_rows, candidate_rows = queries.grid[rows], candidates.grid[columns]
    levels = queries.levels(rows)
    # The place of a single uncertain score is known. A segment with several is counted anew.
    single = segments.code >> _BITS & _COUNT == 1
    single, several = np.flatnonzero(single), np.flatnonzero(~single)
    if len(single) + segments.size * len(several) > _MOST_ALONE * levels.size * len(candidate_rows):
        return _count_on_grid(query_rows, candidate_rows, levels)
    counts = sure.astype(np.int64)
    np.subtract.at(
        counts, (segments.level[several], segments.query[several]), segments.code[several] & _COUNT
    )
    segment = np.concatenate([single, np.repeat(several, segments.size)])
    place = np.concatenate(
        [segments.code[single] >> 2 * _BITS, np.tile(np.arange(segments.size), len(several))]
    )
    candidate = segments.first[segment] + segments.step * place
    exists = candidate < len(candidate_rows)
    segment, candidate = segment[exists], candidate[exists]
    level, query = segments.level[segment], segments.query[segment]
    reached = products(query_rows, candidate_rows, (query, candidate)) >= levels[level, query]
    np.add.at(counts, (level, query), reached)
    return counts


def _count_on_grid(
    query_rows: Int32[np.ndarray, "rows width"],
    candidate_rows: Int32[np.ndarray, "columns width"],
    levels: Float64[np.ndarray, "levels padded_rows"],
) -> Int64[np.ndarray, "levels padded_rows"]:
    """The counts by float64 products alone, for the many ties of a collapsed model."""
    counts = np.zeros(levels.shape, np.int64)
    for top in range(0, len(query_rows), _ROWS):
        rows = slice(top, top + _ROWS)
        for left in range(0, len(candidate_rows), _COLUMNS):
            scores = (query_rows[rows] * 1.0) @ (candidate_rows[left : left + _COLUMNS] * 1.0).T
            for count, level in zip(counts, levels[:, : len(query_rows)], strict=True):
                count[rows][: len(scores)] += (scores >= level[rows, None]).sum(axis=1)
    return counts
