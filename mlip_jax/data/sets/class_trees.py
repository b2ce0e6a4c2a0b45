"""Datasets of one class an image: trees of class folders, and classes.json, which names classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.files import NotJson, decode_json
from mlip_jax.core.texts import brief, wrong_text
from mlip_jax.data.sets.class_order import in_order
from mlip_jax.data.sets.files import ClassSource, Images
from mlip_jax.data.sets.kinds import Opening
from mlip_jax.data.sets.splits import STANDARD, canonical

CLASSES_FILE = "classes.json"


class Tree(Protocol):
    """Class folders, perhaps below split folders."""

    name: str  # of the dataset
    place: Path  # for errors

    def folders(self, above: str) -> list[str]:
        """The folders in the root ("") or in one of its folders; hidden ones are left out."""

    def images(self, folder: str) -> list[str]:
        """The image files anywhere below a folder, sorted; paths from the root, none hidden."""

    def classes_file(self) -> tuple[str, bytes] | None:
        """The path and content of classes.json, if there is one."""

    def open(self, files: list[str]) -> Images:
        """Some of the image files, to be read when asked for."""


def open_tree(tree: Tree, opening: Opening) -> ClassSource:
    """Opens CLASS/*.jpg, or SPLIT/CLASS/*.jpg.

    A class's name is its folder's with spaces for underscores, or what classes.json says. Classes
    are those of all splits, in the order of their folders (`in_order`) or of classes.json; one
    without an image is a class like any other.

    Raises:
      MissingSplit: when there are split folders, but not this one; or none and it is not "train".
      UserError: for no image at all, a wrong classes.json, or too many images of classes whose
        names are no captions.
    """
    splits = _split_folders(tree)
    choice = STANDARD.choose(tree.place, opening.wanted, splits or ("train",))
    # Labels are the same whichever split is opened.
    present = in_order(name for above in splits.values() or [""] for name in tree.folders(above))
    classes_file = tree.classes_file()
    names = (
        {name: " ".join(name.replace("_", " ").split()) for name in present}
        if classes_file is None
        else named_classes(*classes_file, present)
    )
    files, labels = [], []
    for part in choice.parts:
        above = splits.get(part, "")
        folders = set(tree.folders(above))
        for label, name in enumerate(names):
            if name in folders:
                images = tree.images(f"{above}/{name}" if above else name)
                files += images
                labels += [label] * len(images)
    if not files:
        root = "/".join(filter(None, [str(tree.place), splits.get(choice.parts[0], "")]))
        raise UserError(f"no images in {root}: expected {root}/CLASS/*.jpg (or .png, .webp, ...)")
    return ClassSource(
        tree.name,
        choice,
        tree.open(files),
        np.array(labels, np.int32),
        tuple(names.values()),
        cleaning=opening.cleaning,
        max_skipped_share=opening.max_skipped_share,
    )


def _split_folders(tree: Tree) -> dict[str, str]:
    """The folder of each split. "train" is a class too: a split is a folder that holds folders."""
    splits: dict[str, str] = {}
    for folder in sorted(tree.folders("")):
        split = canonical(folder)
        if split is None or not tree.folders(folder):
            continue
        if split in splits:
            raise UserError(
                f"{tree.place}: {splits[split]} and {folder} are both {split}: rename one"
            )
        splits[split] = folder
    return splits


def named_classes(file: str, content: bytes, folders: Iterable[str]) -> dict[str, str]:
    """Class folder -> class name, in the order of a classes.json.

    It holds a list of folders, whose names have spaces for underscores, or an object
    {folder: name}.

    Args:
      file: its path, for errors.
      content: its text.
      folders: those that it must hold.

    Raises:
      UserError: for anything else, or a folder that is missing from it.
    """
    values = read_classes(file, content)
    if isinstance(values, Mapping):
        names = {folder: " ".join(name.split()) for folder, name in values.items()}
    else:
        names = {name: " ".join(name.replace("_", " ").split()) for name in values}
    for folder in folders:
        if folder not in names:
            raise UserError(
                f"{file}: the class folder {brief(folder)} is not in it{suggestion(folder, names)}"
            )
    return names


def read_classes(file: str, content: bytes) -> Mapping[str, str] | Sequence[str]:
    """What a classes.json holds: names, or folders with names.

    Raises:
      UserError: for anything else, or a class that is listed twice.
    """
    try:
        values = decode_json(content, object)
    except NotJson as error:
        raise UserError(f"{file}: {error}") from None
    if not isinstance(values, (list, dict)) or not values:
        raise UserError(
            f"{file}: expected a list of classes or an object {{class folder: class name}}"
        )
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    for key, name in pairs:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{file}: the class {brief(key)} must be a text, found {brief(name)}")
        if wrong := wrong_text(name):
            raise UserError(f"{file}: the class {brief(key)} {wrong}")
    if isinstance(values, list) and len(set(values)) < len(values):
        counts = Counter(values)
        twice = next(name for name in values if counts[name] > 1)
        raise UserError(f"{file}: the class {brief(twice)} is listed twice")
    return values
