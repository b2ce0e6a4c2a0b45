"""The training metrics on their way from the devices to the files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mlip_jax.core.errors import RunError
from mlip_jax.training.callbacks import Callbacks
from mlip_jax.training.step import Metrics


class Log:
    """Training metrics on their way to the callbacks, which hear the mean over an interval.

    They are fetched an interval late, so that nobody waits for them.
    """

    def __init__(self, callbacks: Callbacks) -> None:
        self._callbacks = callbacks
        self._steps: list[Metrics] = []
        self._late: tuple[int, list[Metrics], dict[str, float]] | None = None

    @property
    def pending(self) -> int:
        """Steps since the last interval."""
        return len(self._steps)

    def add(self, metrics: Metrics) -> None:
        """Takes the metrics of one step, on the devices."""
        self._steps.append(metrics)

    def first(self) -> dict[str, float]:
        """The metrics of the first step since the last interval, which must have been done."""
        return {key: float(value) for key, value in jax.device_get(self._steps[0]).items()}

    def interval(self, done: int, speed: dict[str, float]) -> None:
        """Ends an interval at step `done` and tells of the one before.

        Raises:
          RunError: for a step whose loss or gradient was not finite.
        """
        self.flush()
        self._late = (done, self._steps, speed)
        self._steps = []

    def flush(self) -> None:
        """Tells of the last interval, if that is not done yet; waits for the devices.

        Raises:
          RunError: for a step whose loss or gradient was not finite.
        """
        if self._late is None:
            return
        done, on_devices, speed = self._late
        self._late = None
        steps = jax.device_get(on_devices)
        for number, metrics in enumerate(steps, done - len(steps) + 1):
            _check_finite(number, metrics)
        mean = {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}
        self._callbacks.tell("on_metrics", done, mean | speed)


def _check_finite(number: int, metrics: Mapping[str, Any]) -> None:
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]):
        return
    terms = [
        key.removeprefix("loss/")
        for key, value in metrics.items()
        if key.startswith("loss/") and not math.isfinite(value)
    ]
    if terms:
        what = f"the loss of {' and '.join(terms)} is {metrics['loss/' + terms[0]]}"
    elif not math.isfinite(metrics["loss"]):
        what = f"the sum of the losses is {metrics['loss']}"
    else:
        what = f"the losses are finite, but the gradient's norm is {metrics['gradient_norm']}"
    raise RunError(
        f"step {number}: {what}; stopped, the checkpoints hold finite parameters. Lower "
        "config.optimizer.learning_rate or raise its warmup_samples, with a new --workdir"
    )
