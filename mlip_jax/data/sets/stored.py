"""Files of datasets in buckets, kept on this machine for all of its processes.

Below `cache_folder` each dataset has a folder of its own. A `Store` holds all files of a split as
long as its process lives. `Shards` holds as many as there is room for, each while it is needed.
When other files would be more than the cache may hold, datasets that no process has open and shards
that are not needed make room, the longest unused first. The cache may hold $MLIP_JAX_CACHE_GIB, or
what the disk has free but for a tenth.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mlip_jax.core.buckets import Mirror
from mlip_jax.core.cache import cache_folder
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.files import (
    exclusively,
    is_draft,
    read_json,
    remove_drafts,
    whole_file,
    write_atomically,
)

LIMIT = "MLIP_JAX_CACHE_GIB"
_GIB = 2**30
_IN_USE, _BRINGING, _BROUGHT = ".in-use", ".bringing", "brought.json"
_SHARDS = "shards"  # the folder of those that come and go
_CLAIM = ".claim"  # what the lock of a shard that is being brought is called; as large as that
_FRESH = 60.0  # seconds for which a shard is needed that was used now
_PATIENCE, _POLL = 5.0, 0.1  # seconds for which room is waited for, and between two looks
_STREAM = ", or train with config.data.window=16, which brings shards when they are needed"
_FEWER = ", or config.data.window to fewer shards"
_RELEASED = 86_400.0  # seconds by which one that is not needed any more is older than it is
_held: dict[Path, TextIO] = {}  # what this process has open stays until it ends

_brought = 0  # bytes
_counting = threading.Lock()


def brought() -> int:
    """The bytes that this process has brought from buckets so far."""
    return _brought


def _count(size: int) -> None:
    global _brought
    with _counting:
        _brought += size


File = tuple[str, int, str]  # name, bytes, SHA-256


class Store:
    """The files of one dataset in a bucket that are here."""

    def __init__(self, url: str, cache_dir: str) -> None:
        """Opens the dataset's folder in the cache.

        Raises:
          UserError: for a URL that cannot be read.
        """
        url = url.rstrip("/")
        self._url = url
        self.folder = _folder(url, cache_dir) / url.rpartition("/")[2]
        self._bucket = Mirror(url, self.folder)
        _hold(self.folder)

    def bring_anew(self, name: str) -> None:
        """Brings a small file, as it is in the bucket now.

        Raises:
          UserError: where there is none.
        """
        content = self._bucket.read(name)
        if content is None:
            raise UserError(f"{self._url} holds no {name}: check the URL")
        with whole_file(self.folder / name) as draft:
            draft.write_bytes(content)

    def bring(self, files: Sequence[File]) -> None:
        """Brings the files that are not here; one process of a machine does it, the others wait.

        Raises:
          UserError: for a file that is missing or is another one, and when there is no room.
        """
        with exclusively(self.folder.parent / _BRINGING):
            brought = read_json(self.folder.parent / _BROUGHT, missing={})
            lacking = [file for file in files if not self._is_here(file, brought)]
            if not lacking:
                return
            remove_drafts(self.folder)
            size = sum(size for _, size, _ in lacking)
            with exclusively(self.folder.parent.parent / _BRINGING):
                _make_room(self.folder.parent.parent, size, self._url, _STREAM)
            print(
                f"{self._url}: bringing {len(lacking):,} files of {size / _GIB:,.2f} GiB to "
                f"{self.folder}",
                file=sys.stderr,
            )
            for file in lacking:
                self._bring(file)
                brought[file[0]] = file[2]
                write_atomically(self.folder.parent / _BROUGHT, json.dumps(brought))

    def _is_here(self, file: File, brought: Mapping[str, str]) -> bool:
        name, size, checksum = file
        with contextlib.suppress(OSError):
            return brought.get(name) == checksum and (self.folder / name).stat().st_size == size
        return False

    def _bring(self, file: File) -> None:
        name, _, expected = file
        with whole_file(self.folder / name) as draft:
            if not self._bucket.download(name, draft):
                raise UserError(f"{self._url} is damaged: {name} is missing; copy it there again")
            with draft.open("rb") as content:
                actual = hashlib.file_digest(content, "sha256").hexdigest()
            if actual != expected:
                raise UserError(
                    f"{self._url} is damaged: {name} is not what the index says, it was changed or "
                    "cut short; copy the dataset there again"
                )


class Version(NamedTuple):
    """A shard in a bucket as it was found: what is brought must be it."""

    size: int  # bytes
    mark: str  # what tells it from another of its name
    checksum: str = ""  # SHA-256, where it is known


class Shards:
    """Shards of one dataset in a bucket, each here for as long as it is needed and there is room.

    Threads and processes may use it at once; it is cheap to pickle.
    """

    def __init__(self, url: str, cache_dir: str) -> None:
        """Opens the dataset's folder in the cache.

        Args:
          url: of a folder in a bucket; shards lie in it and below.
          cache_dir: see `cache_folder`.

        Raises:
          UserError: for a URL that cannot be read.
        """
        self.url = url.rstrip("/")
        self._cache_dir = cache_dir
        self._folder = _folder(self.url, cache_dir) / _SHARDS
        self.bucket = Mirror(self.url, self._folder)
        self.bucket.afterwards = ""
        _hold(self._folder)

    def __reduce__(self) -> tuple[type[Shards], tuple[str, str]]:
        return Shards, (self.url, self._cache_dir)  # connections stay in their process

    def find(self, name: str, version: Version) -> Path | None:
        """The local file of a shard, which is noted to be needed; None: it is not here."""
        path = self._path(name, version)
        with contextlib.suppress(OSError):
            if path.stat().st_size == version.size:
                os.utime(path)
                return path
        return None

    def bring(self, name: str, version: Version) -> Path:
        """The local file of a shard. Where it is not here, one process brings it, others wait.

        Raises:
          RunError: when there is no room, when it is not there any more, or is another one, and
            when its server stays away.
        """
        if found := self.find(name, version):
            return found
        path = self._path(name, version)
        try:
            with _claimed(path) as claim:
                if found := self.find(name, version):  # brought by another meanwhile
                    return found
                remove_drafts(self._folder, others_write=True)
                self._claim_room(version.size, claim)
                with whole_file(path) as draft:
                    if not self.bucket.download(name, draft):
                        raise RunError(f"{self.url}/{name} is not there any more")
                    self._check(name, version, draft)
                _count(version.size)
            return path
        except UserError as error:  # that there is no room
            raise RunError(str(error)) from error
        except OSError as error:  # which would count as an image that cannot be read
            raise RunError(
                f"cannot keep {self.url}/{name} in {self._folder}: {error.strerror or error}"
            ) from error

    def _claim_room(self, size: int, claim: TextIO) -> None:
        """Makes room for a shard; waits a little for those that are about to be released."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                with exclusively(self._folder.parent.parent / _BRINGING):
                    _make_room(self._folder.parent.parent, size, self.url, _FEWER)
                    claim.truncate(size)
                return
            except UserError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL)

    def part(self, name: str, start: int, end: int) -> bytes:
        """Bytes of a shard, read from the bucket.

        Raises:
          RunError: when it is not there any more, or its server stays away.
        """
        content = self.bucket.read_part(name, start, end)
        if content is None:
            raise RunError(f"{self.url}/{name} is not there any more")
        _count(len(content))
        return content

    def release(self, name: str, version: Version) -> None:
        """Says that a shard is not needed for long: it is the first to make room."""
        path = self._path(name, version)
        with contextlib.suppress(OSError):
            last = time.time() - _RELEASED
            os.utime(path, (last, last))

    def _path(self, name: str, version: Version) -> Path:
        digest = hashlib.sha256(f"{name}\0{version.mark}".encode()).hexdigest()[:16]
        return self._folder / f"{digest}-{name.rpartition('/')[2][-100:]}"

    def _check(self, name: str, version: Version, draft: Path) -> None:
        """Raises RunError unless what was brought is the version that was found at the opening."""
        changed = ""
        if (size := draft.stat().st_size) != version.size:
            changed = f"has {size:,} bytes, not {version.size:,}"
        elif version.checksum:
            with draft.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != version.checksum:
                    changed = "is not what the index says"
        elif mark_of(self.bucket.version(name)) != version.mark:
            changed = "is another one"
        if changed:
            raise RunError(
                f"{self.url}/{name} {changed}: it was changed since the dataset was opened"
            )


def mark_of(version: Sequence[Any] | None) -> str:
    """A text for what a listing tells of an object's version."""
    return "" if version is None else " ".join(map(str, version))


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[TextIO]:
    """Holds the right to write a file; the claim's size counts as used."""
    claim = path.with_name(f"{path.name}{_CLAIM}")
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


def _folder(url: str, cache_dir: str) -> Path:
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_folder(cache_dir) / "datasets" / digest


def _make_room(above: Path, size: int, url: str, instead: str) -> None:
    """Removes what is not needed until `size` bytes fit.

    Args:
      above: the folder of all datasets.
      size: bytes.
      url: for which there must be room.
      instead: what else may be done where there is none.

    Raises:
      UserError: when what is needed leaves none.
    """
    used = _used(above)
    limit = _limit(above, used - sum(map(_size, _claims(above))))
    for remove in _removable(above, url) if used + size > limit else ():
        used -= remove()
        if used + size <= limit:
            break
    if used + size > limit:
        raise UserError(
            f"{url} needs {size / _GIB:,.2f} GiB more in {above}, which may hold "
            f"{limit / _GIB:,.2f} GiB and has {used / _GIB:,.2f} GiB in use: set {LIMIT} higher, "
            f"or config.data.cache_dir to a larger disk{instead}"
        )


def _used(folder: Path) -> int:
    """The bytes of a folder. What is being brought counts by its claim."""
    total = 0
    for path in folder.rglob("*"):
        total += _size(path) if path.is_file() and not is_draft(path) else 0
    return total


def _size(path: Path) -> int:
    """Its bytes; none where another process has removed it meanwhile."""
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _claims(above: Path) -> Iterator[Path]:
    return above.glob(f"*/{_SHARDS}/*{_CLAIM}")


def _removable(above: Path, url: str) -> list[Callable[[], int]]:
    """What may be removed, the longest unused first; each gives the bytes that it freed."""
    found: list[tuple[float, Callable[[], int]]] = []
    own = _folder(url, "").name
    for folder in above.iterdir():
        if folder.is_dir() and folder.name != own:
            found.append((_last_use(folder), partial(_remove_unused, folder)))
        for path in folder.glob(f"{_SHARDS}/*"):
            with contextlib.suppress(OSError):
                used = path.stat().st_mtime
                if time.time() - used > _FRESH and path.suffix != _CLAIM:
                    found.append((used, partial(_remove_shard, path)))
                elif path.suffix == _CLAIM:
                    found.append((used, partial(_remove_claim, path)))
    return [remove for _, remove in sorted(found, key=lambda one: one[0])]


def _remove_shard(path: Path) -> int:
    with contextlib.suppress(OSError):
        size = path.stat().st_size
        path.unlink()
        return size
    return 0


def _remove_claim(path: Path) -> int:
    """Removes the claim of a process that was killed."""
    with contextlib.suppress(OSError), path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _remove_shard(path)
    return 0


def _hold(folder: Path) -> None:
    """Makes a dataset's folder, and keeps it from being removed as long as this process lives."""
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


def _limit(folder: Path, used: int) -> float:
    text = os.environ.get(LIMIT, "")
    if not text:
        return used + 0.9 * shutil.disk_usage(folder).free
    try:
        return float(text) * _GIB
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
        size = _used(folder)
        shutil.rmtree(folder)
        return size
    return 0
