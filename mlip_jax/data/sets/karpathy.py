"""Karpathy's splits of COCO, Flickr30k and Flickr8k (Karpathy and Fei-Fei 2015).

Retrieval is reported on their `test`: 5,000 images of COCO, 1,000 of each other dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.texts import brief, shown, wrong_text
from mlip_jax.data.sets.coco_json import check_path, is_text, read_entries
from mlip_jax.data.sets.files import CaptionSource, ImageFiles, find_images
from mlip_jax.data.sets.kinds import Opening, by_path
from mlip_jax.data.sets.records import Skipped
from mlip_jax.data.sets.splits import Scheme
from mlip_jax.data.text.captions import usable

_SPLITS = ("train", "restval", "val", "test")
_SCHEME = Scheme(
    # restval: those of COCO's validation images that are in neither val nor test.
    roles={
        "train": (("train", "restval"),),
        "validation": (("val",),),
        "evaluation": (("test",),),
    },
    names={"training": "train", "validation": "val", "valid": "val", "dev": "val"},
    by_role=False,
)


class _Image(NamedTuple):
    filename: Any
    filepath: Any
    split: Any
    sentences: Any


def open_karpathy(file: Path, opening: Opening) -> CaptionSource:
    """Opens dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json.

    An image lies in the file's folder by its "filepath" (such as val2014) and "filename", or by the
    "filename" alone, there or in the folder's images/.

    Args:
      file: the JSON file.
      wanted: train, restval, val or test; train and restval are for training, test for evaluation.
      max_skipped_share: more images without a usable caption than this are an error.
      cleaning: one of captions.CLEANINGS.

    Raises:
      MissingSplit: when no image is of this split.
      UserError: for a missing file, or "FILE: images[INDEX] ..." for a malformed entry.
    """
    (images,) = read_entries(file, _slim, "images")
    for index, image in enumerate(images):
        _check(f"{file}: images[{index}]", image)
    splits = {image.split for image in images}
    choice = _SCHEME.choose(file, opening.wanted, [split for split in _SPLITS if split in splits])
    skipped = Skipped("images", opening.cleaning)
    chosen, texts = [], []
    for image in (image for image in images if image.split in choice.parts):
        place = f"{file}: {shown(image.filename)}"
        skipped.mend(place, image.sentences)
        if cleaned := usable(image.sentences, opening.cleaning):
            chosen.append(image)
            texts.append(cleaned)
        else:
            skipped.add(place, image.sentences)
    name = f"{file.stem.removeprefix('dataset_')}-karpathy-{choice.name}"
    notes = skipped.notes(len(texts), opening.max_skipped_share)
    return CaptionSource(name, choice, _images(file.parent, chosen), texts, notes)


def _images(folder: Path, images: Sequence[_Image]) -> ImageFiles:
    plain = [image.filename for image in images]
    below = [f"{image.filepath}/{image.filename}" if image.filepath else "" for image in images]
    by_path = [(folder, below)] if all(below) else []
    return find_images([*by_path, (folder, plain), (folder / "images", plain)])


def _slim(entry: dict[str, Any]) -> Any:
    """What is needed of an object: a sentence's words, for one, take most of the file."""
    if "images" in entry:
        return entry
    if "raw" in entry:
        return entry["raw"]
    return _Image(
        entry.get("filename"), entry.get("filepath"), entry.get("split"), entry.get("sentences")
    )


def _check(place: str, image: Any) -> None:
    if not isinstance(image, _Image) or not is_text(image.filename):
        raise UserError(f'{place} needs "filename", a text')
    if image.filepath is not None and not isinstance(image.filepath, str):
        raise UserError(f'{place}: "filepath" must be a text')
    check_path(f'{place}: "filename"', image.filename)
    check_path(f'{place}: "filepath"', f"{image.filepath or ''}/{image.filename}")
    if image.split not in _SPLITS:
        raise UserError(
            f"{place}: unknown split {brief(image.split)}: {', '.join(_SPLITS)}"
            f"{suggestion(image.split, _SPLITS)}"
        )
    sentences = image.sentences
    if not isinstance(sentences, list) or not sentences or not all(map(is_text, sentences)):
        raise UserError(f'{place} needs "sentences", a list of objects with "raw", a text')
    for sentence in sentences:
        if wrong := wrong_text(sentence):
            raise UserError(f"{place}: a sentence {wrong}")


KIND = by_path(open_karpathy)
