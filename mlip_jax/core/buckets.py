"""A folder on this machine that mirrors one in a bucket (gs://, s3://), object by object.

Objects cannot be appended to, renamed or locked as files can, and Orbax writes to S3 not at all. So
everything works on the local folder, and what is there is brought to the bucket and back whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from mlip_jax.core.errors import RunError, Unreachable, UserError, first_line

EXTRAS = {"gs": "gcs", "s3": "s3"}  # scheme -> the extra of setup.py that reads it
PATIENCE = 300.0  # seconds for which a server may be away
AT_START = 30.0  # the same before anything is done
_QUIET = 5.0  # seconds after which it is said that a server is waited for
PAUSE = 0.5  # seconds before the first other try; they double
_LISTINGS = 5  # of a folder whose files vanish meanwhile
_AT_ONCE = 8  # transfers, of which each may hold 50 MB in memory
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # errors of this machine's disk
_NEVER = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError)
_LIBRARIES = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "s3fs", "google")
_ACCESS = {
    "gs": "log in by `gcloud auth application-default login`, or set "
    "GOOGLE_APPLICATION_CREDENTIALS to a key file that may read and write there",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to a key that may read "
    "and write there",
}
_T = TypeVar("_T")


class Mirror:
    """A folder in a bucket, and the local folder that stands for it.

    Methods take paths in the local folder. Any thread may call them.
    """

    def __init__(self, url: str, root: Path) -> None:
        """Opens the folder, of which nothing need be there yet.

        Args:
          url: such as "gs://bucket/runs/first".
          root: an empty folder of this process's own.

        Raises:
          UserError: for a URL that cannot be read: its scheme, its library, its bucket, its
            credentials.
        """
        self.url = url.rstrip("/")
        self.root = root
        self.held = False  # whether this process alone writes there
        self.lost = ""  # why nothing may be written any more
        # What to add when its server stays away.
        self.afterwards = (
            "; what was saved before is kept there, and the same command goes on from it"
        )
        self._scheme, _, place = self.url.partition("://")
        if not place.split("/")[0]:
            raise UserError(f"{url} names no bucket: write {self._scheme}://BUCKET/FOLDER")
        self._place = place
        self._files = _file_system(self._scheme, url)
        self._versions: dict[str, Any] = {}  # of the objects that have been fetched
        self._published: dict[str, tuple[int, int]] = {}
        self._followed: list[Path] = []
        self._transfers = threading.RLock()
        self._away = False  # whether the server has been waited for in vain

    def open(self, empty: bool = False) -> None:
        """Brings the files that lie directly in the folder, and forgets those that are gone.

        Args:
          empty: whether only to look at the bucket.

        Raises:
          UserError: when the bucket does not exist, or refuses.
          Unreachable: when its server does not answer.
        """
        try:
            direct = self._direct()
        except Unreachable:
            raise
        except (RunError, FileNotFoundError) as error:
            bucket = f"{self._scheme}://{self._place.split('/')[0]}"
            reason = str(error)
            if isinstance(error, FileNotFoundError):
                reason = f"there is no bucket {bucket}: make it, or correct the name"
            raise UserError(f"cannot use {self.url}: {reason}") from error
        if empty:
            return
        first = [direct]

        def listed() -> tuple[dict[str, Any], Collection[str]]:
            found = first.pop() if first else self._direct()
            return found, {*found, *(name for name in self._versions if "/" in name)}

        self._bring(self.root, listed)

    def names(self, folder: Path) -> list[str]:
        """The names in a folder of the bucket; none where it does not exist."""
        place = self._object(self._name(folder))
        found = self._try(lambda: self._files.ls(place, detail=False), missing=[])
        below = {key.rstrip("/") for key in found} - {place}  # some tools mark folders by objects
        return sorted({key.rpartition("/")[2] for key in below} - {"..", "."})

    def sizes(self, folder: Path) -> dict[str, int]:
        """The objects directly in a folder, and their bytes."""
        place = self._object(self._name(folder))
        found = self._try(lambda: self._files.ls(place, detail=True), missing=[])
        return {
            one["name"].rpartition("/")[2]: one["size"]
            for one in found
            if one["type"] == "file" and one["name"].rstrip("/") != place
        }

    def fetch(self, path: Path, without: Collection[str] = (), marked_by: str = "") -> None:
        """Makes a local file or folder like the one in the bucket.

        Args:
          path: what to bring. What has been published from here and is there still stays.
          without: names of folders at any depth that are not brought.
          marked_by: of folders in this one, only those are brought that hold a file of this name.
        """
        depth = len(PurePosixPath(self._name(path)).parts)

        def listed() -> tuple[dict[str, Any], Collection[str]]:
            found = self._find(path)
            if marked_by:
                marked = {
                    PurePosixPath(name).parts[depth]
                    for name in found
                    if PurePosixPath(name).parts[depth + 1 :] == (marked_by,)
                }
                found = {
                    name: one
                    for name, one in found.items()
                    if PurePosixPath(name).parts[depth] in marked
                }
            wanted = {
                name: one
                for name, one in found.items()
                if not set(PurePosixPath(name).parts[depth:-1]) & set(without)
            }
            return wanted, found

        self._bring(path, listed)

    def publish(self, path: Path, target: Path | None = None, anew: bool = False) -> None:
        """Writes a local file, or the files of a folder that are new or changed, to the bucket.

        Args:
          path: the file or folder.
          target: the name that it takes; None: its own.
          anew: also what has been written before and has not changed here.

        Raises:
          RunError: when the bucket refuses; Unreachable: when its server stays away.
        """
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        target = target or path
        changed: dict[str, tuple[Path, tuple[int, int]]] = {}
        for file in files:
            name = self._name(target / file.relative_to(path) if file != path else target)
            status = file.stat()
            seen = (status.st_mtime_ns, status.st_size)
            if anew or self._published.get(name) != seen:
                changed[name] = file, seen
        if not changed:
            return
        with self._transfers:
            self._check_held()
            sources = [str(file) for file, _ in changed.values()]
            self._each(self._files.put_file, sources, map(self._object, changed))
            for name, (_, seen) in changed.items():
                self._published[name] = seen
                self._versions.pop(name, None)

    def follow(self, path: Path) -> None:
        """Has `flush` write a file or folder that grows."""
        self._followed.append(path)

    def flush(self) -> None:
        """Writes what is followed and has changed."""
        for path in list(self._followed):
            files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
            for file in files:
                status, name = file.stat(), self._name(file)
                seen = (status.st_mtime_ns, status.st_size)
                if self._published.get(name) == seen:
                    continue
                # As it is now: a file that grows while it is sent would be another length.
                content = file.read_bytes()
                with self._transfers:
                    self._check_held()
                    self.write(name, content)
                    self._published[name] = seen

    def remove(self, path: Path) -> None:
        """Removes a file or folder, here and in the bucket, files directly in it first."""
        with self._transfers:
            self._check_held()
            found = sorted(self._find(path), key=lambda name: (name.count("/"), name))
            for near in (True, False):  # a mark is gone before what it marks
                depth = min((name.count("/") for name in found), default=0)
                group = [name for name in found if (name.count("/") == depth) == near]
                if group:
                    objects = [self._object(name) for name in group]
                    self._try(partial(self._files.rm, objects), missing=None)
            for name in found:
                self._versions.pop(name, None)
                self._published.pop(name, None)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def move(self, path: Path, target: Path) -> None:
        """Renames a file or folder, here and in the bucket."""
        with self._transfers:
            self._check_held()
            for name in self._find(path):
                new = self._name(target / PurePosixPath(name).relative_to(self._name(path)))
                self._try(partial(self._files.cp_file, self._object(name), self._object(new)))
            path.rename(target)
            self.remove(path)

    def read(self, name: str) -> bytes | None:
        """The content of an object; None where there is none."""
        return self._try(lambda: self._files.cat_file(self._object(name)), missing=None)

    def download(self, name: str, target: Path) -> bool:
        """Writes an object to a local file; whether there is one."""
        copied = self._try(
            lambda: self._files.get_file(self._object(name), str(target)), missing=False
        )
        return copied is not False

    def read_part(self, name: str, start: int, end: int) -> bytes | None:
        """Some bytes of an object, fewer at its end; None where there is none."""

        def part() -> bytes:
            return self._files.cat_file(self._object(name), start=start, end=end)

        return self._try(part, missing=None)

    def listing(self, folder: str, *, below: bool = False) -> dict[str, tuple[Any, Any, int]]:
        """The objects directly in a folder: name -> what tells this version from others, and bytes.

        Args:
          folder: below this one; "" is this one.
          below: also what lies deeper.
        """
        place = self._object(folder)

        def found() -> dict[str, Any]:
            if below:
                return self._files.find(place, detail=True)
            entries = self._files.ls(place, detail=True)
            return {one["name"]: one for one in entries if one["type"] == "file"}

        return self._versions_of(self._try(found, patience=AT_START, missing={}))

    def version(self, name: str) -> tuple[Any, Any, int] | None:
        """What `listing` gives of an object now; None where there is none."""
        found = self._try(lambda: self._files.info(self._object(name)), missing=None)
        return None if found is None else self._versions_of({self._object(name): found})[name]

    def write(self, name: str, content: bytes) -> None:
        """Writes an object."""
        self._try(lambda: self._files.pipe_file(self._object(name), content))

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object unless there is one; whether it did."""
        try:
            self._try(lambda: self._files.pipe_file(self._object(name), content, mode="create"))
        except FileExistsError:
            # Perhaps written by a try of ours whose answer was lost.
            return self.read(name) == content
        return True

    def delete(self, name: str) -> None:
        """Removes an object, if it is there."""
        self._try(lambda: self._files.rm_file(self._object(name)), missing=None)

    def written(self, name: str) -> float | None:
        """When an object was written, in seconds by the server's clock; None: there is none."""

        def modified() -> float:
            return self._files.modified(self._object(name)).timestamp()

        return self._try(modified, missing=None)

    def _name(self, path: Path) -> str:
        name = path.relative_to(self.root).as_posix()
        return "" if name == "." else name

    def _object(self, name: str) -> str:
        return f"{self._place}/{name}" if name else self._place

    def _find(self, path: Path) -> dict[str, Any]:
        """The objects of a path, at any depth: name -> what tells one version from another."""
        place = self._object(self._name(path))
        found = self._try(lambda: self._files.find(place, detail=True), missing={})
        return self._versions_of(found)

    def _direct(self) -> dict[str, Any]:
        """The objects that lie directly in the folder, as `_find` gives them.

        Raises:
          FileNotFoundError: when there is no such bucket.
        """
        try:
            found = self._try(lambda: self._files.ls(self._place, detail=True), patience=AT_START)
        except FileNotFoundError:
            # The folder, or the bucket: this fails without the bucket alone.
            self._try(lambda: self._files.find(self._place, detail=True), patience=AT_START)
            return {}
        return self._versions_of({one["name"]: one for one in found if one["type"] == "file"})

    def _versions_of(self, found: dict[str, Any]) -> dict[str, Any]:
        start = len(self._place) + 1
        return {
            key[start:]: (one.get("ETag") or one.get("etag"), one.get("generation"), one["size"])
            for key, one in found.items()
            # Not what marks a folder, nor what would lie outside the local one.
            if key.startswith(f"{self._place}/") and not key.endswith("/")
            if ".." not in key.split("/")
        }

    def _bring(
        self, path: Path, listed: Callable[[], tuple[dict[str, Any], Collection[str]]]
    ) -> None:
        """Fetches what is wanted and is not here; forgets what is no longer kept in the bucket.

        Args:
          path: the file or folder.
          listed: gives what is wanted, and all that is kept there; it is asked again when some of
            it has been removed meanwhile, as a run that trains does.
        """
        for _ in range(_LISTINGS):
            if self._bring_listed(path, *listed()):
                return
        raise RunError(f"what is in {self.url} vanishes while it is read")

    def _bring_listed(self, path: Path, wanted: dict[str, Any], kept: Collection[str]) -> bool:
        """Does so once; whether all was there."""
        with self._transfers:
            below = f"{self._name(path)}/" if path != self.root else ""
            for name in [name for name in self._versions if name.startswith(below)]:
                if name not in kept:
                    self._forget(name, path)
            lacking = {
                name: version
                for name, version in wanted.items()
                if self._versions.get(name) != version or not (self.root / name).exists()
                if not (self.held and name in self._published)
            }
            if not lacking:
                return True
            targets = [self.root / name for name in lacking]
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
            sources = map(self._object, lacking)
            results = self._each(self._files.get_file, sources, map(str, targets), missing=False)
            self._versions.update(lacking)
            gone = [name for name, got in zip(lacking, results, strict=True) if got is False]
            for name in gone:
                self._forget(name, path)
            return not gone

    def _forget(self, name: str, up_to: Path) -> None:
        """Removes the local copy of an object that is gone, and folders that are empty by that."""
        del self._versions[name]
        file = self.root / name
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in file.parents:
                if folder == up_to or folder == self.root:
                    break
                folder.rmdir()

    def _each(
        self,
        transfer: Callable[[str, str], None],
        sources: Iterable[str],
        targets: Iterable[str],
        *,
        missing: Any = FileNotFoundError,
    ) -> list[Any]:
        """Transfers files, several at a time; gives what `_try` gives of each."""
        # Not by the library's own call for many: where one fails, it leaves the others lying.
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            acts = [partial(transfer, *pair) for pair in zip(sources, targets, strict=True)]
            return list(pool.map(partial(self._try, missing=missing), acts))

    def _check_held(self) -> None:
        if self.lost:
            raise RunError(self.lost)

    def _try(
        self,
        act: Callable[[], _T],
        *,
        patience: float | None = None,
        missing: Any = FileNotFoundError,
    ) -> Any:
        """What `act` gives, tried again while the server is away.

        Args:
          act: asks the library.
          patience: seconds; None: PATIENCE, or none for a server that was waited for already.
          missing: what to give for an object that is not there; by default that is an error.
        """
        if patience is None:
            patience = 0.0 if self._away else PATIENCE
        start = time.monotonic()
        pause, told = PAUSE, False
        while True:
            try:
                value = act()
                self._away = False
                if told:
                    self._tell(f"the server answers again after {time.monotonic() - start:.0f} s")
                return value
            except FileNotFoundError:
                if missing is FileNotFoundError:
                    raise
                return missing
            except Exception as error:
                self._explain(error)
                waited = time.monotonic() - start
                if waited > _QUIET and not told:
                    told = True
                    self._tell(f"the server does not answer ({first_line(error)}): waiting for it")
                if waited + pause > patience:
                    self._away = True
                    raise Unreachable(
                        f"the server of {self.url} does not answer ({first_line(error)})"
                        f"{self.afterwards}"
                    ) from error
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, 15)

    def _tell(self, words: str) -> None:
        print(f"{self.url}: {words}", file=sys.stderr)

    def _explain(self, error: Exception) -> None:
        """Raises what another try would not mend, in words for the user where there are any."""
        words, status = first_line(error), _status(error)
        if isinstance(error, FileExistsError):
            raise error
        # gcsfs gives an OSError without a number for 403.
        refused = status in (401, 403) or words.startswith("Forbidden") or "redential" in words
        if refused or isinstance(error, PermissionError):
            raise RunError(
                f"{self.url} refuses ({words.rstrip('.')}): {_ACCESS[self._scheme]}"
            ) from error
        if isinstance(error, _NEVER) or getattr(error, "errno", None) in _LOCAL:
            raise error
        if 400 <= status < 500 and status not in (408, 429):
            raise RunError(f"{self.url}: the server refuses: {words}") from error
        ours = not type(error).__module__.startswith(_LIBRARIES)
        if ours and not isinstance(error, OSError | TimeoutError | asyncio.TimeoutError):
            raise error


def _file_system(scheme: str, url: str) -> Any:
    if scheme not in EXTRAS:
        raise UserError(
            f"{url}: {scheme}:// is no kind of place that is known here; gs:// and s3:// are, and "
            "paths of this machine"
        )
    options = {"use_listings_cache": False, "skip_instance_cache": True}
    try:
        if scheme == "gs":
            # The class that gcsfs takes by itself asks for the bucket's kind at every call.
            from gcsfs.core import GCSFileSystem

            # We say what is wrong ourselves, in one line.
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
            return GCSFileSystem(**options)
        from s3fs import S3FileSystem

        # Tries that fail are repeated here, where it is known for how long.
        files = S3FileSystem(**options, config_kwargs={"retries": {"max_attempts": 1}})
        files.retries = 2
        return files
    except ImportError as error:
        raise UserError(
            f"{url} needs another library ({error}): pip install 'mlip_jax[{EXTRAS[scheme]}]'"
        ) from error


def _status(error: BaseException | None) -> int:
    """The HTTP status that an error of a library stands for; 0: none."""
    while error is not None:
        response = getattr(error, "response", None)
        found = getattr(error, "code", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if str(found).isdigit():
            return int(str(found))
        error = error.__cause__
    return 0
