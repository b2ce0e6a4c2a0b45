"""Retrieval by captions in several languages, each by itself.

As on Crossmodal-3600 (Thapliyal et al. 2022, arXiv 2205.12522) and XTD (Aggarwal and Kale 2020,
arXiv 2012.05107): the same images, all ranked against the captions of one language at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mlip_jax.core.errors import UserError
from mlip_jax.core.texts import brief, whole, wrong_text
from mlip_jax.data.sets.coco_json import check_path, is_text
from mlip_jax.data.sets.files import ImageFiles
from mlip_jax.evaluations import retrieval
from mlip_jax.evaluations.by_path import embed_images, named_images, read_values, split_spec
from mlip_jax.evaluations.family import Family
from mlip_jax.evaluations.interface import Outcome
from mlip_jax.evaluations.sets import EmbeddedSet, Sets, embed_texts

MEAN = "mean"  # over languages; what no language is called
_IMAGE_KEYS = ("file", "image", "path", "image/key")
_LAYOUT = (
    'a record has "file" and "captions", an object with a text or a list of them by language; or '
    "is one of Crossmodal-3600"
)


class Task(NamedTuple):
    """The records of a file: where their images are, and each language's captions of each."""

    name: str
    images: ImageFiles
    captions: Mapping[str, list[tuple[str, ...]]]


def read_task(spec: str) -> Task:
    """The records that a spec names.

    Args:
      spec: FILE.jsonl, a record a line, or FILE.json, a list of them; then perhaps "@" and the
        folder of the images. A record is {"file": ..., "captions": {"en": ..., "de": [...]}}, or as
        Crossmodal-3600 has it: {"image/key": ..., "en": {"caption": [...]}, ...}.

    Raises:
      UserError: for a file that cannot be read, a record that is none, a language without captions,
        and an image without a caption in one of the languages.
    """
    file, folder = split_spec(spec)
    names: list[str] = []
    rows: list[dict[str, tuple[str, ...]]] = []
    at: list[str] = []
    for place, value in read_values(file):
        name, texts = _record(place, value)
        names.append(name)
        rows.append(texts)
        at.append(place)
    if not rows:
        raise UserError(f"{file} has no records")
    languages = list(dict.fromkeys(language for texts in rows for language in texts))
    for language in languages:
        if not any(texts.get(language) for texts in rows):
            raise UserError(f"{file}: the language {brief(language)} has no captions")
        without = next((row for row, texts in enumerate(rows) if not texts.get(language)), None)
        if without is not None:
            raise UserError(
                f"{at[without]} has no caption in the language {brief(language)}, which others have"
            )
    captions = {language: [texts[language] for texts in rows] for language in languages}
    return Task(file.stem, named_images(folder, names), captions)


def _record(place: str, value: Any) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The image's name and its captions by language."""
    if not isinstance(value, dict):
        raise UserError(f"{place} is no record: expected an object; {_LAYOUT}")
    key = next((key for key in _IMAGE_KEYS if is_text(value.get(key))), "")
    if not key:
        raise UserError(f'{place} needs "file", a text; {_LAYOUT}')
    check_path(f'{place}: "{key}"', value[key])
    by_language = value.get("captions")
    if by_language is None:
        by_language = {
            language: each["caption"]
            for language, each in value.items()
            if isinstance(each, dict) and "caption" in each
        }
    if not isinstance(by_language, dict) or not by_language:
        raise UserError(f"{place} has no captions by language; {_LAYOUT}")
    for language in by_language:
        if not re.fullmatch(r"[\w-]{1,40}", language) or language == MEAN:
            raise UserError(f"{place}: {brief(language)} is no name of a language, such as de")
    texts = {
        language: _texts(f"{place}: {brief(language)}", each)
        for language, each in by_language.items()
    }
    return value[key], texts


def _texts(place: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    for each in values:
        if not isinstance(each, str):
            raise UserError(f"{place} must be a text or a list of them")
        if wrong := wrong_text(each):
            raise UserError(f"{place} {wrong}")
    return tuple(whole(each) for each in values if each.strip())


def check(sets: Sets, spec: str) -> None:
    """Raises UserError for a file of records that cannot be read."""
    del sets
    read_task(spec)


def score(sets: Sets, spec: str) -> Outcome | None:
    """Recall of each language by itself, both ways, and the mean over languages.

    Returns:
      None for "validation": a dataset has no captions by language.

    Raises:
      UserError: as `read_task`, or when too many images cannot be read.
      RunError: for NaN or infinity among the embeddings.
    """
    if spec == "validation":
        return None
    task = read_task(spec)
    size = len(next(iter(task.captions.values())))
    embedded = embed_images(sets, task.name, task.images, size)
    found: dict[str, float] = {}
    expected: dict[str, float] = {}
    examples: dict[str, int] = {}
    for language, captions in task.captions.items():
        own = replace(embedded, captions=tuple(captions[i] for i in embedded.indices.tolist()))
        values, chances, queries = _scores(sets, own, f"{task.name}, {language}")
        for name, value in values.items():
            found[f"{language}_{name}"] = value
            expected[f"{language}_{name}"] = chances[name]
            examples[f"{language}_{name}"] = queries[name]
    for name in values:
        keys = [f"{language}_{name}" for language in task.captions]
        for figures in (found, expected):
            figures[f"{MEAN}_{name}"] = float(np.mean([figures[key] for key in keys]))
        examples[f"{MEAN}_{name}"] = sum(examples[key] for key in keys)
    return Outcome(
        task.name,
        found,
        expected,
        examples,
        {key: _protocol(key) for key in found},
        f"{len(embedded):,} images, all ranked against all distinct captions of one language, for "
        f"{len(task.captions):,} languages: {', '.join(task.captions)}. Captions of equal token "
        f"ids, images of equal bytes and ties count as in retrieval.{embedded.omissions()}",
    )


def _protocol(key: str) -> str:
    return "mean over languages" if key.startswith(f"{MEAN}_") else "hit recall"


def _scores(
    sets: Sets, embedded: EmbeddedSet, name: str
) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Figures of one language, those of chance, and how many queries are behind each."""
    ranked = retrieval.candidates(sets.model, embedded)
    texts = embed_texts(sets.model, ranked.texts, name, sets.progress)
    assert embedded.embeddings is not None  # features were not asked for
    images = embedded.embeddings[ranked.images]
    values = retrieval.recall(images, texts, ranked.pairs, progress=sets.progress)
    values = {key: value for key, value in values.items() if "_recall@" in key}
    values = {key: value for key, value in values.items() if "_actual_" not in key}
    queries = {"text_to_image": len(texts), "image_to_text": len(images)}
    return (
        values,
        retrieval.chance(ranked.pairs, len(images), len(texts)),
        {key: queries[way] for way in retrieval.DIRECTIONS for key in values if way in key},
    )


FAMILY = Family(score, check, wants=("captions by language", "FILE.jsonl"))
