"""Zero-shot classification: a class is the mean embedding of its prompts (CLIP, section 3.1.4)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib import resources

import numpy as np
from jaxtyping import Float, Int

from mlip_jax.config import UserError, suggestion
from mlip_jax.evaluations.interface import Encoder
from mlip_jax.evaluations.scores import on_grid


@functools.cache
def _named_templates() -> dict[str, list[str]]:
    file = resources.files(__package__) / "templates.json"
    return json.loads(file.read_text(encoding="utf-8"))


def find_templates(name: str) -> tuple[str, ...]:
    """The prompt templates of a named set ("plain", "simple", "clip_7", "clip_80") or one template.

    clip_80 and clip_7 are the ImageNet prompts published with CLIP's code (MIT licence).

    Args:
      name: a set's name, or a template itself such as "a drawing of {}".

    Raises:
      UserError: for a template that has no {} and is no set's name.
    """
    named = _named_templates()
    templates = tuple(named[name]) if name in named else (name,)
    if not all("{}" in template for template in templates):
        raise UserError(
            f"config.evaluation.templates={name!r} is neither a set ({', '.join(named)}) nor a "
            f"template with {{}} where the class goes{suggestion(name, named)}"
        )
    return templates


def embed_classes(
    model: Encoder, class_names: Sequence[str], templates: Sequence[str]
) -> Float[np.ndarray, "classes width"]:
    """Each class as the normalised mean of its normalised prompt embeddings."""
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    embeddings = np.asarray(model.encode_text(prompts), np.float32)
    means = embeddings.reshape(len(class_names), len(templates), -1).mean(axis=1)
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


def classify(
    image_embeddings: Float[np.ndarray, "images width"],
    class_embeddings: Float[np.ndarray, "classes width"],
    labels: Int[np.ndarray, " images"],
    chunk: int = 1024,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy and the mean of the classes' own top-1, in [0, 1].

    A class that ties with the right one counts against it. Classes without images are candidates
    like any other and have no part in the mean over classes. top5 is left out for 5 classes or
    fewer, where it says nothing.

    Raises:
      RunError: for NaN or infinity among the embeddings.
    """
    images = on_grid(image_embeddings, "image embeddings")
    classes = on_grid(class_embeddings, "class embeddings")
    labels = np.asarray(labels)
    ranks = np.empty(len(images), np.int64)
    for top in range(0, len(images), chunk):
        scores = images[top : top + chunk] @ classes.T
        right = np.take_along_axis(scores, labels[top : top + chunk, None], axis=1)
        ranks[top : top + chunk] = (scores >= right).sum(axis=1)
    correct = ranks == 1
    present = np.bincount(labels, minlength=len(classes))
    per_class = np.bincount(labels, weights=correct, minlength=len(classes))[present > 0]
    values = {"top1": float(correct.mean())}
    if len(classes) > 5:
        values["top5"] = float(np.mean(ranks <= 5))
    values["mean_per_class"] = float(np.mean(per_class / present[present > 0]))
    return values


def chance(classes: int) -> dict[str, float]:
    """What `classify` gives, on average, for a random order of the classes."""
    values = {"top1": 1 / classes, "top5": 5 / classes, "mean_per_class": 1 / classes}
    if classes <= 5:
        del values["top5"]
    return values
