"""A trace of some steps, for TensorBoard's profile page and xprof."""

from __future__ import annotations

from pathlib import Path

import jax

from mlip_jax.core import places
from mlip_jax.training.callbacks import Callback
from mlip_jax.training.run import Run

FOLDER = "profile"
_BEFORE = 3  # steps: the first ones read what later ones have


class Profile(Callback):
    """Traces some steps of a start into the workdir, and says where the trace lies."""

    def __init__(self, steps: int) -> None:
        """Takes how many steps are traced."""
        self._steps = steps
        self._run: Run | None = None
        self._first = 0
        self._tracing = False

    def on_start(self, run: Run, step: int) -> None:
        """Plans the trace, in the last steps where there are only a few."""
        self._run = run
        self._first = step + max(min(_BEFORE, run.steps - step - self._steps), 0)
        self.on_step(step)

    def on_step(self, step: int) -> None:
        """Starts or ends the trace; the steps' work on the devices is waited for."""
        assert self._run is not None  # on_start comes first
        if step == self._first:
            jax.profiler.start_trace(str(self._run.folder / FOLDER))
            self._tracing = True
        elif self._tracing and step >= self._first + self._steps:
            self._end()

    def on_end(self, step: int) -> None:
        """Ends a trace that would have been longer than the run."""
        del step
        if self._tracing:
            self._end()

    def _end(self) -> None:
        assert self._run is not None
        self._tracing = False
        jax.effects_barrier()
        jax.profiler.stop_trace()
        traces: Path = self._run.folder / FOLDER
        places.publish(traces)
        folder = places.shown(traces)
        self._run.console.print(
            f"profile: {folder} (tensorboard --logdir={folder}, or xprof --logdir={folder})"
        )
