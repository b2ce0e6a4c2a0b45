"""Processes that work for another one."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import threading

from mlip_jax.core.cores import cores
from mlip_jax.core.errors import UserError

# Batches of a worker that exist at a time: in the making, sent, two received, one with the training
# step, which may have one more.
BATCHES_IN_FLIGHT = 5
_MAX_WORKERS = 32
_SHARED = "/dev/shm"


def end_with_parent() -> None:
    """Ends this process when the one that started it does, however that ends."""
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)


def worker_count(workers: int, batch: int = 0) -> int:
    """How many processes decode and augment: `config.data.workers`, -1 by cores and memory.

    With up to two cores a thread beside the training step is faster than a process.

    Args:
      workers: as the config has it.
      batch: bytes of a process's batch: as many workers as their shared memory holds.

    Raises:
      UserError: when the shared memory is too small for `workers`.
    """
    if workers == 0 or workers < 0 and cores() <= 2:
        return 0
    # Writing to more than there is would end a worker by a signal, without a word.
    room = (_shared_bytes() // max(batch, 1) - 1) // BATCHES_IN_FLIGHT
    if workers < 0:
        return max(0, min(_MAX_WORKERS, cores() - 1, room))
    if workers > room:
        need = (BATCHES_IN_FLIGHT * workers + 1) * batch
        raise UserError(
            f"config.data.workers={workers} needs {need / 2**20:,.0f} MiB of "
            f"{_SHARED}, and {_shared_bytes() / 2**20:,.0f} MiB are free: give the container more "
            f"(docker run --shm-size), or set --config.data.workers={max(room, 0)}"
        )
    return workers


def _shared_bytes() -> int:
    """Free memory that processes may share."""
    return shutil.disk_usage(_SHARED).free if os.path.isdir(_SHARED) else sys.maxsize
