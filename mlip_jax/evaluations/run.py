"""The evaluation of a model on every set that the config names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict
from rich.progress import track

from mlip_jax.config import UserError
from mlip_jax.data.pipeline import evaluation_batches
from mlip_jax.data.records import Source
from mlip_jax.data.sources import open_evaluation, open_validation
from mlip_jax.evaluations import retrieval, zero_shot
from mlip_jax.evaluations.interface import Encoder
from mlip_jax.evaluations.pairs import PairScorer, accuracy
from mlip_jax.evaluations.results import Results

# Sets whose captions after the first are aliases of the concept, not descriptions of the image.
_FIRST_CAPTION_ONLY = frozenset({"emoji"})


@dataclass(frozen=True)
class EmbeddedSet:
    """A set's readable images as embeddings, with what is known of each."""

    source: Source
    name: str  # as the figures' keys carry it
    embeddings: Float[np.ndarray, "images width"]
    indices: Int[np.ndarray, " images"]  # place in the source
    captions: tuple[tuple[str, ...], ...]  # those that count for retrieval
    labels: Int[np.ndarray, " images"]  # -1: none
    unreadable: tuple[str, ...]  # names

    def omissions(self) -> str:
        """Sentences on what was left out, each after a space; "" when nothing was."""
        sentences = [f" {note.rstrip('.')}." for note in self.source.notes]
        if self.unreadable:
            sentences.append(
                f" {len(self.unreadable):,} unreadable images are left out, the first: "
                f"{self.unreadable[0]}."
            )
        return "".join(sentences)


def evaluate(
    model: Encoder, config: ConfigDict, validation: Source | None = None, progress: bool = True
) -> Results:
    """Scores a model on config.evaluation's sets.

    "validation" stands for the run's own validation set and gives what it can: without captions
    no retrieval, without labels no zero-shot classification, and nothing when there is none. A
    set that is named outright must have what it is named for.

    Args:
      model: what embeds images and texts.
      config: the run's config.
      validation: the run's validation set if it is open already.
      progress: whether to draw a bar; a caller that draws its own says no.

    Raises:
      UserError: for an empty set, a set without captions or labels, a class folder without
        images, or a template without a slot.
      RunError: for NaN or infinity among the embeddings.
    """
    results = Results()
    if config.model.critic == "concat":
        _score_pairs(model, config, validation, results)
        return results
    templates = zero_shot.find_templates(config.evaluation.templates)
    sets: dict[str, EmbeddedSet | None] = {}
    for family in ("retrieval", "zero_shot"):
        for spec in config.evaluation[family]:
            if spec not in sets:
                sets[spec] = _embed(model, config, spec, validation, sets, progress)
            embedded = sets[spec]
            if embedded is None:
                continue
            if family == "retrieval":
                _retrieve(model, embedded, spec, results)
            else:
                _classify(model, embedded, spec, templates, results)
    return results


def _validation_set(config: ConfigDict, opened: Source | None) -> Source | None:
    if opened is not None:
        return opened
    return open_validation(config.data, config.model.text.cleaning)


def _score_pairs(
    model: PairScorer, config: ConfigDict, validation: Source | None, results: Results
) -> None:
    source = _validation_set(config, validation)
    if source is None:
        return
    share, total = accuracy(model, source, config.evaluation.batch_size)
    results.add(
        f"pairs/{short_name(source.name)}",
        {"accuracy": share},
        {"accuracy": 0.5},
        {"accuracy": total},
        "an image's own caption against that of the next image; ties count against the model.",
    )


def embed_source(
    model: Encoder,
    source: Source,
    name: str,
    batch_size: int,
    limit: int | None = None,
    progress: bool = True,
) -> EmbeddedSet:
    """Embeds a source's images, the first `limit` of them if given; leaves unreadable ones out.

    Raises:
      UserError: when no image is readable.
    """
    size = len(source) if limit is None else min(limit, len(source))
    if not size:
        raise UserError(f"the set {name!r} is empty: there is nothing to evaluate on")
    batches = evaluation_batches(source, model.preprocess, batch_size)
    count = track(
        range(-(-size // batch_size)), f"Embedding {name}", transient=True, disable=not progress
    )
    parts, indices, captions, labels, unreadable = [], [], [], [], []
    for _, batch in zip(count, batches, strict=False):
        rows = np.flatnonzero(batch.readable & (batch.indices < size))
        # The whole batch, so that every call has one shape and the model compiles once.
        parts.append(np.asarray(model.encode_image_pixels(batch.images), np.float32)[rows])
        indices.extend(batch.indices[rows].tolist())
        captions.extend(batch.captions[row] for row in rows)
        labels.extend(batch.labels[rows].tolist())
        unreadable.extend(batch.unreadable)
    if not indices:
        raise UserError(f"none of the {size:,} images of the set {name!r} can be read")
    if source.name in _FIRST_CAPTION_ONLY:
        captions = [own[:1] for own in captions]
    return EmbeddedSet(
        source=source,
        name=name,
        embeddings=np.concatenate(parts),
        indices=np.array(indices),
        captions=tuple(captions),
        labels=np.array(labels),
        unreadable=tuple(unreadable),
    )


def _embed(
    model: Encoder,
    config: ConfigDict,
    spec: str,
    validation: Source | None,
    sets: dict[str, EmbeddedSet | None],
    progress: bool,
) -> EmbeddedSet | None:
    if spec == "validation":
        source = _validation_set(config, validation)
        if source is None:
            return None
        name = short_name(source.name)
    else:
        source = open_evaluation(
            spec, cache_dir=config.data.cache_dir, cleaning=config.model.text.cleaning
        )
        name = short_name(spec)
    taken = {other.name for other in sets.values() if other is not None}
    if name in taken:
        name = next(f"{name}-{n}" for n in range(2, len(taken) + 3) if f"{name}-{n}" not in taken)
    return embed_source(model, source, name, config.evaluation.batch_size, progress=progress)


def short_name(spec: str) -> str:
    """The name of a set in a figure's key: "jsonl:/data/birds.jsonl" -> "birds"."""
    kind, colon, path = spec.partition(":")
    return Path(path).stem or kind if colon else Path(kind).stem or kind


def _retrieve(model: Encoder, embedded: EmbeddedSet, spec: str, results: Results) -> None:
    texts, pairs = retrieval.pair_captions(embedded.captions)
    if not texts:
        if spec == "validation":
            return
        raise UserError(f"config.evaluation.retrieval: the set {spec!r} has no captions")
    images = len(embedded.embeddings)
    figures = retrieval.recall(embedded.embeddings, model.encode_text(texts), pairs)
    queries = {"text_to_image": len(texts), "image_to_text": len(np.unique(pairs[:, 0]))}
    results.add(
        f"retrieval/{embedded.name}",
        figures,
        retrieval.chance(pairs, images, len(texts)),
        {key: queries[key.partition("_recall")[0].partition("_median")[0]] for key in figures},
        f"{images:,} images, {len(texts):,} distinct captions, all ranked against all; ties count "
        f"against the model.{embedded.omissions()}",
    )


def _classify(
    model: Encoder,
    embedded: EmbeddedSet,
    spec: str,
    templates: tuple[str, ...],
    results: Results,
) -> None:
    names = tuple(embedded.source.class_names)
    labelled = embedded.labels >= 0
    if not names or not labelled.any():
        if spec == "validation":
            return
        raise UserError(f"config.evaluation.zero_shot: the set {spec!r} has no class labels")
    labels = embedded.labels[labelled]
    present = np.bincount(labels, minlength=len(names))
    empty = [name for name, count in zip(names, present, strict=True) if not count]
    if empty and spec.startswith("folder:"):
        folder = Path(spec.partition(":")[2]) / empty[0]
        raise UserError(f"config.evaluation.zero_shot: no readable image in {folder}")
    classes = zero_shot.embed_classes(model, names, templates)
    figures = zero_shot.classify(embedded.embeddings[labelled], classes, labels)
    prompts = f"{len(templates)} prompts a class" if len(templates) > 1 else repr(templates[0])
    note = f"{len(names):,} classes, {prompts}; ties count against the model."
    if empty:
        note += f" {len(empty):,} classes have no image here and are candidates only."
    if not labelled.all():
        note += f" {int((~labelled).sum()):,} images without a class are left out."
    results.add(
        f"zero_shot/{embedded.name}",
        figures,
        zero_shot.chance(len(names)),
        dict.fromkeys(figures, len(labels)),
        note + embedded.omissions(),
    )
