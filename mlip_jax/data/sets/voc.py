"""PASCAL VOC's classification task (Everingham et al. 2010) in its official layout."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from jaxtyping import Int8

from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.files import ImageFiles, MultiLabelSource
from mlip_jax.data.sets.kinds import Opening, by_path
from mlip_jax.data.sets.splits import Scheme

_LISTS = Path("ImageSets", "Main")
_LIST = re.compile(r"([^.].*)_(trainval|train|val|test)\.txt$")
_VALUES = {"1": 1, "0": 0, "-1": -1}
_ORDER = ("train", "val", "trainval", "test")
# Trained on trainval, tested on test: there is nothing else to validate on.
_SCHEME = Scheme(
    roles={"train": (("trainval",),), "validation": (), "evaluation": (("test",),)},
    names={"training": "train", "validation": "val", "valid": "val", "dev": "val"},
    by_role=False,
)


def open_voc(folder: Path, opening: Opening) -> MultiLabelSource:
    """Opens FOLDER/ImageSets/Main/CLASS_SPLIT.txt with FOLDER/JPEGImages/ID.jpg.

    An image shows a class (1), shows it only as objects that are difficult (0), or does not (-1).
    The captions of an image are the classes that it shows.

    Args:
      folder: such as VOCdevkit/VOC2007, or VOCdevkit where it holds one year.
      wanted: train, val, trainval or test; trainval is for training, test for evaluation.
      max_skipped_share: not used: no image is left out.
      cleaning: one of captions.CLEANINGS.

    Raises:
      MissingSplit: when there are no lists of the split.
      UserError: for a missing folder or list, or "LIST:LINE: what is wrong" for a malformed line.
    """
    folder = _year(folder)
    lists = folder / _LISTS
    matches = [match for file in sorted(lists.iterdir()) if (match := _LIST.match(file.name))]
    if not matches:
        raise UserError(f"no lists of a class's images, such as dog_test.txt, in {lists}")
    classes = sorted({match[1] for match in matches})
    splits = {match[2] for match in matches}
    choice = _SCHEME.choose(lists, opening.wanted, [split for split in _ORDER if split in splits])
    rows: dict[str, np.ndarray] = {}
    for part in choice.parts:
        ids, targets = _read_split(lists, classes, part)
        rows.update(zip(ids, targets, strict=True))  # trainval repeats train and val
    if choice.parts == ("trainval",):
        choice = choice._replace(parts=("train", "val"))
    return MultiLabelSource(
        folder.resolve().name,
        choice,
        ImageFiles(folder / "JPEGImages", [f"{image}.jpg" for image in rows]),
        np.array(list(rows.values()), np.int8).reshape(-1, len(classes)),
        tuple(classes),
        opening.cleaning,
    )


def _year(folder: Path) -> Path:
    """The folder that holds the lists: this one, or the only year in it."""
    if (folder / _LISTS).is_dir():
        return folder
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    years = sorted(path.parents[len(_LISTS.parts) - 1] for path in folder.glob(f"VOC*/{_LISTS}"))
    if len(years) > 1:
        names = " or ".join(f"voc:{year}" for year in years)
        raise UserError(f"{folder} holds several years: name one, {names}")
    if not years:
        raise UserError(
            f"no {_LISTS} in {folder}: expected what the archives of PASCAL VOC unpack to, such as "
            "VOCdevkit/VOC2007"
        )
    return years[0]


def _read_split(
    lists: Path, classes: list[str], split: str
) -> tuple[list[str], Int8[np.ndarray, "images classes"]]:
    """The images of a split and their targets."""
    ids: list[str] = []
    columns: list[list[int]] = []
    for name in classes:
        file = lists / f"{name}_{split}.txt"
        values = _read_list(file)
        if columns and values.keys() != set(ids):
            other = lists / f"{classes[0]}_{split}.txt"
            raise UserError(f"{file}: does not list the same images as {other}")
        ids = ids or list(values)
        columns.append([values[image] for image in ids])
    return ids, np.array(columns, np.int8).T


def _read_list(file: Path) -> dict[str, int]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8") from None
    values: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        image, *value = line.split()
        if len(value) != 1 or value[0] not in _VALUES:
            raise UserError(
                f"{file}:{number}: expected an image and 1, 0 or -1, found {line!r:.60}"
            )
        if image in values:
            raise UserError(f"{file}:{number}: the image {image} is listed twice")
        values[image] = _VALUES[value[0]]
    return values


KIND = by_path(open_voc)
