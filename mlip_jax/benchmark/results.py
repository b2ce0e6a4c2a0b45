"""What a benchmark found, as figures, a table and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from mlip_jax.core.files import write_atomically
from mlip_jax.core.tables import make_table
from mlip_jax.storage.workdir import environment
from mlip_jax.training.step_cost import GIB


class Timing(NamedTuple):
    """A step: its seconds, and how many of them the host waited for its batch."""

    seconds: float
    waited: float


@dataclass(frozen=True)
class Result:
    """Figures of the timed steps of one config.

    Attributes:
      name: of the config.
      batch_size: global.
      dtype: what the model computes in.
      parameters: of the model.
      input: "random" (one batch, on the host) or "data".
      attention: the form in each tower whose attention has several; None for another program.
      steps: how many were timed.
      step_seconds: the median.
      step_seconds_low: the lower quartile.
      step_seconds_high: the upper quartile.
      images_per_second: the batch over the median.
      data_wait: the share of the time that the host waited for batches, copies included.
      model_flops: of a step: three times the matrix products of the forward pass, merged tokens
        counted as they are, recomputation and the optimizer not at all.
      utilisation: model-FLOP utilisation: model_flops / (step_seconds * the measured matrix peak of
        all devices).
      compile_seconds: tracing included; short where the compiler's cache had the program.
      memory: bytes of a device, by the compiler.
      peak_memory: bytes of the first device at most, with all configs of the comparison; None where
        the device does not say.
    """

    name: str
    batch_size: int
    dtype: str
    parameters: int
    steps: int
    step_seconds: float
    step_seconds_low: float
    step_seconds_high: float
    images_per_second: float
    data_wait: float
    compile_seconds: float
    input: str = "random"
    attention: dict[str, str] | None = None
    model_flops: float | None = None
    utilisation: float | None = None
    memory: int | None = None
    peak_memory: int | None = None


def summarize(timings: Sequence[Timing], **known: Any) -> Result:
    """The figures of timed steps.

    Args:
      timings: of the steps.
      known: what else `Result` has; "matrix_peak", FLOP/s of all devices, gives the utilisation.
    """
    seconds = [timing.seconds for timing in timings]
    median = statistics.median(seconds)
    low, high = np.percentile(seconds, [25, 75])
    peak, flops = known.pop("matrix_peak", None), known.get("model_flops")
    return Result(
        **known,
        steps=len(seconds),
        step_seconds=median,
        step_seconds_low=float(low),
        step_seconds_high=float(high),
        images_per_second=known["batch_size"] / median,
        data_wait=sum(timing.waited for timing in timings) / sum(seconds),
        utilisation=flops / (median * peak) if peak and flops else None,
    )


def print_results(console: Console, results: Sequence[Result]) -> None:
    """A column for each config, numbered; the speed is over that of the first."""
    several = len(results) > 1
    if several:
        for number, result in enumerate(results, 1):
            console.print(f"{number}: {result.name}")
    names = [str(place) if several else result.name for place, result in enumerate(results, 1)]
    table = make_table(("Training step", *names))

    def row(words: str, *cells: str) -> None:
        if any(cells):
            table.add_row(words, *cells)

    row("global batch", *(f"{result.batch_size:,}" for result in results))
    row("compute", *(result.dtype for result in results))
    row("parameters", *(f"{result.parameters:,}" for result in results))
    row("step, median", *(_milliseconds(result.step_seconds) for result in results))
    row("  lower quartile", *(_milliseconds(result.step_seconds_low) for result in results))
    row("  upper quartile", *(_milliseconds(result.step_seconds_high) for result in results))
    row("images a second", *(f"{result.images_per_second:,.1f}" for result in results))
    if several:
        first = results[0].images_per_second
        row("  over the first", *(f"{result.images_per_second / first:.2f}x" for result in results))
    row("model FLOPs a step", *(_or_nothing(result.model_flops, "{:.3g}") for result in results))
    row("  utilisation", *(_or_nothing(result.utilisation, "{:.1%}") for result in results))
    row("wait for data", *(f"{result.data_wait:.1%}" for result in results))
    row("memory a device", *(_gib(result.memory) for result in results))
    row("  peak so far", *(_gib(result.peak_memory) for result in results))
    row("compilation", *(f"{result.compile_seconds:.1f} s" for result in results))
    console.print(table)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:.2f} GiB"


def _or_nothing(value: float | None, shape: str) -> str:
    return "" if value is None else shape.format(value)


def write_json(path: Path, results: Sequence[Result], **more: Any) -> None:
    """The results, what else was found, and the machine."""
    content = {
        "results": [asdict(result) for result in results],
        **more,
        "environment": environment(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=2) + "\n")
