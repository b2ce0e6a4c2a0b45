"""Child processes of a device check, each within its time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

MINUTES = 8.0  # for all entries; what an entry may take is told for these
NO_TIME = "no time left"
_LEAST_SECONDS = 5.0  # with less an entry is not begun
_POLL_SECONDS = 0.02


class Owed(Exception):
    """Why an entry has no figures although nothing failed."""


class Failed(Exception):
    """What went wrong in an entry."""


class Ended(NamedTuple):
    """How a child process ended.

    Attributes:
      code: its exit code, that of a signal below 0; None when its time was over.
      output: stdout and stderr.
    """

    code: int | None
    output: str

    def why(self) -> str:
        """Its error message, else its last line, after the exit code."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:")]
        return f"exit code {self.code}: {(errors or lines or ['no output'])[-1]}"


Run = Callable[[Sequence[str], Path, float, Callable[[], bool] | None], Ended]


def run_child(
    arguments: Sequence[str],
    log: Path,
    seconds: float,
    stop_when: Callable[[], bool] | None = None,
    *,
    environment: Mapping[str, str],
) -> Ended:
    """Runs Python in a process group of its own, which is killed when its time is over.

    Args:
      arguments: of Python.
      log: a file to which the output is appended.
      seconds: the time that it has.
      stop_when: asked again and again; SIGTERM is sent when it says so.
      environment: all variables.
    """
    end, code = time.monotonic() + seconds, None
    with log.open("a+") as output:
        begin = output.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        try:
            while (code := child.poll()) is None and time.monotonic() < end:
                if stop_when and stop_when():
                    child.send_signal(signal.SIGTERM)
                    stop_when = None
                time.sleep(_POLL_SECONDS)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        output.seek(begin)
        return Ended(code, output.read())


class Children:
    """Child processes, each within the time of its entry and of the whole check."""

    def __init__(
        self,
        logs: Path,
        seconds: float,
        run: Run,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """The time begins.

        Args:
          logs: a folder for the output of each entry.
          seconds: for all entries.
          run: starts a process and waits for it.
          now: a clock, in seconds.
        """
        self._logs, self._run, self._now = logs, run, now
        self._end = now() + seconds
        self._slowness = max(seconds / (60 * MINUTES), 1.0)
        self._entry_end = self._end
        self._log = logs / "log"

    def begin(self, name: str, seconds: float) -> None:
        """Begins an entry, which has at most that time, or more where the whole check has more.

        Raises:
          Owed: when hardly any time is left.
        """
        if self._end - self._now() < _LEAST_SECONDS:
            raise Owed(NO_TIME)
        self._entry_end = min(self._end, self._now() + seconds * self._slowness)
        self._log = self._logs / f"{re.sub(r'[^a-z0-9.]+', '_', name.lower())}.log"
        self._log.write_text("")

    def python(self, *arguments: str, stop_when: Callable[[], bool] | None = None) -> Ended:
        """Runs Python to its end; sends SIGTERM when `stop_when` says so.

        Raises:
          Owed: when the time of the whole check is over.
          Failed: when that of the entry is.
        """
        ended = self._run(arguments, self._log, self._entry_end - self._now(), stop_when)
        if ended.code is None:
            if self._entry_end == self._end:
                raise Owed(NO_TIME)
            raise Failed("took longer than an entry may")
        return ended
