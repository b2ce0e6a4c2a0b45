"""Prepared datasets on disk: ArrayRecord shards of encoded images with what is said about them.

A folder holds SPLIT-NNNNN.array_record, beside each SPLIT-NNNNN.texts.jsonl with its texts alone,
index.json, SHA256SUMS (as `sha256sum --check` reads it), broken.jsonl and a card, README.md;
scores.npz too where a model has chosen among the pairs (`data.prepare.scored`). The
format is ours: a record is the length of a JSON object (32 bits, little endian), the object in
UTF-8, and then the image file as it was encoded. Nothing in it can be executed.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import decode_json, kind_of, read_json
from mlip_jax.core.texts import brief, is_whole, whole, wrong_text

INDEX, SUMS, CARD, BROKEN = "index.json", "SHA256SUMS", "README.md", "broken.jsonl"
SCORES = "scores.npz"  # what a model says of each pair of the source, where it was asked
SHARD_SUFFIX, TEXTS_SUFFIX = ".array_record", ".texts.jsonl"
FORMAT, VERSION = "mlip_jax prepared set", 1
_MOST_COUNT = 2**50
_LENGTH = struct.Struct("<I")
_KEYS = ("captions", "tags", "labels", "difficult")
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Example:
    """One image and what is said about it, as a shard keeps it."""

    name: str
    image: bytes = b""
    captions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()  # keys of the classes that it shows
    difficult: tuple[str, ...] = ()  # keys of those that are too difficult to count
    scores: tuple[float, ...] = ()  # what a model says of each caption; (): nothing


@dataclass(frozen=True)
class Shard:
    """A shard's entry in the index."""

    name: str  # of its files, without a suffix
    split: str
    records: int  # 0: it has no files
    sizes: tuple[int, int]  # bytes of the shard, of its texts
    sums: tuple[str, str]  # SHA-256 of the same
    made_of: str  # a digest of what it was made from
    facts: Mapping[str, Any]  # counts for the card

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Shard:
        """The shard of its entry in an index.

        Raises:
          ValueError, TypeError, KeyError: when it is no such entry.
        """
        values = {**values, "sizes": tuple(values["sizes"]), "sums": tuple(values["sums"])}
        shard = cls(**values)
        if not is_split(shard.split):
            raise ValueError(f"{brief(shard.split)} is no name of a split")
        number = shard.name.removeprefix(f"{shard.split}-") if _is_text(shard.name) else ""
        if not re.fullmatch(r"[0-9]{5,12}", number):
            raise ValueError(
                f"{brief(shard.name)} is no shard's name: expected {shard.split}-NNNNN"
            )
        if not (
            _is_count(shard.records)
            and len(shard.sizes) == len(shard.sums) == 2
            and all(map(_is_count, shard.sizes))
            and all(map(_is_text, (*shard.sums, shard.made_of)))
            and isinstance(shard.facts, dict)
        ):
            raise ValueError(f"the entry of the shard {shard.name} is wrong")
        formats = shard.facts.get("formats")
        if isinstance(formats, dict) and all(map(_is_count, formats.values())):
            counted = sum(formats.values())
            if counted != shard.records:
                raise ValueError(
                    f'"records" of the shard {shard.name} is {shard.records}, but it counts '
                    f"{counted} images"
                )
        return shard

    def files(self) -> tuple[tuple[str, int, str], ...]:
        """Name, size and SHA-256 of its files."""
        names = (f"{self.name}{SHARD_SUFFIX}", f"{self.name}{TEXTS_SUFFIX}")
        return tuple(zip(names, self.sizes, self.sums, strict=True)) if self.records else ()


@dataclass(frozen=True)
class Index:
    """What index.json holds."""

    job: Mapping[str, Any]  # the source and the options that the shards depend on
    shards: tuple[Shard, ...]
    class_keys: tuple[str, ...] = ()  # how records name their classes, in the order of the labels
    class_names: tuple[str, ...] = ()
    multi_label: bool = False
    attribution: str = ""
    licence: str = ""
    notes: tuple[str, ...] = ()
    inputs: Mapping[str, int] = field(default_factory=dict)  # number of files and their bytes

    def to_json(self) -> str:
        """As the text of index.json, the same for the same content."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def read_index(folder: Path) -> Index:
    """The index of a prepared dataset.

    Raises:
      UserError: when there is none, or it is damaged.
    """
    path = folder / INDEX
    content = read_json(path, missing=None)
    if content is None:
        raise UserError(
            f"{folder} holds no prepared dataset: it has no {INDEX}. Prepare it by "
            f"mlip prepare --source=KIND:PATH --out={folder}"
        )
    try:
        if content.pop("format") != FORMAT:
            raise ValueError(f"it is no index of a {FORMAT}")
        version = content.pop("version")
        if version != VERSION:
            raise ValueError(f"it is of version {version}, this program reads {VERSION}")
        shards = tuple(map(Shard.from_values, _list(content, "shards")))
        if len({shard.name for shard in shards}) < len(shards):
            raise ValueError("two shards have one name")
        class_keys, class_names, notes = (
            tuple(_list(content, key)) for key in ("class_keys", "class_names", "notes")
        )
        index = Index(
            shards=shards, class_keys=class_keys, class_names=class_names, notes=notes, **content
        )
        _check(index)
        return replace(
            index,
            class_names=tuple(map(whole, index.class_names)),
            notes=tuple(map(whole, index.notes)),
            attribution=whole(index.attribution),
            licence=whole(index.licence),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _list(content: dict[str, Any], key: str) -> list[Any]:
    values = content.pop(key)
    if not isinstance(values, list):
        raise ValueError(f'"{key}" must be a list, found {kind_of(values)}')
    return values


def _check(index: Index) -> None:
    texts = (*index.class_keys, *index.class_names, *index.notes, index.attribution, index.licence)
    if not all(map(_is_text, texts)) or any(map(wrong_text, texts)):
        raise ValueError("a class, a note, the attribution or the licence is no text")
    if len(index.class_keys) != len(index.class_names):
        raise ValueError('"class_keys" and "class_names" are not of one length')
    if len(set(index.class_keys)) < len(index.class_keys):
        raise ValueError('a class is twice in "class_keys"')
    if not isinstance(index.multi_label, bool) or not isinstance(index.job, dict):
        raise ValueError('"multi_label" must be true or false, and "job" an object')
    if not isinstance(index.inputs, dict) or not all(map(_is_count, index.inputs.values())):
        raise ValueError('"inputs" must be an object of counts')


def is_split(name: Any) -> bool:
    """Whether a split may be called so: it is a part of the names of files."""
    return _is_text(name) and bool(re.fullmatch(r"\w[\w.+-]{0,99}", name)) and is_whole(name)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_COUNT


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def pack(example: Example, image: bytes) -> tuple[bytes, bytes]:
    """A record of an example with this image, and its line of the texts."""
    values = {"name": example.name}
    values |= {key: texts for key in (*_KEYS, "scores") if (texts := getattr(example, key))}
    line = _JSON.encode(values).encode("utf-8", "replace")
    return b"".join((_LENGTH.pack(len(line)), line, image)), line + b"\n"


def unpack(record: bytes) -> Example:
    """The inverse of `pack`.

    Raises:
      ValueError: when it is no record.
    """
    if len(record) < _LENGTH.size:
        raise ValueError("too short")
    end = _LENGTH.size + _LENGTH.unpack_from(record)[0]
    return parse_texts(record[_LENGTH.size : end], record[end:])


def parse_texts(line: bytes, image: bytes = b"") -> Example:
    """The example of a line of the texts.

    Raises:
      ValueError: when it is none.
    """
    values = decode_json(line, one_line=True)
    texts = {key: values.get(key, []) for key in _KEYS}
    name = values.get("name")
    if not _is_text(name) or not all(
        isinstance(each, list) and all(map(_is_text, each)) for each in texts.values()
    ):
        raise ValueError(f"no record of a {FORMAT}")
    for key in ("captions", "tags"):
        if wrong := next(filter(None, map(wrong_text, texts[key])), ""):
            raise ValueError(f'a text of "{key}" {wrong}')
    scores = values.get("scores", [])
    if not isinstance(scores, list) or not all(type(each) in (int, float) for each in scores):
        raise ValueError('"scores" must be numbers')
    texts["scores"] = scores
    return Example(name, image, **{key: tuple(each) for key, each in texts.items()})
