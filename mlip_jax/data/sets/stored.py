"""Files of datasets in buckets, kept on this machine for all of its processes.

A `Store` holds all files of a split as long as its process lives. `Shards` holds as many as there
is room for, each while it is needed; see `cache_room`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.files import (
    exclusively,
    read_json,
    remove_drafts,
    whole_file,
    write_atomically,
)
from mlip_jax.core.object_store import Bucket
from mlip_jax.data.sets import cache_room
from mlip_jax.data.sets.cache_room import GIB, SHARDS

_BRINGING, _BROUGHT = ".bringing", "brought.json"
_CHANGED = "it was changed since the dataset was opened"
_ROOM = (
    f"set {cache_room.LIMIT} higher, or config.data.cache_dir to a larger disk, or train with "
    "config.data.window=16, which brings shards when they are needed"
)
_T = TypeVar("_T")

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
        self.folder = cache_room.dataset_folder(url, cache_dir) / url.rpartition("/")[2]
        self._bucket = Bucket(url)
        cache_room.hold(self.folder)

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
            cache_room.make_room(self.folder.parent.parent, size, self._url, _ROOM)
            print(
                f"{self._url}: bringing {len(lacking):,} files of {size / GIB:,.2f} GiB to "
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
        self._folder = cache_room.dataset_folder(self.url, cache_dir) / SHARDS
        self.bucket = Bucket(self.url)
        cache_room.hold(self._folder)

    def __reduce__(self) -> tuple[type[Shards], tuple[str, str]]:
        return Shards, (self.url, self._cache_dir)  # connections stay in their process

    def find(self, name: str, version: Version) -> Path | None:
        """The local file of a shard, which is noted to be needed; None: it is not here."""
        path = self.path(name, version)
        with contextlib.suppress(OSError):
            if path.stat().st_size == version.size:
                cache_room.use(path)
                return path
        return None

    def bring(self, name: str, version: Version, *, ahead: bool = False) -> Path:
        """The local file of a shard. Where it is not here, one process brings it, others wait.

        It may be gone soon, when others need its room: see `opened`.

        Args:
          name: of the shard.
          version: that it must be.
          ahead: whether it is not needed yet, and so brought only if there is room.

        Raises:
          RunError: when there is no room, when it is not there any more, or is another one, and
            when its server stays away.
        """
        return self.find(name, version) or self.opened(name, version, Path, ahead=ahead)

    def opened(
        self, name: str, version: Version, open_file: Callable[[Path], _T], *, ahead: bool = False
    ) -> _T:
        """What a function makes of the local file of a shard, which stays as long as that takes.

        Raises:
          RunError: as `bring`.
        """
        path = self.path(name, version)
        with contextlib.ExitStack() as until_opened:
            with self._errors_told(name):
                claim = until_opened.enter_context(cache_room.claimed(path))
            while True:
                if self.find(name, version) is None:
                    with self._errors_told(name):
                        self._download(name, version, claim, ahead)
                # It may have made room when it was not claimed yet.
                with contextlib.suppress(FileNotFoundError):
                    return open_file(path)

    def _download(self, name: str, version: Version, claim: TextIO, ahead: bool) -> None:
        remove_drafts(self._folder, others_write=True)
        above = self._folder.parent.parent
        cache_room.claim_room(above, version.size, claim, self.url, ahead=ahead)
        with whole_file(self.path(name, version)) as draft:
            if not self.bucket.download(name, draft):
                raise RunError(f"{self.url}/{name} is not there any more")
            self._check(name, version, draft)
        claim.truncate(0)
        _count(version.size)

    @contextlib.contextmanager
    def _errors_told(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:  # that there is no room
            raise RunError(str(error)) from error
        except OSError as error:  # which would count as an image that cannot be read
            raise RunError(
                f"cannot keep {self.url}/{name} in {self._folder}: {error.strerror or error}"
            ) from error

    def part(self, name: str, version: Version, start: int, end: int) -> bytes:
        """Bytes of a shard, read from the bucket.

        Raises:
          RunError: when it is not there any more, or is another one, and when its server stays
            away.
        """
        part = self.bucket.read_part(name, start, end)
        if part is None:
            raise RunError(f"{self.url}/{name} is not there any more")
        changed = ""
        if part.tag and part.tag not in version.mark.split():
            changed = "is another one"
        elif len(part.content) < end - start:
            changed = f"ends before byte {end:,}, up to which a sample reaches"
        if changed:
            raise RunError(f"{self.url}/{name} {changed}: {_CHANGED}")
        _count(len(part.content))
        return part.content

    def release(self, name: str, version: Version) -> None:
        """Says that a shard is not needed for long: it is the first to make room."""
        cache_room.release(self.path(name, version))

    def path(self, name: str, version: Version) -> Path:
        """Where a shard is on this machine, if it is."""
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
            raise RunError(f"{self.url}/{name} {changed}: {_CHANGED}")


def mark_of(version: Sequence[Any] | None) -> str:
    """A text for what a listing tells of an object's version."""
    return "" if version is None else " ".join(map(str, version))
