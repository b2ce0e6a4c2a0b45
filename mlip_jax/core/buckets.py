"""A folder on this machine that mirrors one in a bucket (gs://, s3://), object by object.

Objects cannot be appended to, renamed or locked as files can, and Orbax writes to S3 not at all. So
everything works on the local folder, and what is there is brought to the bucket and back whole.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from mlip_jax.core.errors import RunError
from mlip_jax.core.object_store import Bucket

_LISTINGS = 5  # of a folder whose files vanish meanwhile


class Mirror(Bucket):
    """A folder in a bucket, and the local folder that stands for it.

    Methods that take paths take those in the local folder.
    """

    def __init__(self, url: str, root: Path) -> None:
        """Opens the folder, of which nothing need be there yet.

        Args:
          url: such as "gs://bucket/runs/first".
          root: an empty folder of this process's own.

        Raises:
          UserError: for a URL that cannot be read: its scheme, its library.
        """
        super().__init__(url)
        self.root = root
        self.held = False  # whether this process alone writes there
        self.lost = ""  # why nothing may be written any more
        self.afterwards = (
            "; what was saved before is kept there, and the same command goes on from it"
        )
        self._versions: dict[str, Any] = {}  # of the objects that have been fetched
        self._published: dict[str, tuple[int, int]] = {}
        self._followed: list[Path] = []
        self._transfers = threading.RLock()

    def open(self) -> None:
        """Brings the files that lie directly in the folder, and forgets those that are gone.

        Raises:
          UserError, Unreachable: as `direct`.
        """
        first = [self.direct()]

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

    def _name(self, path: Path) -> str:
        name = path.relative_to(self.root).as_posix()
        return "" if name == "." else name

    def _find(self, path: Path) -> dict[str, Any]:
        """The objects of a path, at any depth: name -> what tells one version from another."""
        place = self._object(self._name(path))
        found = self._try(lambda: self._files.find(place, detail=True), missing={})
        return self._versions_of(found)

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

    def _check_held(self) -> None:
        if self.lost:
            raise RunError(self.lost)
