"""A run's folder: who may write there, which config it belongs to, and where it came from."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mlip_jax.core import locks, places, schema, versions
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import check_writable, remove_drafts, write_atomically
from mlip_jax.core.trained import ENVIRONMENT, FOLDER, read_config
from mlip_jax.devices import processes

TOKENIZER = "tokenizer.json"
_LOCK = ".lock"
_SHARED_SECONDS = 60


# Of the folder, its config and the new one; see `open_workdir`.
Accept = Callable[[Path, ConfigDict, ConfigDict], None]


def refuse_changes(folder: Path, old: ConfigDict, new: ConfigDict) -> None:
    """Raises UserError unless a run may go on under the new config as it is."""
    changed = schema.differences(old, new)
    if changed:
        raise UserError(
            f"{folder} holds a run of another config ({'; '.join(changed)}): give another "
            "--workdir, or the old values to go on"
        )


@contextlib.contextmanager
def open_workdir(
    workdir: str | os.PathLike[str], config: ConfigDict, accept: Accept = refuse_changes
) -> Iterator[Path]:
    """Makes or reopens a run's folder and holds its lock, so that one run at a time writes there.

    Writes config.json and environment.json. Keys that may change at a resume take their new
    values.

    All processes of a run open it together; process 0 holds the lock and writes.

    Args:
      workdir: the run's folder.
      config: the run's.
      accept: called in process 0 where the folder holds a run already; it raises UserError when
        that run cannot go on under this config, and may change the folder so that it can.

    Raises:
      UserError: if another run trains there, a run of another config is kept there, or not all
        processes see the folder.
    """
    folder = places.local(workdir)
    with contextlib.ExitStack() as held:
        holder = processes.by_first(lambda: _take(folder, config, held, accept))
        _check_shared(folder, holder)
        yield folder


def _take(folder: Path, config: ConfigDict, held: contextlib.ExitStack, accept: Accept) -> str:
    """Locks the folder until `held` is closed, writes what it is, and returns who holds it."""
    check_writable(folder, "--workdir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holder = held.enter_context(locks.held(folder / _LOCK))
    except locks.InUse as other:
        raise UserError(
            f"{other} trains in {folder} already: stop it, or give another --workdir"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        in_the_way = "" if error.filename in (None, str(folder)) else f"{error.filename}: "
        raise UserError(
            f"cannot use {str(folder)[:200]} as --workdir: {in_the_way[:300]}{error.strerror}"
        ) from error
    for place in (folder, folder / "report"):
        remove_drafts(place, others_write=True)
    path = folder / "config.json"
    if os.path.lexists(path):
        accept(folder, read_config(folder), config)
    write_atomically(path, schema.to_json(config))
    recorded = {**environment(), FOLDER: str(Path.cwd())}
    write_atomically(folder / ENVIRONMENT, json.dumps(recorded, indent=2))
    return holder


def _check_shared(folder: Path, holder: str) -> None:
    """Raises UserError where a process does not see what process 0 has just written."""
    deadline = time.monotonic() + _SHARED_SECONDS
    while jax.process_index():
        # Shared file systems show new files late.
        if locks.holder(folder / _LOCK) == holder:
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"process {jax.process_index()} on {socket.gethostname()} does not see what "
                f"process 0 writes in {folder}: --workdir must be on a file system that all share, "
                "or in a bucket"
            )
        time.sleep(0.1)


def environment() -> dict[str, Any]:
    """Versions, the commit, devices and the command: what one needs to repeat a run."""
    return {
        **origin(),
        "platform": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "command": shlex.join(sys.argv),
    }


@functools.cache  # what runs is what was there at the start, whatever is edited since
def origin() -> dict[str, Any]:
    """Versions of this package and what it stands on, and the commit: {"versions", "commit"}."""
    return {"versions": versions.installed(), "commit": _commit()}


def _commit() -> str | None:
    """The commit of a checkout, with "-dirty" after it if files differ; None when installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.strip()
