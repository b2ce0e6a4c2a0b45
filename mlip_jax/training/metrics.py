"""What a run reports while it goes: a progress bar, metrics.jsonl, TensorBoard and its speed."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
)
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from mlip_jax.core import places
from mlip_jax.core.errors import RunError
from mlip_jax.core.files import decode_json, write_atomically
from mlip_jax.core.stages import Stage
from mlip_jax.training.callbacks import Callback

_PACES = 100  # steps whose median is the measure
_FEWEST_PACES = 10
_OUTLIER = 3.0
_MUCH_WAITING = 0.05  # share of the time that is shown beside the bar


class Clock:
    """Images a second, and the share of the time that the loop stood waiting for data."""

    def __init__(
        self,
        seen: Callable[[int], int],
        done: int = 0,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Starts the first lap.

        Args:
          seen: images of the run after so many steps, over all devices.
          done: steps that are done already.
          now: seconds from some fixed moment.
        """
        self._seen = seen
        self._now = now
        self._measured: dict[str, float] = {}
        self.rest(done)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what happens inside as waiting: `with clock.waiting(): batch = next(batches)`."""
        start = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - start

    def lap(self, done: int, brought: int = 0) -> dict[str, float]:
        """{"images_per_second", "data_wait"} since the last lap, and starts the next.

        Args:
          done: steps that the devices have done by now; what is under way does not count. Where
            none is done since the last lap, it goes on, and the figures are those of the one
            before.
          brought: bytes of data that have come from buckets so far. Where there are any,
            "bucket_bytes_per_second" is measured, too.
        """
        if done > self._done:
            seconds = max(self._now() - self._start, 1e-9)
            self._measured = {
                "images_per_second": (self._seen(done) - self._seen(self._done)) / seconds,
                "data_wait": min(self._waited / seconds, 1.0),
            }
            if brought:
                bucket_bytes = max(brought - self._brought, 0)
                self._measured["bucket_bytes_per_second"] = bucket_bytes / seconds
            self.rest(done, brought)
        return self._measured

    def rest(self, done: int, brought: int = 0) -> None:
        """Starts a lap after what is no training, such as an evaluation; arguments as for `lap`."""
        self._start, self._waited = self._now(), 0.0
        self._done, self._brought = done, brought


class Slow(NamedTuple):
    """Steps that took far longer than their like."""

    steps: int
    longest: float  # seconds


class Paces:
    """The times of steps, and which of them stand out: more than three times the median."""

    def __init__(self) -> None:
        self._before: float | None = None
        self._recent: collections.deque[float] = collections.deque(maxlen=_PACES)
        self._slow: list[float] = []

    @property
    def last(self) -> float | None:
        """Seconds of the newest step; None before two have followed each other."""
        return self._recent[-1] if self._recent else None

    def add(self, moment: float) -> None:
        """Takes when a step was done."""
        if self._before is not None:
            seconds = moment - self._before
            if len(self._recent) >= _FEWEST_PACES and seconds > _OUTLIER * median(self._recent):
                self._slow.append(seconds)
            self._recent.append(seconds)
        self._before = moment

    def rest(self) -> None:
        """The next step follows a pause: its time says nothing."""
        self._before = None

    def take_slow(self) -> Slow | None:
        """The outliers since the last call; None without any."""
        if not self._slow:
            return None
        slow = Slow(len(self._slow), max(self._slow))
        self._slow = []
        return slow


class MetricWriter(Callback):
    """Writes what the loop measured; only process 0 writes, on the others every call is empty.

    A line of metrics.jsonl is one JSON object: "step" (steps done), "samples" (pairs seen), "time"
    (seconds since 1970) and the scalars by name; null for what is not finite.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        seen: Callable[[int], int],
        total_steps: int,
        work: Callable[[int], float] = float,
        start_step: int = 0,
        active: bool = True,
        console: Console | None = None,
    ) -> None:
        """Opens the files; those of an earlier start are cut back to `start_step`.

        Args:
          workdir: the run's folder.
          seen: pairs of the run after so many steps, over all devices.
          total_steps: steps of the whole run.
          work: what so many steps cost, in any unit: what is left of it tells how long the rest
            takes.
          start_step: steps already done.
          active: whether this process writes.
          console: where progress goes; None: standard error.

        Raises:
          RunError: if the files cannot be written.
        """
        self._active = active
        if not active:
            return
        self._seen, self._work = seen, work
        self._total, self._start = total_steps, start_step
        self._started = time.monotonic()
        self._paces = Paces()
        self._console = console or Console(stderr=True)
        self._path = Path(workdir) / "metrics.jsonl"
        with _writing(self._path):
            cut_back(self._path, start_step)
            # Unbuffered: a line is on disk, or known not to be, when the call returns.
            self._lines = self._path.open("ab", buffering=0)
            folder = Path(workdir) / "tensorboard"
            folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(folder / "events"))
            if start_step:
                # TensorBoard drops what an interrupted start wrote from this step on.
                restart = SessionLog(status=SessionLog.START)
                self._event(start_step + 1, session_log=restart)
                self._events.flush()
        self._copies = contextlib.ExitStack()
        self._copies.enter_context(places.following(self._path, folder))
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TextColumn("{task.fields[left]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "starting", total=total_steps, completed=start_step, left=""
            )
            self._bar.start()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def on_stage(self, stage: Stage) -> None:
        """Says which stage begins, whose steps have a pace of their own."""
        if not self._active:
            return
        self._paces = Paces()
        self.note(str(stage))

    def on_step(self, step: int) -> None:
        """Moves the bar, and times the step."""
        if not self._active:
            return
        self._paces.add(time.monotonic())
        if self._bar:
            self._bar.update(self._task, completed=step, left=self._left(step))

    def begin(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the first step of this start, whose interval is still to come; writes no file."""
        if not self._active:
            return
        pace = self._paces.last
        images = self._seen(step + 1) - self._seen(step)
        speed = {"images_per_second": images / pace} if pace else {}
        self._show(step, {**metrics, **speed})

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one interval's training metrics and prints a line about them.

        Raises:
          RunError: if the disk refuses it; the file keeps its whole lines.
        """
        if not self._active:
            return
        self._write(step, metrics)
        self._show(step, metrics)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """The pause before the next step is none of its time."""
        del step, folder
        if self._active:
            self._paces.rest()

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        text = describe(metrics)
        if slow := self._paces.take_slow():
            plural = "s" if slow.steps > 1 else ""
            text += f"  {slow.steps} slow step{plural}, up to {slow.longest:.1f} s"
        if self._bar:
            self._bar.update(self._task, description=brief(metrics))
        self._print(f"step {step}/{self._total}  {text}  left {self._left(step)}")

    def _left(self, step: int) -> str:
        """The time that the rest will take, at the speed since the start."""
        step = max(step, self._start + 1)
        done = self._work(step) - self._work(self._start)
        rate = (time.monotonic() - self._started) / done
        seconds = rate * max(self._work(self._total) - self._work(step), 0.0)
        return time.strftime("%H:%M:%S", time.gmtime(seconds))

    def on_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes an evaluation's figures, such as "retrieval/SET/text_to_image_recall@1".

        Raises:
          RunError: if the disk refuses it; the file keeps its whole lines.
        """
        if self._active:
            self._write(step, figures)

    def note(self, message: Any) -> None:
        """Prints a line, or anything that rich can draw, above the bar."""
        if self._active:
            self._print(message)

    def close(self) -> None:
        """Ends the bar and closes the files.

        Raises:
          RunError: if a bucket does not take them.
        """
        if not self._active:
            return
        if self._bar:
            self._bar.stop()
        self._lines.close()
        # Every write was flushed; what could fail again here has been told already.
        with contextlib.suppress(OSError):
            self._events.close()
        self._copies.close()

    def _print(self, message: Any) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        now = time.time()
        line: dict[str, float | None] = {
            "step": step,
            "samples": self._seen(step),
            "time": round(now, 3),
        }
        line |= {key: float(v) if math.isfinite(v) else None for key, v in scalars.items()}
        left = json.dumps(line).encode() + b"\n"
        whole = self._lines.tell()
        with _writing(self._path):
            try:
                while left:
                    left = left[self._lines.write(left) :]
            except OSError:
                self._lines.truncate(whole)
                raise
            for key, value in scalars.items():
                self._event(step, wall_time=now, summary=scalar(key, value))
            self._events.flush()

    def _event(self, step: int, **content: Any) -> None:
        # tensorboardX's own SummaryWriter writes in a thread, and on a full disk blocks for ever.
        self._events.write_event(Event(step=step, **content))


def cut_back(path: Path, step: int) -> None:
    """Leaves of metrics.jsonl what an uninterrupted run has after `step` steps.

    Drops lines of later steps, which will be written again, and a line that a killed process
    left unfinished. The file is changed whole or not at all.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = "".join(line for line in text.splitlines(keepends=True) if _is_kept(line, step))
    if kept != text:
        write_atomically(path, kept)


def _is_kept(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and decode_json(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def describe(scalars: Mapping[str, float]) -> str:
    """One line for people: the losses, the speed, the data wait, the samples of each set."""
    parts = [f"loss {scalars['loss']:.3f}"] if "loss" in scalars else []
    views = {key[5:]: value for key, value in scalars.items() if key.startswith("loss/")}
    if len(views) > 1:
        each = ", ".join(f"{view} {value:.3f}" for view, value in views.items())
        parts[-1:] = [" ".join([*parts[-1:], f"({each})"])]
    if "images_per_second" in scalars:
        parts.append(f"{scalars['images_per_second']:,.0f} images/s")
    if "data_wait" in scalars:
        parts.append(f"data wait {100 * scalars['data_wait']:.0f} %")
    if "bucket_bytes_per_second" in scalars:
        parts.append(f"{scalars['bucket_bytes_per_second'] / 1e6:,.1f} MB/s from buckets")
    if "learning_rate" in scalars:
        parts.append(f"lr {scalars['learning_rate']:.1e}")
    sets = {key[8:]: count for key, count in scalars.items() if key.startswith("samples/")}
    if sets:
        parts.append("of " + ", ".join(f"{name} {count:,.0f}" for name, count in sets.items()))
    return "  ".join(parts)


def brief(scalars: Mapping[str, float]) -> str:
    """What stands beside the bar, which leaves few columns of 80."""
    parts = [f"loss {scalars['loss']:.3f}"] if "loss" in scalars else []
    if "images_per_second" in scalars:
        parts.append(f"{scalars['images_per_second']:,.0f} images/s")
    if scalars.get("data_wait", 0.0) >= _MUCH_WAITING:
        parts.append(f"data wait {100 * scalars['data_wait']:.0f} %")
    if "learning_rate" in scalars:
        parts.append(f"lr {scalars['learning_rate']:.1e}")
    return " ".join(parts)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {error.filename or path}: {error.strerror}; the last checkpoint is "
            "good, and the same command goes on from it"
        ) from error
