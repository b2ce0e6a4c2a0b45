"""Where the samples of a tar shard lie: found once, kept in a small file, read when needed."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import NotJson, decode_json, write_atomically
from mlip_jax.data.prepare.containers import is_packed
from mlip_jax.data.prepare.readers import Broken
from mlip_jax.data.prepare.webdataset import ANNOTATIONS, Sample, WebDataset, sample_of

_VERSION = 1
_KEPT = 3  # broken samples that are named


@dataclass(frozen=True)
class Findings:
    """How many samples a shard has, and what of it is of no use."""

    samples: int
    broken: int = 0
    first: Sequence[tuple[str, str]] = ()  # place and reason of the first broken ones


@dataclass(frozen=True)
class TarIndex:
    """The samples of one shard. Of 10,000 pairs it takes 350 kB."""

    findings: Findings
    keys: UInt8[np.ndarray, " bytes"]  # in UTF-8, one after the other
    key_ends: Int[np.ndarray, " samples"]
    member_ends: Int[np.ndarray, " samples"]
    endings: UInt8[np.ndarray, " members"]  # numbers in `ending_names`
    ending_names: Sequence[str]
    offsets: Int[np.ndarray, " members"]
    sizes: Int[np.ndarray, " members"]

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, place: int) -> str:
        """A sample's name in its shard."""
        start = int(self.key_ends[place - 1]) if place else 0
        return self.keys[start : self.key_ends[place]].tobytes().decode()

    def sample(self, place: int) -> Sample:
        """A sample, without members that are never read."""
        start = int(self.member_ends[place - 1]) if place else 0
        members = {
            self.ending_names[self.endings[at]]: (int(self.offsets[at]), int(self.sizes[at]))
            for at in range(start, int(self.member_ends[place]))
        }
        return sample_of(0, self.key(place), members)


def build(path: Path, shown: str) -> TarIndex:
    """Finds the samples of a shard by its headers.

    Args:
      path: of the file.
      shown: its name for the user.

    Raises:
      UserError: when it is packed: samples are read in any order.
    """
    if is_packed(path):
        raise UserError(
            f"{shown} is packed by gzip, and its samples are read in any order: unpack it, or "
            "prepare the dataset by mlip prepare --source=webdataset:..."
        )
    names: dict[str, int] = {}
    keys: list[bytes] = []
    ends: list[int] = []
    endings: list[int] = []
    places: list[tuple[int, int]] = []
    broken = 0
    first: list[tuple[str, str]] = []
    for ref in _refs(path):
        if isinstance(ref, Broken):
            broken += 1
            if len(first) < _KEPT:
                first.append((ref.name.replace(str(path), shown), ref.reason))
            continue
        keys.append(ref.key.encode())
        for ending, place in ref.members.items():
            if ending == ref.image or ending in ANNOTATIONS:
                endings.append(names.setdefault(ending, len(names)))
                places.append(place)
        ends.append(len(places))
    offsets, sizes = np.array(places, np.int64).reshape(-1, 2).T
    return TarIndex(
        findings=Findings(len(keys), broken, first),
        keys=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum(list(map(len, keys)), dtype=np.int64).astype(np.int32),
        member_ends=np.array(ends, np.int32),
        endings=np.array(endings, np.uint8 if len(names) < 256 else np.int32),
        ending_names=tuple(names),
        offsets=offsets,
        sizes=sizes,
    )


def _refs(path: Path) -> Iterator[Sample | Broken]:
    for _, ref in WebDataset(str(path), {}, "train").refs():
        yield ref


_ARRAYS = ("keys", "key_ends", "member_ends", "endings", "offsets", "sizes")


def save(index: TarIndex, file: Path, stamp: str) -> None:
    """Writes an index.

    Args:
      index: of a shard.
      file: to write.
      stamp: what tells this version of the shard from another.
    """
    found = index.findings
    about = {
        "version": _VERSION,
        "stamp": stamp,
        "endings": index.ending_names,
        "samples": found.samples,
        "broken": found.broken,
        "first": found.first,
    }
    stream = io.BytesIO()
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(stream, about=text, **{name: getattr(index, name) for name in _ARRAYS})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, stream.getvalue())


def load(file: Path, stamp: str) -> TarIndex | None:
    """Reads an index; None where there is none of this version of the shard, or it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            about = decode_json(arrays["about"].tobytes())
            if about["version"] != _VERSION or about["stamp"] != stamp:
                return None
            return TarIndex(
                findings=Findings(
                    int(about["samples"]),
                    int(about["broken"]),
                    tuple((str(place), str(reason)) for place, reason in about["first"]),
                ),
                ending_names=tuple(about["endings"]),
                **{name: arrays[name] for name in _ARRAYS},
            )
    except (OSError, ValueError, KeyError, TypeError, NotJson, zipfile.BadZipFile):
        return None
