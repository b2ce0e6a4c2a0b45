"""Files of datasets in buckets, kept on this machine for all of its processes.

Below `cache_folder` each dataset has a folder of its own. When the files of another would be more
than the cache may hold, datasets that no process has open make room, the longest unused first. It
may hold $MLIP_JAX_CACHE_GIB, or what the disk has free but for a tenth.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from mlip_jax.core.buckets import Mirror
from mlip_jax.core.cache import cache_folder
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_json, remove_drafts, whole_file, write_atomically

LIMIT = "MLIP_JAX_CACHE_GIB"
_GIB = 2**30
_IN_USE, _BRINGING, _BROUGHT = ".in-use", ".bringing", "brought.json"
_held: dict[Path, TextIO] = {}  # what this process has open stays until it ends

File = tuple[str, int, str]  # name, bytes, SHA-256


class Store:
    """The files of one dataset in a bucket that are here."""

    def __init__(self, url: str, cache_dir: str) -> None:
        """Opens the dataset's folder in the cache.

        Raises:
          UserError: for a URL that cannot be read.
        """
        url = url.rstrip("/")
        digest = hashlib.sha256(url.encode()).hexdigest()[:16]
        self._url = url
        self._above = cache_folder(cache_dir) / "datasets"
        self.folder = self._above / digest / url.rpartition("/")[2]
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
        with _locked(self.folder.parent / _BRINGING):
            brought = read_json(self.folder.parent / _BROUGHT, missing={})
            lacking = [file for file in files if not self._is_here(file, brought)]
            if not lacking:
                return
            remove_drafts(self.folder)
            size = sum(size for _, size, _ in lacking)
            self._make_room(size)
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

    def _make_room(self, size: int) -> None:
        """Removes datasets that no process has open until `size` bytes fit."""
        used = {folder: _size(folder) for folder in self._above.iterdir() if folder.is_dir()}
        limit = _limit(self._above, sum(used.values()))
        for folder in sorted(used, key=_last_use):
            if sum(used.values()) + size <= limit:
                return
            if folder != self.folder.parent and _remove_unused(folder):
                del used[folder]
        if sum(used.values()) + size > limit:
            raise UserError(
                f"{self._url} needs {size / _GIB:,.2f} GiB more in {self._above}, which may hold "
                f"{limit / _GIB:,.2f} GiB and has {sum(used.values()) / _GIB:,.2f} GiB in use: set "
                f"{LIMIT} higher, or config.data.cache_dir to a larger disk"
            )


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


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _last_use(folder: Path) -> float:
    with contextlib.suppress(OSError):
        return (folder / _IN_USE).stat().st_mtime
    return 0.0


def _remove_unused(folder: Path) -> bool:
    """Removes a dataset's folder unless a process has it open; whether it did."""
    with contextlib.suppress(OSError), (folder / _IN_USE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
        return True
    return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
