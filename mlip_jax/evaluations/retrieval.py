"""Recall@k and median rank of image-text retrieval, both ways, over any relation of pairs.

A query's rank is that of its best positive: one plus the number of wrong candidates that score as
high or higher. So a tie counts against the model, and a constant embedding finds nothing.
Right candidates never stand in each other's way. A candidate without a partner stays a distractor;
as a query it has no answer and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mlip_jax.config import UserError
from mlip_jax.evaluations.scores import on_grid

KS = (1, 5, 10)


@dataclass(frozen=True)
class Ranks:
    """Rank of each query's best positive, from 1; 0 for a query that has no positive."""

    text_to_image: Int[np.ndarray, " texts"]
    image_to_text: Int[np.ndarray, " images"]


def pair_captions(
    captions: Sequence[Sequence[str]],
) -> tuple[list[str], Int[np.ndarray, "pairs 2"]]:
    """The distinct captions of a set and which image carries which.

    A caption that several images carry is one query, answered by any of them, and one candidate:
    nothing can tell equal texts apart. Empty captions are dropped.

    Args:
      captions: each image's captions.

    Returns:
      The distinct texts in order of appearance, and rows of (image index, text index).
    """
    texts: dict[str, int] = {}
    pairs = [
        (image, texts.setdefault(caption, len(texts)))
        for image, own in enumerate(captions)
        for caption in own
        if caption.strip()
    ]
    return list(texts), np.array(pairs, np.int64).reshape(-1, 2)


def ranks(
    image_embeddings: Float[np.ndarray, "images width"],
    text_embeddings: Float[np.ndarray, "texts width"],
    pairs: Int[np.ndarray, "pairs 2"],
    chunk: int = 1024,
) -> Ranks:
    """Ranks every query by cosine, in blocks of chunk x chunk scores; the same for every chunk.

    Args:
      image_embeddings: normalised or not.
      text_embeddings: normalised or not.
      pairs: rows of (image index, text index); any number for an image or a text.
      chunk: rows and columns of a block, which bound the memory.

    Raises:
      UserError: without a pair.
      RunError: for NaN or infinity among the embeddings.
    """
    images = on_grid(image_embeddings, "image embeddings")
    texts = on_grid(text_embeddings, "text embeddings")
    pairs = np.unique(np.asarray(pairs, np.int64).reshape(-1, 2), axis=0)
    if not len(pairs):
        raise UserError("retrieval needs at least one image with a caption")

    positives = np.concatenate(
        [
            np.einsum("pe,pe->p", images[part[:, 0]], texts[part[:, 1]])
            for part in np.array_split(pairs, -(-len(pairs) // chunk))
        ]
    )
    best_of_image, own_of_image = _best(pairs[:, 0], positives, len(images))
    best_of_text, own_of_text = _best(pairs[:, 1], positives, len(texts))

    above_image = np.zeros(len(images), np.int64)
    above_text = np.zeros(len(texts), np.int64)
    for top in range(0, len(images), chunk):
        rows = slice(top, top + chunk)
        for left in range(0, len(texts), chunk):
            columns = slice(left, left + chunk)
            block = images[rows] @ texts[columns].T
            above_image[rows] += (block >= best_of_image[rows, None]).sum(axis=1)
            above_text[columns] += (block >= best_of_text[None, columns]).sum(axis=0)
    # Scores are exact, so a positive found in a block equals its score computed alone.
    return Ranks(
        text_to_image=np.where(own_of_text > 0, above_text - own_of_text + 1, 0),
        image_to_text=np.where(own_of_image > 0, above_image - own_of_image + 1, 0),
    )


def recall(
    image_embeddings: Float[np.ndarray, "images width"],
    text_embeddings: Float[np.ndarray, "texts width"],
    pairs: Int[np.ndarray, "pairs 2"],
    ks: Sequence[int] = KS,
    chunk: int = 1024,
) -> dict[str, float]:
    """Recall@k in [0, 1] and median rank, both ways; arguments and errors as in `ranks`.

    Without ties the recalls equal those of CLIP_benchmark (its image_retrieval is our
    text_to_image): the share of queries with any positive among the first k.
    """
    return figures(ranks(image_embeddings, text_embeddings, pairs, chunk), ks)


def figures(found: Ranks, ks: Sequence[int] = KS) -> dict[str, float]:
    """The figures of given ranks: "text_to_image_recall@1", "text_to_image_median_rank", ..."""
    values = {}
    for direction in ("text_to_image", "image_to_text"):
        own = getattr(found, direction)
        own = own[own > 0]
        for k in ks:
            values[f"{direction}_recall@{k}"] = float(np.mean(own <= k))
        values[f"{direction}_median_rank"] = float(np.median(own))
    return values


def chance(
    pairs: Int[np.ndarray, "pairs 2"], images: int, texts: int, ks: Sequence[int] = KS
) -> dict[str, float]:
    """What `recall` gives, on average, for a random order of the candidates.

    Recall@k is the mean over queries of 1 - C(n - m, k) / C(n, k) for m positives among n; the
    median rank is the smallest k at which that mean reaches a half.
    """
    pairs = np.unique(np.asarray(pairs, np.int64).reshape(-1, 2), axis=0)
    values = {}
    for direction, query, candidates in (("text_to_image", 1, images), ("image_to_text", 0, texts)):
        positives = np.unique(pairs[:, query], return_counts=True)[1]
        for k in ks:
            values[f"{direction}_recall@{k}"] = _found(positives, candidates, k)
        low, high = 1, candidates
        while low < high:
            middle = (low + high) // 2
            if _found(positives, candidates, middle) >= 0.5 - 1e-12:
                high = middle
            else:
                low = middle + 1
        values[f"{direction}_median_rank"] = float(low)
    return values


def _best(
    query: Int[np.ndarray, " pairs"], scores: Float[np.ndarray, " pairs"], queries: int
) -> tuple[Float[np.ndarray, " queries"], Int[np.ndarray, " queries"]]:
    """Each query's highest positive score and how many of its positives have that score."""
    best = np.full(queries, -np.inf)
    np.maximum.at(best, query, scores)
    count = np.bincount(query[scores == best[query]], minlength=queries)
    return best, count


def _found(positives: Int[np.ndarray, " queries"], candidates: int, k: int) -> float:
    """Mean chance that one of m positives is among the first k of a random order."""
    sizes, counts = np.unique(positives, return_counts=True)
    k = min(k, candidates)
    missed = []
    for size in sizes:
        # C(n - m, k) / C(n, k) = C(n - k, m) / C(n, m), a product over the smaller of m and k.
        draws, rest = (size, k) if size < k else (k, size)
        steps = np.arange(draws)
        missed.append(np.prod(np.maximum(candidates - rest - steps, 0) / (candidates - steps)))
    return float(1 - np.average(missed, weights=counts))
