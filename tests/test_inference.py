"""A trained model behind its interface: the same embedding by every way in."""

import io
import json
import re
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

import mlip_jax
from mlip_jax import inference
from mlip_jax import main as door
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.evaluations.verb import changes, results_name
from mlip_jax.models import building, resnet, two_tower
from mlip_jax.models.grad_cam import grad_cam
from mlip_jax.storage.saved import restore_fields


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


def test_one_alone_is_a_list_of_one(model, paths):
    picture = Image.open(paths[0])
    expected = model.encode_image(paths[:1])
    for single in (str(paths[0]), paths[0], paths[0].read_bytes(), picture):
        np.testing.assert_array_equal(model.encode_image(single), expected)
    with pytest.raises(TypeError, match=r"pass an array of one image in a list"):
        model.encode_image(np.asarray(picture))
    for encode in (model.encode_text, model.tokenize):
        one = encode("a dog")
        assert one.shape[0] == 1 and one.ndim == 2
        np.testing.assert_array_equal(one, encode(["a dog"]))
        for no_text in (b"a dog", paths[0]):
            with pytest.raises(TypeError, match="pass a text or a list of texts"):
                encode(no_text)


def test_what_is_no_image_is_an_error(model, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    with pytest.raises(OSError):
        model.encode_image([tmp_path / "torn.png"])
    with pytest.raises(FileNotFoundError):
        model.encode_image([tmp_path / "absent.png"])
    with pytest.raises(ValueError, match="float64"):
        model.encode_image([np.zeros((4, 4, 3))])


def test_averaged_parameters_are_served(trained, model, paths):
    fields, _ = restore_fields(trained, ("params", "ema"))
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
    ({"model.image.merging.rat": 0.9}, "did you mean 'model.image.merging.rate'"),
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
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "largest rate" in lines[0] and "of another model" in lines[1]


def test_results_are_named_by_what_changed():
    trained = schema.default()
    requested = schema.from_json(schema.to_json(trained))
    requested.evaluation.batch_size, requested.batch_size, requested.data.workers = 3, 4, 5
    assert changes(trained, requested) == [] and results_name([]) == "results.json"
    for key, value in (
        ("model.image.merging.rate", 0.5),
        ("data.train", "jsonl:a/b.jsonl"),
        ("perspectives.spatial_global.weight", 0.0),
    ):
        other = schema.from_json(schema.to_json(trained))
        schema.set_key(other, key, value)
        assert changes(trained, other) == [f"{key}={value}"]
    names = [results_name([f"data.train=jsonl:a/b{end}c.jsonl"]) for end in " _"]
    assert len(set(names)) == 2  # what is written by other characters has a digest
    for name in names:
        assert re.fullmatch(r"results,data\.train=jsonl_a_b_c\.jsonl,[0-9a-f]{8}\.json", name)
    long = [results_name(["data.validation=jsonl:" + "d/" * 300 + end]) for end in "ab"]
    assert len(set(long)) == 2 and all(len(name.encode()) < 200 for name in long)
    assert re.fullmatch(r"results,[\w.,=+-]+\.json", long[0])


def test_bytes_in_memory(model, paths, embeddings):
    out = io.BytesIO()
    Image.open(paths[4]).save(out, "BMP")
    np.testing.assert_array_equal(
        model.encode_image([out.getvalue()])[0], model.encode_image([paths[4]])[0]
    )


def network_of(config) -> two_tower.TwoTower:
    tokenizer = load_tokenizer("clip_8k")
    return building.build(
        config, vocab_size=tokenizer.vocab_size, start_id=tokenizer.sot, end_id=tokenizer.eot
    )


def untrained(**changes) -> inference.Model:
    """The model of the default config made tiny, at its start."""
    config = schema.default()
    config.update_from_flattened_dict(
        {
            "model.embed_dim": 16,
            "model.image.image_size": 16,
            "model.image.patch_size": 4,
            "model.image.width": 16,
            "model.image.depth": 2,
            "model.image.heads": 2,
            "model.text.context_length": 8,
            "model.text.width": 16,
            "model.text.depth": 1,
            "model.text.heads": 2,
            "evaluation.batch_size": 4,
        }
        | changes
    )
    tokenizer, network = load_tokenizer("clip_8k"), network_of(config)
    variables = jax.jit(lambda: building.initialise(network, config, jax.random.key(0)))()
    return inference.Model(config, variables, tokenizer, Preprocessing.of(config))


KINDS = {
    "vit": {},
    "resnet": {
        "model.image.architecture": "resnet",
        "model.image.depth": 18,
        "model.image.width": 4,
        "model.image.stem": "small",
    },
    "critic": {"model.critic": "concat", "perspectives.spatial_global.loss": "jsd"},
}


@pytest.fixture(scope="module")
def kinds():
    with pytest.MonkeyPatch.context() as patch:
        # One block a stage: a ResNet-18 takes three times as long to compile.
        patch.setattr(resnet, "_STAGES", {18: (1, 1, 1, 1)})
        yield {kind: untrained(**changes) for kind, changes in KINDS.items()}


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_features_lie_before_the_projection(kinds, kind, pixels):
    model = kinds[kind]
    features = model.image_features(pixels)
    width = 32 if kind == "resnet" else 16
    assert features.shape == (5, width) and features.dtype == np.float32
    assert np.abs(np.linalg.norm(features, axis=1) - 1).max() > 0.1
    assert model.image_features(pixels[:0]).shape == (0, width)
    assert_close(model.image_features(pixels[4:]), features[4:])


@pytest.mark.parametrize("kind", KINDS)
def test_saliency_is_a_map_of_image_and_text(kinds, kind, pixels):
    model, side = kinds[kind], 2 if kind == "resnet" else 4
    texts = ["a dog", "a cat", "two", "a dog", "a much longer text"]
    maps = model.saliency(pixels, texts)
    assert maps.shape == (5, side, side) and maps.dtype == np.float32
    assert maps.min() == 0 < maps.max()
    other = model.saliency(pixels, texts[::-1])
    assert np.abs(other - maps).max() > 1e-3 * maps.max()
    np.testing.assert_allclose(other[2], maps[2], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(model.saliency(pixels[3:4], texts[3:4]), maps[3:4], atol=1e-6)
    assert model.saliency(pixels[:0], []).shape == (0, side, side)
    with pytest.raises(ValueError, match="5 images and 1 texts are no pairs"):
        model.saliency(pixels, ["a dog"])
    np.testing.assert_array_equal(
        model.saliency(pixels[:1], "a dog"), model.saliency(pixels[:1], ["a dog"])
    )


def head_gradient(model, view, tokens, text):
    """d cosine / d tokens for an embedding that projects their mean."""
    kernel = model._variables["params"][f"image_heads_{view}"]["projection"]["kernel"]

    def cosine(tokens):
        embedding = tokens.mean(0) @ kernel
        return embedding @ text / jax.numpy.linalg.norm(embedding)

    return jax.jit(jax.grad(cosine))(tokens)


def views_of(model, pixels):
    network = network_of(model.config)
    inspect = jax.jit(
        lambda images: network.apply(model._variables, images, method="inspect_images")
    )
    return inspect(model.preprocess.normalize(pixels))


def test_saliency_of_a_resnet_is_grad_cam_on_its_last_grid(kinds, pixels):
    model, texts = kinds["resnet"], [f"text {index}" for index in range(5)]
    maps = model.saliency(pixels, texts)
    tokens = views_of(model, pixels).spatial_tokens
    for row, text in enumerate(model.encode_text(texts)):
        weights = head_gradient(model, "spatial_global", tokens[row], text).mean(0)
        expected = np.maximum(tokens[row] @ weights, 0).reshape(2, 2)
        np.testing.assert_allclose(maps[row], expected, atol=1e-6)


def test_saliency_of_the_frequency_view_is_grad_cam_on_its_tokens(pixels):
    model = untrained(
        **{
            "model.image.frequency.depth": 1,
            "perspectives.spatial_global.weight": 0.0,
            "perspectives.frequency_global.weight": 1.0,
        }
    )
    maps = model.saliency(pixels, ["a dog"] * 5)
    (text,) = model.encode_text(["a dog"])
    tokens = views_of(model, pixels).frequency_tokens
    for row in range(5):
        weights = head_gradient(model, "frequency_global", tokens[row], text).mean(0)
        expected = np.maximum(tokens[row] @ weights, 0).reshape(4, 4)
        np.testing.assert_allclose(maps[row], expected, atol=1e-6)


def test_patches_have_the_value_of_the_token_that_enters_the_last_block(pixels):
    guided = {
        "model.image.depth": 3,
        "model.image.frequency.depth": 1,
        "model.image.merging.rate": 0.5,
        "perspectives.frequency_global.weight": 1.0,
    }
    plain, mixed = (untrained(**guided, **{"evaluation.frequency_mix": mix}) for mix in (0.0, 1.0))
    maps, both = (model.saliency(pixels, ["a dog"] * 5).reshape(5, 16) for model in (plain, mixed))
    sources = np.argmax(views_of(plain, pixels).last_source, axis=1)
    for values, source in zip(maps, sources, strict=True):
        assert 1 < len(np.unique(values)) <= len(np.unique(source)) == 12
        for token in np.unique(source):
            assert len(np.unique(values[source == token])) == 1
    # The frequency view, where the score has it, tells patches of one token apart.
    assert any(
        len(np.unique(values[source == token])) > 1
        for values, source in zip(both, sources, strict=True)
        for token in np.unique(source)
    )


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="first")(x)
        return jax.numpy.square(nn.Dense(2, name="second")(x).sum(1))


def test_grad_cam_weighs_activations_by_mean_gradients():
    x = jax.random.normal(jax.random.key(0), (4, 5, 6))
    module = Layers()
    variables = module.init(jax.random.key(1), x)
    assert list(variables) == ["params"]
    weights = jax.numpy.array([1.0, -2.0])
    paths = {("first",): lambda tokens: tokens, ("second",): lambda tokens: tokens[:, 1:]}
    maps = grad_cam(lambda: module.apply(variables, x) @ weights, paths)
    first, second = (variables["params"][name]["kernel"] for name in ("first", "second"))
    activations = x @ first
    outputs = activations @ second
    gradients = 2 * outputs.sum(1) * weights  # the same for every token
    np.testing.assert_allclose(
        maps["first",], np.einsum("btc,bc->bt", activations, gradients @ second.T), rtol=1e-4
    )
    np.testing.assert_allclose(
        maps["second",], np.einsum("btc,bc->bt", outputs[:, 1:], gradients), rtol=1e-4
    )
