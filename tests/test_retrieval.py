"""Retrieval: ranks and recalls that are exact whatever the blocks, and what they count."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.schema import default
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.evaluations import counting, retrieval
from mlip_jax.evaluations import sets as evaluated_sets
from mlip_jax.evaluations.scores import grid_integers, on_grid, products
from mlip_jax.evaluations.sets import EmbeddedSet

REFERENCE = Path(__file__).parent / "data" / "retrieval.npz"


def random_case(seed=0, images=30, texts=50, pairs=90):
    rng = np.random.default_rng(seed)
    relation = np.stack([rng.integers(0, images, pairs), rng.integers(0, texts, pairs)], axis=1)
    # Rows repeat, so that many scores tie.
    image = rng.normal(size=(8, 5))[rng.integers(0, 8, images)].astype(np.float32)
    text = rng.normal(size=(9, 5))[rng.integers(0, 9, texts)].astype(np.float32)
    return image, text, relation


def queries_of(image, text, pairs):
    """Direction, query, exact scores of all candidates, and which are right."""
    scores = on_grid(image, "images") @ on_grid(text, "texts").T
    for direction, axis in (("image_to_text", 0), ("text_to_image", 1)):
        for query, query_scores in enumerate(scores if axis == 0 else scores.T):
            right = np.zeros(len(query_scores), bool)
            right[pairs[pairs[:, axis] == query, 1 - axis]] = True
            yield direction, query, query_scores, right


def assert_equal(one, other):
    for direction in retrieval.DIRECTIONS:
        np.testing.assert_array_equal(getattr(one, direction), getattr(other, direction))
        for field in ("query", "place", "positives"):
            np.testing.assert_array_equal(
                getattr(one.answers[direction], field), getattr(other.answers[direction], field)
            )


def test_recall_equals_the_reference():
    case = np.load(REFERENCE)
    index = case["caption_image_index"]
    pairs = np.stack([index, np.arange(len(index))], axis=1)
    figures = retrieval.recall(case["image_embeddings"], case["text_embeddings"], pairs, chunk=16)
    for k in (1, 5, 10):
        for ours, theirs in (("text_to_image", "image"), ("image_to_text", "text")):
            reference = case[f"{theirs}_retrieval_recall_{k}"]
            np.testing.assert_allclose(figures[f"{ours}_recall@{k}"], reference, rtol=1e-6)


# In the last case some captions have far more images than are placed.
@pytest.mark.parametrize("case", [(0, 30, 50, 90), (1, 40, 300, 200), (2, 90, 12, 400)])
def test_ranks_and_recalls_equal_brute_force_with_many_positives_both_ways(case):
    image, text, pairs = random_case(*case)
    ranks = retrieval.ranks(image, text, pairs)
    hits = {key: [] for key in retrieval.figures(ranks) if "recall" in key}
    for direction, query, query_scores, right in queries_of(image, text, pairs):
        rank = getattr(ranks, direction)[query]
        if not right.any():
            assert rank == 0
            continue
        assert rank == 1 + (query_scores[~right] >= query_scores[right].max()).sum()
        order = np.lexsort((right, -query_scores))  # of equal scores the wrong ones come first
        for k in retrieval.KS:
            among = right[order[:k]].sum()
            hits[f"{direction}_recall@{k}"].append(among > 0)
            hits[f"{direction}_actual_recall@{k}"].append(among / right.sum())
    figures = retrieval.figures(ranks)
    assert {key: figures[key] for key in hits} == pytest.approx(
        {key: np.mean(values) for key, values in hits.items()}
    )


def test_actual_recall_is_given_where_a_query_has_several_positives():
    image, text, _ = random_case()
    figures = retrieval.recall(image, text, np.array([[0, 0], [0, 1], [2, 2]]))
    assert "image_to_text_actual_recall@5" in figures
    assert not [key for key in figures if key.startswith("text_to_image_actual")]
    with pytest.raises(ValueError, match="k=10"):
        retrieval.figures(retrieval.ranks(image, text, np.array([[0, 0]]), depth=5))


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_chunks_change_nothing(chunk):
    rng = np.random.default_rng(3)
    image = rng.normal(size=(70, 24)).astype(np.float32)
    text = np.concatenate([image, image])  # every caption ties with its twin
    pairs = np.stack([np.arange(70), np.arange(70)], axis=1)
    unchunked = retrieval.ranks(image, text, pairs)
    assert (unchunked.image_to_text == 2).all()  # the twin is wrong and scores the same
    assert_equal(retrieval.ranks(image, text, pairs, chunk=chunk), unchunked)


@pytest.mark.parametrize("scores_alone", [0.0, 1 / 32, 2.0])
def test_scores_within_float32s_error_of_a_threshold_are_told_apart(monkeypatch, scores_alone):
    """Whether they are few enough to be computed one by one or not."""
    monkeypatch.setattr(counting, "_MOST_ALONE", scores_alone)
    rng = np.random.default_rng(4)
    image = rng.normal(size=(150, 16))
    image += 3e-8 * rng.normal(size=(2, 150, 16))[rng.integers(0, 2, 150), np.arange(150)]
    near = rng.normal(size=16) + 1e-7 * rng.normal(size=(60, 16))
    text = np.concatenate([near, rng.normal(size=(90, 16))])
    image[:40] = near[:40] + 1e-7 * rng.normal(size=(40, 16))
    pairs = rng.integers(0, 150, (260, 2))
    ranks = retrieval.ranks(image, text, pairs, chunk=96)
    for direction, query, query_scores, right in queries_of(image, text, pairs):
        if right.any():
            wrong = (query_scores[~right] >= query_scores[right].max()).sum()
            assert getattr(ranks, direction)[query] == 1 + wrong


@pytest.mark.parametrize("value", [0.0, 0.37])
def test_a_constant_embedding_finds_nothing(value):
    same = np.full((40, 17), value, np.float32)
    figures = retrieval.recall(same, same, np.stack([np.arange(40)] * 2, axis=1))
    assert figures["text_to_image_recall@10"] == 0
    assert figures["image_to_text_median_rank"] == 40


def test_images_and_captions_without_a_partner_are_candidates_alone():
    image = np.eye(4, dtype=np.float32)
    text = np.array([[1, 1.1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)
    ranks = retrieval.ranks(image, text, np.array([[0, 0], [2, 1]]))
    assert ranks.text_to_image.tolist() == [2, 1, 0]  # image 1, without a caption, is nearer
    assert ranks.image_to_text.tolist() == [1, 0, 1, 0]
    assert retrieval.figures(ranks)["text_to_image_recall@1"] == 0.5


def test_nan_is_an_error_that_counts():
    image, text, pairs = random_case()
    image[[4, 9]] = np.nan
    with pytest.raises(RunError, match="2 of 30 image embeddings .* index 4"):
        retrieval.recall(image, text, pairs)
    with pytest.raises(RunError, match="2 of 30 text embeddings .* index 4"):
        retrieval.recall(text, image, pairs[:, ::-1])
    with pytest.raises(UserError, match="at least one image with a caption"):
        retrieval.recall(text, text, np.zeros((0, 2), int))


def test_chance_equals_random_orders():
    _, _, pairs = random_case()
    expected = retrieval.chance(pairs, 30, 50)
    rng = np.random.default_rng(1)
    runs = [
        retrieval.recall(rng.normal(size=(30, 64)), rng.normal(size=(50, 64)), pairs)
        for _ in range(150)
    ]
    assert set(expected) == set(runs[0])
    for key, value in expected.items():
        mean = np.mean([run[key] for run in runs])
        assert mean == pytest.approx(value, rel=0.1, abs=0.01), key
    single = retrieval.chance(np.stack([np.arange(952)] * 2, axis=1), 952, 952)
    assert single["text_to_image_recall@5"] == pytest.approx(5 / 952)
    assert single["text_to_image_median_rank"] == 476
    assert not [key for key in single if "actual" in key]
    few = retrieval.chance(np.array([[0, 0], [1, 1], [1, 0]]), 2, 2)
    assert few["image_to_text_recall@10"] == few["image_to_text_actual_recall@10"] == 1


def tokenize(texts):
    """Case-blind and four words long."""
    return load_tokenizer("clip_8k").encode(texts, 4 + 2)


def test_equal_captions_are_one_text():
    texts, pairs = retrieval.pair_captions([("a cat", "pet"), ("a dog", "pet", " ")], tokenize)
    assert texts == ["a cat", "pet", "a dog"]
    assert pairs.tolist() == [[0, 0], [0, 1], [1, 2], [1, 1]]
    # In capitals, and where what tells them apart is cut off.
    captions = [("Dog face", "dog face"), ("dog  FACE", "to be or not to"), ("to be or not at",)]
    texts, pairs = retrieval.pair_captions(captions, tokenize)
    assert texts == ["Dog face", "to be or not to"]
    assert pairs.tolist() == [[0, 0], [0, 0], [1, 0], [1, 1], [2, 1]]


def test_copies_of_an_image_and_of_a_text_do_not_count_against_the_model():
    """The figures of a set are those of the set with each image and each text once."""
    sets = FakeSets((("a 0", "A 0"), ("a 1",), ("A 1", "a 2"), ("b 2",)))
    copies = replace(sets.set, embeddings=np.eye(4, dtype=np.float32)[[0, 1, 2, 2]])
    sets.set = replace(copies, equal=np.array([0, 1, 2, 2]))
    outcome = retrieval.score(sets, "jsonl:birds.jsonl")
    assert outcome.figures["text_to_image_recall@1"] == 1
    assert outcome.figures["image_to_text_recall@1"] == 1
    assert outcome.examples["text_to_image_recall@1"] == 4
    assert outcome.examples["image_to_text_recall@1"] == 3
    assert outcome.chance["text_to_image_recall@1"] == pytest.approx((1 + 2 + 1 + 1) / 3 / 4)
    assert outcome.note.startswith("3 images, 4 distinct captions")
    assert (
        "One candidate each: images of equal bytes (1 repeat another), captions of equal token ids "
        "(2 repeat another)." in outcome.note
    )
    sets.set = replace(copies, equal=np.arange(4))  # each copy stands in the other's way
    assert retrieval.score(sets, "jsonl:birds.jsonl").figures["text_to_image_recall@1"] == 2 / 4


def test_products_on_the_grid_are_exact_and_equal_rows_tie():
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(9, 33)).astype(np.float32)
    grid = on_grid(rows, "rows")
    np.testing.assert_allclose(np.linalg.norm(grid, axis=1), 1, atol=1e-7)
    assert (np.linalg.norm(grid, axis=1) <= 1).all()
    np.testing.assert_array_equal(grid, on_grid(4 * np.asfortranarray(rows), "rows"))
    numbers = grid_integers(rows, "rows")
    assert (grid == numbers / 2**26).all()
    order = rng.permutation(9)
    np.testing.assert_array_equal(grid_integers(rows, "rows", order), numbers[order])
    exact = [sum(int(a) * int(b) for a, b in zip(row, numbers[3], strict=True)) for row in numbers]
    assert products(numbers, numbers, (np.arange(9), np.full(9, 3))).tolist() == exact


class FakeSets:
    """One embedded dataset and a model that knows its captions."""

    progress = False
    config = default()

    def __init__(self, captions, name="birds"):
        self.captions = captions
        self.texts = []
        self.model = SimpleNamespace(encode_text=self.encode, tokenize=tokenize)
        source = SimpleNamespace(notes=("1 row has no image",), split="validation")
        self.set = EmbeddedSet(
            source=source,
            name=name,
            embeddings=np.eye(len(captions), dtype=np.float32),
            features=None,
            indices=np.arange(len(captions)),
            captions=captions,
            labels=np.full(len(captions), -1),
            equal=np.arange(len(captions)),
            unreadable=(),
        )

    def encode(self, texts):
        self.texts.append(len(texts))
        return np.eye(len(self.captions), dtype=np.float32)[[int(text[-1]) for text in texts]]

    def evaluation(self, spec):
        return self.set


def test_a_set_is_scored_with_what_tells_how(monkeypatch):
    monkeypatch.setattr(retrieval, "TEXTS", 3)
    monkeypatch.setattr(evaluated_sets, "TEXTS", 3)
    sets = FakeSets((("a 0", "b 0"), ("a 1",), ("a 2", "both 2"), ("both 2",)))
    outcome = retrieval.score(sets, "jsonl:birds.jsonl")
    assert sets.texts == [3, 2]
    assert outcome.name == "birds"
    assert outcome.figures["image_to_text_recall@1"] == 3 / 4
    assert not [key for key in outcome.figures if "actual" in key]
    assert set(outcome.figures) == set(outcome.chance) == set(outcome.protocols)
    sets.config = default()
    sets.config.evaluation.actual_recall = True
    outcome = retrieval.score(sets, "jsonl:birds.jsonl")
    assert outcome.figures["image_to_text_actual_recall@1"] == pytest.approx(2 / 4)
    assert outcome.figures["text_to_image_actual_recall@5"] == 1
    keys = set(outcome.figures)
    assert keys == set(outcome.chance) == set(outcome.examples) == set(outcome.protocols)
    assert outcome.examples["text_to_image_recall@1"] == 5
    assert outcome.examples["image_to_text_median_rank"] == 4
    assert outcome.protocols["text_to_image_actual_recall@5"] == "actual recall"
    assert outcome.protocols["text_to_image_recall@5"] == "hit recall"
    assert outcome.protocols["text_to_image_median_rank"] == "rank of the best right answer"
    assert outcome.note.startswith("4 images, 5 distinct captions, all ranked against all; ties")
    assert "The split is 'validation'. 1 row has no image." in outcome.note


def test_a_set_without_captions_must_be_the_runs_own():
    sets = FakeSets(((), (" ",)))
    assert retrieval.score(sets, "validation") is None
    with pytest.raises(UserError, match="the dataset 'folder:birds' has no captions"):
        retrieval.score(sets, "folder:birds")
    sets.set = None
    assert retrieval.score(sets, "validation") is None
