"""Inputs that lie in a bucket: brought to this machine, and called as they are called there."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import glob
import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.files import exclusively, whole_file
from mlip_jax.core.object_store import Bucket
from mlip_jax.data.prepare.containers import SUFFIXES
from mlip_jax.data.prepare.readers import Broken, InputRecord, Reader
from mlip_jax.data.prepare.webdataset import expanded
from mlip_jax.data.sets import cache_room
from mlip_jax.data.sets.stored import mark_of

Objects = dict[str, tuple[Any, Any, int]]  # name below a folder -> version, as listings give it

# By the kind of a source, the files that count where a folder or a pattern is named.
_OF_KIND = {"webdataset": SUFFIXES, "wds": SUFFIXES, "parquet": (".parquet",)}
_ALONE = (*SUFFIXES, ".parquet", ".zip")  # files that need no others beside them
_AT_ONCE = 16  # requests
_BRINGING, _BROUGHT = ".bringing", "brought.jsonl"
_ROOM = (
    f"set {cache_room.LIMIT} higher, or MLIP_JAX_CACHE to a folder on a larger disk: a source of "
    "prepare is brought whole"
)


def matching(bucket: Bucket, pattern: str, suffixes: Sequence[str]) -> Objects:
    """The objects that a pattern names, in its order.

    Args:
      bucket: a folder in a bucket.
      pattern: below that folder: an object, a folder, or what {000..123} and {a,b}, and in the last
        name * and ? stand for; "" is the folder itself.
      suffixes: of the objects that count in a folder; () for all.

    Raises:
      UserError: when there is none.
    """
    listed = functools.cache(bucket.listing)
    found: Objects = {}
    for each in expanded(pattern):
        above, _, last = each.rpartition("/")
        if glob.has_magic(above):
            raise UserError(f"{bucket.url}/{pattern}: in a URL only the last name may be a pattern")
        if glob.has_magic(last):
            names = sorted(n for n in listed(above) if _fits(n.rpartition("/")[2], last))
            entries = {name: listed(above)[name] for name in names}
        elif "." in last and each in listed(above):
            entries = {each: listed(above)[each]}
        elif suffixes and each.endswith(tuple(suffixes)):
            entries = {}
        else:
            below = bucket.listing(each.rstrip("/"), below=True)
            entries = {name: below[name] for name in sorted(below) if _ends(name, suffixes)}
        if not entries:
            bucket.direct()  # which tells whether there is such a bucket
            is_file = bool(suffixes) and each.endswith(tuple(suffixes))
            what = "no such file" if is_file else f"there is no {_kind(suffixes)} in"
            raise UserError(f"{what}: {bucket.url}/{each}")
        for name, version in entries.items():
            found.setdefault(name, version)
    return found


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)


def _ends(name: str, suffixes: Sequence[str]) -> bool:
    return not suffixes or name.endswith(tuple(suffixes))


def _kind(suffixes: Sequence[str]) -> str:
    return f"{suffixes[0].removeprefix('.')} file" if suffixes else "file"


class Copy(NamedTuple):
    """Where the files of a source are on this machine."""

    where: str  # what stands for the source's own path or pattern
    root: str  # the folder that stands for ...
    url: str  # this one


def bring(kind: str, where: str) -> Copy:
    """Brings a source; what an earlier try has brought, and is there still, is not brought again.

    Of one file that is a tar file, Parquet or a zip archive, that is the file; of any other, such
    as a table, all that lies in its folder and below, where its images are.

    Args:
      kind: of the source.
      where: its URL, or a pattern of URLs.

    Raises:
      UserError: when it cannot be read, and when there is no room for it.
      RunError: when a file cannot be brought.
    """
    where = where.rstrip("/")
    base, pattern = _base(where)
    bucket = Bucket(base)
    objects = matching(bucket, pattern, _OF_KIND.get(kind, ()))
    local_where = pattern
    if set(objects) == {pattern} and not pattern.endswith(_ALONE):
        folder = pattern.rpartition("/")[0]
        objects = matching(bucket, folder, ())
    holder = cache_room.dataset_folder(where, "")
    root = holder / (base.rpartition("/")[2] or "source")
    cache_room.hold(root)
    with exclusively(holder / _BRINGING), _errors_told(where, root):
        _bring(bucket, where, objects, root)
    return Copy(f"{root}/{local_where}".rstrip("/"), str(root), base)


def _base(where: str) -> tuple[str, str]:
    """The folder above the last name, and above all that is a pattern; and the rest."""
    scheme, _, place = where.partition("://")
    parts = place.split("/")
    plain = next((n for n, part in enumerate(parts) if set(part) & set("*?[{")), len(parts) - 1)
    at = max(1, min(plain, len(parts) - 1))
    return f"{scheme}://{'/'.join(parts[:at])}", "/".join(parts[at:])


@contextlib.contextmanager
def _errors_told(where: str, root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot keep {where} in {root}: {error.strerror or error}") from error


def _bring(bucket: Bucket, where: str, objects: Objects, root: Path) -> None:
    log = root.parent / _BROUGHT
    marks = {name: mark_of(version) for name, version in objects.items()}
    brought = _brought(log)
    for path in [path for path in root.rglob("*") if path.is_file()]:
        if path.relative_to(root).as_posix() not in objects:
            path.unlink()  # it is not there any more, or was never whole
    lacking = [name for name in objects if not _is_here(root / name, objects[name], brought, name)]
    if not lacking:
        return
    size = sum(objects[name][2] for name in lacking)
    cache_room.reserve(root.parent, 0)
    cache_room.make_room(root.parent.parent, size, where, _ROOM)
    cache_room.reserve(root.parent, sum(version[2] for version in objects.values()))
    print(
        f"{where}: bringing {len(lacking):,} files of {size / cache_room.GIB:,.2f} GiB to {root}",
        file=sys.stderr,
    )
    writing = threading.Lock()
    with log.open("a", encoding="utf-8") as noted, ThreadPoolExecutor(_AT_ONCE) as pool:

        def act(name: str) -> None:
            _download(bucket, name, objects[name], root / name)
            with writing:
                noted.write(json.dumps([name, marks[name]]) + "\n")
                noted.flush()

        try:
            for done in [pool.submit(act, name) for name in lacking]:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _brought(log: Path) -> dict[str, str]:
    """The versions of what has been brought. A killed process may have left half a line."""
    brought: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                name, mark = json.loads(line)
                brought[name] = mark
    return brought


def _is_here(path: Path, version: Sequence[Any], brought: dict[str, str], name: str) -> bool:
    with contextlib.suppress(OSError):
        return brought.get(name) == mark_of(version) and path.stat().st_size == version[2]
    return False


def _download(bucket: Bucket, name: str, version: Sequence[Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as draft:
        if not bucket.download(name, draft):
            raise RunError(f"{bucket.url}/{name} is not there any more")
        if draft.stat().st_size != version[2] or bucket.version(name) != version:
            raise RunError(
                f"{bucket.url}/{name} was changed while it was read: run the same command again"
            )


class InBucket(Reader):
    """Another input that reads a copy, with places as they are called in the bucket."""

    def __init__(self, copy: Copy, open_reader: Callable[[str], Reader]) -> None:
        """Opens the copy.

        Raises:
          UserError: as `open_reader`.
        """
        self._root, self._url = copy.root, copy.url
        with self._named():
            self._reader = open_reader(copy.where)
        self.class_names = self._reader.class_names
        self.multi_label = self._reader.multi_label
        self.attribution = self._reader.attribution
        self.repeats = self._reader.repeats

    def files(self) -> Sequence[Path]:
        """The input's, on this machine."""
        return self._reader.files()

    def shown(self, file: Path) -> str:
        """A file as it is called in the bucket."""
        return self._there(str(file))

    def total(self) -> int | None:
        """The input's."""
        return self._reader.total()

    def notes(self) -> Iterable[str]:
        """The input's."""
        return map(self._there, self._reader.notes())

    def refs(self) -> Iterator[tuple[str, Any]]:
        """The input's, which are the same wherever the copy lies."""
        with self._named():
            for split, ref in self._reader.refs():
                yield split, _translated(ref, self._root, self._url)

    def read(self, refs: Sequence[Any]) -> Iterator[InputRecord | Broken]:
        """The input's records."""
        for record in self._reader.read(self._here(refs)):
            if isinstance(record, Broken):
                yield _translated(record, self._root, self._url)
            else:
                name = self._there(record.example.name)
                yield record._replace(
                    example=replace(record.example, name=name), place=self._there(record.place)
                )

    def glances(self, refs: Sequence[Any]) -> Iterator[bytes]:
        """The input's."""
        return self._reader.glances(self._here(refs))

    def _here(self, refs: Sequence[Any]) -> list[Any]:
        return [_translated(ref, self._url, self._root) for ref in refs]

    def _there(self, text: str) -> str:
        return text.replace(self._root, self._url)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            error.args = tuple(self._there(str(argument)) for argument in error.args)
            raise


def _translated(value: Any, old: str, new: str) -> Any:
    """A ref with other names of places, which begin the texts that they are in."""
    if isinstance(value, str):
        return new + value.removeprefix(old) if value.startswith(old) else value
    if isinstance(value, Broken):
        return Broken(value.name.replace(old, new), value.reason.replace(old, new))
    if isinstance(value, tuple):
        parts = [_translated(part, old, new) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
