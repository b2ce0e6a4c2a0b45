"""Retrieval by captions in several languages: figures by hand, and files that are none."""

import json

import numpy as np
import pytest
from images import encoded
from PIL import Image

from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.evaluations import multilingual
from mlip_jax.evaluations.sheets import sheet
from mlip_jax.evaluations.suites import check, evaluate

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
# What the model knows: no French, and one German word of the three is wrong.
WORDS = COLOURS | {"rot": (255, 0, 0), "blau": (0, 0, 255), "grün": (255, 0, 1)}
GERMAN = {"red": "rot", "green": "grün", "blue": "blau"}


class FakeModel:
    preprocess = Preprocessing(image_size=8)

    def encode_image_pixels(self, images):
        return images[:, 4, 4].astype(np.float32) / 255

    def encode_text(self, texts):
        return np.array([WORDS.get(text, (1, 1, 1)) for text in texts], np.float32) / 255

    def tokenize(self, texts):
        padded = [text.encode().ljust(8)[:8] for text in texts]
        return np.array([list(text) for text in padded], np.int32)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name, colour in COLOURS.items():
        image = encoded(Image.new("RGB", (8, 8), colour), "PNG")
        (tmp_path / "images" / f"{name}.png").write_bytes(image)
    return tmp_path


def score(path):
    config = schema.default()
    for name in ("retrieval", "zero_shot"):
        config.evaluation[name] = ()
    config.evaluation.multilingual = (str(path),)
    check(config)
    return evaluate(FakeModel(), config, progress=False)


def write(file, values):
    file.write_text("\n".join(json.dumps(value) for value in values))
    return file


def ours(name):
    captions = {"en": [name, " "], "de": GERMAN[name], "fr": f"{name} en français"}
    return {"file": f"{name}.png", "captions": captions}


def crossmodal(name):
    texts = {"en": name, "de": GERMAN[name], "fr": f"{name} en français"}
    captions = {language: {"caption": [text]} for language, text in texts.items()}
    return {"image/key": name, "image/locale": "de"} | captions


@pytest.mark.parametrize("record", [ours, crossmodal])
def test_each_language_is_ranked_by_itself(folder, record):
    results = score(write(folder / "all.jsonl", map(record, COLOURS)))
    figures = {key.rsplit("/")[-1]: value for key, value in results.figures.items()}
    assert set(figures) == {
        f"{language}_{way}_recall@{k}"
        for language in ("en", "de", "fr", "mean")
        for way in ("text_to_image", "image_to_text")
        for k in (1, 5, 10)
    }
    assert figures["en_text_to_image_recall@1"] == figures["en_image_to_text_recall@1"] == 1
    # "grün" finds red. Of red's captions "rot" is the better, of green's "grün" ties with the rest.
    assert figures["de_text_to_image_recall@1"] == pytest.approx(2 / 3)
    assert figures["de_image_to_text_recall@1"] == pytest.approx(2 / 3)
    assert figures["fr_text_to_image_recall@1"] == 0  # ties count against the model
    for way in ("text_to_image", "image_to_text"):
        each = [figures[f"{language}_{way}_recall@1"] for language in ("en", "de", "fr")]
        assert figures[f"mean_{way}_recall@1"] == pytest.approx(np.mean(each))
    key = "multilingual/all/mean_text_to_image_recall@1"
    assert results.chance[key] == pytest.approx(1 / 3) and results.examples[key] == 9
    assert "for 3 languages: en, de, fr" in results.notes["multilingual/all"]
    rows = {row[1]: row[2] for row in sheet(results, "Results").rows}
    assert rows["en text to image R@1"] == "100.00 %"


def test_a_validation_set_has_no_languages():
    assert multilingual.score(None, "validation") is None


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "has no records"),
        ([5], ":1: expected a JSON object"),
        ([{"captions": {"en": "x"}}], ':1 needs "file", a text'),
        ([{"file": "a.png"}], "has no captions by language"),
        ([{"file": "a.png", "captions": ["x"]}], "has no captions by language"),
        ([{"file": "a.png", "captions": {"en": 3}}], "must be a text or a list of them"),
        ([{"file": "a.png", "captions": {"mean": "x"}}], "is no name of a language"),
        ([{"file": "a.png", "captions": {"a/b": "x"}}], "is no name of a language"),
        ([ours("red"), ours("blue") | {"captions": {"en": "x", "de": "y"}}], ":2 has no .* 'fr'"),
        ([{"file": "a.png", "captions": {"en": "x", "de": []}}], "language 'de' has no captions"),
        ([{"file": "a\0", "captions": {"en": "x"}}], "NUL"),
    ],
)
def test_files_that_are_none(folder, records, words):
    file = write(folder / "bad.jsonl", records)
    with pytest.raises(UserError, match=words):
        score(file)
