"""A trained model behind its interface: the same embedding by every way in."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import mlip_jax
from mlip_jax import config as schema
from mlip_jax import inference
from mlip_jax import main as door
from mlip_jax.config import UserError
from mlip_jax.evaluations.workdir import changes, results_name


@pytest.fixture(scope="module")
def model(trained):
    return mlip_jax.load(trained)


@pytest.fixture(scope="module")
def paths(pairs):
    return [pairs.parent / f"{index}.png" for index in range(11)]


@pytest.fixture(scope="module")
def embeddings(model, paths):
    return model.encode_image(paths)


TEXTS = ["picture 1", "picture 2", "a much longer caption than the context of this model takes"]


def assert_close(one, other):
    np.testing.assert_allclose(one, other, atol=2e-6)


def test_embeddings_are_of_one_length_and_tell_images_apart(model, embeddings):
    texts = model.encode_text(TEXTS)
    for rows, count in ((embeddings, 11), (texts, 3)):
        assert type(rows) is np.ndarray and rows.dtype == np.float32
        assert rows.shape == (count, model.config.model.embed_dim)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
        assert len(np.unique(rows.round(5), axis=0)) == count
    assert 1 <= model.logit_scale <= 100


def test_every_way_in_gives_the_same_image(model, paths, embeddings):
    pictures = [Image.open(path) for path in paths]
    ways = {
        "strings": list(map(str, paths)),
        "bytes": [path.read_bytes() for path in paths],
        "pillow": pictures,
        "arrays": [np.asarray(picture.convert("RGB")) for picture in pictures],
        "mixed": [paths[0], pictures[1], paths[2].read_bytes(), *pictures[3:]],
        "generator": (path for path in paths),
    }
    for way, images in ways.items():
        np.testing.assert_array_equal(model.encode_image(images), embeddings, err_msg=way)
    batch = np.stack([model.preprocess(path) for path in paths])
    np.testing.assert_array_equal(model.encode_image(batch), embeddings)
    np.testing.assert_array_equal(model.encode_image_pixels(batch), embeddings)
    assert_close(model.encode_image_array(model.preprocess.normalize(batch)), embeddings)


def test_token_ids_are_texts(model):
    ids = model.tokenize(TEXTS)
    assert ids.dtype == np.int32 and ids.shape == (3, model.config.model.text.context_length)
    np.testing.assert_array_equal(model.encode_token_ids(ids), model.encode_text(TEXTS))


def test_company_changes_nothing(model, trained, paths, embeddings):
    assert_close(np.concatenate([model.encode_image([path]) for path in paths]), embeddings)
    assert_close(model.encode_text(TEXTS[::-1])[::-1], model.encode_text(TEXTS))
    other = inference.load(trained, overrides={"evaluation.batch_size": 3})
    assert_close(other.encode_image(paths), embeddings)


def test_nothing_in_nothing_out(model):
    width = model.config.model.embed_dim
    assert model.encode_image([]).shape == model.encode_text([]).shape == (0, width)


def test_one_alone_is_no_list(model, paths):
    picture = Image.open(paths[0])
    singles = (str(paths[0]), paths[0], paths[0].read_bytes(), picture, np.asarray(picture))
    for single in singles:
        with pytest.raises(TypeError, match="pass a list"):
            model.encode_image(single)
    for encode in (model.encode_text, model.tokenize):
        with pytest.raises(TypeError, match="pass a list"):
            encode("a dog")


def test_what_is_no_image_is_an_error(model, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    with pytest.raises(OSError):
        model.encode_image([tmp_path / "torn.png"])
    with pytest.raises(FileNotFoundError):
        model.encode_image([tmp_path / "absent.png"])
    with pytest.raises(ValueError, match="float64"):
        model.encode_image([np.zeros((4, 4, 3))])


def test_averaged_parameters_are_served(trained, model, paths):
    fields, _ = inference.restore_fields(trained, ("params", "ema"))
    raw = model.with_variables({"params": fields["params"]}).encode_image(paths)
    averaged = model.with_variables({"params": fields["ema"]}).encode_image(paths)
    np.testing.assert_array_equal(averaged, model.encode_image(paths))
    assert np.abs(raw - averaged).max() > 1e-5


def test_it_looks_inside(model, paths):
    pixels = np.stack([model.preprocess(path) for path in paths[:3]])
    inside = model.inspect(pixels)
    patches, merged = 16, 12  # 4 x 4, a quarter of them merged
    assert inside["source"].shape == (3, patches) and inside["source"].dtype == np.int32
    assert inside["sizes"].shape == (3, merged)
    assert inside["importance"].shape == (3, patches)
    for source, sizes in zip(inside["source"], inside["sizes"], strict=True):
        np.testing.assert_array_equal(np.bincount(source, minlength=merged), sizes)
    (kernel,) = model.frequency_filters()
    assert kernel.shape == (4, 3, 16) and kernel.dtype == np.complex64


def test_without_merging_each_patch_is_its_own_token(trained, model, paths, embeddings):
    plain = inference.load(trained, overrides={"model.image.merging.rate": 0.0})
    assert model.config.model.image.merging.rate == 0.25
    assert np.abs(plain.encode_image(paths) - embeddings).max() > 1e-6
    np.testing.assert_array_equal(plain.encode_text(TEXTS), model.encode_text(TEXTS))
    inside = plain.inspect(np.stack([plain.preprocess(paths[0])]))
    np.testing.assert_array_equal(inside["source"], np.arange(16)[None])
    np.testing.assert_array_equal(inside["sizes"], np.ones((1, 16)))
    assert inside["importance"] is None


def test_another_checkpoint_of_the_run(trained, model, paths, embeddings):
    assert np.abs(inference.load(trained, step=6).encode_image(paths) - embeddings).max() > 1e-6
    with pytest.raises(UserError, match="no checkpoint of step 5"):
        inference.load(trained, step=5)


OTHERS = [
    ({"model.image.merging.rate": 0.9}, "largest rate here is"),
    ({"model.image.merging.rat": 0.9}, "did you mean 'rate'"),
    ({"model.image.merging.rate": "half"}, "model.image.merging.rate='half'"),
    ({"model.image.width": 32}, r"of another model: tensor image_encoder/\S+ is \[.*\] there"),
    ({"model.text.depth": 2}, "text_encoder/block_1/.* does not exist there"),
    ({"model.image.image_size": 24}, "of another model: tensor image_encoder/"),
    ({"perspectives.spatial_global.weight": 0.0}, "no embedding of a whole image"),
]


@pytest.mark.parametrize(("overrides", "message"), OTHERS)
def test_what_the_checkpoint_cannot_be_is_said(trained, overrides, message):
    with pytest.raises(UserError, match=message):
        inference.load(trained, overrides=overrides)


def test_what_is_no_run_is_said(trained, tmp_path):
    with pytest.raises(UserError, match="is not a folder: give the workdir of a run"):
        mlip_jax.load(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no config.json: it is not the workdir"):
        mlip_jax.load(tmp_path)
    shutil.copy(trained / "config.json", tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        mlip_jax.load(str(tmp_path))


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def evaluate(workdir, *flags):
    return door.main(["mlip", "evaluate", f"--workdir={workdir}", *flags])


def test_evaluating_again_gives_the_figures_of_the_run(workdir, trained, capsys):
    (workdir / "results.json").unlink()
    assert evaluate(workdir) == 0
    assert f"results: {workdir / 'results.json'}" in capsys.readouterr().out
    one, other = (json.loads((f / "results.json").read_text()) for f in (trained, workdir))
    assert one == other


def test_evaluating_another_model_leaves_the_results_of_the_run(workdir):
    before = (workdir / "results.json").read_bytes()
    assert evaluate(workdir, "--config.model.image.merging.rate=0.5") == 0
    (other,) = workdir.glob("results,*.json")
    assert other.name == "results,model.image.merging.rate=0.5.json"
    assert "retrieval/pairs/text_to_image_recall@1" in json.loads(other.read_text())
    assert (workdir / "results.json").read_bytes() == before


def test_evaluating_what_it_is_not_is_one_line(workdir, capfd):
    assert evaluate(workdir, "--config.model.image.merging.rate=0.94") == 2
    assert evaluate(workdir, "--config.model.image.width=32") == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2
    assert "largest rate" in told[0] and "of another model" in told[1]


def test_results_are_named_by_what_changed():
    trained = schema.default()
    asked = schema.from_json(schema.to_json(trained))
    asked.evaluation.batch_size, asked.batch_size, asked.data.workers = 3, 4, 5
    assert changes(trained, asked) == [] and results_name([]) == "results.json"
    for key, value in (
        ("model.image.merging.rate", 0.5),
        ("data.train", "jsonl:a/b.jsonl"),
        ("perspectives.spatial_global.weight", 0.0),
    ):
        other = schema.from_json(schema.to_json(trained))
        schema.set_key(other, key, value)
        assert changes(trained, other) == [f"{key}={value}"]
    assert (
        results_name(["data.train=jsonl:a/b c.jsonl"])
        == "results,data.train=jsonl_a_b_c.jsonl.json"
    )
    long = [results_name(["data.validation=jsonl:" + "d/" * 300 + end]) for end in "ab"]
    assert len(set(long)) == 2 and all(len(name.encode()) < 200 for name in long)
    assert re.fullmatch(r"results,[\w.,=+-]+\.json", long[0])


def test_bytes_in_memory(model, paths, embeddings):
    out = io.BytesIO()
    Image.open(paths[4]).save(out, "BMP")
    np.testing.assert_array_equal(
        model.encode_image([out.getvalue()])[0], model.encode_image([paths[4]])[0]
    )
