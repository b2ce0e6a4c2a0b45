"""Files that users keep, written whole or not at all; and what is read of them, within bounds.

What is written to a place in a bucket is there when the call returns.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import shutil
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from mlip_jax.core import places
from mlip_jax.core.errors import UserError
from mlip_jax.core.texts import brief

MOST_BYTES = 256 * 2**20  # of an image, and of a JSON file of settings or figures
_MOST_DEPTH = 100  # of lists and objects in each other; what programs write has some ten
_DRAFT = re.compile(r"\..+\.[0-9]+")  # .NAME.PROCESS, as `_draft` makes it
_LONGEST = 200  # characters of a path in a message
_FULL = (errno.ENOSPC, errno.EDQUOT)
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    bytes: "bytes",
    type(None): "null",
}
_REQUIRED = object()
_TOO_DEEP = "nested too deeply to be read"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: it is on the disk before it takes its name.

    Args:
      path: the file; one that is there is replaced.
      content: bytes, or a text that is written in UTF-8; what that cannot hold is escaped, as in
        "\\ud83d", which JSON reads back.

    Raises:
      OSError: when it cannot be written. What was there stays.
    """
    with whole_file(path) as draft:
        if isinstance(content, str):
            content = content.encode("utf-8", "backslashreplace")
        draft.write_bytes(content)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a draft to write, which becomes the file when the block ends without an error.

    Nothing is left of it otherwise, nor where the block removes the draft itself.

    Raises:
      OSError: when the draft cannot take the file's place.
    """
    draft = _draft(path)
    try:
        with named_if_full(path, draft):
            yield draft
            if draft.exists():
                _sync(draft)
                draft.replace(path)
                places.publish(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Gives a draft folder to fill, which is renamed when the block ends without an error.

    Nothing is left of it otherwise. The folder above `target` is made where it is missing.

    Raises:
      UserError: when the folder cannot be made, or something stands in its place.
      OSError: when the disk is full.
    """
    draft = _draft(target)
    try:
        with _told(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            # Of a killed process that had this one's number.
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
        with named_if_full(target, draft):
            yield draft
            for path in draft.rglob("*"):
                if path.is_file():
                    _sync(path)
        with _told(target):
            draft.rename(target)
        places.publish(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def named_if_full(path: Path, draft: Path | None = None) -> Iterator[None]:
    """Has the error of a full disk name the file: a write that fails names none by itself.

    Args:
      path: what is written.
      draft: what stands for it until it is whole; no error names this.
    """
    try:
        yield
    except OSError as error:
        nameless = error.filename is None and error.errno in _FULL
        if nameless or (draft is not None and error.filename == str(draft)):
            error.filename = str(path)
        raise


def open_lock(path: Path) -> TextIO:
    """Opens a file to lock, to read and to write; it is made where it is missing, empty.

    Raises:
      OSError: when it cannot be written, or is a link: what that leads to is another's.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, f"{path.name} is a link: remove it", str(path)) from None
    return os.fdopen(descriptor, "r+", encoding="utf-8")


@contextlib.contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Holds a lock file that the processes of this machine wait for."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_draft(path: Path) -> bool:
    """Whether a name is that of a draft: of a process at work, or left by one that was killed."""
    return bool(_DRAFT.fullmatch(path.name))


def remove_drafts(folder: Path, *, others_write: bool = False) -> None:
    """Removes what killed processes left in a folder.

    Args:
      folder: which need not exist.
      others_write: whether other processes may write there now: the drafts of those that live stay.
    """
    for path in filter(is_draft, folder.glob(".*")):
        if others_write and _lives(int(path.name.rpartition(".")[2])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def check_name(folder: Path, flag: str) -> None:
    """Raises UserError, naming the flag, for what is no folder and can be none."""
    try:
        if stat.S_ISDIR(folder.stat().st_mode):
            return
        reason = "it is no folder"
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # such as a name that is too long, or a zero byte in it
        reason = getattr(error, "strerror", "") or str(error)
    raise UserError(f"cannot use {str(folder)[:_LONGEST]} as {flag}: {reason}") from None


def check_writable(folder: Path, flag: str) -> None:
    """Raises UserError, naming the flag, for a folder that cannot be written in or made."""
    check_name(folder, flag)
    if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write in {folder}: give another {flag}, or the right to write")


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise UserError(f"cannot write {target}: {error.strerror}") from error


def open_file(path: Path) -> int:
    """A descriptor of a file, which may lie there under another spelling of the same name.

    Lists written on Windows have "\\" between folders, and macOS takes letters and their accents
    apart, or puts them together, where other systems keep what they are given.

    Raises:
      OSError: when it cannot be opened for reading; opening a pipe does not wait.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK
    try:
        return os.open(path, flags)
    except ValueError as error:  # of a NUL character or half of a surrogate pair
        raise OSError(errno.EINVAL, str(error)) from None
    except FileNotFoundError:
        lying = _as_it_lies(path)
        if lying is None:
            raise
        return os.open(lying, flags)


def _as_it_lies(path: Path) -> Path | None:
    """The path of the file that a path means, by what is there; None: there is none."""
    lying = Path()
    for part in Path(str(path).replace("\\", "/")).parts:
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        there = next((lying / form for form in forms if (lying / form).exists()), None)
        if there is None:
            return None
        lying = there
    return lying


def read_file(path: Path, most: int = MOST_BYTES) -> bytes:
    """A file's content.

    Raises:
      OSError: when it cannot be read, is no regular file (reading a pipe may never end) or is
        larger than `most` bytes.
    """
    descriptor = open_file(path)
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a file")
        if status.st_size > most:
            reason = f"it has {status.st_size:,} bytes, at most {most:,} are read"
            raise OSError(errno.EFBIG, reason)
        # By its size: to read at most `most` bytes would ask for memory for all of them.
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


class NotJson(ValueError):
    """Why a text is no JSON of the kind that is expected."""


def read_json(
    path: Path,
    kind: type | tuple[type, ...] = dict,
    *,
    missing: Any = _REQUIRED,
    advice: str = "",
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
    most: int = MOST_BYTES,
) -> Any:
    """The content of a JSON file.

    Args:
      path: the file, in UTF-8 with or without a mark, or in UTF-16 or UTF-32.
      kind: what it must hold, such as `dict` or `(list, dict)`; `object` for anything.
      missing: what to give where there is no file; without it that is an error.
      advice: what the user can do about a file that is damaged.
      object_hook: makes something else of each object, as for `json.loads`.
      most: bytes that are read.

    Raises:
      UserError: "PATH: what is wrong", with line and column where there are any; "cannot read
        PATH: ..." for a file that is missing or cannot be read.
    """
    try:
        content = read_file(path, most)
    except OSError as error:
        if missing is not _REQUIRED and isinstance(error, FileNotFoundError | NotADirectoryError):
            return missing
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        return decode_json(content, kind, object_hook=object_hook)
    except NotJson as error:
        raise UserError(f"{path}: {error}{advice and f'; {advice}'}") from None


def parse_json(line: str | bytes, place: str, kind: type | tuple[type, ...] = dict) -> Any:
    """The value of a line of JSON.

    Args:
      line: the text.
      place: where it stands, such as "FILE:LINE".
      kind: what it must hold.

    Raises:
      UserError: "PLACE: what is wrong", with the column where there is one.
    """
    try:
        return decode_json(line, kind, one_line=True)
    except NotJson as error:
        raise UserError(f"{place}: {error}") from None


def decode_json(
    text: str | bytes,
    kind: type | tuple[type, ...] = dict,
    *,
    one_line: bool = False,
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
) -> Any:
    """The value of a JSON text. NaN and Infinity are numbers, as Python writes them.

    Args:
      text: in Unicode, or encoded as for `read_json`.
      kind: what it must hold, such as `dict`; `object` for anything.
      one_line: whether errors need no line.
      object_hook: as for `json.loads`.

    Raises:
      NotJson: what is wrong, with its place in the text where there is one; also for an object with
        a key twice, and for more than 100 lists and objects in each other.
    """
    try:
        if isinstance(text, bytes):
            text = _decoded(text)
        value = _decoder(object_hook).decode(text)
    except UnicodeDecodeError:
        raise NotJson("not UTF-8") from None
    except json.JSONDecodeError as error:
        place = "" if one_line else f"line {error.lineno}, "
        raise NotJson(f"not JSON: {error.msg}, {place}column {error.colno}") from None
    except RecursionError:
        raise NotJson(_TOO_DEEP) from None
    except NotJson:
        raise
    except ValueError:  # Python converts no more than some thousands of digits
        raise NotJson("holds a whole number of too many digits") from None
    # What goes through values may use up the stack where the reader does not.
    if text.count("[") + text.count("{") > _MOST_DEPTH and _is_too_deep(value):
        raise NotJson(_TOO_DEEP)
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(_KINDS[each].split()[-1] for each in kinds)
        raise NotJson(f"expected a JSON {wanted}, found {kind_of(value)}")
    return value


@functools.lru_cache(maxsize=8)
def _decoder(object_hook: Callable[[dict[str, Any]], Any] | None) -> json.JSONDecoder:
    def make(pairs: list[tuple[str, Any]]) -> Any:
        values = dict(pairs)
        if len(values) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = next(key for key, times in counts.items() if times > 1)
            raise NotJson(f"the key {brief(twice)} occurs twice")
        return object_hook(values) if object_hook else values

    return json.JSONDecoder(object_pairs_hook=make)


def _is_too_deep(value: Any) -> bool:
    level: list[Any] = [[value]]  # a hook may have made anything of it
    for _ in range(_MOST_DEPTH + 2):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list, tuple))
        ]
        if not level:
            return False
    return True


def _decoded(content: bytes) -> str:
    start = content[:2]
    if start.isascii() and 0 not in start:  # as nearly all lines of large files begin
        return content.decode()
    return content.decode(json.detect_encoding(content))


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold: not NaN, not infinite, no truth value."""
    # Compared, not converted: that fails for whole numbers of hundreds of digits.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


def kind_of(value: Any) -> str:
    """What a plain value is, in words."""
    return _KINDS.get(type(value), "something else")
