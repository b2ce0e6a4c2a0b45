"""Zero-shot classification: a class is the mean embedding of its prompts (CLIP, section 3.1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mlip_jax.core.errors import UserError
from mlip_jax.data.text.equality import equal_ids
from mlip_jax.evaluations.classifiers import named, place_in_class
from mlip_jax.evaluations.family import Family
from mlip_jax.evaluations.interface import Encoder, Outcome
from mlip_jax.evaluations.prompts import find_class_names, find_templates
from mlip_jax.evaluations.scores import on_grid
from mlip_jax.evaluations.sets import EmbeddedSet, Sets, check_classes

_PROMPTS_A_CALL = 4096


def embed_classes(
    model: Encoder, class_names: Sequence[str], templates: Sequence[str]
) -> Float[np.ndarray, "classes width"]:
    """Each class as the normalised mean of its normalised prompt embeddings."""
    means = []
    at_once = max(1, _PROMPTS_A_CALL // len(templates))
    for first in range(0, len(class_names), at_once):
        names = class_names[first : first + at_once]
        prompts = [template.replace("{}", name) for name in names for template in templates]
        embeddings = np.asarray(model.encode_text(prompts), np.float32)
        means.append(embeddings.reshape(len(names), len(templates), -1).mean(axis=1))
    classes = np.concatenate(means)
    return classes / np.maximum(np.linalg.norm(classes, axis=1, keepdims=True), 1e-12)


def equal_classes(
    model: Encoder, class_names: Sequence[str], templates: Sequence[str]
) -> Int[np.ndarray, " classes"]:
    """A number a class, the same for classes whose prompts have equal token ids, all of them."""
    groups = np.zeros(len(class_names), np.int64)
    for template in templates:
        if groups.max() == len(groups) - 1:  # no two are equal
            break
        tokens = model.tokenize([template.replace("{}", name) for name in class_names])
        groups = equal_ids(np.stack([groups, equal_ids(tokens)], axis=1))
    return groups


def classify(
    image_embeddings: Float[np.ndarray, "images width"],
    class_embeddings: Float[np.ndarray, "classes width"],
    labels: Int[np.ndarray, " images"],
    chunk: int = 1024,
    groups: Int[np.ndarray, " classes"] | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy and the mean of the classes' own top-1, in [0, 1].

    A class that ties with the right one counts against it. Classes of one group are one text to
    the model: among them the first stands first, as argmax has it. Classes without images are
    candidates like any other and have no part in the mean over classes. top5 is left out for 5
    classes or fewer, where it says nothing.

    Args:
      image_embeddings: a row an image.
      class_embeddings: a row a class.
      labels: the right classes.
      chunk: images at a time, which bound the memory.
      groups: as `equal_classes` gives them; None: no two classes are equal.

    Raises:
      UserError: for labels that are no class's index.
      RunError: for NaN or infinity among the embeddings.
    """
    images = on_grid(image_embeddings, "image embeddings")
    classes = on_grid(class_embeddings, "class embeddings")
    labels = np.asarray(labels)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if wrong.size:
        raise UserError(
            f"the label {labels[wrong[0]]} of image {wrong[0]} is out of range: there are "
            f"{len(classes)} classes"
        )
    later = np.zeros(len(classes), np.int64)
    if groups is not None:
        first = np.unique(groups, return_index=True)[1]
        classes = classes[first[groups]]  # equal texts of two batches may differ in their last bits
        later = np.bincount(groups)[groups] - 1 - place_in_class(groups)
    ranks = np.empty(len(images), np.int64)
    for top in range(0, len(images), chunk):
        scores = images[top : top + chunk] @ classes.T
        right = np.take_along_axis(scores, labels[top : top + chunk, None], axis=1)
        ranks[top : top + chunk] = (scores >= right).sum(axis=1)
    ranks -= later[labels]
    return accuracies(ranks, labels, len(classes))


def accuracies(
    ranks: Int[np.ndarray, " images"], labels: Int[np.ndarray, " images"], classes: int
) -> dict[str, float]:
    """The figures of `classify`, from the rank of each image's own class, from 1."""
    correct = ranks == 1
    present = np.bincount(labels, minlength=classes)
    per_class = np.bincount(labels, weights=correct, minlength=classes)[present > 0]
    values = {"top1": float(correct.mean())}
    if classes > 5:
        values["top5"] = float(np.mean(ranks <= 5))
    values["mean_per_class"] = float(np.mean(per_class / present[present > 0]))
    return values


def chance(classes: int) -> dict[str, float]:
    """What `classify` gives, on average, for a random order of the classes."""
    values = {"top1": 1 / classes, "top5": 5 / classes, "mean_per_class": 1 / classes}
    if classes <= 5:
        del values["top5"]
    return values


def check(sets: Sets, spec: str, family: str = "zero_shot") -> None:
    """Raises UserError for a dataset that cannot be opened or has no classes."""
    source = sets.source(spec)
    if source is not None and not source.class_names:
        raise UserError(f"config.evaluation.{family}: the dataset {spec!r} has no class labels")


def score(sets: Sets, spec: str) -> Outcome | None:
    """Zero-shot classification of a dataset by config.evaluation.templates and class_names.

    A dataset whose images show several classes each is scored by mean average precision.

    Returns:
      None for "validation" without labels.

    Raises:
      UserError: for a dataset without labels, or a class folder without images.
      RunError: for NaN or infinity among the embeddings.
    """
    embedded = sets.evaluation(spec)
    if embedded is None or not has_classes(embedded):
        if spec == "validation":
            return None
        raise UserError(f"config.evaluation.zero_shot: the dataset {spec!r} has no class labels")
    prompted = class_embeddings(sets, spec, embedded)
    if embedded.multi_label:
        return _average_precision(embedded, prompted.embeddings, prompted.words)
    groups = equal_classes(sets.model, prompted.names, prompted.templates)
    return _accuracy(embedded, prompted.embeddings, groups, prompted.names, prompted.words)


class Prompted(NamedTuple):
    """The classes of a dataset as the model reads them."""

    embeddings: Float[np.ndarray, "classes width"]
    names: Sequence[str]
    templates: Sequence[str]

    @property
    def words(self) -> str:
        """How they are asked for."""
        several = len(self.templates) > 1
        return f"{len(self.templates)} prompts a class" if several else repr(self.templates[0])


def has_classes(embedded: EmbeddedSet) -> bool:
    """Whether a dataset has class names, and an image of a class."""
    return bool(embedded.source.class_names) and bool((embedded.targets == 1).any())


def class_embeddings(sets: Sets, spec: str, embedded: EmbeddedSet) -> Prompted:
    """The classes of a dataset by config.evaluation.templates and class_names.

    Raises:
      UserError: for a class folder without images, or a template without a slot.
    """
    check_classes(embedded, spec)
    config = sets.config.evaluation
    templates = find_templates(config.templates, embedded.name)
    names = find_class_names(config.class_names, embedded.source.class_names, embedded.name)
    return Prompted(embed_classes(sets.model, names, templates), names, templates)


def _accuracy(
    embedded: EmbeddedSet,
    classes: Float[np.ndarray, "classes width"],
    groups: Int[np.ndarray, " classes"],
    names: Sequence[str],
    prompts: str,
) -> Outcome:
    labelled = embedded.labels >= 0
    labels = embedded.labels[labelled]
    empty = int(np.sum(np.bincount(labels, minlength=len(names)) == 0))
    assert embedded.embeddings is not None  # `evaluation` was asked for them
    figures = classify(embedded.embeddings[labelled], classes, labels, groups=groups)
    note = f"{len(names):,} classes, {prompts}; ties count against the model."
    twins = np.flatnonzero(place_in_class(groups) == 1)
    if twins.size:
        note += (
            f" Prompts that occur for more than one class mean the first of them, as argmax has "
            f"it: {named([names[twin] for twin in twins.tolist()])}."
        )
    if empty:
        note += f" {empty:,} classes have no image here and are candidates only."
    if not labelled.all():
        note += f" {int((~labelled).sum()):,} images without a class are left out."
    return Outcome(
        embedded.name,
        figures,
        chance(len(names)),
        dict.fromkeys(figures, len(labels)),
        dict.fromkeys(figures, f"zero-shot, {prompts}"),
        note + embedded.omissions(),
    )


def _average_precision(
    embedded: EmbeddedSet, classes: Float[np.ndarray, "classes width"], prompts: str
) -> Outcome:
    from mlip_jax.evaluations import average_precision  # here: its library takes a second to import

    assert embedded.embeddings is not None  # `evaluation` was asked for them
    images = on_grid(embedded.embeddings, "image embeddings")
    scores = images @ on_grid(classes, "class embeddings").T
    class_means = average_precision.mean_over_classes(embedded.targets, scores)
    key = "mean_average_precision"
    note = (
        f"{len(class_means.classes):,} of {len(classes):,} classes have images here and count, "
        f"{prompts}; images in which a class is marked difficult are left out for it."
    )
    return Outcome(
        embedded.name,
        {key: class_means.step_sum},
        {key: class_means.chance},
        {key: len(embedded)},
        {key: f"zero-shot, {prompts}, step-sum AP"},
        note + embedded.omissions(),
    )


FAMILY = Family(score, check, at_intervals=True)
