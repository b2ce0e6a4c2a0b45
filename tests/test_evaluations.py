"""Retrieval, zero-shot classification and what is kept of them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mlip_jax.config import RunError, UserError, default
from mlip_jax.data.images import Preprocessing
from mlip_jax.data.records import Record
from mlip_jax.evaluations import evaluate, read_results, retrieval, table, write_results, zero_shot
from mlip_jax.evaluations.run import short_name

REFERENCE = Path(__file__).parent / "data" / "retrieval.npz"


def png(value):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(out, "PNG")
    return out.getvalue()


class FakeSource:
    """Images of one grey each; entries are (grey or None, captions, label)."""

    split = "validation"
    attribution = ""
    notes = ()

    def __init__(self, rows, class_names=(), name="fake"):
        self.rows, self.class_names, self.name = rows, class_names, name

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        grey, captions, label = self.rows[index]
        image = b"no image" if grey is None else png(grey)
        return Record(image, captions, (), label, self.name_of(index))

    def name_of(self, index):
        return str(index)


class FakeModel:
    """Greys and the texts that name them (the last word) share a direction."""

    preprocess = Preprocessing(8)

    def encode_image_pixels(self, images):
        return self._direction(images[:, 0, 0, 0].astype(np.float64))

    def encode_text(self, texts):
        return self._direction(np.array([float(text.split()[-1]) for text in texts]))

    def _direction(self, greys):
        angle = greys / 255 * np.pi / 2
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def random_case(seed=0, images=30, texts=50, pairs=90):
    rng = np.random.default_rng(seed)
    relation = np.stack([rng.integers(0, images, pairs), rng.integers(0, texts, pairs)], axis=1)
    # Rows repeat, so that many scores tie.
    image = rng.normal(size=(8, 5))[rng.integers(0, 8, images)].astype(np.float32)
    text = rng.normal(size=(9, 5))[rng.integers(0, 9, texts)].astype(np.float32)
    return image, text, relation


def test_recall_equals_the_reference():
    case = np.load(REFERENCE)
    index = case["caption_image_index"]
    pairs = np.stack([index, np.arange(len(index))], axis=1)
    found = retrieval.recall(case["image_embeddings"], case["text_embeddings"], pairs, chunk=16)
    for k in (1, 5, 10):
        for ours, theirs in (("text_to_image", "image"), ("image_to_text", "text")):
            reference = case[f"{theirs}_retrieval_recall_{k}"]
            np.testing.assert_allclose(found[f"{ours}_recall@{k}"], reference, rtol=1e-6)


def test_ranks_equal_brute_force_with_many_positives_both_ways():
    image, text, pairs = random_case()
    found = retrieval.ranks(image, text, pairs)
    unit_image, unit_text = (
        rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        for rows in (image, text)
    )
    scores = np.round(unit_image @ unit_text.T, 6)
    for axis, ranks in ((1, found.text_to_image), (0, found.image_to_text)):
        for query, rank in enumerate(ranks):
            right = pairs[pairs[:, axis] == query, 1 - axis]
            own = scores[:, query] if axis else scores[query]
            if not right.size:
                assert rank == 0
                continue
            wrong = np.delete(own, right)
            assert rank == 1 + (wrong >= own[right].max()).sum()


def test_chunks_change_nothing():
    rng = np.random.default_rng(3)
    image = rng.normal(size=(70, 24)).astype(np.float32)
    text = np.concatenate([image, image])  # every caption ties with its twin
    pairs = np.stack([np.arange(70), np.arange(70)], axis=1)
    whole = retrieval.ranks(image, text, pairs)
    assert (whole.image_to_text == 2).all()  # the twin is wrong and scores the same
    for chunk in (1, 7, 64):
        cut = retrieval.ranks(image, text, pairs, chunk=chunk)
        np.testing.assert_array_equal(cut.text_to_image, whole.text_to_image)
        np.testing.assert_array_equal(cut.image_to_text, whole.image_to_text)


@pytest.mark.parametrize("value", [0.0, 0.37])
def test_a_constant_embedding_finds_nothing(value):
    same = np.full((40, 17), value, np.float32)
    found = retrieval.recall(same, same, np.stack([np.arange(40)] * 2, axis=1))
    assert found["text_to_image_recall@10"] == 0
    assert found["image_to_text_median_rank"] == 40
    assert zero_shot.classify(same, same[:3], np.zeros(40, int))["top1"] == 0


def test_nan_is_an_error_that_counts():
    image, text, pairs = random_case()
    image[[4, 9]] = np.nan
    with pytest.raises(RunError, match="2 of 30 image embeddings .* index 4"):
        retrieval.recall(image, text, pairs)
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
    for key, value in expected.items():
        mean = np.mean([run[key] for run in runs])
        assert mean == pytest.approx(value, rel=0.1, abs=0.01), key
    single = retrieval.chance(np.stack([np.arange(952)] * 2, axis=1), 952, 952)
    assert single["text_to_image_recall@5"] == pytest.approx(5 / 952)
    assert single["text_to_image_median_rank"] == 476
    few = retrieval.chance(np.array([[0, 0], [1, 1]]), 2, 2)
    assert few["image_to_text_recall@10"] == 1


def test_equal_captions_are_one_text():
    texts, pairs = retrieval.pair_captions([("a cat", "pet"), ("a dog", "pet", " ")])
    assert texts == ["a cat", "pet", "a dog"]
    assert pairs.tolist() == [[0, 0], [0, 1], [1, 2], [1, 1]]


def test_zero_shot_on_a_constructed_case():
    classes = np.eye(6, dtype=np.float32)
    images = classes[[0, 0, 0, 1, 2]].copy()
    images[2] = [0.5, 1, 0, 0, 0, 0]  # nearest to class 1, then to its own
    images[4] = [0.5, 0.4, 0, 0.3, 0.2, 0.1]  # its own class comes last
    found = zero_shot.classify(images, classes, np.array([0, 0, 0, 1, 2]), chunk=2)
    assert found["top1"] == pytest.approx(3 / 5)
    assert found["top5"] == pytest.approx(4 / 5)
    assert found["mean_per_class"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert "top5" not in zero_shot.classify(images[:, :3], classes[:3, :3], np.zeros(5, int))


def test_templates_average_normalised_prompts():
    class Model(FakeModel):
        def encode_text(self, texts):
            ends = {"a": [1, 0], "b": [0, 1]}
            return np.array([ends[text[-1]] for text in texts], np.float32)

    found = zero_shot.embed_classes(Model(), ["a", "b"], ["{}", "the {}"])
    np.testing.assert_allclose(found, np.eye(2))
    assert len(zero_shot.find_templates("clip_80")) == 80
    assert zero_shot.find_templates("a drawing of {}") == ("a drawing of {}",)
    for bad in ("simpel", "a photo"):
        with pytest.raises(UserError, match="where the class goes"):
            zero_shot.find_templates(bad)


def small_config(**evaluation):
    config = default()
    config.evaluation.batch_size = 4
    config.evaluation.update(evaluation)
    return config


ROWS = [(grey, (f"grey {grey}",), grey // 128) for grey in (0, 40, 90, 140, 200, 250)]


def test_evaluate_scores_what_the_validation_set_has(tmp_path):
    rows = [*ROWS, (None, ("grey 7",), 0), (255, ("grey 255",), -1)]
    source = FakeSource(rows, ("class 60", "class 190", "class 120"))
    results = evaluate(FakeModel(), small_config(), validation=source)
    assert results.figures["retrieval/fake/text_to_image_recall@1"] == 1
    assert results.chance["retrieval/fake/text_to_image_recall@1"] == pytest.approx(1 / 7)
    assert results.examples["retrieval/fake/image_to_text_median_rank"] == 7
    assert results.examples["zero_shot/fake/top1"] == 6
    assert results.figures["zero_shot/fake/top1"] == pytest.approx(4 / 6)
    assert "1 unreadable images are left out, the first: 6" in results.notes["retrieval/fake"]
    assert "1 classes have no image" in results.notes["zero_shot/fake"]
    assert "1 images without a class" in results.notes["zero_shot/fake"]

    path = write_results(tmp_path, results)
    flat = json.loads(path.read_text())
    assert flat["retrieval/fake/image_to_text_recall@5"] == 1
    assert flat["chance/zero_shot/fake/top1"] == pytest.approx(1 / 3)
    assert flat["examples/zero_shot/fake/top1"] == 6
    assert read_results(tmp_path) == results
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(results))
    text = console.export_text()
    assert "text to image R@1" in text and "100.00 %" in text and "14.29 %" in text


def test_evaluate_without_labels_or_validation_set():
    config = small_config()
    unlabelled = FakeSource([(grey, captions, -1) for grey, captions, _ in ROWS])
    results = evaluate(FakeModel(), config, validation=unlabelled)
    assert {key.split("/")[0] for key in results.figures} == {"retrieval"}
    config.data.validation = ""
    assert evaluate(FakeModel(), config).figures == {}


def test_evaluate_refuses_empty_and_unreadable_sets():
    for rows, message in (([], "is empty"), ([(None, ("grey 1",), 0)], "none of the 1 images")):
        with pytest.raises(UserError, match=message):
            evaluate(FakeModel(), small_config(), validation=FakeSource(rows))


def test_a_named_set_must_have_what_it_is_named_for(monkeypatch):
    sources = {
        "jsonl:no/labels.jsonl": FakeSource(ROWS, name="labels"),
        "folder:birds": FakeSource(ROWS, ("class 60", "class 190", "owl"), name="birds"),
        "jsonl:no/captions.jsonl": FakeSource([(5, (), 0)], name="captions"),
    }
    monkeypatch.setattr(
        "mlip_jax.evaluations.run.open_evaluation", lambda spec, cache_dir, cleaning: sources[spec]
    )
    for family, spec, message in (
        ("zero_shot", "jsonl:no/labels.jsonl", "no class labels"),
        ("zero_shot", "folder:birds", "no readable image in birds/owl"),
        ("retrieval", "jsonl:no/captions.jsonl", "no captions"),
    ):
        config = small_config(**{"retrieval": (), "zero_shot": (), family: (spec,)})
        with pytest.raises(UserError, match=message):
            evaluate(FakeModel(), config)


def test_names_of_sets_in_keys_are_short_and_distinct(monkeypatch):
    assert short_name("jsonl:/data/birds.jsonl") == "birds"
    assert short_name("folder:/data/birds/") == "birds"
    assert short_name("emoji") == "emoji"
    monkeypatch.setattr(
        "mlip_jax.evaluations.run.open_evaluation",
        lambda spec, cache_dir, cleaning: FakeSource(ROWS),
    )
    config = small_config(retrieval=("jsonl:a/x.jsonl", "jsonl:b/x.jsonl"), zero_shot=())
    groups = evaluate(FakeModel(), config, progress=False).notes
    assert set(groups) == {"retrieval/x", "retrieval/x-2"}


def test_emoji_are_searched_by_their_name_alone():
    source = FakeSource([(grey, (f"grey {grey}", "alias 3"), 0) for grey in (0, 200)], name="emoji")
    results = evaluate(FakeModel(), small_config(zero_shot=()), validation=source)
    assert results.examples["retrieval/emoji/text_to_image_recall@1"] == 2
