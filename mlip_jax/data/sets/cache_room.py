"""Room in the cache of datasets in buckets: who holds what, and what is removed for others.

Below `cache_folder` each dataset has a folder of its own, which a process holds that has it open. A
shard is claimed while it is brought or opened: the claim counts as used, and no other process
brings or removes that shard. The cache may hold $MLIP_JAX_CACHE_GIB, or what the disk has free but
for a tenth.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from mlip_jax.core.cache import cache_folder
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import exclusively, is_draft

LIMIT = "MLIP_JAX_CACHE_GIB"
GIB = 2**30
SHARDS = "shards"  # the folder of those that come and go
_IN_USE, _MAKING_ROOM = ".in-use", ".bringing"
_SIZE = ".size"  # the bytes of a dataset of so many files that counting them would take long
_CLAIM = ".claim"  # what the lock of a shard is called; as large as what is being brought
_FRESH = 60.0  # seconds for which a shard is kept that was used now, unless there is need
_RELEASED = 86_400.0  # seconds by which one that is not needed any more is older than it is
_AHEAD = 0.5  # the share of the cache that may be on its way before it is needed
_POLL = 0.1  # seconds between two looks for room
_ADVICE = (
    f"set {LIMIT} higher, or config.data.cache_dir to a larger disk, or config.data.window to "
    "fewer shards"
)
_held: dict[Path, TextIO] = {}  # what this process has open stays until it ends
_told: set[str] = set()  # datasets of which was said that the cache is small for them


def dataset_folder(url: str, cache_dir: str) -> Path:
    """The folder of a dataset."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_folder(cache_dir) / "datasets" / digest


def hold(folder: Path) -> None:
    """Makes a folder in a dataset's, and keeps that as long as this process lives."""
    in_use = folder.parent / _IN_USE
    while folder not in _held:
        folder.mkdir(parents=True, exist_ok=True)
        file = in_use.open("w")
        fcntl.flock(file, fcntl.LOCK_SH)
        if (
            in_use.exists()
            and folder.is_dir()
            and os.path.samestat(os.fstat(file.fileno()), in_use.stat())
        ):
            _held[folder] = file
        else:  # it was removed while this process waited
            file.close()
    os.utime(in_use)


def let_go() -> None:
    """Holds nothing any more, as if this process had ended."""
    for file in _held.values():
        file.close()
    _held.clear()


def use(path: Path) -> None:
    """Says that a shard is needed now. Raises OSError where it is not there."""
    os.utime(path)


def release(path: Path) -> None:
    """Says that a shard is not needed for long: it is the first to make room."""
    with contextlib.suppress(OSError):
        last = time.time() - _RELEASED
        os.utime(path, (last, last))


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[TextIO]:
    """Holds the right to write a shard; the claim's size counts as used."""
    claim = _claim_of(path)
    while True:
        file = claim.open("a")
        fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), claim.stat()):
                break
        file.close()  # another process had it, and removed it
    with file:
        file.truncate(0)  # of a process that was killed
        try:
            yield file
        finally:
            claim.unlink(missing_ok=True)


def claim_room(above: Path, size: int, claim: TextIO, url: str, *, ahead: bool) -> None:
    """Makes room for a shard, and claims it.

    Shards that were used a moment ago make room too: a reader needs one at a time, so that none
    ever fails because of what others need. What is on its way to others is waited for.

    Args:
      above: the folder of all datasets.
      size: of the shard, in bytes.
      claim: of `claimed`.
      url: of the dataset.
      ahead: whether the shard is not needed yet: it takes the room of nothing that may be.

    Raises:
      UserError: when the cache can never hold it; with `ahead`, when there is no room now.
    """
    while True:
        with exclusively(above / _MAKING_ROOM):
            try:
                _make_room(above, size, url, _ADVICE, need=not ahead, ahead=ahead)
                claim.truncate(size)
                return
            except UserError:
                if ahead or not any(map(_is_busy, _claims(above))):
                    raise
        time.sleep(_POLL)


def make_room(above: Path, size: int, url: str, advice: str) -> None:
    """Makes room for a whole dataset by what nobody needs.

    Args:
      above: the folder of all datasets.
      size: bytes.
      url: of the dataset.
      advice: what can be done where there is none.

    Raises:
      UserError: when what is in use leaves none.
    """
    with exclusively(above / _MAKING_ROOM):
        _make_room(above, size, url, advice)


def _make_room(
    above: Path, size: int, url: str, advice: str, *, need: bool = False, ahead: bool = False
) -> None:
    """Removes files until `size` bytes fit; with `need`, also those that were used a moment ago."""
    for claim in _claims(above):
        _remove_dead(claim)
    used = _used(above)
    coming = sum(map(_size, _claims(above)))
    limit = _limit(above, used - coming)
    unused, fresh = _removable(above, url) if used + size > limit else ([], [])
    for remove in unused:
        if used + size <= limit:
            break
        used -= remove()
    for remove in fresh if need else ():
        if used + size <= limit:
            break
        used -= remove()
        _tell(url)
    if used + size > limit or (ahead and coming + size > _AHEAD * limit):
        raise UserError(
            f"{url} needs {size / GIB:,.2f} GiB more in {above}, which may hold "
            f"{limit / GIB:,.2f} GiB and has {used / GIB:,.2f} GiB in use: {advice}"
        )


def _tell(url: str) -> None:
    if url not in _told:
        _told.add(url)
        print(
            f"{url}: the cache is too small for the shards that are read at once, some are brought "
            f"again and again: set {LIMIT} higher, or config.data.window to fewer shards",
            file=sys.stderr,
        )


def reserve(folder: Path, size: int) -> None:
    """Notes the bytes that a dataset's folder will have; 0: that nobody knows them."""
    if size:
        (folder / _SIZE).write_text(str(size))
    else:
        (folder / _SIZE).unlink(missing_ok=True)


def _used(above: Path) -> int:
    """The bytes of all datasets."""
    return sum(map(_bytes, above.iterdir()))


def _bytes(folder: Path) -> int:
    """The bytes of a dataset, as they are noted. What is being brought counts by its claim."""
    with contextlib.suppress(OSError, ValueError):
        return int((folder / _SIZE).read_text())
    total = 0
    for path in folder.rglob("*"):
        total += _size(path) if path.is_file() and not is_draft(path) else 0
    return total


def _size(path: Path) -> int:
    """Its bytes; none where another process has removed it meanwhile."""
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _claim_of(path: Path) -> Path:
    return path.with_name(f"{path.name}{_CLAIM}")


def _claims(above: Path) -> list[Path]:
    return list(above.glob(f"*/{SHARDS}/*{_CLAIM}"))


def _is_busy(claim: Path) -> bool:
    """Whether a shard is brought or opened, which ends; and not whether its process waits."""
    return _size(claim) > 0 or claim.with_name(claim.name.removesuffix(_CLAIM)).exists()


def _removable(above: Path, url: str) -> tuple[list[Callable[[], int]], list[Callable[[], int]]]:
    """What nobody needs, and shards that were used a moment ago; the longest unused first.

    Each frees bytes when it is called, and gives their number.
    """
    unused: list[tuple[float, Callable[[], int]]] = []
    fresh: list[tuple[float, Callable[[], int]]] = []
    own = dataset_folder(url, "").name
    for folder in above.iterdir():
        if folder.is_dir() and folder.name != own:
            unused.append((_last_use(folder), partial(_remove_unused, folder)))
        for path in folder.glob(f"{SHARDS}/*"):
            with contextlib.suppress(OSError):
                used = path.stat().st_mtime
                if path.suffix != _CLAIM and not is_draft(path):
                    group = unused if time.time() - used > _FRESH else fresh
                    group.append((used, partial(_remove_shard, path)))
    first, last = ([remove for _, remove in sorted(g, key=lambda o: o[0])] for g in (unused, fresh))
    return first, last


def _remove_shard(path: Path) -> int:
    if _claim_of(path).exists():  # it is being opened
        return 0
    with contextlib.suppress(OSError):
        size = path.stat().st_size
        path.unlink()
        return size
    return 0


def _remove_dead(claim: Path) -> None:
    """Removes the claim of a process that was killed."""
    with contextlib.suppress(OSError), claim.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        claim.unlink()


def _limit(folder: Path, used: int) -> float:
    text = os.environ.get(LIMIT, "")
    if not text:
        return used + 0.9 * shutil.disk_usage(folder).free
    try:
        return float(text) * GIB
    except ValueError:
        raise UserError(f"{LIMIT}={text!r}: expected a number of GiB") from None


def _last_use(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return (folder / _IN_USE).stat().st_mtime
    return 0.0


def _remove_unused(folder: Path) -> int:
    """Removes a dataset's folder unless a process has it open; gives the bytes that it had."""
    with contextlib.suppress(OSError), (folder / _IN_USE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = _bytes(folder)
        shutil.rmtree(folder)
        return size
    return 0
