"""The subcommand: one config timed, or several in turns, or one beside another program."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax.benchmark import input_speed, peers
from mlip_jax.benchmark.contender import Contender, open_input
from mlip_jax.benchmark.peak import matrix_peak
from mlip_jax.benchmark.results import Timing, print_results, write_json
from mlip_jax.core import places
from mlip_jax.data.batches.teaching import NO_INPUTS
from mlip_jax.models import building
from mlip_jax.training.step_cost import network_of, teachers_of

_ROUNDS = 4  # turns that each side has
_STEPS_BESIDE_INPUT = 5


class Side(Protocol):
    """What is timed."""

    def run(self, steps: int) -> list[Timing]:
        """Trains some steps."""


def benchmark(
    config: ConfigDict,
    workdir: str | Path,
    *,
    compare: Sequence[tuple[str, ConfigDict]] = (),
    against: str = "",
    only: str = "",
    input: str = "random",
    steps: int = 20,
    warmup: int = 3,
    title: str = "",
) -> int:
    """Times the training step of a config and writes what it found as JSON.

    Several sides take turns, a few steps each, so that what else the machine does meets all.

    Args:
      config: validated.
      workdir: where the JSON goes.
      compare: more configs, with the names that they are given.
      against: "open_clip": its model of the same sizes, in a process of its own.
      only: "data": the input alone, beside Pillow and what a few steps take.
      input: "random", one batch again and again, or "data", the batches of a run.
      steps: how many are timed, of each side.
      warmup: steps before.
      title: the config's name in the table.

    Returns:
      0.

    Raises:
      UserError: for a step that does not fit, or a peer that is not installed or has no such model.
    """
    if against:
        peers.check(config, against)
        # Both programs are on the device at a time; JAX would take most of its memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    measured = None
    if only == "data":
        # Before the step is compiled, which may take minutes and need more memory than there is.
        teachers = teachers_of(config, network_of(config)).inputs if config.teacher else NO_INPUTS
        measured = input_speed.measure_input(config, *open_input(config), warmup, steps, teachers)
        input_speed.print_input(console, measured)
        steps = min(steps, _STEPS_BESIDE_INPUT)
    before = _peak(config)
    with contextlib.ExitStack() as stack:
        ours = [
            stack.enter_context(Contender(name, each, input == "data"))
            for name, each in ((title or config.name, config), *compare)
        ]
        theirs = [stack.enter_context(peers.started(config))] if against else []
        timings = in_turns([*ours, *theirs], steps, warmup)
        peak = max(before, _peak(config))
        results = [
            *(side.result(times, peak) for side, times in zip(ours, timings, strict=False)),
            *(side.result(times) for side, times in zip(theirs, timings[len(ours) :], strict=True)),
        ]
    extra: dict[str, Any] = {"matrix_peak": peak}
    console.print(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}; products of matrices run at "
        f"{peak / 1e12:,.2f} TFLOP/s, measured"
    )
    print_results(console, results)
    if measured:
        measured = dataclasses.replace(measured, step=results[0].images_per_second)
        input_speed.print_step(console, measured)
        extra["input"] = dataclasses.asdict(measured)
    path = (
        places.local(workdir) / f"benchmark-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.json"
    )
    write_json(path, results, **extra)
    console.print(f"written: {places.shown(path)}")
    return 0


def _peak(config: ConfigDict) -> float:
    """Of all devices, in what the model computes in; virtual CPU devices share the cores."""
    peak = matrix_peak(building.compute_dtype(config))
    return peak if jax.default_backend() == "cpu" else peak * jax.device_count()


def in_turns(sides: Sequence[Side], steps: int, warmup: int) -> list[list[Timing]]:
    """The timed steps of every side, a few at a time, in turns.

    The first step of a turn is not timed: it finds the memory and the caches that the others left.
    """
    for side in sides:
        side.run(warmup)
    timings: list[list[Timing]] = [[] for _ in sides]
    rounds = min(_ROUNDS, steps) if len(sides) > 1 else 1
    for turn in range(rounds):
        share = steps * (turn + 1) // rounds - steps * turn // rounds
        for side, times in zip(sides, timings, strict=True):
            times += side.run(share + 1)[1:] if len(sides) > 1 else side.run(share)
    return timings
