"""The JSON files of COCO (Lin et al. 2014): images, and annotations that refer to them by id.

The files have up to half a GB: of each object only what is needed is kept, as soon as it is parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_json
from mlip_jax.core.texts import brief, wrong_path

_MOST_BYTES = 16 * 2**30  # of one file; the largest that are published have some 6 GB


class CocoImage(NamedTuple):
    """An entry of "images"."""

    id: Any
    file_name: Any
    split: Any
    objects: Any


class CocoAnnotation(NamedTuple):
    """An entry of "annotations": a caption, or an object."""

    image_id: Any
    caption: Any
    category_id: Any


class CocoCategory(NamedTuple):
    """An entry of "categories"."""

    id: Any
    name: Any


def slim(entry: dict[str, Any]) -> Any:
    """What is needed of an object of a COCO file; None for segmentations, licences and the like."""
    if "images" in entry or "annotations" in entry:
        return entry
    if "image_id" in entry or "caption" in entry or "category_id" in entry:
        return CocoAnnotation(entry.get("image_id"), entry.get("caption"), entry.get("category_id"))
    if "file_name" in entry:
        return CocoImage(
            entry.get("id"), entry["file_name"], entry.get("split"), entry.get("objects")
        )
    return CocoCategory(entry.get("id"), entry["name"]) if "name" in entry else None


def read_entries(file: Path, slim: Callable[[dict[str, Any]], Any], *keys: str) -> list[list[Any]]:
    """The lists that a JSON file must hold, each object in them as `slim` makes it.

    Raises:
      UserError: when the file cannot be read, is not JSON, or lacks a list.
    """
    return entries(file, read_large(file, slim), *keys)


def read_large(file: Path, slim: Callable[[dict[str, Any]], Any]) -> Any:
    """The content of a JSON file of annotations, each object in it as `slim` makes it.

    Raises:
      UserError: when the file cannot be read, or is not JSON.
    """
    return read_json(file, object, object_hook=slim, most=_MOST_BYTES)


def entries(file: Path, content: Any, *keys: str) -> list[list[Any]]:
    """The lists that a file must hold.

    Raises:
      UserError: when it lacks one.
    """
    values = content if isinstance(content, dict) else {}
    lists = [each for key in keys if isinstance(each := values.get(key), list)]
    if len(lists) < len(keys):
        names = " and ".join(f'"{key}"' for key in keys)
        many = ("a list", "two lists", "three lists")[len(keys) - 1]
        raise UserError(f"{file}: expected an object with {names}, {many}")
    return lists


def numbered(file: Path, images: Sequence[Any]) -> dict[int | str, int]:
    """The place of each image by its id.

    Raises:
      UserError: "FILE: images[INDEX] ..." for an entry without id or file, or an id given twice.
    """
    places: dict[int | str, int] = {}
    for index, image in enumerate(images):
        if not (isinstance(image, CocoImage) and is_id(image.id) and is_text(image.file_name)):
            raise UserError(f'{file}: images[{index}] needs "id" and "file_name", a text')
        check_path(f'{file}: images[{index}]: "file_name"', image.file_name)
        if places.setdefault(image.id, index) != index:
            raise UserError(
                f"{file}: images[{index}] has the id {brief(image.id)} of another image"
            )
    return places


def place_of(
    file: Path, index: int, kind: str, key: Any, places: Mapping[int | str, int], among: str
) -> int:
    """The place of what annotation `index` refers to.

    Raises:
      UserError: "FILE: annotations[INDEX] ..." when it refers to nothing in the file.
    """
    place = places.get(key)
    if place is None:
        raise UserError(
            f"{file}: annotations[{index}] is of the {kind} {brief(key)}, which is not among "
            f'"{among}"'
        )
    return place


def check_path(what: str, path: str) -> None:
    """Raises UserError, "WHAT holds ...", for a text that cannot be a path."""
    if wrong := wrong_path(path):
        raise UserError(f"{what} {wrong}")


def is_id(value: Any) -> bool:
    """Whether a value may be an id."""
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Whether a value is a text that is not empty."""
    return isinstance(value, str) and bool(value)
