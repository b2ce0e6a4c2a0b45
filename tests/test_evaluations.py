"""Retrieval, zero-shot classification and what is kept of them."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mlip_jax.core.errors import UserError
from mlip_jax.core.schema import default
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.sets.records import Record
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.evaluations import evaluate, read_results, table, write_results, zero_shot
from mlip_jax.evaluations.prompts import find_templates
from mlip_jax.evaluations.sets import Sets, short_name


def png(value):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(out, "PNG")
    return out.getvalue()


class FakeSource:
    """Images of one grey each; entries are (grey or None, captions, label)."""

    split = "validation"
    parts = ("validation",)
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

    def tokenize(self, texts):
        return load_tokenizer("clip_8k").encode(texts, 12)

    def _direction(self, greys):
        angle = greys / 255 * np.pi / 2
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def test_zero_shot_on_a_constructed_case():
    classes = np.eye(6, dtype=np.float32)
    images = classes[[0, 0, 0, 1, 2]].copy()
    images[2] = [0.5, 1, 0, 0, 0, 0]  # nearest to class 1, then to its own
    images[4] = [0.5, 0.4, 0, 0.3, 0.2, 0.1]  # its own class comes last
    figures = zero_shot.classify(images, classes, np.array([0, 0, 0, 1, 2]), chunk=2)
    assert figures["top1"] == pytest.approx(3 / 5)
    assert figures["top5"] == pytest.approx(4 / 5)
    assert figures["mean_per_class"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert "top5" not in zero_shot.classify(images[:, :3], classes[:3, :3], np.zeros(5, int))


def test_of_classes_with_equal_prompts_the_first_wins():
    long = "a b c d e f g h"
    names = ("missile", "dog", "Missile ", "cat", "missile", f"{long} 1", f"{long} 2")
    groups = zero_shot.equal_classes(FakeModel(), names, ("{}", "one two {}."))
    assert groups.tolist() == [0, 1, 0, 2, 0, 3, 4]
    cut = zero_shot.equal_classes(FakeModel(), names, ("one two three {}",))
    assert cut.tolist() == [0, 1, 0, 2, 0, 3, 3]  # what tells the last two apart is cut off
    classes = np.eye(7, dtype=np.float32)[groups]
    classes[4] += 3e-7  # as another batch may round it
    labels = np.array([0, 1, 2, 4, 2])
    images = np.eye(7, dtype=np.float32)[[0, 1, 0, 0, 1]]
    images[4, 0] = 0.5
    figures = zero_shot.classify(images, classes, labels, groups=groups)
    scores = images @ classes[[0, 1, 0, 3, 0, 5, 6]].T
    assert figures["top1"] == np.mean(scores.argmax(axis=1) == labels) == 2 / 5
    assert figures["top5"] == 1.0
    assert figures["mean_per_class"] == pytest.approx((1 + 1 + 0 + 0) / 4)
    assert zero_shot.classify(images, classes[groups], labels)["top1"] == 1 / 5


def test_equal_prompts_are_counted_so_and_noted():
    rows = [(grey, (f"grey {grey}",), label) for grey, label in ((10, 0), (250, 1), (240, 2))]
    source = FakeSource(rows, ("grey 9", "Bright 255", "bright 255"))
    results = evaluate(FakeModel(), small_config(retrieval=()), validation=source)
    assert results.figures["zero_shot/fake/top1"] == pytest.approx(2 / 3)
    note = results.notes["zero_shot/fake"]
    assert "for more than one class mean the first of them, as argmax has it: bright 255." in note


@pytest.mark.parametrize("value", [0.0, 0.37])
def test_a_constant_embedding_classifies_nothing(value):
    same = np.full((40, 17), value, np.float32)
    assert zero_shot.classify(same, same[:3], np.zeros(40, int))["top1"] == 0


def test_labels_out_of_range_are_named():
    with pytest.raises(UserError, match="the label 6 of image 1 is out of range: there are 6"):
        zero_shot.classify(np.eye(6), np.eye(6), np.array([0, 6, 0, 0, 0, 0]))
    source = FakeSource([*ROWS, (3, ("grey 3",), 5)], ("a 1", "b 2"))
    with pytest.raises(UserError, match="the label 5 of 6 is out of range: there are 2 classes"):
        evaluate(FakeModel(), small_config(), validation=source)


class ManyLabels(FakeSource):
    """Greys above 100 show "bright", one is too difficult to tell; nothing shows "green"."""

    def targets(self):
        bright = [0 if grey == 90 else 1 if grey > 100 else -1 for grey, *_ in self.rows]
        return np.stack([np.array(bright, np.int8), np.full(len(bright), -1, np.int8)], axis=1)


def test_several_classes_an_image_are_scored_by_average_precision():
    source = ManyLabels([(grey, captions, -1) for grey, captions, _ in ROWS], ("bright 255", "x 9"))
    results = evaluate(FakeModel(), small_config(retrieval=()), validation=source)
    key = "zero_shot/fake/mean_average_precision"
    assert results.figures == {key: 1.0}
    assert 0.5 < results.chance[key] < 1
    assert "1 of 2 classes have images here" in results.notes["zero_shot/fake"]


def test_templates_average_normalised_prompts():
    class Model(FakeModel):
        def encode_text(self, texts):
            ends = {"a": [1, 0], "b": [0, 1]}
            return np.array([ends[text[-1]] for text in texts], np.float32)

    embeddings = zero_shot.embed_classes(Model(), ["a", "b"], ["{}", "the {}"])
    np.testing.assert_allclose(embeddings, np.eye(2))
    assert len(find_templates("clip_80")) == 80
    assert find_templates("a drawing of {}") == ("a drawing of {}",)
    for bad in ("simpel", "a photo"):
        with pytest.raises(UserError, match="where the class goes"):
            find_templates(bad)


def small_config(**evaluation):
    config = default()
    config.evaluation.batch_size = 4
    config.evaluation.update(evaluation)
    return config


ROWS = [(grey, (f"grey {grey}",), grey // 128) for grey in (0, 40, 90, 140, 200, 250)]


def test_evaluate_scores_what_the_validation_set_has(tmp_path):
    rows = [*ROWS, (None, ("grey 7",), 0), (255, ("grey 255",), -1)]
    source = FakeSource(rows, ("class 60", "class 190", "class 120"))
    config = small_config()
    with pytest.raises(UserError, match="1 of 8 images .* the first: 6 .*max_skipped_share=0.01"):
        evaluate(FakeModel(), config, validation=source)
    config.data.max_skipped_share = 0.2
    results = evaluate(FakeModel(), config, validation=source)
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
    assert flat["protocol/zero_shot/fake/top1"] == "zero-shot, '{}'"
    done, results.done = results.done, []
    assert done == ["retrieval=validation", "zero_shot=validation"]
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
    zero_shot.check(Sets(None, config), "validation")  # nothing is there that could be at fault


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
        "mlip_jax.evaluations.sets.open_evaluation", lambda spec, cache_dir, cleaning: sources[spec]
    )
    for family, spec, message in (
        ("zero_shot", "jsonl:no/labels.jsonl", "no class labels"),
        (
            "zero_shot",
            "folder:birds",
            "class 'owl' of the dataset 'folder:birds' has no readable image",
        ),
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
        "mlip_jax.evaluations.sets.open_evaluation",
        lambda spec, cache_dir, cleaning: FakeSource(ROWS),
    )
    config = small_config(retrieval=("jsonl:a/x.jsonl", "jsonl:b/x.jsonl"), zero_shot=())
    groups = evaluate(FakeModel(), config, progress=False).notes
    assert set(groups) == {"retrieval/x", "retrieval/x-2"}


def test_emoji_are_searched_by_their_name_alone():
    source = FakeSource([(grey, (f"grey {grey}", "alias 3"), 0) for grey in (0, 200)], name="emoji")
    results = evaluate(FakeModel(), small_config(zero_shot=()), validation=source)
    assert results.examples["retrieval/emoji/text_to_image_recall@1"] == 2
