"""How long a run will take: its step is timed before any data is read."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax

from mlip_jax.training.repeatability import random_batch
from mlip_jax.training.run import Run
from mlip_jax.training.stages import Part, Steps
from mlip_jax.training.state import TrainState
from mlip_jax.training.step import Step

_FEWEST_STEPS = 100  # in fewer, the first line of progress says as much as soon
_SLOW = 10.0  # seconds: a step that takes longer is not taken again


def is_worth_it(run: Run) -> bool:
    """Whether the run is long enough for somebody to plan by it."""
    return run.steps >= _FEWEST_STEPS


def forecast(run: Run, steps: Steps, fresh: Callable[[Part], TrainState]) -> str:
    """Takes two steps of each stage on a random batch, and says what the whole run will take.

    All processes call it.

    Args:
      run: opened, at its beginning.
      steps: compiled; they take the state away.
      fresh: makes a state that a stage may start from.
    """
    times = [_seconds(run, part, step, fresh) for part, step in steps.left]
    total = sum(seconds * stage.steps for seconds, stage in zip(times, run.stages, strict=True))
    rates = [
        stage.config.batch_size / seconds for seconds, stage in zip(times, run.stages, strict=True)
    ]
    words = f"{rates[0]:,.0f} images/s"
    if len(rates) > 1:
        words = "; ".join(
            f"stage {stage.number} {duration(seconds * stage.steps)}, {rate:,.0f} images/s"
            for seconds, rate, stage in zip(times, rates, run.stages, strict=True)
        )
    return (
        f"expected: about {duration(total)} here at {words}, where "
        "reading data keeps up; evaluations come on top"
    )


def _seconds(run: Run, part: Part, step: Step, fresh: Callable[[Part], TrainState]) -> float:
    """How long a step of a stage takes."""
    state, batch, seconds = fresh(part), random_batch(run, part.stage.config), 0.0
    for _ in range(2):  # the first also touches memory for the first time
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - start
        if seconds > _SLOW:
            break
    return seconds


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
