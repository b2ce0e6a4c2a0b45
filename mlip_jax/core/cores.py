"""How many CPU cores there are to share work among."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager


def cores() -> int:
    """The CPU cores that this process may use, by its affinity and by a container's quota."""
    import joblib  # here: it takes its time to import, and worker processes need no count

    return joblib.cpu_count()


def numbered() -> list[int]:
    """The numbers of the CPU cores that this process may use; none where the system has none."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextmanager
def starting_on(numbers: Collection[int]) -> Iterator[None]:
    """Has the processes that are started inside use these cores alone; with none, all."""
    whole = numbered()
    if numbers:
        os.sched_setaffinity(0, numbers)  # what is started inherits it
    try:
        yield
    finally:
        if numbers:
            os.sched_setaffinity(0, whole)
