"""What a teacher says of a prepared dataset, kept beside its shards.

Beside each SPLIT-NNNNN.array_record of a prepared dataset lie, of each teacher that is kept, three
arrays as NumPy writes them: SPLIT-NNNNN.teacher-ID.images.npy, float16 [records, views, width], of
`views` augmented views of each image; .texts.npy, float16 [captions, sides, width], of each caption
and, where images are mirrored, of the mirrored image's; .records.npy, int64 [records + 1], where
each record's captions begin. teacher-ID.json says by which model, of which shards, and how views
are made: a view is a function of the seed, the shard's name, the place in it and the view's number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_json
from mlip_jax.data.sets import shards
from mlip_jax.data.sets.records import Origin

FORMAT, VERSION = "mlip_jax kept teacher", 1
ARRAYS = ("images", "texts", "records")
_AGAIN = "run mlip prepare --teacher again"
_CACHE_OPEN = 64  # shards whose files a process has mapped


@dataclass(frozen=True)
class Kept:
    """One teacher's embeddings of the training split of a prepared dataset.

    Attributes:
      folder: of the dataset.
      teacher: the digest of the model, see `search.identity.digest`.
      width: of its embeddings.
      scale: what it multiplies cosines by.
      image_size: pixels along a side of what it has seen.
      views: augmented views of each image.
      seed: of the views.
      settings: by the config's keys, what views and captions depend on.
      shards: by name, the SHA-256 of the shard and of its texts, and the bytes of the arrays.
    """

    folder: Path
    teacher: str
    width: int
    scale: float
    image_size: int
    views: int
    seed: int
    settings: Mapping[str, Any]
    shards: Mapping[str, Mapping[str, Any]]
    _open: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": {}}  # maps stay in their process

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def file(self) -> Path:
        """What says all of this."""
        return index_file(self.folder, self.teacher)

    def to_values(self) -> dict[str, Any]:
        """As plain values, for the file."""
        values = {key: value for key, value in asdict(self).items() if key not in _NOT_WRITTEN}
        return {"format": FORMAT, "version": VERSION} | values

    def image(self, origin: Origin, view: int) -> Float16[np.ndarray, " width"]:
        """Of a view of a record's image."""
        return np.array(self._arrays(origin.shard)[0][origin.place, view])

    def text(
        self, origin: Origin, caption: int, flipped: bool, captions: int
    ) -> Float16[np.ndarray, " width"]:
        """Of a caption of a record that has so many, of its image or of the mirrored one."""
        _, texts, records = self._arrays(origin.shard)
        first, end = records[origin.place : origin.place + 2]
        if end - first != captions:
            raise UserError(
                f"{self.file}: {origin.shard} has {end - first} captions of record {origin.place}, "
                f"and the dataset {captions}: {_AGAIN}"
            )
        return np.array(texts[first + caption, int(flipped)])

    def _arrays(self, shard: str) -> tuple[np.ndarray, ...]:
        if shard not in self._open:
            if len(self._open) >= _CACHE_OPEN:
                self._open.pop(next(iter(self._open)))
            paths = array_files(self.folder, shard, self.teacher)
            self._open[shard] = tuple(
                np.load(path, mmap_mode="r", allow_pickle=False) for path in paths
            )
        return self._open[shard]


_NOT_WRITTEN = ("folder", "_open")


def random_of_view(seed: int, origin: Origin, view: int) -> np.random.Generator:
    """Where the chance of one kept view comes from."""
    shard = hashlib.sha256(origin.shard.encode()).digest()[:8]
    return np.random.default_rng([seed, int.from_bytes(shard, "big"), origin.place, view])


def index_file(folder: Path, teacher: str) -> Path:
    """What says how a teacher's embeddings were made."""
    return folder / f"teacher-{teacher[:12]}.json"


def array_files(folder: Path, shard: str, teacher: str) -> list[Path]:
    """A shard's files, in the order of `ARRAYS`."""
    return [folder / f"{shard}.teacher-{teacher[:12]}.{name}.npy" for name in ARRAYS]


def kept_teachers(folder: Path) -> list[str]:
    """The first digits of the models whose embeddings a folder keeps."""
    names = (path.stem.removeprefix("teacher-") for path in folder.glob("teacher-*.json"))
    return sorted(names)


def read(path: Path) -> Kept:
    """What a file of `Kept.to_values` says.

    Raises:
      UserError: for a file that is missing or damaged.
    """
    values = read_json(path, advice=_AGAIN)
    try:
        if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"it is no index of a {FORMAT} of version {VERSION}")
        kept = Kept(folder=path.parent, **values)
        numbers = (kept.width, kept.image_size, kept.views)
        if not all(type(each) is int and each >= 1 for each in numbers):
            raise ValueError("the width, the image size and the views must be whole numbers")
        if type(kept.seed) is not int or not float(kept.scale) > 0:
            raise ValueError("the seed must be a whole number and the scale above 0")
        if not all(isinstance(each, dict) for each in (kept.settings, kept.shards)):
            raise ValueError('"settings" and "shards" must be objects')
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): {_AGAIN}") from None
    return kept


def open_kept(folder: Path, settings: Mapping[str, Any], teacher: str = "") -> Kept:
    """A teacher's embeddings of a prepared dataset, of all its training shards as they are now.

    Args:
      folder: of the dataset.
      settings: of the run, by the config's keys: what its views and captions depend on.
      teacher: the digest of the model; "": the only one that is kept.

    Raises:
      UserError: when there is none or more than one, and where the model, a shard or a setting is
        another than the one whose embeddings are kept.
    """
    there = kept_teachers(folder)
    if teacher and teacher[:12] not in there:
        others = f"those of {', '.join(there)}" if there else "none"
        raise UserError(
            f"{folder} keeps no embeddings of the model {teacher[:12]}, but {others}: another "
            f"model, or {_AGAIN}"
        )
    if not teacher and len(there) != 1:
        found = f"those of {', '.join(there)}: say which by kept:FOLDER" if there else "none"
        raise UserError(
            f"config.teacher='kept': {folder} must keep one teacher's embeddings and keeps {found}"
            + ("" if there else "; mlip prepare --teacher=FOLDER makes them")
        )
    kept = read(index_file(folder, teacher or there[0]))
    if teacher and kept.teacher != teacher:
        raise UserError(f"{kept.file} is of another model: {_AGAIN}")
    for key, value in settings.items():
        if kept.settings.get(key) != value:
            raise UserError(
                f"config.{key}={value!r}, and the embeddings that {folder} keeps are of views with "
                f"{kept.settings.get(key)!r}: set it so, or {_AGAIN}"
            )
    index = shards.read_index(folder)
    for shard in index.shards:
        if shard.split == "train" and shard.records:
            _check_shard(kept, shard)
    return kept


def _check_shard(kept: Kept, shard: shards.Shard) -> None:
    entry = kept.shards.get(shard.name)
    if entry is None:
        raise UserError(f"{kept.file} says nothing of the shard {shard.name}: {_AGAIN}")
    if list(entry["sums"]) != list(shard.sums):
        raise UserError(
            f"the shard {shard.name} of {kept.folder} is another than the one whose embeddings are "
            f"kept: {_AGAIN}"
        )
    if sizes(kept.folder, shard.name, kept.teacher) != list(entry["sizes"]):
        raise UserError(f"the kept embeddings of the shard {shard.name} are damaged: {_AGAIN}")


def sizes(folder: Path, shard: str, teacher: str) -> list[int]:
    """The bytes of a shard's files; [] where one is missing."""
    try:
        return [path.stat().st_size for path in array_files(folder, shard, teacher)]
    except OSError:
        return []


def same_views(all_kept: Sequence[Kept]) -> Kept | None:
    """One of several that are kept, where all are of the same views; None of none.

    Raises:
      UserError: where they are not.
    """
    for kept in all_kept[1:]:
        if (kept.views, kept.seed) != (all_kept[0].views, all_kept[0].seed):
            raise UserError(
                "config.teacher: the kept embeddings of two teachers are of other views: prepare "
                "both with the same --views and config.seed"
            )
    return all_kept[0] if all_kept else None
