"""How long a run will take: its step is timed before any data is read."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax

from mlip_jax.training.repeatability import random_batch
from mlip_jax.training.run import Run
from mlip_jax.training.state import TrainState
from mlip_jax.training.step import Step

_FEWEST_STEPS = 100  # in fewer, the first line of progress says as much as soon
_SLOW = 10.0  # seconds: a step that takes longer is not taken again


def is_worth_it(run: Run) -> bool:
    """Whether the run is long enough for somebody to plan by it."""
    return run.steps >= _FEWEST_STEPS


def forecast(run: Run, step: Step, fresh: Callable[[], TrainState]) -> str:
    """Takes two steps on a random batch, and says in a line what the whole run will take.

    All processes call it.

    Args:
      run: opened.
      step: compiled; it takes the state away.
      fresh: makes the state that the run starts from.
    """
    state, batch, seconds = fresh(), random_batch(run), 0.0
    for _ in range(2):  # the first also touches memory for the first time
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - start
        if seconds > _SLOW:
            break
    rate = run.config.batch_size / seconds
    return (
        f"expected: about {duration(seconds * run.steps)} here at {rate:,.0f} images/s, where "
        "reading data keeps up; evaluations come on top"
    )


def duration(seconds: float) -> str:
    """A time in the two largest units that people would use: "40 minutes", "3 hours 20 minutes"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return _count(max(round(seconds), 1), "second")
    for unit, size, rest in (("day", 1440, "hour"), ("hour", 60, "minute")):
        if minutes >= size:
            left = minutes % size // (60 if rest == "hour" else 1)
            return _count(minutes // size, unit) + (f" {_count(left, rest)}" if left else "")
    return _count(minutes, "minute")


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}" + ("" if number == 1 else "s")
