"""Compositional understanding: whether a model tells a caption from one of the same words.

Two kinds of examples, as their authors publish them:

- SugarCrepe (Hsieh et al. 2023, arXiv 2306.14610): an image, its caption and one that is wrong in a
  word or in their order. The model is right where the caption scores higher.
- Winoground (Thrush et al. 2022, arXiv 2204.03162): two images and two captions of the same words.
  The text score counts examples in which each image scores higher with its caption than with the
  other, the image score those in which each caption scores higher with its image, and the group
  score those with both.

Ties count against the model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mlip_jax.core.errors import UserError
from mlip_jax.core.texts import whole, wrong_text
from mlip_jax.data.sets.coco_json import check_path, is_text
from mlip_jax.data.sets.files import ImageFiles
from mlip_jax.evaluations.by_path import embed_images, named_images, read_values, split_spec
from mlip_jax.evaluations.family import Family
from mlip_jax.evaluations.interface import Outcome
from mlip_jax.evaluations.scores import on_grid
from mlip_jax.evaluations.sets import Sets, embed_texts

_FIGURES = {
    1: {"accuracy": (0.5, "caption against a wrong one")},
    2: {
        "text_score": (0.25, "each image's caption against the other's"),
        "image_score": (0.25, "each caption's image against the other's"),
        "group_score": (1 / 6, "both"),
    },
}


class Example(NamedTuple):
    """Images and two captions; caption i belongs to image i, the second of one image to none."""

    images: tuple[str, ...]
    captions: tuple[str, str]


class Task(NamedTuple):
    """The examples of a file and where their images are."""

    name: str
    examples: tuple[Example, ...]
    images: ImageFiles
    names: tuple[str, ...]  # of the images


def read_task(spec: str) -> Task:
    """The examples that a spec names.

    Args:
      spec: FILE.json, an object or a list of examples, or FILE.jsonl, an example a line; then
        perhaps "@" and the folder of the images. An example has "filename", "caption" and
        "negative_caption", or "image_0", "image_1", "caption_0" and "caption_1". An image is a file
        there, in images/ or in val2017/; of Winoground's, whose names have no suffix, with one.

    Raises:
      UserError: for a file that cannot be read, or an example that is none, with its place.
    """
    file, folder = split_spec(spec)
    examples = tuple(_example(place, value) for place, value in read_values(file))
    if not examples:
        raise UserError(f"{file} has no examples")
    kinds = {len(example.images) for example in examples}
    if len(kinds) > 1:
        raise UserError(f"{file} has examples of one image and of two: give each a file of its own")
    names = tuple(dict.fromkeys(name for example in examples for name in example.images))
    return Task(file.stem, examples, named_images(folder, names), names)


def _example(place: str, value: Any) -> Example:
    if not isinstance(value, dict):
        raise UserError(f"{place} is no example: expected an object")
    images: tuple[str, ...]
    if "negative_caption" in value:
        keys, images = ("caption", "negative_caption"), ("filename",)
    else:
        keys, images = ("caption_0", "caption_1"), ("image_0", "image_1")
    for key in (*images, *keys):
        if not is_text(value.get(key)):
            raise UserError(
                f'{place} needs "{key}", a text; an example has "filename", "caption" and '
                '"negative_caption", or "image_0", "image_1", "caption_0" and "caption_1"'
            )
    for key in images:
        check_path(f'{place}: "{key}"', value[key])
    for key in keys:
        if wrong := wrong_text(value[key]):
            raise UserError(f'{place}: "{key}" {wrong}')
    first, second = (whole(value[key]) for key in keys)
    return Example(tuple(value[key] for key in images), (first, second))


def check(sets: Sets, spec: str) -> None:
    """Raises UserError for a file of examples that cannot be read."""
    del sets
    read_task(spec)


def score(sets: Sets, spec: str) -> Outcome | None:
    """The scores on a file of examples.

    Returns:
      None for "validation": a dataset has no such examples.

    Raises:
      UserError: as `read_task`, or when too many images cannot be read.
      RunError: for NaN or infinity among the embeddings.
    """
    if spec == "validation":
        return None
    task = read_task(spec)
    embedded = embed_images(sets, task.name, task.images, len(task.names))
    assert embedded.embeddings is not None  # features were not asked for
    row_of = {task.names[index]: row for row, index in enumerate(embedded.indices.tolist())}
    kept = [example for example in task.examples if all(name in row_of for name in example.images)]
    if not kept:
        raise UserError(f"{spec}: no example has images that can all be read")
    images = on_grid(embedded.embeddings, "image embeddings")
    rows = np.array([[row_of[name] for name in example.images] for example in kept])
    captions = [text for example in kept for text in example.captions]
    embedded_captions = embed_texts(sets.model, captions, task.name, sets.progress)
    texts = on_grid(embedded_captions, "text embeddings")
    # [examples, images, captions]
    scores = np.einsum("eiw,ecw->eic", images[rows], texts.reshape(len(kept), 2, -1))
    shares = {name: float(right.mean()) for name, right in judge(scores).items()}
    about = _FIGURES[rows.shape[1]]
    left = len(task.examples) - len(kept)
    note = (
        "The share of the examples in which the model scores what belongs together above what does "
        "not; ties count against it." + embedded.omissions()
    )
    if left:
        note += f" {left:,} of {len(task.examples):,} examples are left out for want of an image."
    return Outcome(
        task.name,
        shares,
        {name: about[name][0] for name in shares},
        dict.fromkeys(shares, len(kept)),
        {name: about[name][1] for name in shares},
        note,
    )


def judge(scores: Float[np.ndarray, "examples images captions"]) -> dict[str, np.ndarray]:
    """Of each example whether it is right, by figure.

    Args:
      scores: of each image with each of the two captions; the diagonal belongs together.
    """
    own = scores[:, 0, 0]
    if scores.shape[1] == 1:
        return {"accuracy": own > scores[:, 0, 1]}
    other = scores[:, 1, 1]
    text = (own > scores[:, 0, 1]) & (other > scores[:, 1, 0])
    image = (own > scores[:, 1, 0]) & (other > scores[:, 0, 1])
    return {"text_score": text, "image_score": image, "group_score": text & image}


FAMILY = Family(score, check, wants=("examples", "sugar_crepe.json"))
