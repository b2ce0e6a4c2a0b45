"""The objects below a folder in a bucket (gs://, s3://): read, written and listed one by one.

Servers that are away for a while are waited for, and errors of libraries become one line.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import random
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mlip_jax.core.errors import RunError, Unreachable, UserError, first_line

EXTRAS = {"gs": "gcs", "s3": "s3"}  # scheme -> the extra of setup.py that reads it
PATIENCE = 300.0  # seconds for which a server may be away
AT_START = 30.0  # the same before anything is done
_QUIET = 5.0  # seconds after which it is said that a server is waited for
PAUSE = 0.5  # seconds before the first other try; they double ...
_LONGEST_PAUSE = 5.0  # ... up to this: by no more is a server seen late that is back
_OWN_TRIES = 2  # of the libraries: tries are repeated here, where it is known for how long
_AT_ONCE = 8  # transfers, of which each may hold 50 MB in memory
_PAST_THE_END = 416  # the HTTP status for bytes that an object does not have
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


class Part(NamedTuple):
    """Some bytes of an object."""

    content: bytes
    tag: str  # what tells its version from others, one of those that a listing gives; "": unknown


class Bucket:
    """A folder in a bucket, of which nothing need be there yet. Any thread may call its methods.

    Every method raises RunError when the server refuses, and Unreachable when it stays away.
    """

    def __init__(self, url: str) -> None:
        """Asks nothing yet.

        Args:
          url: such as "gs://bucket/runs/first".

        Raises:
          UserError: for a URL that cannot be read: its scheme, its library.
        """
        self.url = url.rstrip("/")
        # What to add when its server stays away.
        self.afterwards = ""
        self._scheme, _, place = self.url.partition("://")
        if not place.split("/")[0]:
            raise UserError(f"{url} names no bucket: write {self._scheme}://BUCKET/FOLDER")
        self._place = place
        self._files = _file_system(self._scheme, url)
        self._away = False  # whether the server has been waited for in vain

    def direct(self) -> dict[str, Any]:
        """The objects that lie directly in the folder, as `listing` gives them.

        Raises:
          UserError: when the bucket does not exist, or refuses.
          Unreachable: when its server does not answer.
        """
        try:
            return self._direct()
        except Unreachable:
            raise
        except (RunError, FileNotFoundError) as error:
            bucket = f"{self._scheme}://{self._place.split('/')[0]}"
            reason = str(error)
            if isinstance(error, FileNotFoundError):
                reason = f"there is no bucket {bucket}: make it, or correct the name"
            raise UserError(f"cannot use {self.url}: {reason}") from error

    def read(self, name: str) -> bytes | None:
        """The content of an object; None where there is none."""
        return self._try(lambda: self._files.cat_file(self._object(name)), missing=None)

    def download(self, name: str, target: Path) -> bool:
        """Writes an object to a local file; whether there is one."""
        copied = self._try(
            lambda: self._files.get_file(self._object(name), str(target)), missing=False
        )
        return copied is not False

    def read_part(self, name: str, start: int, end: int) -> Part | None:
        """Some bytes of an object, fewer at its end; None where there is none."""

        def part() -> Part:
            place, header = self._object(name), f"bytes={start}-{end - 1}"
            try:
                if self._scheme == "gs":
                    url = self._files.url(place)
                    told, content = self._files.call("GET", url, headers={"Range": header})
                    tags = {key.lower(): value for key, value in told.items()}
                    return Part(content, tags.get("x-goog-generation", ""))
                from fsspec.asyn import sync

                bucket, _, key = place.partition("/")
                answer = self._files.call_s3("get_object", Bucket=bucket, Key=key, Range=header)
                return Part(sync(self._files.loop, answer["Body"].read), answer.get("ETag", ""))
            except Exception as error:
                if _status(error) == _PAST_THE_END:
                    return Part(b"", "")
                raise

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

    def _object(self, name: str) -> str:
        return f"{self._place}/{name}" if name else self._place

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
            pause = min(2 * pause, _LONGEST_PAUSE)

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


@functools.cache
def _of_few_tries(google_files: Any) -> Any:
    """gcsfs's file system, with fewer tries of its own: six take half a minute, and are nested."""
    from gcsfs.retry import retry_request

    class OfFewTries(google_files):  # type: ignore[misc]
        pass

    for name in ("_request", "_get_file_request", "_get_file_concurrent"):
        tried_once = getattr(getattr(google_files, name, None), "__wrapped__", None)
        if tried_once is not None:
            setattr(OfFewTries, name, retry_request(retries=_OWN_TRIES)(tried_once))
    return OfFewTries


def _file_system(scheme: str, url: str) -> Any:
    if scheme not in EXTRAS:
        raise UserError(
            f"{url}: {scheme}:// is no kind of place that is known here; gs:// and s3:// are, and "
            "paths of this machine"
        )
    options = {"use_listings_cache": False, "skip_instance_cache": True}
    try:
        if scheme == "gs":
            # We say what is wrong ourselves, in one line.
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
            # The class that gcsfs takes by itself asks for the bucket's kind at every call.
            from gcsfs.core import GCSFileSystem

            return _of_few_tries(GCSFileSystem)(**options)
        from s3fs import S3FileSystem

        files = S3FileSystem(**options, config_kwargs={"retries": {"max_attempts": 1}})
        files.retries = _OWN_TRIES
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
