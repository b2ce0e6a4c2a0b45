"""Class folders in zip files, read without unpacking them."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import MOST_BYTES
from mlip_jax.data.sets.class_folders import read_beside
from mlip_jax.data.sets.class_trees import CLASSES_FILE, open_tree
from mlip_jax.data.sets.files import IMAGE_SUFFIXES, ClassSource, is_hidden
from mlip_jax.data.sets.kinds import Opening, by_path
from mlip_jax.data.sets.splits import canonical

_MOST_DEPTH = 2  # folders that are asked for: of a split and of a class
_ENCRYPTED = 1  # bit of the flags
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name and of the extra field


class _Member(NamedTuple):
    """A file in one of the zip files."""

    archive: int
    path: str  # as it is stored
    info: zipfile.ZipInfo


def open_zip(path: Path, opening: Opening) -> ClassSource:
    """Opens class folders in a zip file, or in all zip files of a folder, taken as one tree.

    The tree is CLASS/*.jpg or SPLIT/CLASS/*.jpg, perhaps below one folder common to all. Where
    none of it is a split but every zip file is called by one, as in train.zip and test.zip, that is
    the split of what it holds. classes.json lies in the root, or beside the zip file.

    Raises:
      MissingSplit: as `classes.open_tree`.
      UserError: as `classes.open_tree`; for a missing or damaged file; and for members that are
        encrypted or leave the archive by their path.
    """
    files = _zip_files(path)
    trees = [_members(index, file) for index, file in enumerate(files)]
    merged = _without_common_folder(_merged(path, files, _named_by_split(files, trees)))
    return open_tree(_ZipTree(path, files, merged), opening)


class ZipImages:
    """Images that are members of zip files. Where each begins is kept, no file stays open."""

    def __init__(self, files: list[Path], members: list[_Member]) -> None:
        """Takes members, none of which is encrypted or packed by another method than deflate."""
        self._files = files
        self._paths = [member.path for member in members]
        self._archives = np.array([member.archive for member in members], np.int32)
        infos = [member.info for member in members]
        self._packed = np.array([info.compress_type != zipfile.ZIP_STORED for info in infos], bool)
        self._places = np.array(
            [(i.header_offset, i.compress_size, i.file_size, i.CRC) for i in infos], np.int64
        ).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> bytes:
        """The member's content. Raises OSError when it is damaged or too large."""
        offset, stored_size, size, checksum = self._places[index].tolist()
        if max(stored_size, size) > MOST_BYTES:
            raise OSError(f"it unpacks to {size:,} bytes, at most {MOST_BYTES:,} are read")
        # Opening anew takes microseconds, and leaves nothing for threads and processes to share.
        with self._files[self._archives[index]].open("rb") as file:
            file.seek(offset)
            header = file.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
                raise OSError("the zip file is damaged")
            _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            file.seek(name_length + extra_length, 1)
            content = file.read(stored_size)
        if self._packed[index]:
            try:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
            except zlib.error:
                raise OSError("the zip file is damaged") from None
        if len(content) != size or zlib.crc32(content) != checksum:
            raise OSError("the zip file is damaged")
        return content

    def name(self, index: int) -> str:
        """The zip file's path, and the member's in it."""
        return f"{self._files[self._archives[index]]}/{self._paths[index]}"


class _ZipTree:
    """The members of all files, by their paths from the root of the tree."""

    def __init__(self, place: Path, files: list[Path], members: dict[str, _Member]) -> None:
        self.name = place.stem if place.is_file() else place.resolve().name
        self.place = place
        self._files = files
        self._members = members
        self._folders: dict[str, dict[str, None]] = {}
        self._images: dict[str, list[str]] = {}
        for path in sorted(members):
            if not _is_image(path):
                continue
            parts = path.split("/")[:-1]
            for depth in range(min(len(parts), _MOST_DEPTH)):
                above, folder = "/".join(parts[:depth]), "/".join(parts[: depth + 1])
                self._folders.setdefault(above, {})[parts[depth]] = None
                self._images.setdefault(folder, []).append(path)

    def folders(self, above: str) -> list[str]:
        """The folders in the root ("") or in one of its folders."""
        return list(self._folders.get(above, ()))

    def images(self, folder: str) -> list[str]:
        """The image files anywhere below a folder, sorted; paths from the root."""
        return self._images.get(folder, [])

    def classes_file(self) -> tuple[str, bytes] | None:
        """The path and content of classes.json: in the root, or else beside the zip file."""
        member = self._members.get(CLASSES_FILE)
        if member is None:
            return read_beside(self.place.parent if self.place.is_file() else self.place)
        images = self.open([CLASSES_FILE])
        try:
            return images.name(0), images.read(0)
        except OSError as error:
            raise UserError(f"cannot read {images.name(0)}: {error}") from None

    def open(self, files: list[str]) -> ZipImages:
        """Some of the image files, to be read when asked for."""
        members = [self._members[file] for file in files]
        for member in members:
            _check_readable(f"{self._files[member.archive]}: {member.path}", member.info)
        return ZipImages(self._files, members)


def _zip_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"no such zip file or folder: {path}")
    files = sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() == ".zip" and not is_hidden(file.name)
    )
    if not files:
        raise UserError(f"no zip file in {path}")
    return files


def _members(index: int, file: Path) -> dict[str, _Member]:
    """The files in a zip file by path, without those that are hidden."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise UserError(f"{file}: no zip file, or a damaged one: {error}") from None
    members = {}
    for info in infos:
        # Some programs on Windows store its separators.
        path = info.filename.replace("\\", "/")
        if path.startswith("/") or path[1:2] == ":" or ".." in path.split("/"):
            raise UserError(f"{file}: the path {info.filename!r} leads out of the archive")
        if info.flag_bits & _ENCRYPTED:
            raise UserError(f"{file}: {path} is encrypted: pack it without a password")
        if path.endswith("/") or is_hidden(path):
            continue
        path = "/".join(part for part in path.split("/") if part not in ("", "."))
        members[path] = _Member(index, path, info)  # of two versions the later one is valid
    return members


def _check_readable(place: str, info: zipfile.ZipInfo) -> None:
    if info.compress_type not in _METHODS:
        raise UserError(f"{place} is neither stored nor packed by deflate: pack it anew")


def _named_by_split(files: list[Path], trees: list[dict[str, _Member]]) -> list[dict[str, _Member]]:
    """The trees; below the split that their zip file is called by, where all are."""
    images = [path for tree in trees for path in tree if _is_image(path)]
    inside = any(canonical(folder) for path in images for folder in path.split("/")[:-2])
    if inside or not all(canonical(file.stem) for file in files):
        return trees
    return [
        {
            path if path == CLASSES_FILE else f"{file.stem}/{path}": member
            for path, member in _without_common_folder(tree).items()
        }
        for file, tree in zip(files, trees, strict=True)
    ]


def _merged(place: Path, files: list[Path], trees: list[dict[str, _Member]]) -> dict[str, _Member]:
    merged: dict[str, _Member] = {}
    for tree in trees:
        for path, member in tree.items():
            other = merged.setdefault(path, member)
            if other is not member and _is_image(path):
                raise UserError(
                    f"{place}: {files[other.archive].name} and {files[member.archive].name} both "
                    f"hold {path}"
                )
    return merged


def _without_common_folder(members: dict[str, _Member]) -> dict[str, _Member]:
    """The tree below the one folder that holds all class folders or split folders, if one does."""
    images = [path.split("/") for path in members if _is_image(path)]
    tops = {path[0] for path in images}
    if len(tops) != 1 or min(map(len, images)) < 3 or canonical(*tops):
        return members
    top = f"{tops.pop()}/"
    return {path.removeprefix(top): member for path, member in members.items()}


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES)


KIND = by_path(open_zip)
