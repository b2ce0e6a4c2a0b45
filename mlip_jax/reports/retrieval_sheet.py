"""Queries with what the model found for them: successes and failures in their true proportion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mlip_jax.evaluations.interface import Encoder
from mlip_jax.evaluations.retrieval import candidates, ranks
from mlip_jax.evaluations.scores import on_grid
from mlip_jax.evaluations.sets import EmbeddedSet
from mlip_jax.reports.style import thumbnail

TEXT_QUERIES = 12
IMAGE_QUERIES = 8
SHOWN = 5


@dataclass(frozen=True)
class Answer:
    """One candidate; `content` is a picture's data URI or a caption."""

    content: str
    right: bool


@dataclass(frozen=True)
class Query:
    """A query, its first answers, and a right answer with its rank."""

    content: str
    rank: int
    answers: tuple[Answer, ...]
    truth: str  # a right answer when none of `answers` is one; "" otherwise


@dataclass(frozen=True)
class RetrievalSheet:
    """What the page shows of retrieval, and over how many candidates."""

    text_queries: tuple[Query, ...]
    image_queries: tuple[Query, ...]
    images: int
    texts: int


def make_sheet(model: Encoder, embedded: EmbeddedSet) -> RetrievalSheet | None:
    """Queries at even steps through all queries sorted by rank, best and worst included.

    None for a dataset without captions.
    """
    found = candidates(model, embedded)
    texts, pairs = found.texts, found.pairs
    if not texts:
        return None
    text_embeddings = np.asarray(model.encode_text(texts))
    assert embedded.embeddings is not None  # the caller has asked for them
    image_embeddings = embedded.embeddings[found.images]
    query_ranks = ranks(image_embeddings, text_embeddings, pairs, depth=1)
    image_grid = on_grid(image_embeddings, "image embeddings")
    text_grid = on_grid(text_embeddings, "text embeddings")

    def picture(image: int) -> str:
        return thumbnail(embedded.source[int(embedded.indices[found.images[image]])].image)

    text_queries = []
    for text in evenly_by_rank(query_ranks.text_to_image, TEXT_QUERIES):
        right = np.isin(np.arange(len(image_grid)), pairs[pairs[:, 1] == text, 0])
        order = _order(image_grid @ text_grid[text], right)
        answers = tuple(Answer(picture(image), bool(right[image])) for image in order[:SHOWN])
        truth = "" if right[order[:SHOWN]].any() else picture(order[right[order]][0])
        text_queries.append(
            Query(texts[text], int(query_ranks.text_to_image[text]), answers, truth)
        )
    image_queries = []
    for image in evenly_by_rank(query_ranks.image_to_text, IMAGE_QUERIES):
        right = np.isin(np.arange(len(text_grid)), pairs[pairs[:, 0] == image, 1])
        order = _order(text_grid @ image_grid[image], right)
        answers = tuple(Answer(texts[text], bool(right[text])) for text in order[:SHOWN])
        truth = "" if right[order[:SHOWN]].any() else texts[order[right[order]][0]]
        image_queries.append(
            Query(picture(image), int(query_ranks.image_to_text[image]), answers, truth)
        )
    return RetrievalSheet(
        tuple(text_queries), tuple(image_queries), images=len(image_grid), texts=len(texts)
    )


def evenly_by_rank(ranks_of_queries: Int[np.ndarray, " queries"], count: int) -> list[int]:
    """Queries at even steps from the best rank to the worst; queries of rank 0 have no answer."""
    order = np.argsort(ranks_of_queries, kind="stable")
    order = order[ranks_of_queries[order] > 0]
    steps = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [int(order[step]) for step in steps]


def _order(scores: np.ndarray, right: np.ndarray) -> Int[np.ndarray, " candidates"]:
    """Candidates from the best; of equal scores the wrong ones come first, as in `ranks`."""
    return np.lexsort((right, -scores))
