"""How fast the input is, beside Pillow's plain decoding and what the step takes."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from dataclasses import dataclass

from ml_collections import ConfigDict
from PIL import Image, ImageOps
from rich.console import Console

from mlip_jax.data.batches.teaching import NO_INPUTS, TeacherInputs
from mlip_jax.data.batches.training import train_batches, workers_for
from mlip_jax.data.sets.records import Source
from mlip_jax.data.text.tokenizer import Tokenizer

_PILLOW_IMAGES = 256
_PILLOW_TURNS = 3


@dataclass(frozen=True)
class InputResult:
    """Images a second.

    Attributes:
      images_per_second: of the whole input: reading, decoding, augmenting, tokenising, stacking.
      cores: worker processes, or 1 for the thread that stands in for none.
      per_core: the former over the latter.
      pillow_per_core: Pillow alone on one core, the same images: decode, convert to RGB, resize and
        cut the centre to the model's size, bicubic.
      step: what the training step takes with a batch at hand; None when it was not timed.
    """

    images_per_second: float
    cores: int
    per_core: float
    pillow_per_core: float
    step: float | None


def measure_input(
    config: ConfigDict,
    source: Source,
    tokenizer: Tokenizer,
    warmup: int,
    batches: int,
    teachers: TeacherInputs = NO_INPUTS,
) -> InputResult:
    """Times the input of a run.

    Args:
      config: the run's.
      source: opened config.data.train.
      tokenizer: the run's.
      warmup: batches before the clock starts.
      batches: batches to time.
      teachers: what else is made of each example.
    """
    feed = train_batches(config, source, tokenizer, start_step=0, teachers=teachers)
    with contextlib.closing(feed):
        for _ in range(warmup):
            next(feed)
        start = time.perf_counter()
        for _ in range(batches):
            next(feed)
        seconds = time.perf_counter() - start
    speed = batches * config.batch_size / seconds
    workers = workers_for(config, config.batch_size, teachers)
    cores = max(workers, 1)
    return InputResult(
        images_per_second=speed,
        cores=cores,
        per_core=speed / cores,
        pillow_per_core=_pillow(source, config.model.image.image_size),
        step=None,
    )


def _pillow(source: Source, size: int) -> float:
    """Images a second of Pillow on one core, the median of some turns; reading is not timed."""
    files = [source[index].image for index in range(min(len(source), _PILLOW_IMAGES))]
    seconds = []
    for _ in range(_PILLOW_TURNS):
        start = time.perf_counter()
        for data in files:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        seconds.append(time.perf_counter() - start)
    return len(files) / statistics.median(seconds)


def print_input(console: Console, result: InputResult) -> None:
    """Two lines."""
    ratio = result.per_core / result.pillow_per_core
    cores = f"{result.cores} cores" if result.cores > 1 else "1 core"
    console.print(
        f"input: {result.images_per_second:,.0f} images/s on {cores}, {result.per_core:,.0f} a core"
    )
    console.print(
        f"Pillow, decode and resize alone: {result.pillow_per_core:,.0f} images/s a core; the "
        f"input is {ratio:.2f}x"
    )


def print_step(console: Console, result: InputResult) -> None:
    """A line: what the step takes of the input."""
    assert result.step is not None  # it was timed
    console.print(
        f"the step takes {result.step:,.0f} images/s: {result.step / result.per_core:,.1f} cores "
        "of input"
    )
