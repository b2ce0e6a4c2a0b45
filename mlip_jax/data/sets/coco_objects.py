"""Which objects images show, in COCO's JSON (Lin et al. 2014) or a list of them an image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int8

from mlip_jax.core.errors import UserError
from mlip_jax.core.texts import brief, wrong_text
from mlip_jax.data.sets.class_order import in_order
from mlip_jax.data.sets.coco_json import (
    CocoAnnotation,
    CocoCategory,
    CocoImage,
    check_path,
    entries,
    is_id,
    is_text,
    numbered,
    place_of,
    read_large,
    slim,
)
from mlip_jax.data.sets.files import ImageFiles, MultiLabelSource, find_images
from mlip_jax.data.sets.kinds import Opening, by_path
from mlip_jax.data.sets.splits import STANDARD, canonical, split_of

_OFFICIAL = re.compile(r"instances_(\w+)\.json$")


class _Objects(NamedTuple):
    """A file's content."""

    images: list[CocoImage]
    names: tuple[str, ...]  # of the classes
    targets: Int8[np.ndarray, "images classes"]


def open_objects(path: Path, opening: Opening) -> MultiLabelSource:
    """Opens instances_val2017.json and its like, a folder with several, or a simple form of it.

    In the simple form there are no annotations; an image has "objects", a list of class names, and
    perhaps "split". Crowds count as their class. The captions of an image are the classes that it
    shows. Images lie in ../val2017 for instances_val2017.json, or in val2017, in images or right
    beside the file.

    Args:
      path: a file, or a folder with annotations/instances_*.json for its splits.
      wanted: the split; an official file is all of one, by its name.
      max_skipped_share: not used: no image is left out.
      cleaning: one of captions.CLEANINGS.

    Raises:
      MissingSplit: when it has no such split.
      UserError: for a missing file, or "FILE: annotations[INDEX] ..." or "FILE: images[INDEX] ..."
        for a malformed entry.
    """
    if path.is_dir():
        files = _official_files(path)
        choice = STANDARD.choose(path, opening.wanted, files)
        chosen = [(files[part], _read(files[part])) for part in choice.parts]
    else:
        objects = _read(path)
        splits = _splits(path, objects.images)
        choice = STANDARD.choose(path, opening.wanted, dict.fromkeys(splits))
        rows = [index for index, split in enumerate(splits) if split in choice.parts]
        images = [objects.images[index] for index in rows]
        chosen = [(path, objects._replace(images=images, targets=objects.targets[rows]))]
    names = chosen[0][1].names
    for file, content in chosen:
        if content.names != names:
            raise UserError(f"{file}: has other categories than {chosen[0][0]}")
    return MultiLabelSource(
        path.resolve().name if path.is_dir() else path.stem,
        choice,
        ImageFiles(
            Path(), [name for file, content in chosen for name in _images(file, content.images)]
        ),
        np.concatenate([content.targets for _, content in chosen]),
        names,
        opening.cleaning,
    )


def _official_files(folder: Path) -> dict[str, Path]:
    """The file of each split, of the newest year where there are several."""
    files = sorted(folder.glob("annotations/instances_*.json")) or sorted(
        folder.glob("instances_*.json")
    )
    named = {file: _OFFICIAL.match(file.name) for file in files}
    by_split = {
        split: file for file, match in named.items() if match and (split := canonical(match[1]))
    }
    if not by_split:
        raise UserError(
            f"no annotations/instances_train2017.json or instances_val2017.json in {folder}: name "
            "one of its files, or unpack annotations_trainval2017.zip from https://cocodataset.org"
        )
    return by_split


def _splits(file: Path, images: Sequence[CocoImage]) -> list[str]:
    """The split of each image: its own, else the one that the file is called by."""
    match = _OFFICIAL.match(file.name)
    of_file = match and canonical(match[1])
    return [
        split_of(f"{file}: images[{index}]", image.split or of_file)
        for index, image in enumerate(images)
    ]


def _read(file: Path) -> _Objects:
    content = read_large(file, slim)
    if isinstance(content, dict) and "annotations" in content:
        return _from_annotations(file, content)
    return _from_lists(file, *entries(file, content, "images"))


def _from_annotations(file: Path, content: dict[str, Any]) -> _Objects:
    images, annotations, categories = entries(file, content, "images", "annotations", "categories")
    places = numbered(file, images)
    columns: dict[int | str, int] = {}
    for index, category in enumerate(categories):
        if not (
            isinstance(category, CocoCategory) and is_id(category.id) and is_text(category.name)
        ):
            raise UserError(f'{file}: categories[{index}] needs "id" and "name", a text')
        if columns.setdefault(category.id, index) != index:
            raise UserError(
                f"{file}: categories[{index}] has the id {brief(category.id)} of another"
            )
        if wrong := wrong_text(category.name):
            raise UserError(f'{file}: categories[{index}]: "name" {wrong}')
    targets = np.full((len(images), len(categories)), -1, np.int8)
    for index, annotation in enumerate(annotations):
        if not (
            isinstance(annotation, CocoAnnotation)
            and is_id(annotation.image_id)
            and is_id(annotation.category_id)
        ):
            raise UserError(f'{file}: annotations[{index}] needs "image_id" and "category_id"')
        row = place_of(file, index, "image", annotation.image_id, places, "images")
        column = place_of(file, index, "category", annotation.category_id, columns, "categories")
        targets[row, column] = 1
    return _Objects(images, tuple(category.name for category in categories), targets)


def _from_lists(file: Path, images: list[Any]) -> _Objects:
    for index, image in enumerate(images):
        if not isinstance(image, CocoImage) or not is_text(image.file_name):
            raise UserError(f'{file}: images[{index}] needs "file_name", a text')
        check_path(f'{file}: images[{index}]: "file_name"', image.file_name)
        if not isinstance(image.objects, list) or not all(map(is_text, image.objects)):
            raise UserError(
                f'{file}: images[{index}] needs "objects", a list of class names, where the file '
                'has no "annotations"'
            )
        for name in image.objects:
            if wrong := wrong_text(name):
                raise UserError(f'{file}: images[{index}]: a name in "objects" {wrong}')
    names = in_order(name for image in images for name in image.objects)
    columns = {name: column for column, name in enumerate(names)}
    targets = np.full((len(images), len(names)), -1, np.int8)
    for row, image in enumerate(images):
        targets[row, [columns[name] for name in image.objects]] = 1
    return _Objects(images, tuple(names), targets)


def _images(file: Path, images: Sequence[CocoImage]) -> list[str]:
    """The images' paths."""
    names = [image.file_name for image in images]
    match = _OFFICIAL.match(file.name)
    # The official archives unpack beside the folder of annotations.
    beside = [file.absolute().parents[1] / match[1], file.parent / match[1]] if match else []
    folders = [*beside, file.parent / "images", file.parent]
    files = find_images([(folder, names) for folder in folders])
    return [files.name(index) for index in range(len(files))]


KIND = by_path(open_objects)
