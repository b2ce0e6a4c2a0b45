"""One run at a time in a folder: a lock of the file system, or a lease in a bucket.

A lease is an object that its holder writes again at intervals. One whose holder is gone, or has not
written for LEASE seconds by the server's clock, may be taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mlip_jax.core import places
from mlip_jax.core.buckets import Mirror
from mlip_jax.core.errors import RunError
from mlip_jax.core.files import NotJson, decode_json, named_if_full, open_lock

LEASE = 60.0  # seconds
_BEATS = 4  # times that a lease is written anew while it lasts
_tokens: set[str] = set()  # of the leases that this process holds now


class InUse(Exception):
    """Another process holds a lock; says which one."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[str]:
    """Holds a lock file; gives what it holds now, by which others know this holder.

    Raises:
      InUse: while another process holds it.
      OSError: when the file cannot be made.
    """
    mirror = places.mirror_of(path)
    with _locked(path) if mirror is None else _leased(path.absolute(), mirror) as content:
        yield content


@contextlib.contextmanager
def leased(path: Path) -> Iterator[None]:
    """Holds a lock file of a place in a bucket; does nothing about one of this machine.

    Raises:
      InUse: while another process holds it.
    """
    mirror = places.mirror_of(path)
    if mirror is None:
        yield
        return
    with _leased(path.absolute(), mirror):
        yield


def holder(path: Path) -> str:
    """What a lock file holds; nothing where there is none."""
    if mirror := places.mirror_of(path):
        return (mirror.read(_name(path.absolute(), mirror)) or b"").decode(errors="replace")
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8")
    return ""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[str]:
    content = str(os.getpid())
    with open_lock(path) as file:
        _lock(file)
        with named_if_full(path):
            # Past the buffer, which would be written again when the file is closed.
            os.ftruncate(file.fileno(), 0)
            os.pwrite(file.fileno(), content.encode(), 0)
        yield content


def _lock(file: TextIO) -> None:
    # A record lock: it ends with this process, and the processes that load data do not inherit it.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise InUse(f"process {file.read().strip() or '?'}") from error


@contextlib.contextmanager
def _leased(path: Path, mirror: Mirror) -> Iterator[str]:
    name = _name(path, mirror)
    host, pid, token = socket.gethostname(), os.getpid(), uuid.uuid4().hex
    content = json.dumps(
        {"host": host, "process": pid, "life": _life(pid), "token": token}
    ).encode()
    _take(name, content, mirror)
    _tokens.add(token)
    mirror.held = True
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(LEASE / _BEATS):
            with contextlib.suppress(RunError):  # of a server that is away; others cannot take it
                if mirror.read(name) not in (content, None):
                    mirror.lost = (
                        f"another run has taken over {mirror.url}, as this one did not write there "
                        f"for {LEASE:.0f} s: this one ends"
                    )
                    return
                mirror.write(name, content)

    thread = threading.Thread(target=beat, daemon=True, name="lease")
    thread.start()
    try:
        yield content.decode()
    finally:
        ended.set()
        thread.join()
        mirror.held = False
        _tokens.discard(token)
        with contextlib.suppress(RunError):  # it ends by itself
            if not mirror.lost:
                mirror.delete(name)


def _take(name: str, content: bytes, mirror: Mirror) -> None:
    """Writes the lease.

    Raises:
      InUse: while another process has it.
    """
    for _ in range(3):
        if mirror.create(name, content):
            return
        former = mirror.read(name)
        if former is None:
            continue
        try:
            about = decode_json(former)
        except NotJson:
            about = {}
        who = f"process {about.get('process', '?')} on {about.get('host', '?')}"
        runs = _runs_here(about)
        if runs is None:
            print(f"{mirror.url}: waiting for a sign of life of {who}", file=sys.stderr)
            runs = _writes_again(name, mirror)
        if runs:
            raise InUse(who)
        print(f"{mirror.url}: taken over from {who}, which is gone", file=sys.stderr)
        if mirror.read(name) == former:
            mirror.delete(name)
    raise InUse("another process")


def _writes_again(name: str, mirror: Mirror) -> bool:
    """Whether a lease is written again before it ends, by the clock of the server."""
    first = mirror.written(name)
    while (then := mirror.written(name)) is not None:
        if then != first:
            return True
        if _now(name, mirror) - then > LEASE:
            return False
        time.sleep(LEASE / _BEATS / 5)
    return False


def _now(name: str, mirror: Mirror) -> float:
    """The server's clock."""
    probe = f"{name}.{uuid.uuid4().hex}"
    mirror.write(probe, b"")
    try:
        return mirror.written(probe) or 0.0
    finally:
        mirror.delete(probe)


def _life(pid: int) -> str:
    """What tells a process of this machine from a later one of its number; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        has_ended = status[0] in "ZX"  # nobody has asked for its exit code yet
        return "" if has_ended else f"{boot} {os.readlink('/proc/self/ns/pid')} {status[19]}"
    except OSError:
        return ""


def _runs_here(about: dict[str, object]) -> bool | None:
    """Whether the process that wrote a lease still runs; None: it is of another machine."""
    life, pid = str(about.get("life", "")), about.get("process")
    here = _life(os.getpid()).rpartition(" ")[0]
    if not here or not isinstance(pid, int) or life.rpartition(" ")[0] != here:
        return None
    if about.get("host") != socket.gethostname():
        return None
    if pid == os.getpid() and about.get("token") not in _tokens:
        return False  # this process could not remove it, as the server was away
    return _life(pid) == life


def _name(path: Path, mirror: Mirror) -> str:
    return path.relative_to(mirror.root).as_posix()
