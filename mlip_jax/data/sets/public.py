"""Datasets that are named by one word: where their files belong, and how they come there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mlip_jax.core.cache import cache_folder
from mlip_jax.core.errors import UserError


class Place(NamedTuple):
    """Where a named dataset lies."""

    spec: str  # KIND:PATH, with {folder} for the dataset's folder in the cache folder
    needs: tuple[str, ...]  # what must be in that folder
    how: str  # what the user does for that, with {folder}


_PREPARED = (
    "fetch the images of {table} with img2dataset (--output_format webdataset) into a folder TARS, "
    "then run mlip prepare --source=webdataset:TARS --resize=256 --out={folder}"
)


def _web(table: str) -> Place:
    return Place("prepared:{folder}", ("index.json",), _PREPARED.replace("{table}", table))


PLACES = {
    "coco": Place(
        "coco:{folder}",
        ("annotations",),
        "download train2017.zip, val2017.zip and annotations_trainval2017.zip from "
        "https://cocodataset.org and unpack them in {folder}",
    ),
    "flickr30k": Place(
        "karpathy:{folder}/dataset_flickr30k.json",
        ("dataset_flickr30k.json", "images"),
        "ask for the images at https://shannon.cs.illinois.edu/DenotationGraph, unpack them in "
        "{folder}/images, and put dataset_flickr30k.json of Karpathy's caption_datasets.zip in "
        "{folder}",
    ),
    "cc3m": _web("Train_GCC-training.tsv (https://ai.google.com/research/ConceptualCaptions)"),
    "cc12m": _web("cc12m.tsv (https://github.com/google-research-datasets/conceptual-12m)"),
    "yfcc15m": _web(
        "YFCC100M that yfcc100m_subset_data.tsv of https://github.com/openai/CLIP lists, with "
        "their titles and descriptions,"
    ),
    "imagenet": Place(
        "folder:{folder}",
        ("train", "val", "classes.json"),
        "unpack ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of https://image-net.org into "
        "{folder}/train/n01440764/*.JPEG and {folder}/val/n01440764/*.JPEG, a folder a class, and "
        'write {folder}/classes.json with the classes\' names, {{"n01440764": "tench", ...}}',
    ),
    "voc": Place(
        "voc:{folder}/VOCdevkit/VOC2007",
        ("VOCdevkit/VOC2007/ImageSets/Main", "VOCdevkit/VOC2007/JPEGImages"),
        "download VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar from "
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2007 and unpack both in {folder}",
    ),
}


def find(name: str, cache_dir: str) -> tuple[str, str]:
    """The kind and the path of a named dataset.

    Args:
      name: one of PLACES.
      cache_dir: see `cache_folder`; the dataset lies in the folder of its name there.

    Raises:
      UserError: when it is not there, with what is missing and how it comes there.
    """
    place, folder = PLACES[name], cache_folder(cache_dir) / name
    missing = [need for need in place.needs if not (folder / need).exists()]
    if missing:
        raise UserError(
            f"the dataset {name!r} belongs in {folder}, which lacks {' and '.join(missing)}: "
            f"{instructions(name, folder)}"
        )
    kind, _, where = place.spec.format(folder=folder).partition(":")
    return kind, where


def instructions(name: str, folder: str | Path) -> str:
    """What to put where, in one sentence."""
    return PLACES[name].how.format(folder=folder)
