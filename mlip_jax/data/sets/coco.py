"""COCO Captions (Chen et al. 2015) in its official layout: a JSON file beside a folder of images.

Whether an image exists is found out when it is read.
"""

from __future__ import annotations

from pathlib import Path

from mlip_jax.core.errors import UserError
from mlip_jax.core.texts import shown, wrong_text
from mlip_jax.data.sets.coco_json import (
    CocoAnnotation,
    is_id,
    numbered,
    place_of,
    read_entries,
    slim,
)
from mlip_jax.data.sets.files import CaptionSource, ImageFiles
from mlip_jax.data.sets.kinds import Opening, by_path
from mlip_jax.data.sets.records import Skipped
from mlip_jax.data.sets.splits import STANDARD
from mlip_jax.data.text.captions import usable

_YEARS = ("2017", "2014")
_SPLITS = {"train": "train", "validation": "val"}


def open_coco(folder: Path, opening: Opening) -> CaptionSource:
    """Opens a split: FOLDER/annotations/captions_train2017.json and FOLDER/train2017/*.jpg.

    A record an image, with its captions in the order of the file. The files of 2014 do as well.

    Args:
      folder: what the official archives are unpacked in.
      wanted: the split.
      max_skipped_share: more images without a usable caption than this are an error.
      cleaning: one of captions.CLEANINGS.

    Raises:
      MissingSplit: for another split than train and validation.
      UserError: for what is missing, with what to download, or "FILE: annotations[INDEX]: what is
        wrong" for what is malformed.
    """
    choice = STANDARD.choose(f"the COCO captions in {folder}", opening.wanted, _SPLITS)
    skipped = Skipped("images", opening.cleaning)
    files, texts, folders = [], [], []
    for split in choice.parts:
        file, images = _find(folder, _SPLITS[split])
        folders.append(images)
        for name, captions in zip(*_grouped(file), strict=True):
            place = f"{file}: {shown(name)}"
            skipped.mend(place, captions)
            if cleaned := usable(captions, opening.cleaning):
                files.append(f"{images}/{name}")
                texts.append(cleaned)
            else:
                skipped.add(place, captions)
    notes = skipped.notes(len(files), opening.max_skipped_share)
    # Figures on COCO are of this split or of Karpathy's: the name tells which.
    name = f"coco-{'+'.join(folders)}"
    return CaptionSource(name, choice, ImageFiles(folder, files), texts, notes)


def _find(folder: Path, part: str) -> tuple[Path, str]:
    """The file of captions and the folder of images, of the newer year if there are both."""
    for year in _YEARS:
        file = folder / "annotations" / f"captions_{part}{year}.json"
        if file.is_file() and (folder / f"{part}{year}").is_dir():
            return file, f"{part}{year}"
    file, images = folder / "annotations" / f"captions_{part}2017.json", folder / f"{part}2017"
    missing = " and ".join(str(path) for path in (file, images) if not path.exists())
    raise UserError(
        f"the COCO captions in {folder} lack {missing}: download train2017.zip, val2017.zip and "
        f"annotations_trainval2017.zip from https://cocodataset.org and unpack them in {folder}"
    )


def _grouped(file: Path) -> tuple[list[str], list[list[str]]]:
    """The images' file names, and as many lists of captions."""
    images, annotations = read_entries(file, slim, "images", "annotations")
    places = numbered(file, images)
    captions: list[list[str]] = [[] for _ in images]
    for index, annotation in enumerate(annotations):
        if not (
            isinstance(annotation, CocoAnnotation)
            and is_id(annotation.image_id)
            and isinstance(annotation.caption, str)
        ):
            raise UserError(f'{file}: annotations[{index}] needs "image_id" and "caption", a text')
        if wrong := wrong_text(annotation.caption):
            raise UserError(f"{file}: annotations[{index}]: the caption {wrong}")
        place = place_of(file, index, "image", annotation.image_id, places, "images")
        captions[place].append(annotation.caption)
    return [image.file_name for image in images], captions


KIND = by_path(open_coco)
