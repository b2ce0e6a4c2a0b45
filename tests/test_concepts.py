"""Concepts taken out of embeddings: the projection, the definitions, and what is measured."""

import json

import numpy as np
import pytest
from PIL import Image
from test_evaluations import FakeSource

from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.schema import default
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.evaluations.concepts import editing, measures
from mlip_jax.evaluations.concepts.definitions import figure_name, read_concept
from mlip_jax.evaluations.sets import Sets

WIDTH = 12
NAMES = tuple(f"job{number}" for number in range(40))
DEFINITION = {
    "name": "gender",
    "sides": ["man", "woman"],
    "pairs": [["man", "woman"]],
    "words": [["he", "she"]],
    "templates": ["{}", "a {}", "the {}"],
    "queries": ["a nurse", "the job2"],
    "components": 1,
}


class Model:
    """Texts and images of one content share an embedding; the side is in the first dimensions.

    Greys are indices into `captions`. `tilt` turns the images' side out of the texts' direction.
    """

    preprocess = Preprocessing(8)

    def __init__(self, captions, tilt=0.0, broken=False):
        self.captions, self.tilt, self.broken = captions, tilt, broken

    def encode_text(self, texts):
        return np.stack([self._embed(text, 0.0) for text in texts])

    def tokenize(self, texts):
        return load_tokenizer("clip_8k").encode(texts, 32)

    def encode_image_pixels(self, images):
        greys = images[:, 0, 0, 0]
        rows = np.stack([self._embed(self.captions[grey], self.tilt, grey) for grey in greys])
        return np.where(self.broken, np.nan, rows).astype(np.float32)

    def _embed(self, text, tilt, noise=None):
        words = [word for word in text.split() if word not in ("a", "the")]
        side = ("man" in words or "he" in words) * 1.0 - ("woman" in words or "she" in words)
        side -= "nurse" in words  # what the model has learnt of nurses
        row = np.zeros(WIDTH)
        row[:2] = side * np.cos(tilt), side * np.sin(tilt)
        for word in words:
            if word.startswith("job"):
                row[2] += int(word[3:]) % 2
                row[3:] += np.random.default_rng(int(word[3:])).normal(size=WIDTH - 3) / 3
        if noise is not None:
            row += np.random.default_rng(1000 + int(noise)).normal(size=WIDTH) / 20
        return (row / max(np.linalg.norm(row), 1e-9)).astype(np.float32)


def captions(jobs=NAMES):
    return [f"{side} {job}" for job in jobs for side in ("man", "woman")] + ["job1 tool"] * 6


def sets(texts, labels=None, class_names=("even", "odd"), **model):
    labels = [-1] * len(texts) if labels is None else labels
    rows = [
        (grey, (text,), label) for grey, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    config = default()
    config.data.validation = ""
    source = FakeSource(rows, class_names if max(labels) >= 0 else (), name="fake")
    return Sets(Model(texts, **model), config, source, progress=False)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fewer fits: what is measured stays the same."""
    monkeypatch.setattr(measures, "_FOLDS", 3)
    monkeypatch.setattr(editing, "_DRAWS", 1)
    monkeypatch.setattr(measures, "_STRENGTHS", {"logisticregression__C": [1e-2, 1.0]})


@pytest.fixture
def definition(tmp_path):
    def write(**changes):
        values = {key: value for key, value in (DEFINITION | changes).items() if value is not None}
        path = tmp_path / "gender.json"
        path.write_text(json.dumps(values))
        return str(path)

    return write


def test_the_subspace_is_that_of_pairs_less_their_midpoints():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 9, 6))
    subspace = editing.concept_subspace(first, second, 3)
    np.testing.assert_allclose(subspace @ subspace.T, np.eye(3), atol=1e-12)
    middle = (first + second) / 2
    offsets = np.concatenate([first - middle, second - middle])
    values, vectors = np.linalg.eigh(offsets.T @ offsets)
    assert (np.diff(values) > 0).all()
    expected = vectors[:, ::-1][:, :3]
    np.testing.assert_allclose(subspace.T @ subspace, expected @ expected.T, atol=1e-9)


def test_edited_embeddings_are_normalised_and_orthogonal_to_the_subspace():
    rng = np.random.default_rng(1)
    span = np.linalg.qr(rng.normal(size=(5, 2)))[0].T
    rows = np.concatenate([rng.normal(size=(4, 5)), np.zeros((1, 5))])
    edited = editing.edit(rows, span)
    np.testing.assert_allclose(edited @ span.T, 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(edited, axis=1), [1, 1, 1, 1, 0])
    np.testing.assert_allclose(editing.edit(edited, span), edited, atol=1e-12)
    unchanged = rows[:4] / np.linalg.norm(rows[:4], axis=1, keepdims=True)
    np.testing.assert_allclose(editing.edit(rows[:4], span[:0]), unchanged)


@pytest.mark.parametrize("components", [0, 4])
def test_components_that_the_pairs_cannot_give_are_refused(components):
    with pytest.raises(UserError, match=f"of {components} components: 3 pairs .* give 1 to 3"):
        editing.concept_subspace(np.ones((3, 5)), np.zeros((3, 5)), components)


def test_a_concept_that_texts_hold_leaves_the_images_and_the_task_stays(definition):
    texts = captions()
    labels = [int(text.split()[-1][3:]) % 2 if "man" in text else -1 for text in texts]
    outcome = editing.score(sets(texts, labels), definition())
    figures = outcome.figures
    assert outcome.name == "gender-fake"
    assert figures["probe_before"] == figures["zero_shot_probe_before"] == 1
    assert figures["gap_before_cosine"] > 0.1 > figures["gap_after_cosine"]
    for name in ("probe_after", "image_pairs_probe_after"):
        assert abs(figures[name] - 0.5) < 0.15, name
    assert figures["task_before"] > 0.6
    assert figures["task_after"] > 0.95 * figures["task_before"]
    assert figures["image_pairs_task_after"] > 0.95 * figures["task_before"]
    assert {"nurse_man_before_cosine", "job2_woman_after_cosine"} <= set(figures)
    assert (
        figures.keys()
        == outcome.chance.keys()
        == outcome.examples.keys()
        == outcome.protocols.keys()
    )
    assert outcome.chance["probe_after"] == outcome.chance["task_after"] == 0.5
    assert outcome.examples["task_before"] == outcome.examples["probe_before"] == 80
    assert "40 pairs" in outcome.note


def test_pairs_of_images_take_out_what_texts_do_not_hold(definition):
    figures = editing.score(sets(captions(), tilt=1.2), definition()).figures
    assert figures["probe_after"] > 0.95
    assert abs(figures["image_pairs_probe_after"] - 0.5) < 0.15
    # Without classes: the images on neither side carry one caption, which finds them.
    assert figures["task_before"] == figures["task_after"] == 1


def test_the_figures_do_not_depend_on_the_batch(definition):
    spec, outcomes = definition(), []
    for batch_size in (7, 64):
        case = sets(captions(NAMES[:32]))
        case.config.evaluation.batch_size = batch_size
        outcomes.append(editing.score(case, spec).figures)
    assert outcomes[0] == outcomes[1]


def test_too_few_pairs_of_images_leave_that_method_out(definition):
    outcome = editing.score(sets(captions(NAMES[:22])), definition(queries=None))
    assert not [key for key in outcome.figures if "image_pairs" in key or "cosine" in key]
    assert "22" in outcome.note


def test_too_few_images_of_a_side_are_refused_in_a_named_set_alone(definition, pairs):
    assert editing.score(sets(captions(NAMES[:19])), definition()) is None
    case = sets(captions())
    case.model.captions = ["job1"] * 256
    with pytest.raises(UserError, match="'pairs' has 0 and 0 different .*'man' and 'woman'.*20"):
        editing.score(case, f"{definition()}@jsonl:{pairs}")


def test_a_run_without_a_validation_set_gives_nothing(definition):
    config = default()
    config.data.validation = ""
    assert editing.score(Sets(Model([]), config, progress=False), definition()) is None


def test_damaged_embeddings_end_it(definition):
    with pytest.raises(RunError, match="image embeddings hold NaN"):
        editing.score(sets(captions(), broken=True), definition())


def test_the_training_images_of_the_run_count_too(definition, tmp_path):
    texts, rows = captions(NAMES[:22]), []
    for grey, caption in enumerate(texts):
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(tmp_path / f"{grey}.png")
        split = "train" if grey < 30 else "validation"
        rows.append({"file": f"{grey}.png", "caption": caption, "split": split})
    path = tmp_path / "sided.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = default()
    config.data.train = f"jsonl:{path}"
    case = Sets(Model(texts), config, progress=False)
    outcome = editing.score(case, definition(queries=None))
    assert outcome.examples["probe_before"] == 44
    assert "of the training split too" in outcome.note
    with pytest.raises(UserError, match="has 7 and 7 different captions"):
        editing.score(case, f"{definition()}@jsonl:{path}")


def test_sides_are_told_by_whole_words_of_one_side(definition):
    concept, place = read_concept(definition())
    assert place == ""
    expected_sides = {
        "A Man runs": 0,
        "she runs": 1,
        "a man and a woman": -1,
        "a man's shoe": -1,
        "human": -1,
        "": -1,
    }
    assert {text: concept.side([text]) for text in expected_sides} == expected_sides
    assert concept.side(["a man", "she"]) == -1
    assert concept.neutral(["The man, farmer"]) == concept.neutral(["the woman farmer"])
    assert concept.neutral(["he farmer"]) != concept.neutral(["man farmer"])


def test_the_built_in_concept_is_sound():
    concept, place = read_concept("gender@jsonl:/data/a@b.jsonl#all")
    assert place == "jsonl:/data/a@b.jsonl#all"
    first, second = concept.texts()
    assert len(first) == len(second) == len(concept.pairs) * len(concept.templates)
    assert first[:2] == ["man", "a man"] and second[:2] == ["woman", "a woman"]
    assert figure_name("a police officer") == "police_officer"


def test_a_file_and_its_set_are_told_apart(definition):
    path = definition()
    assert read_concept(f"{path}@emoji")[1] == "emoji"
    editing.check(sets(captions()), path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, "'name': expected a word, not 'a/b'"),
        ({"sides": ["man"]}, "'sides': expected two different words"),
        ({"sides": None}, "the key 'sides' is missing"),
        ({"pairs": [["man"]]}, "'pairs': expected a list of pairs"),
        ({"pairs": []}, "'pairs': expected at least one pair"),
        ({"pairs": [["Man", "woman"]]}, "'pairs': 'Man' is not one word in lower case"),
        ({"words": [["woman", "man"]]}, "'man' stands on both sides"),
        ({"templates": ["a person"]}, "'templates': expected texts with {}"),
        ({"queries": ["a job", "the job"]}, "'queries': expected up to 8 different texts"),
        ({"components": 4}, r"'components': expected a whole number from 1 to 3 \(3 pairs"),
        ({"components": True}, "'components': expected a whole number"),
        ({"component": 1}, "unknown key 'component'; did you mean 'components'"),
    ],
)
def test_a_malformed_definition_is_named_by_file_and_key(definition, changes, message):
    with pytest.raises(UserError, match=rf"gender\.json: .*{message}|gender\.json: {message}"):
        read_concept(definition(**changes))


def test_an_unreadable_definition_is_named(tmp_path):
    with pytest.raises(UserError, match="missing.json: .*No such file"):
        read_concept(str(tmp_path / "missing.json"))
    path = tmp_path / "list.json"
    path.write_text("[")
    with pytest.raises(UserError, match="list.json: "):
        read_concept(str(path))
    path.write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, found a list"):
        read_concept(str(path))
    with pytest.raises(UserError, match="'gendre' is neither .*did you mean 'gender'"):
        read_concept("gendre")


def test_a_classifier_is_trained_on_the_training_images_alone():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(60, 4))
    training = np.arange(60) < 40
    labels = (embeddings[:, 0] > 0).astype(int)
    labels[training] = 1 - labels[training]  # what it learns there is wrong elsewhere
    task = measures.classification(labels, training)
    thirds = np.arange(60) % 3
    assert task.examples == 20
    assert task.score([embeddings] * 3, thirds) < 0.2
    labels = (embeddings[:, 0] > 0).astype(int)
    crossed = measures.classification(labels, np.zeros(60, bool))
    assert crossed.examples == 60
    assert crossed.score([embeddings] * 3, thirds) > 0.8
    assert measures.classification(np.full(60, -1), training) is None
