"""Concept editing: taking a concept such as gender out of embeddings (CLIP-Lite's bias-free ones).

Pairs of words define a concept. The texts that they make span a subspace; an embedding less its
part in there holds no more of the concept than the texts say. Whether a classifier still finds the
concept in images, and whether the images are still good for anything else, is what is measured.

A text's subspace may miss what only images show of the concept. So a second method, reported apart
as "image_pairs", takes the subspace from pairs of images whose captions differ in the words alone,
always of other captions than those of the images that are edited with it. That method is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from mlip_jax.core.errors import UserError
from mlip_jax.evaluations.concepts.definitions import Concept, figure_name, read_concept
from mlip_jax.evaluations.concepts.measures import (
    THIRDS,
    Images,
    Task,
    classification,
    cut_in_thirds,
    finding,
    first_of_each_side,
    image_pairs,
    nearest_text,
    side_probe,
)
from mlip_jax.evaluations.family import Family
from mlip_jax.evaluations.interface import Encoder, Outcome
from mlip_jax.evaluations.scores import on_grid
from mlip_jax.evaluations.sets import EmbeddedSet, Sets, embed_source

_TOP = 20  # images of a side behind a cosine of the table
_FEWEST_CAPTIONS = 20  # a side: fewer make no probe
_FEWEST_PAIRS = 30  # of images: fewer make no subspace and no probe beside it
_MOST_TRAINING = 20_000  # images of the training split, the first
_DRAWS = 3  # of the thirds: two give a subspace of image pairs, the last is edited with it

Subspace = Float[np.ndarray, "components width"]


def concept_subspace(
    pairs_embeddings_a: Float[np.ndarray, "pairs width"],
    pairs_embeddings_b: Float[np.ndarray, "pairs width"],
    components: int,
) -> Subspace:
    """The directions in which the two sides of a concept differ most.

    The principal components of all embeddings, each less the midpoint of its pair.

    Args:
      pairs_embeddings_a: one side of each pair.
      pairs_embeddings_b: the other side, in the same order.
      components: how many directions.

    Returns:
      Orthonormal rows.

    Raises:
      UserError: for more components than there are pairs or dimensions.
    """
    # Both of a pair lie as far from its midpoint, in opposite directions: one of them will do.
    offsets = (np.asarray(pairs_embeddings_a, np.float64) - pairs_embeddings_b) / 2
    if not 1 <= components <= min(offsets.shape):
        raise UserError(
            f"a concept of {components} components: {len(offsets)} pairs of embeddings of width "
            f"{offsets.shape[1]} give 1 to {min(offsets.shape)}"
        )
    return np.linalg.svd(offsets, full_matrices=False)[2][:components]


def edit(
    embeddings: Float[np.ndarray, "rows width"], subspace: Subspace
) -> Float[np.ndarray, "rows width"]:
    """h - sum_i <h, v_i> v_i for each row h, normalised; a row of zeros stays."""
    rows = np.asarray(embeddings, np.float64)
    rows = rows - rows @ subspace.T @ subspace
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def check(sets: Sets, spec: str) -> None:
    """Raises UserError for a spec whose concept or dataset cannot be opened."""
    _, place = read_concept(spec)
    if place:
        sets.source(place)


def score(sets: Sets, spec: str) -> Outcome | None:
    """Takes a concept out of image embeddings and measures what is left of it and of the rest.

    Images are on a side when their captions hold words of that side alone. Figures come in pairs,
    "..._before" and "..._after":

    - probe: balanced accuracy of logistic regression for the side, cross-validated so that captions
      which differ in the side's words alone are never on both sides of a split. It is trained on
      the kind of embeddings that it is tested on.
    - zero_shot_probe: the same of the nearer of both sides' mean definitional text.
    - task: what the concept is no part of: the dataset's classes, by a ridge classifier; without
      classes, text-to-image R@1 of images on neither side.
    - QUERY_SIDE_..._cosine: mean of the 20 highest cosines between a query and a side's images.
    - gap_..._cosine: mean over the queries of the absolute difference between the sides.

    "image_pairs_..." are the figures of the second method, where the dataset has enough pairs:
    captions are cut in thirds, and each third's images are edited with the subspace of the other
    two.

    Args:
      sets: where embeddings come from.
      spec: a concept of concepts.json or a file that defines one, and perhaps "@" and a dataset.
        Without a dataset, the run's own validation and training images are taken.

    Returns:
      None where the run's own dataset has too few images of a side.

    Raises:
      UserError: for a concept or dataset that cannot be opened, or too few images in a named
        dataset.
      RunError: for NaN or infinity among the embeddings.
    """
    concept, place = read_concept(spec)
    opened = _open(sets, place)
    if opened is None:
        return None
    embedded, training = opened
    images = _gather(concept, embedded, training)
    fewest = [len(np.unique(images.groups[images.sides == side])) for side in (0, 1)]
    if min(fewest) < _FEWEST_CAPTIONS:
        if not place:
            return None
        raise UserError(
            f"config.evaluation.concepts={spec!r}: the dataset {embedded.name!r} has "
            f"{fewest[0]} and {fewest[1]} different captions with words of {concept.sides[0]!r} "
            f"and {concept.sides[1]!r} alone; {_FEWEST_CAPTIONS} a side are the least"
        )
    task = classification(images.labels, images.training) or finding(
        sets.model, images.captions, images.training, images.sides
    )
    figures, note = _measure(sets.model, concept, images, task)
    return _outcome(concept, images, embedded, task, figures, note)


def _open(sets: Sets, place: str) -> tuple[EmbeddedSet, EmbeddedSet | None] | None:
    embedded = sets.evaluation(place or "validation")
    if embedded is None:
        return None
    source = None if place else sets.training_source("validation")
    if source is None:
        return embedded, None
    config = sets.config
    return embedded, embed_source(
        sets.model,
        source,
        f"{embedded.name} ({source.split})",
        config.evaluation.batch_size,
        limit=_MOST_TRAINING,
        max_skipped_share=config.data.max_skipped_share,
        progress=sets.progress,
    )


def _gather(concept: Concept, embedded: EmbeddedSet, training: EmbeddedSet | None) -> Images:
    parts = [part for part in (training, embedded) if part is not None]
    captions = tuple(image_captions for part in parts for image_captions in part.captions)
    names: dict[str, int] = {}
    grids = []
    for part in parts:
        assert part.embeddings is not None  # `_open` asks for them
        grids.append(on_grid(part.embeddings, "image embeddings"))
    return Images(
        embeddings=np.concatenate(grids),
        captions=captions,
        labels=np.concatenate([part.labels for part in parts]),
        training=np.repeat([part is training for part in parts], [len(part) for part in parts]),
        sides=np.array([concept.side(image_captions) for image_captions in captions]),
        groups=np.array(
            [
                names.setdefault(concept.neutral(image_captions), len(names))
                for image_captions in captions
            ]
        ),
    )


def _measure(
    model: Encoder, concept: Concept, images: Images, task: Task
) -> tuple[dict[str, float], str]:
    """Every figure, and a sentence on the pairs of images."""
    sides = [_embed(model, texts) for texts in concept.texts()]
    queries = _embed(model, concept.queries) if concept.queries else None
    subspace = concept_subspace(sides[0], sides[1], concept.components)
    thirds = cut_in_thirds(images, 0)
    rows = first_of_each_side(images)
    figures = {}
    for when, span in (("before", subspace[:0]), ("after", subspace)):
        edited = edit(images.embeddings, span)
        figures[f"probe_{when}"] = side_probe(edited[rows], images, rows)
        figures[f"zero_shot_probe_{when}"] = nearest_text(edited, sides, images)
        figures[f"task_{when}"] = task.score([edited] * THIRDS, thirds)
        if queries is not None:
            figures |= _cosines(concept, edited @ queries.T, images.sides, when)
    pairs = len(image_pairs(images, images.sided)[0])
    if pairs < _FEWEST_PAIRS:
        return figures, f" Of the {_FEWEST_PAIRS} pairs that image_pairs takes there are {pairs}."
    figures |= _by_image_pairs(concept.components, images, task)
    return figures, (
        f" image_pairs: {pairs} pairs, the captions cut in thirds {_DRAWS} times, the task at the "
        "first."
    )


def _outcome(
    concept: Concept,
    images: Images,
    embedded: EmbeddedSet,
    task: Task,
    figures: dict[str, float],
    note: str,
) -> Outcome:
    rows = images.sided
    figures = _side_by_side(figures)
    chance, examples, protocols = {}, {}, {}
    for key in figures:
        if "task_" in key:
            chance[key], examples[key], protocols[key] = task.chance, task.examples, task.protocol
        elif key.endswith("cosine"):  # 0 is a random direction's
            chance[key], examples[key], protocols[key] = 0.0, len(rows), f"mean of the top {_TOP}"
        else:
            chance[key], examples[key] = 0.5, len(rows)
            protocols[key] = (
                "balanced accuracy, nearer mean text"
                if key.startswith("zero_shot")
                else "balanced accuracy, logistic regression, cross-validated by captions"
            )
    counts = [f"{int(np.sum(images.sides == side)):,} images" for side in (0, 1)]
    return Outcome(
        f"{concept.name}-{embedded.name}",
        figures,
        chance,
        examples,
        protocols,
        f"{counts[0]} of {concept.sides[0]!r}, {counts[1]} of {concept.sides[1]!r}"
        f"{', of the training split too' if images.training.any() else ''}; "
        f"principal components: {concept.components}, of {len(concept.texts()[0])} pairs of texts; "
        f"images are edited, texts are not.{note}{embedded.omissions()}",
    )


def _side_by_side(figures: dict[str, float]) -> dict[str, float]:
    """The same, each "after" behind its "before"."""
    keys = dict.fromkeys(
        twin
        for key in figures
        for twin in (key, key.replace("_before", "_after"))
        if twin in figures and ("_before" in key or key.replace("_after", "_before") not in figures)
    )
    return {key: figures[key] for key in keys}


def _embed(model: Encoder, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
    return on_grid(np.asarray(model.encode_text(list(texts))), "text embeddings")


def _cosines(
    concept: Concept,
    cosines: Float[np.ndarray, "images queries"],
    sides: Int[np.ndarray, " images"],
    when: str,
) -> dict[str, float]:
    """The table of cosines by side, and the mean gap."""
    by_side = [np.sort(cosines[sides == side], axis=0)[-_TOP:].mean(axis=0) for side in (0, 1)]
    table = {
        f"{figure_name(query)}_{figure_name(name)}_{when}_cosine": float(mean)
        for name, means in zip(concept.sides, by_side, strict=True)
        for query, mean in zip(concept.queries, means, strict=True)
    }
    return table | {f"gap_{when}_cosine": float(np.abs(by_side[0] - by_side[1]).mean())}


def _by_image_pairs(components: int, images: Images, task: Task) -> dict[str, float]:
    """The probe and the task with subspaces of pairs of images."""
    before, after = [], []
    for draw in range(_DRAWS):
        thirds = cut_in_thirds(images, draw)
        subspaces = []
        for third in range(THIRDS):
            in_third = images.sided[thirds[images.sided] == third]
            outside = images.sided[thirds[images.sided] != third]
            subspaces.append(concept_subspace(*image_pairs(images, outside), components))
            rows = first_of_each_side(images, in_third)
            before.append(side_probe(images.embeddings[rows], images, rows))
            after.append(side_probe(edit(images.embeddings[rows], subspaces[-1]), images, rows))
        if not draw:
            edited = [edit(images.embeddings, subspace) for subspace in subspaces]
            task_after = task.score(edited, thirds)
    return {
        "image_pairs_probe_before": float(np.mean(before)),
        "image_pairs_probe_after": float(np.mean(after)),
        "image_pairs_task_after": task_after,
    }


FAMILY = Family(score, check, default_set="gender")
