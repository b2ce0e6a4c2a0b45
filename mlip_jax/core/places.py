"""Where runs, models and datasets are kept: folders of this machine, or in a bucket (gs://, s3://).

A caller asks `local` for the folder that it works in. For a path that is the path itself, and the
rest of this module does nothing. For a URL it is a folder that mirrors the one in the bucket, and
the caller says when files are needed (`fetch`) and when they are whole (`publish`).
`mlip_jax.core.files` publishes what it writes.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import fnmatch
import glob
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from mlip_jax.core.buckets import Mirror
from mlip_jax.core.cache import cache_folder
from mlip_jax.core.errors import RunError, UserError

INTERVAL = 30.0  # seconds between two copies of files that grow
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_COLLAPSED = re.compile(r"(gs|s3):/(?!/)")
_ALIVE = ".alive"  # locked by the process whose mirror it is
_mirrors: dict[str, Mirror] = {}  # by URL
_kept = contextlib.ExitStack()
_opening = threading.Lock()


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is written as a URL, of whatever kind."""
    return isinstance(place, str) and bool(_URL.match(place))


def local(place: str | os.PathLike[str], *, empty: bool = False) -> Path:
    """The folder of this machine that stands for a place.

    Of a place in a bucket the files that lie directly in it are brought; `fetch` brings others. The
    folder is gone when this process ends.

    Args:
      place: a path, or the URL of a folder, which need not exist yet.
      empty: whether nothing is brought.

    Raises:
      UserError: for a URL that cannot be read.
    """
    if not is_url(place):
        if _COLLAPSED.match(str(place)):
            raise UserError(f"{place}: a Path takes a slash from a URL; give it as a text")
        return Path(place)
    url = str(place).rstrip("/")
    with _opening:
        mirror = _mirrors.get(url)
        if mirror is None:
            mirror = Mirror(url, _kept.enter_context(_scratch(url.rsplit("/", 1)[-1])))
            _look(mirror, empty)
            _mirrors[url] = mirror
        elif not mirror.held:
            _look(mirror, empty)
    return mirror.root


def _look(mirror: Mirror, empty: bool) -> None:
    if empty:
        mirror.direct()
    else:
        mirror.open()


def matching(pattern: str) -> list[Path]:
    """The local paths that stand for all places that a pattern fits, such as "runs/mlip*".

    Raises:
      UserError: for a URL that cannot be read.
    """
    if not is_url(pattern):
        return [Path(path) for path in sorted(glob.glob(str(Path(pattern).expanduser())))]
    above, _, last = pattern.rstrip("/").rpartition("/")
    if not glob.has_magic(pattern):
        return [local(pattern)]
    if glob.has_magic(above):
        raise UserError(f"{pattern}: in a URL only the last name may be a pattern")
    return [local(f"{above}/{name}") for name in fnmatch.filter(names(local(above)), last)]


def mirror_of(path: str | os.PathLike[str]) -> Mirror | None:
    """What a local path mirrors; None for a path that stands for itself."""
    if not _mirrors:
        return None
    absolute = Path(path).absolute()
    return next((one for one in _mirrors.values() if absolute.is_relative_to(one.root)), None)


def shown(path: str | os.PathLike[str]) -> str:
    """A path as the user knows it."""
    mirror = mirror_of(path)
    if mirror is None:
        return str(path)
    return named(str(Path(path).absolute()))


def named(text: str) -> str:
    """A text with the names of places in it as the user knows them."""
    for mirror in _mirrors.values():
        text = text.replace(str(mirror.root), mirror.url)
    return text


@contextlib.contextmanager
def named_in_errors() -> Iterator[None]:
    """Has errors name places as the user knows them."""
    try:
        yield
    except (UserError, RunError) as error:
        error.args = tuple(named(str(argument)) for argument in error.args)
        raise


def fetch(path: Path, without: Collection[str] = (), marked_by: str = "") -> None:
    """Makes a file or folder like the one in its bucket; see `Mirror.fetch`."""
    if mirror := mirror_of(path):
        mirror.fetch(path.absolute(), without, marked_by)


def names(folder: Path) -> list[str]:
    """The names in a folder, there where it is kept; none where there is no such folder."""
    if mirror := mirror_of(folder):
        return mirror.names(folder.absolute())
    return sorted(path.name for path in folder.glob("*"))


def sizes(folder: Path) -> dict[str, int]:
    """The files that lie directly in a folder, there where it is kept, and their bytes."""
    if mirror := mirror_of(folder):
        return mirror.sizes(folder.absolute())
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def hand_over(path: Path) -> None:
    """Brings a file to its bucket and keeps it there alone; does nothing about others."""
    if mirror_of(path):
        publish(path)
        path.unlink(missing_ok=True)


def publish(path: Path, target: Path | None = None, anew: bool = False) -> None:
    """Brings a file or folder to its bucket; see `Mirror.publish`."""
    if mirror := mirror_of(path):
        mirror.publish(path.absolute(), target and target.absolute(), anew)


def flush(path: Path) -> None:
    """Brings to its bucket what has grown since the last copy, of all that lies in a place."""
    if mirror := mirror_of(path):
        mirror.flush()


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there."""
    if mirror := mirror_of(path):
        mirror.remove(path.absolute())
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move(path: Path, target: Path) -> None:
    """Renames a file or folder."""
    if mirror := mirror_of(path):
        mirror.move(path.absolute(), target.absolute())
    else:
        path.rename(target)


@contextlib.contextmanager
def following(*paths: Path) -> Iterator[None]:
    """Brings files that grow to their bucket: at intervals, at `flush`, and at the end.

    Raises:
      RunError: at the end, when they cannot be written.
    """
    mirror = mirror_of(paths[0])
    if mirror is None:
        yield
        return
    ended = threading.Event()

    def copy() -> None:
        pause = INTERVAL
        while not ended.wait(pause):
            started = time.monotonic()
            try:
                mirror.flush()
            except RunError as error:  # the next checkpoint raises it, where it still lasts
                print(f"warning: {error}", file=sys.stderr)
            # A file that has grown large is copied less often.
            pause = max(INTERVAL, 20 * (time.monotonic() - started))

    for path in paths:
        mirror.follow(path.absolute())
    thread = threading.Thread(target=copy, daemon=True, name="copies of growing files")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        mirror.flush()


@contextlib.contextmanager
def _scratch(name: str) -> Iterator[Path]:
    """An empty folder of this process's own; what killed processes left beside it is removed."""
    above = cache_folder("") / "mirrors"
    above.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as alive:
        with (above / _ALIVE).open("w") as one_at_a_time:
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            for other in above.glob(f"*/{_ALIVE}"):
                with contextlib.suppress(OSError), other.open() as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(other.parent)
            holder = Path(tempfile.mkdtemp(dir=above, prefix=f"{os.getpid()}-"))
            fcntl.flock(alive.enter_context((holder / _ALIVE).open("w")), fcntl.LOCK_EX)
        folder = holder / (name or "root")
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(holder, ignore_errors=True)


def release() -> None:
    """Removes the mirrors of this process."""
    _mirrors.clear()
    _kept.close()


atexit.register(release)
