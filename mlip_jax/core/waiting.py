"""Says what a program is at, where it would otherwise be silent for long."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

QUIET = 2.0  # seconds that nobody minds
_LATER = (15.0, 60.0)  # seconds after which it is said again; from then on every minute


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def announced(words: str, say: Callable[[str], None] = _to_stderr) -> Iterator[None]:
    """Says what is done inside, if it takes longer than `QUIET`, and from time to time how long.

    A thread speaks, so that even what never returns to Python is announced.

    Args:
      words: such as "compiling the step".
      say: prints a line.
    """
    done = threading.Event()
    start = time.monotonic()

    def speak() -> None:
        if done.wait(QUIET):
            return
        say(f"{words} ...")
        moments = list(_LATER)
        while True:
            elapsed = time.monotonic() - start
            moment = moments.pop(0) if moments else elapsed + 60.0
            if done.wait(max(moment - elapsed, 0.0)):
                return
            say(f"{words} ... {time.monotonic() - start:.0f} s")

    speaker = threading.Thread(target=speak, name="announcements", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()
