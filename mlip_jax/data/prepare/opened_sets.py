"""COCO's captions, and every kind of dataset that training opens, as inputs of the preparation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.core.errors import UserError
from mlip_jax.core.texts import brief, whole, wrong_path, wrong_text
from mlip_jax.data.prepare.readers import Broken, InputRecord, Reader, image_at, split_of_file
from mlip_jax.data.sets import held_out
from mlip_jax.data.sets.coco_json import (
    CocoAnnotation,
    CocoImage,
    is_id,
    is_text,
    read_entries,
    slim,
)
from mlip_jax.data.sets.files import ImageSource, find_images
from mlip_jax.data.sets.opening import open_evaluation, open_source, split_spec
from mlip_jax.data.sets.records import MissingSplit, MultiLabel, Source
from mlip_jax.data.sets.shards import Example
from mlip_jax.data.sets.splits import ALL, canonical

_ROLES = ("train", "validation", "evaluation")


class CocoCaptions(Reader):
    """captions_*.json, beside its images or in annotations/ of COCO's official layout."""

    def __init__(self, where: str, columns: Mapping[str, str], split: str) -> None:
        """Takes a JSON file, or a folder with annotations/captions_*.json.

        Raises:
          UserError: when there is none, or it is no JSON of this kind.
        """
        del columns
        path = Path(where).expanduser()
        self._files = [path]
        if path.is_dir():
            self._files = sorted(path.glob("annotations/captions_*.json"))
            self._files = self._files or sorted(path.glob("captions_*.json"))
            if not self._files:
                raise UserError(f"no annotations/captions_*.json in {path}")
        self._splits = [split or split_of_file(file.with_suffix("")) for file in self._files]
        self._count = 0

    def files(self) -> Sequence[Path]:
        """The JSON files."""
        return self._files

    def total(self) -> int | None:
        """The images so far: a file is read when it is its turn."""
        return self._count or None

    def refs(self) -> Iterator[tuple[str, Any]]:
        """Path and captions of each image; a Broken for each entry that is wrong."""
        for file, split in zip(self._files, self._splits, strict=True):
            images, annotations = read_entries(file, slim, "images", "annotations")
            self._count += len(images)
            places: dict[Any, int] = {}
            captions: list[list[str]] = []
            names: list[str] = []
            for index, image in enumerate(images):
                if reason := _wrong_image(image, places):
                    yield split, Broken(f"{file}: images[{index}]", reason)
                else:
                    places[image.id] = len(captions)
                    captions.append([])
                    names.append(image.file_name)
            for index, annotation in enumerate(annotations):
                if reason := _wrong_annotation(annotation, places):
                    yield split, Broken(f"{file}: annotations[{index}]", reason)
                else:
                    captions[places[annotation.image_id]].append(annotation.caption)
            image_files = _beside(file, names)
            for index, texts in enumerate(captions):
                yield split, (image_files.name(index), tuple(texts))

    def read(self, refs: Sequence[Any]) -> Iterator[InputRecord | Broken]:
        """Reads the images."""
        for ref in refs:
            if isinstance(ref, Broken):
                yield ref
                continue
            name, texts = ref
            try:
                image = image_at(Path(), name)
            except OSError as error:
                yield Broken(name, str(error))
                continue
            captions = dict.fromkeys(whole(text) for text in texts if text.strip())
            yield InputRecord(Example(name, image, tuple(captions)))


class OpenedSet(Reader):
    """Any dataset by the grammar of `config.data.train`, opened as training opens it."""

    def __init__(self, spec: str, columns: Mapping[str, str], split: str) -> None:
        """Takes a spec; without #SPLIT, all of its splits are taken.

        Raises:
          UserError: when it cannot be opened, or --columns is given.
        """
        if columns:
            raise UserError(f"--columns is for tables, JSON and columns of images, not for {spec}")
        self._parts: list[tuple[str, Source]] = []
        self._left_out: tuple[str, ...] = ()
        base, pinned = split_spec(spec)
        if pinned:
            source = open_source(spec, "train", max_skipped_share=1.0)
            whole = held_out.parse(pinned)[0] or "train"
            self._parts.append((split or canonical(whole) or whole, source))
        else:
            self._open_all(base, split)
        source = self._parts[0][1]
        self.class_names = source.class_names
        self.multi_label = isinstance(source, MultiLabel)
        self.attribution = source.attribution

    def _open_all(self, base: str, split: str) -> None:
        seen: set[str] = set()
        for role, name in zip(_ROLES, ("train", "validation", "test"), strict=True):
            try:
                if role == "evaluation":
                    source = open_evaluation(base)
                else:
                    source = open_source(base, role, max_skipped_share=1.0)
            except MissingSplit:
                continue
            if not set(source.parts) <= seen:
                seen.update(source.parts)
                split_name = canonical(source.parts[0]) if len(source.parts) == 1 else None
                self._parts.append((split or split_name or name, source))
        every = open_source(f"{base}#{ALL}", "train", max_skipped_share=1.0).parts
        self._left_out = tuple(part for part in every if part not in seen)

    def files(self) -> Sequence[Path]:
        """None: datasets do not say which files they read."""
        return ()

    def total(self) -> int | None:
        """All records."""
        return sum(len(source) for _, source in self._parts)

    def notes(self) -> Iterable[str]:
        """What the dataset left out on opening, and splits that are not among the three."""
        for _, source in self._parts:
            yield from source.notes
        if self._left_out:
            yield f"splits that are left out: {', '.join(self._left_out)}; name one after #"

    def refs(self) -> Iterator[tuple[str, Any]]:
        """Number of the source, index in it, the classes that are there, and a file's name."""
        for number, (split, source) in enumerate(self._parts):
            # By the name it is noticed when another file has come to stand here.
            has_files = isinstance(source, ImageSource)
            targets = source.targets() if isinstance(source, MultiLabel) else itertools.repeat(None)
            for index, row in zip(range(len(source)), targets, strict=False):
                shown = () if row is None else tuple(map(int, np.flatnonzero(row == 1)))
                difficult = () if row is None else tuple(map(int, np.flatnonzero(row == 0)))
                name = source.name_of(index) if has_files else ""
                yield split, (number, index, shown, difficult, name)

    def read(self, refs: Sequence[Any]) -> Iterator[InputRecord | Broken]:
        """Reads the records."""
        for number, index, shown, difficult, _ in refs:
            source = self._parts[number][1]
            try:
                record = source[index]
            except OSError as error:
                yield Broken(source.name_of(index), error.strerror or str(error))
                continue
            labels = shown or ((record.label,) if record.label >= 0 else ())
            yield InputRecord(
                Example(
                    name=record.name,
                    image=record.image,
                    captions=tuple(filter(None, record.captions)),
                    tags=record.tags,
                    labels=tuple(map(str, labels)),
                    difficult=tuple(map(str, difficult)),
                ),
                multi_label=self.multi_label,
            )


def _wrong_image(image: Any, places: Mapping[Any, int]) -> str:
    if not (isinstance(image, CocoImage) and is_id(image.id) and is_text(image.file_name)):
        return 'needs "id" and "file_name", a text'
    if wrong := wrong_path(image.file_name):
        return f'"file_name" {wrong}'
    return f"has the id {brief(image.id)} of another image" if image.id in places else ""


def _wrong_annotation(annotation: Any, places: Mapping[Any, int]) -> str:
    if not (isinstance(annotation, CocoAnnotation) and isinstance(annotation.caption, str)):
        return 'needs "image_id" and "caption", a text'
    if wrong := wrong_text(annotation.caption):
        return f"the caption {wrong}"
    image = annotation.image_id
    known = is_id(image) and image in places
    return "" if known else f'is of the image {brief(image)}, which is not among "images"'


def _beside(file: Path, names: list[str]) -> Any:
    """The images, in ../train2017 for captions_train2017.json, or in a folder near the file."""
    part = file.stem.removeprefix("captions_")
    folders = (file.parent.parent / part, file.parent / part, file.parent / "images", file.parent)
    return find_images([(folder, names) for folder in folders])
