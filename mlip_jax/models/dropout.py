"""What training leaves out at random, drawn for each row of the global batch by itself.

Nothing depends on which other rows a device, or a part of the batch, computes beside it. So a batch
that is cut in parts for memory's sake is left the same as one that is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# A variable beside the parameters: {ROWS: {NUMBER: int32 [rows]}}, the places in the global batch
# of the rows that a network is applied to. Without it they are 0, 1, ...
ROWS, NUMBER = "rows", "number"
_numbers: ContextVar[Array | None] = ContextVar("numbers", default=None)


@contextmanager
def numbered(network: nn.Module) -> Iterator[None]:
    """Makes the rows' numbers known in all of a network while it is called.

    Flax hides the variables of the whole from blocks that are computed again for their gradient.
    """
    before = _numbers.set(network.get_variable(ROWS, NUMBER, None))
    try:
        yield
    finally:
        _numbers.reset(before)


def row_keys(module: nn.Module, rows: int) -> Key[Array, "rows"]:
    """A key for each row: of the step, of this call's place in the network, and of the row.

    Args:
      module: the module that draws; it takes the stream "dropout".
      rows: how many rows it has; a multiple of the network's when each has several views, which
        then lie beside one another.
    """
    assert module.scope is not None  # it is being applied
    numbers = _numbers.get()
    if numbers is None:
        numbers = module.scope.root.get_variable(ROWS, NUMBER, jnp.arange(rows))
    views = rows // len(numbers)
    numbers = (numbers[:, None] * views + jnp.arange(views)).reshape(-1)
    return jax.vmap(jax.random.fold_in, (None, 0))(module.make_rng("dropout"), numbers)


def random_patches(
    module: nn.Module, rows: int, patches: int, kept: int
) -> Int[Array, "rows kept"]:
    """For each row the numbers of `kept` of its patches, in order; any choice is as likely.

    Args:
      module: see `row_keys`.
      rows: how many there are.
      patches: of a row.
      kept: at most `patches`.
    """

    def choose(key: Key[Array, ""]) -> Int[Array, "kept"]:
        return jnp.sort(jax.random.permutation(key, patches)[:kept])

    return jax.vmap(choose)(row_keys(module, rows))


class Dropout(nn.Module):
    """Sets elements to 0 with the probability `rate` and scales the others up (JMLR 15:1929)."""

    rate: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *rest"], deterministic: bool
    ) -> Float[Array, "batch *rest"]:
        return _leave_out(self, x, self.rate, x.shape[1:], deterministic)


class DropPath(nn.Module):
    """Stochastic depth: leaves a residual branch out for some examples (arXiv 1603.09382)."""

    rate: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *rest"], deterministic: bool
    ) -> Float[Array, "batch *rest"]:
        return _leave_out(self, x, self.rate, (1,) * (x.ndim - 1), deterministic)


def _leave_out(
    module: nn.Module, x: Array, rate: float, shape: tuple[int, ...], deterministic: bool
) -> Array:
    """x with what a draw of this shape leaves out of each row."""
    if deterministic or rate == 0.0:
        return x
    keep = 1.0 - rate
    keys = row_keys(module, x.shape[0])
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, shape))(keys)
    return jnp.where(kept, x / jnp.asarray(keep, x.dtype), jnp.zeros_like(x))
