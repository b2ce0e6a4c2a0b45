"""COCO Captions (Chen et al. 2015) in its official layout: a JSON file beside a folder of images.

Whether an image exists is found out when it is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from mlip_jax.config import UserError
from mlip_jax.data.captions import usable
from mlip_jax.data.file_sources import FileSource
from mlip_jax.data.records import Skipped

_YEARS = ("2017", "2014")
_SPLITS = {"train": "train", "validation": "val"}


class _Image(NamedTuple):
    id: Any
    file_name: Any


class _Annotation(NamedTuple):
    image_id: Any
    caption: Any


def open_coco(
    folder: Path, split: str, max_skipped_share: float, cleaning: str = "none"
) -> FileSource:
    """Opens a split: FOLDER/annotations/captions_train2017.json and FOLDER/train2017/*.jpg.

    A record an image, with its captions in the order of the file. The files of 2014 do as well.

    Args:
      folder: what the official archives are unpacked in.
      split: "train" or "validation".
      max_skipped_share: more images without a usable caption than this are an error.
      cleaning: one of captions.CLEANINGS.

    Raises:
      UserError: for what is missing, with what to download, or "FILE: annotations[INDEX]: what is
        wrong" for what is malformed.
    """
    file, images_folder = _find(folder, _SPLITS[split])
    names, captions = _grouped(file)
    skipped = Skipped("images", cleaning)
    files, texts = [], []
    for name, own in zip(names, captions, strict=True):
        if cleaned := usable(own, cleaning):
            files.append(name)
            texts.append(cleaned)
        else:
            skipped.add(f"{file}: {name}", own)
    return FileSource(
        "coco",
        split,
        folder=images_folder,
        files=files,
        captions=texts,
        notes=skipped.notes(len(files), max_skipped_share),
    )


def _find(folder: Path, part: str) -> tuple[Path, Path]:
    """The file of captions and the folder of images, of the newer year if there are both."""
    for year in _YEARS:
        file = folder / "annotations" / f"captions_{part}{year}.json"
        images = folder / f"{part}{year}"
        if file.is_file() and images.is_dir():
            return file, images
    file, images = folder / "annotations" / f"captions_{part}2017.json", folder / f"{part}2017"
    missing = " and ".join(str(path) for path in (file, images) if not path.exists())
    raise UserError(
        f"the COCO captions in {folder} lack {missing}: download train2017.zip, val2017.zip and "
        f"annotations_trainval2017.zip from https://cocodataset.org and unpack them in {folder}"
    )


def _grouped(file: Path) -> tuple[list[str], list[list[str]]]:
    """The images' file names, and as many lists of captions."""
    content = _parse(file)
    images, annotations = (_entries(file, content, key) for key in ("images", "annotations"))
    places: dict[int | str, int] = {}
    for index, image in enumerate(images):
        if not (isinstance(image, _Image) and _is_id(image.id) and _is_text(image.file_name)):
            raise UserError(f'{file}: images[{index}] needs "id" and "file_name", a text')
        if places.setdefault(image.id, index) != index:
            raise UserError(f"{file}: images[{index}] has the id {image.id!r} of another image")
    captions: list[list[str]] = [[] for _ in images]
    for index, annotation in enumerate(annotations):
        if not (
            isinstance(annotation, _Annotation)
            and _is_id(annotation.image_id)
            and isinstance(annotation.caption, str)
        ):
            raise UserError(f'{file}: annotations[{index}] needs "image_id" and "caption", a text')
        place = places.get(annotation.image_id)
        if place is None:
            raise UserError(
                f"{file}: annotations[{index}] is of the image {annotation.image_id!r}, which is "
                'not among "images"'
            )
        captions[place].append(annotation.caption)
    return [image.file_name for image in images], captions


def _parse(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text, object_hook=_slim)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not JSON: {error.msg}, line {error.lineno}") from None


def _slim(entry: dict[str, Any]) -> Any:
    """What is needed of an object, as soon as it is parsed: all of them would fill half a GB."""
    if "images" in entry or "annotations" in entry:
        return entry
    if "caption" in entry or "image_id" in entry:
        return _Annotation(entry.get("image_id"), entry.get("caption"))
    return _Image(entry.get("id"), entry.get("file_name"))


def _entries(file: Path, content: Any, key: str) -> list[Any]:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f'{file}: expected an object with "images" and "annotations", two lists')
    return entries


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
