"""Recall@k and median rank of image-text retrieval, both ways, over any relation of pairs.

A query's rank is that of its best positive: one plus the number of wrong candidates that score as
high or higher. So a tie counts against the model, and a constant embedding finds nothing.
Right candidates never stand in each other's way. A candidate without a partner stays a distractor;
as a query it has no answer and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mlip_jax.core.errors import UserError
from mlip_jax.data.text.equality import equal_ids
from mlip_jax.evaluations.counting import Side, count_reaching
from mlip_jax.evaluations.family import Family
from mlip_jax.evaluations.interface import Encoder, Outcome
from mlip_jax.evaluations.scores import grid_integers, products
from mlip_jax.evaluations.sets import TEXTS, EmbeddedSet, Sets, embed_texts

KS = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")


@dataclass(frozen=True)
class Answers:
    """Where each query's best positives stand in its order of the candidates."""

    query: Int[np.ndarray, " answers"]
    place: Int[np.ndarray, " answers"]  # from 1; positives among themselves in any order
    positives: Int[np.ndarray, " queries"]  # how many each query has
    depth: int  # the most that are kept of a query


@dataclass(frozen=True)
class Ranks:
    """Rank of each query's best positive, from 1; 0 for a query that has no positive."""

    text_to_image: Int[np.ndarray, " texts"]
    image_to_text: Int[np.ndarray, " images"]
    answers: Mapping[str, Answers]  # by direction


@dataclass(frozen=True)
class Candidates:
    """A dataset's images and captions that a model can tell apart, and which belong together."""

    images: Int[np.ndarray, " images"]  # places in the dataset; of images of equal bytes the first
    texts: list[str]  # of captions of equal token ids the first
    pairs: Int[np.ndarray, "pairs 2"]  # rows of (image, text), places among the two


def candidates(model: Encoder, embedded: EmbeddedSet) -> Candidates:
    """What is ranked against what; without pairs for a dataset without captions."""
    _, images, image_of = np.unique(embedded.equal, return_index=True, return_inverse=True)
    order = np.argsort(images)  # as they come
    texts, pairs = pair_captions(embedded.captions, model.tokenize)
    pairs = np.stack([np.argsort(order)[image_of[pairs[:, 0]]], pairs[:, 1]], axis=1)
    return Candidates(images[order], texts, _distinct(pairs))


def pair_captions(
    captions: Sequence[Sequence[str]], tokenize: Callable[[Sequence[str]], np.ndarray]
) -> tuple[list[str], Int[np.ndarray, "pairs 2"]]:
    """The distinct captions of a dataset and which image carries which.

    Captions are equal when their token ids are: in small letters and cut, as the model sees them.
    A caption that several images carry is one query, answered by any of them, and one candidate:
    nothing can tell equal texts apart. Empty captions are dropped.

    Args:
      captions: each image's captions.
      tokenize: texts -> token ids [texts, context].

    Returns:
      The distinct texts in order of appearance, and rows of (image index, text index).
    """
    texts: dict[str, int] = {}
    pairs = [
        (image, texts.setdefault(caption, len(texts)))
        for image, image_captions in enumerate(captions)
        for caption in image_captions
        if caption.strip()
    ]
    places = np.array(pairs, np.int64).reshape(-1, 2)
    if not texts:
        return [], places
    every = list(texts)
    starts = range(0, len(every), TEXTS)
    tokens = np.concatenate([np.asarray(tokenize(every[s : s + TEXTS])) for s in starts])
    groups = equal_ids(tokens)
    firsts = np.unique(groups, return_index=True)[1]
    places[:, 1] = groups[places[:, 1]]
    return [every[first] for first in firsts], places


def ranks(
    image_embeddings: Float[np.ndarray, "images width"],
    text_embeddings: Float[np.ndarray, "texts width"],
    pairs: Int[np.ndarray, "pairs 2"],
    chunk: int = 1024,
    depth: int = max(KS),
    progress: bool = False,
) -> Ranks:
    """Ranks every query by cosine, in blocks of chunk x chunk scores; the same for every chunk.

    Args:
      image_embeddings: normalised or not.
      text_embeddings: normalised or not.
      pairs: rows of (image index, text index); any number for an image or a text.
      chunk: the most rows and columns of a block, which bound the memory.
      depth: how many of a query's best positives are placed; more cannot be among the first
        `depth` candidates.
      progress: whether to draw a bar.

    Raises:
      UserError: without a pair.
      RunError: for NaN or infinity among the embeddings.
    """
    sizes = len(image_embeddings), len(text_embeddings)
    pairs = _distinct(pairs)
    if not len(pairs):
        raise UserError("retrieval needs at least one image with a caption")
    totals = [np.bincount(pairs[:, side], minlength=size) for side, size in enumerate(sizes)]
    # Queries with more positives first: those that have a t-th one are then the first so many.
    orders = [np.argsort(-np.minimum(total, depth), kind="stable") for total in totals]
    grids = [
        grid_integers(rows, noun, order)
        for rows, noun, order in (
            (image_embeddings, "image embeddings", orders[0]),
            (text_embeddings, "text embeddings", orders[1]),
        )
    ]
    placed = (np.argsort(orders[0])[pairs[:, 0]], np.argsort(orders[1])[pairs[:, 1]])
    scores = products(grids[0], grids[1], placed)
    best_positives = [_best_positives(query, scores, depth) for query in placed]
    images, texts = (
        Side(grid, tuple(levels)) for grid, (levels, _) in zip(grids, best_positives, strict=True)
    )
    counts = count_reaching(images, texts, chunk, progress)

    best, answers = {}, {}
    for direction, side in (("image_to_text", 0), ("text_to_image", 1)):
        # Of those that reach a positive's score, its like are no hindrance.
        places = [
            count - like + 1 + earlier
            for earlier, (count, like) in enumerate(
                zip(counts[side], best_positives[side][1], strict=True)
            )
        ]
        query = np.concatenate([orders[side][: len(level)] for level in places])
        best[direction] = np.zeros(sizes[side], np.int64)
        best[direction][query[: len(places[0])]] = places[0]
        answers[direction] = Answers(query, np.concatenate(places), totals[side], depth)
    return Ranks(**best, answers=answers)


def recall(
    image_embeddings: Float[np.ndarray, "images width"],
    text_embeddings: Float[np.ndarray, "texts width"],
    pairs: Int[np.ndarray, "pairs 2"],
    ks: Sequence[int] = KS,
    chunk: int = 1024,
    progress: bool = False,
) -> dict[str, float]:
    """Recall@k in [0, 1] and median rank, both ways; arguments and errors as in `ranks`."""
    return figures(ranks(image_embeddings, text_embeddings, pairs, chunk, max(ks), progress), ks)


def figures(query_ranks: Ranks, ks: Sequence[int] = KS) -> dict[str, float]:
    """The figures of given ranks: "text_to_image_recall@1", "text_to_image_median_rank", ...

    "recall" is hit recall, what CLIP and its like report: the share of queries with any positive
    among the first k. Where a query has several positives, "actual_recall" is the mean share of a
    query's positives among the first k. Without ties both equal CLIP_benchmark's (whose
    image_retrieval is our text_to_image).

    Raises:
      ValueError: for a k beyond the depth of the ranks.
    """
    values = {}
    for direction in DIRECTIONS:
        rank, answers = getattr(query_ranks, direction), query_ranks.answers[direction]
        if max(ks) > answers.depth:
            raise ValueError(f"k={max(ks)} needs ranks of that depth, not {answers.depth}")
        has_positives = answers.positives > 0
        for k in ks:
            values[f"{direction}_recall@{k}"] = float(np.mean(rank[has_positives] <= k))
        if np.max(answers.positives) > 1:
            for k in ks:
                first = answers.query[answers.place <= k]
                right = np.bincount(first, minlength=len(rank))[has_positives]
                share = float(np.mean(right / answers.positives[has_positives]))
                values[f"{direction}_actual_recall@{k}"] = share
        values[f"{direction}_median_rank"] = float(np.median(rank[has_positives]))
    return values


def chance(
    pairs: Int[np.ndarray, "pairs 2"], images: int, texts: int, ks: Sequence[int] = KS
) -> dict[str, float]:
    """What `recall` gives, on average, for a random order of the candidates.

    Recall@k is the mean over queries of 1 - C(n - m, k) / C(n, k) for m positives among n; actual
    recall@k is k / n for every m; the median rank is the smallest k at which the mean of recall@k
    reaches a half.
    """
    pairs = _distinct(pairs)
    values = {}
    for direction, query, candidates in (("text_to_image", 1, images), ("image_to_text", 0, texts)):
        positives = np.unique(pairs[:, query], return_counts=True)[1]
        for k in ks:
            values[f"{direction}_recall@{k}"] = _expected_recall(positives, candidates, k)
        if np.max(positives) > 1:
            for k in ks:
                values[f"{direction}_actual_recall@{k}"] = min(k, candidates) / candidates
        low, high = 1, candidates
        while low < high:
            middle = (low + high) // 2
            if _expected_recall(positives, candidates, middle) >= 0.5 - 1e-12:
                high = middle
            else:
                low = middle + 1
        values[f"{direction}_median_rank"] = float(low)
    return values


def check(sets: Sets, spec: str) -> None:
    """Raises UserError for a dataset that cannot be opened."""
    sets.source(spec)


def score(sets: Sets, spec: str) -> Outcome | None:
    """Retrieval among a dataset's images and captions, both ways.

    Returns:
      None for "validation" without captions.

    Raises:
      UserError: for a dataset without captions.
      RunError: for NaN or infinity among the embeddings.
    """
    embedded = sets.evaluation(spec)
    found = None if embedded is None else candidates(sets.model, embedded)
    if embedded is None or found is None or not found.texts:
        if spec == "validation":
            return None
        raise UserError(f"config.evaluation.retrieval: the dataset {spec!r} has no captions")
    images, texts, pairs = found.images, found.texts, found.pairs
    text_embeddings = embed_texts(sets.model, texts, embedded.name, sets.progress)
    assert embedded.embeddings is not None  # `evaluation` was asked for them
    values = recall(embedded.embeddings[images], text_embeddings, pairs, progress=sets.progress)
    if not sets.config.evaluation.actual_recall:
        values = {key: value for key, value in values.items() if "_actual_recall@" not in key}
    expected = chance(pairs, len(images), len(texts))
    queries = {"text_to_image": len(texts), "image_to_text": len(np.unique(pairs[:, 0]))}
    return Outcome(
        embedded.name,
        values,
        {key: expected[key] for key in values},
        {key: queries[direction] for direction in DIRECTIONS for key in values if direction in key},
        {key: _protocol(key) for key in values},
        f"{len(images):,} images, {len(texts):,} distinct captions, all ranked against all; ties "
        f"count against the model. The split is {embedded.source.split!r}."
        f"{_merged(embedded, found)}{embedded.omissions()}",
    )


def _merged(embedded: EmbeddedSet, found: Candidates) -> str:
    """A sentence on what is one candidate, after a space; "" where all stand alone."""
    images = len(embedded) - len(found.images)
    captions = {text for texts in embedded.captions for text in texts if text.strip()}
    texts = len(captions) - len(found.texts)
    parts = [f"images of equal bytes ({images:,} repeat another)"] if images else []
    parts += [f"captions of equal token ids ({texts:,} repeat another)"] if texts else []
    return f" One candidate each: {', '.join(parts)}." if parts else ""


def _protocol(key: str) -> str:
    if key.endswith("_rank"):
        return "rank of the best right answer"
    return "actual recall" if "_actual_recall@" in key else "hit recall"


def _distinct(pairs: Int[np.ndarray, "pairs 2"]) -> Int[np.ndarray, "distinct 2"]:
    pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
    base = pairs.max(initial=0) + 1
    # As single numbers they sort ten times as fast as rows do.
    return np.stack(np.divmod(np.unique(pairs[:, 0] * base + pairs[:, 1]), base), axis=1)


def _best_positives(
    query: Int[np.ndarray, " pairs"], scores: Float[np.ndarray, " pairs"], depth: int
) -> tuple[list[Float[np.ndarray, " queries"]], list[Int[np.ndarray, " queries"]]]:
    """Scores of the best, second best, ... positive of each query that has so many.

    Returns:
      At most `depth` arrays of scores, and as many of how many of the query's positives reach them.
    """
    order = np.lexsort((-scores, query))
    query, scores = query[order], scores[order]
    index = np.arange(len(query))
    number = index - np.searchsorted(query, query)  # 0: a query's best
    last_like = np.append((np.diff(query) != 0) | (np.diff(scores) != 0), True)
    ends = np.flatnonzero(last_like)
    reach = number + ends[np.searchsorted(ends, index)] - index + 1
    chosen = [np.flatnonzero(number == place) for place in range(min(depth, np.max(number) + 1))]
    return [scores[rows] for rows in chosen], [reach[rows] for rows in chosen]


def _expected_recall(positives: Int[np.ndarray, " queries"], candidates: int, k: int) -> float:
    """Mean chance that one of m positives is among the first k of a random order."""
    sizes, counts = np.unique(positives, return_counts=True)
    k = min(k, candidates)
    missed = []
    for size in sizes:
        # C(n - m, k) / C(n, k) = C(n - k, m) / C(n, m), a product over the smaller of m and k.
        draws, larger = (size, k) if size < k else (k, size)
        steps = np.arange(draws)
        missed.append(np.prod(np.maximum(candidates - larger - steps, 0) / (candidates - steps)))
    return float(1 - np.average(missed, weights=counts))


FAMILY = Family(score, check, at_intervals=True, wants=("captions", "jsonl:FILE"))
