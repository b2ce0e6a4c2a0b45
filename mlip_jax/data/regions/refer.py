"""Referring expressions in the layout of REFER (Yu et al. 2016): RefCOCO, RefCOCO+, RefCOCOg."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_json
from mlip_jax.core.texts import brief
from mlip_jax.data.regions.base import FileRegions, Query, check_box, clean_regions
from mlip_jax.data.sets.coco_json import check_path, is_id, is_text, read_entries
from mlip_jax.data.sets.splits import Scheme, Wanted

# The standard splits of RefCOCO and RefCOCO+ are UNC's, of RefCOCOg UMD's.
_REFS = ("refs(unc).p", "refs(umd).p", "refs(google).p")
_SPLITS = Scheme(
    roles={"evaluation": (("val",),)},
    names={"validation": "val", "testa": "testA", "testb": "testB"},
    by_role=False,
)
_MSCOCO = Path("images") / "mscoco" / "images" / "train2014"  # where REFER's code has them


class _Image(NamedTuple):
    id: Any
    file_name: Any


class _Annotation(NamedTuple):
    id: Any
    image_id: Any
    bbox: Any


class _Plain(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers, and executes nothing."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuses every class and function."""
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, but only lists, dicts, texts and numbers are read"
        )


def open_refer(
    folder: Path, split: str = "", *, cleaning: str = "none", max_skipped_share: float = 0.01
) -> FileRegions:
    """Opens FOLDER/refs(unc).p with FOLDER/instances.json; every sentence is a query.

    refs(umd).p, refs(google).p and refs*.json with the same content do as well; of several the
    first in this order is read. Images are looked for in FOLDER/images, in
    FOLDER/../images/mscoco/images/train2014, and in every folder in FOLDER or beside it.

    Args:
      folder: the dataset's folder.
      split: train, val, testA, testB, test or "all"; "": val.
      cleaning: how expressions are cleaned, `config.model.text.cleaning`.
      max_skipped_share: more sentences than this that are empty are an error.

    Raises:
      MissingSplit: when no expression is of this split.
      UserError: for what is missing, or "FILE: annotations[INDEX]: what is wrong" and the like for
        what is malformed.
    """
    refs_file, instances_file = _find_files(folder)
    refs = _read_refs(refs_file)
    present = dict.fromkeys(ref["split"] for ref in refs)
    choice = _SPLITS.choose(folder, Wanted("evaluation", split), present)
    wanted = {index: ref for index, ref in enumerate(refs) if ref["split"] in choice.parts}
    queries = list(_queries(refs_file, wanted, instances_file))
    if not queries:
        raise UserError(f"{refs_file}: the split {choice.name} holds no sentences")
    images = _find_images(folder, queries[0].file)
    return clean_regions(
        f"Expressions of {refs_file.name}, split {choice.name}.",
        (query._replace(file=images / query.file) for query in queries),
        cleaning,
        max_skipped_share,
    )


def _find_files(folder: Path) -> tuple[Path, Path]:
    candidates = [folder / name for name in _REFS] + sorted(folder.glob("refs*.json"))
    refs = next((file for file in candidates if file.is_file()), None)
    if refs is None:
        raise UserError(
            f"{folder} has no file of expressions: expected {', '.join(_REFS)} or refs*.json, as "
            "in the archives of https://github.com/lichengunc/refer"
        )
    instances = folder / "instances.json"
    if not instances.is_file():
        raise UserError(f"{folder} has no instances.json, which holds the boxes of {refs.name}")
    return refs, instances


def _read_refs(file: Path) -> list[dict[str, Any]]:
    content = _unpickle(file) if file.suffix == ".p" else read_json(file, list)
    if not isinstance(content, list) or not content:
        raise UserError(f"{file}: expected a list of expressions")
    for index, ref in enumerate(content):
        if not (
            isinstance(ref, dict)
            and is_id(ref.get("ann_id"))
            and is_text(ref.get("split"))
            and isinstance(ref.get("sentences"), list)
            and all(
                isinstance(sentence, dict) and isinstance(sentence.get("sent"), str)
                for sentence in ref["sentences"]
            )
        ):
            raise UserError(
                f'{file}: refs[{index}] needs "ann_id", "split" and "sentences", a list of '
                'objects with "sent"'
            )
    return content


def _unpickle(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            # Texts of Python 2, which wrote these files, are bytes.
            return _Plain(stream, encoding="utf-8", errors="replace").load()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    # A damaged pickle raises whatever its instructions stumble over.
    except Exception as error:
        raise UserError(f"{file}: not a pickle of expressions: {error}") from None


def _queries(refs_file: Path, refs: Mapping[int, dict[str, Any]], file: Path) -> Iterator[Query]:
    """One a sentence, the files by their names alone."""
    images, annotations = read_entries(file, _slim, "images", "annotations")
    names = {}
    for index, image in enumerate(images):
        if not (isinstance(image, _Image) and is_id(image.id) and is_text(image.file_name)):
            raise UserError(f'{file}: images[{index}] needs "id" and "file_name", a text')
        check_path(f'{file}: images[{index}]: "file_name"', image.file_name)
        names[image.id] = Path(image.file_name)
    places = {}
    for index, annotation in enumerate(annotations):
        if not (isinstance(annotation, _Annotation) and is_id(annotation.id)):
            raise UserError(f'{file}: annotations[{index}] needs "id", "image_id" and "bbox"')
        places[annotation.id] = index
    for number, ref in refs.items():
        found = places.get(ref["ann_id"])
        if found is None:
            raise UserError(
                f"{refs_file}: refs[{number}] is of the annotation {brief(ref['ann_id'])}, which "
                f'is not among the "annotations" of {file}'
            )
        annotation, place = annotations[found], f"{file}: annotations[{found}]"
        name = names.get(annotation.image_id) if is_id(annotation.image_id) else None
        if name is None:
            raise UserError(
                f"{place} is of the image {brief(annotation.image_id)}, which is not among the "
                '"images"'
            )
        box = check_box(place, annotation.bbox)
        for sentence in ref["sentences"]:
            yield Query(name, sentence["sent"], box, place)


def _slim(entry: dict[str, Any]) -> Any:
    """What is needed of an object of instances.json; None for what else there is."""
    if "images" in entry or "annotations" in entry:
        return entry
    if "bbox" in entry:
        return _Annotation(entry.get("id"), entry.get("image_id"), entry["bbox"])
    return _Image(entry.get("id"), entry["file_name"]) if "file_name" in entry else None


def _find_images(folder: Path, name: Path) -> Path:
    """The folder of images, which holds this one."""
    standard_folders = [folder / "images", folder.parent / _MSCOCO]
    beside = [path for place in (folder, folder.parent) for path in sorted(place.iterdir())]
    for candidate in (*standard_folders, *beside):
        if (candidate / name).is_file():
            return candidate
    raise UserError(
        f"cannot find the image {name}: looked in {standard_folders[0]}, {standard_folders[1]} "
        f"and the folders in {folder} and {folder.parent}; COCO's train2014.zip from "
        "https://cocodataset.org holds it"
    )
