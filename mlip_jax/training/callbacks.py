"""What follows a run: its own writers, and whatever a user adds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlip_jax.core.errors import RunError, first_line

if TYPE_CHECKING:
    from mlip_jax.core.stages import Stage
    from mlip_jax.training.run import Run


class Callback:
    """Told of what happens in a run; a subclass overrides what it wants to hear.

    Process 0 calls, in the thread that trains: what takes long delays the next step. `step` counts
    the steps that are done.
    """

    def on_start(self, run: Run, step: int) -> None:
        """Before the first step of this start; a run that is resumed has done `step` steps."""

    def on_stage(self, stage: Stage) -> None:
        """Before the first step of a stage, or of this start in it; of config.stages alone."""

    def on_step(self, step: int) -> None:
        """After every step, whose metrics may still be on their way."""

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """After every interval of config.log_every steps, an interval late: means over it.

        "loss", "loss/VIEW", "scale/VIEW", "gradient_norm", "learning_rate", "images_per_second",
        "data_wait".
        """

    def on_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """After an evaluation, such as {"retrieval/SET/text_to_image_recall@1": 0.4}."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """When a checkpoint was handed to the writer; its folder appears when it is whole."""

    def on_end(self, step: int) -> None:
        """After the last step of this start, finished or not."""


class Callbacks:
    """The run's own writers and the user's callbacks as one.

    What a writer of the run raises ends the run there and then. A user's callback that raises is
    not called again: the run saves, stops, and names it in its error.
    """

    def __init__(
        self, writers: Sequence[Callback], of_user: Sequence[Callback], stop: Callable[[], None]
    ) -> None:
        """Takes what asks the run to stop, which is called when a user's callback raises."""
        self._writers = writers
        self._of_user = list(of_user)
        self._stop = stop
        self._error: RunError | None = None

    def tell(self, event: str, *arguments: object) -> None:
        """Calls the method `event` of all of them."""
        for writer in self._writers:
            getattr(writer, event)(*arguments)
        for callback in list(self._of_user):
            with self._kept(callback, event):
                getattr(callback, event)(*arguments)

    def check(self) -> None:
        """Raises RunError if a user's callback has raised."""
        if self._error is not None:
            raise self._error

    @contextlib.contextmanager
    def _kept(self, callback: Callback, event: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._of_user.remove(callback)
            if self._error is None:
                name = type(callback).__name__
                self._error = RunError(
                    f"the callback {name} raised {type(error).__name__} in {event}: "
                    f"{first_line(error)}. Everything is saved; mend it, and the same command goes "
                    "on"
                )
                self._error.__cause__ = error
            self._stop()
