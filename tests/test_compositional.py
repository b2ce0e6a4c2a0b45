"""SugarCrepe's and Winoground's examples: figures by hand, and files that are none."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from images import encoded
from PIL import Image

from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.evaluations import compositional
from mlip_jax.evaluations.suites import evaluate

# An image's embedding is its colour's, a text's that of the first colour that it names.
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


class FakeModel:
    preprocess = Preprocessing(image_size=8)

    def encode_image_pixels(self, images):
        return images[:, 4, 4].astype(np.float32) / 255

    def encode_text(self, texts):
        named = [next(word for word in text.split() if word in COLOURS) for text in texts]
        return np.array([COLOURS[name] for name in named], np.float32) / 255


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name, colour in COLOURS.items():
        (tmp_path / "images" / f"{name}.png").write_bytes(
            encoded(Image.new("RGB", (8, 8), colour), "PNG")
        )
    return tmp_path


def crepe(image, right, wrong):
    return {"filename": f"{image}.png", "caption": right, "negative_caption": wrong}


def pair(first, second, texts):
    names = {"image_0": first, "image_1": second}
    return names | {"caption_0": texts[0], "caption_1": texts[1], "id": 7, "tag": "x"}


def score(path):
    config = schema.default()
    for name in ("retrieval", "zero_shot"):
        config.evaluation[name] = ()
    config.evaluation.compositional = (str(path),)
    return evaluate(FakeModel(), config, progress=False)


def write(file, values):
    rows = "\n".join(json.dumps(value) for value in values)
    file.write_text(rows if file.suffix == ".jsonl" else json.dumps(values))
    return file


def test_sugar_crepe_counts_captions_above_wrong_ones(folder):
    examples = {
        "0": crepe("red", "a red cat", "a blue cat"),
        "1": crepe("red", "red", "green"),
        "2": crepe("green", "blue", "green"),  # wrong
        "3": crepe("blue", "red", "green"),  # a tie, which counts against the model
    }
    file = folder / "swap_att.json"
    file.write_text(json.dumps(examples))
    results = score(file)
    key = "compositional/swap_att/accuracy"
    assert results.figures[key] == 0.5 and results.chance[key] == 0.5
    assert results.examples[key] == 4


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_winoground_counts_texts_images_and_both(folder, suffix):
    examples = [
        pair("red", "green", ("red", "green")),  # all right
        pair("green", "red", ("red", "green")),  # all wrong
        pair("red", "black", ("red", "black")),  # black is as far from all: ties
    ]
    results = score(write(folder / f"winoground{suffix}", examples))
    figures = {key.rsplit("/")[-1]: value for key, value in results.figures.items()}
    assert figures == {
        "text_score": pytest.approx(1 / 3),
        "image_score": pytest.approx(1 / 3),
        "group_score": pytest.approx(1 / 3),
    }
    assert results.chance["compositional/winoground/group_score"] == pytest.approx(1 / 6)


def test_each_score_by_itself():
    scores = np.array(
        [
            [[0.9, 0.1], [0.95, 0.96]],  # texts right, images not
            [[0.3, 0.4], [0.1, 0.5]],  # images right, texts not
        ]
    )
    right = compositional.judge(scores)
    assert right["text_score"].tolist() == [True, False]
    assert right["image_score"].tolist() == [False, True]
    assert not right["group_score"].any()


def test_images_may_lie_elsewhere_and_some_may_be_missing(folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("elsewhere") / "add.json"
    examples = [crepe("red", "red", "blue"), crepe("none", "red", "blue")]
    write(file, examples * 60 + [crepe("blue", "blue", "red")])
    with pytest.raises(UserError, match="cannot be read"):
        score(f"{file}@{folder}")
    file = write(folder / "add.json", [crepe("red", "red", "blue")])
    (folder / "images" / "extra.png").write_bytes(b"no image")
    write(file, [crepe(name, name, "black") for name in ("red", "green", "blue")])
    assert score(f"{file}@{folder / 'images'}").examples["compositional/add/accuracy"] == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "has no examples"),
        ("5", "expected"),
        ("[5]", r"\[0\] is no example"),
        ('[{"filename": "a.png", "caption": "x", "negative_caption": 3}]', '"negative_caption"'),
        ('[{"image_0": "a", "image_1": "b", "caption_0": "x"}]', 'needs "caption_1", a text'),
        (json.dumps([crepe("a\0", "x", "y")]), "NUL"),
        (json.dumps([crepe("a", "x", "y"), pair("a", "b", "xy")]), "of one image and of two"),
        (json.dumps({"k": crepe("a", "x" * 10**6, "y")}), r"\[k\]: \"caption\" has 1,000,000"),
        ("{", "line 1"),
    ],
)
def test_what_is_no_such_file(tmp_path, content, words):
    file = tmp_path / "task.json"
    file.write_text(content)
    with pytest.raises(UserError, match=words):
        compositional.check(SimpleNamespace(), str(file))


def test_a_missing_file_and_a_broken_line(tmp_path):
    with pytest.raises(UserError, match="cannot read .*No such file"):
        compositional.read_task(str(tmp_path / "none.jsonl"))
    (tmp_path / "task.jsonl").write_text('{"filename": "a.png"}\n{')
    with pytest.raises(UserError, match=r"task.jsonl:1 needs "):
        compositional.read_task(str(tmp_path / "task.jsonl"))


def test_a_validation_set_has_none(folder):
    config = schema.default()
    for name in ("retrieval", "zero_shot"):
        config.evaluation[name] = ()
    config.evaluation.compositional = ("validation",)
    results = evaluate(FakeModel(), config, progress=False)
    assert (
        "add --config.evaluation.compositional=sugar_crepe.json"
        in results.left_out["compositional"]
    )
