"""Models out: what is written is read again, or run, and gives the same embeddings."""

import copy
import importlib.util
import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_foreign import (
    DATA,
    hugging_face_folder,
    open_clip_folder,
    reference,
    small_encoder,
    unit,
    write_preprocessor,
)

import mlip_jax
from mlip_jax import main as door
from mlip_jax.cli.command_line import parse
from mlip_jax.core import schema
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.validation import validate
from mlip_jax.data.images.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.export import hugging_face, open_clip, own, programs
from mlip_jax.inference import Model
from mlip_jax.interop import pretrained
from mlip_jax.models import building
from mlip_jax.training.optimizer import make
from mlip_jax.training.state import initial_state

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 40, 52, 3), np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A whole folder of Hugging Face's: preprocessing and tokenizer too."""
    folder = hugging_face_folder(tmp_path_factory.mktemp("hf") / "clip")
    write_preprocessor(folder, image_std=list(CLIP_STD), size=32)
    small_encoder().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "</s>"}))
    return folder


def run(*arguments):
    return door.main(["mlip", *map(str, arguments)])


def exported(source, out, form, *more):
    assert run("export", f"--workdir={source}", f"--out={out}", f"--format={form}", *more) == 0
    return mlip_jax.load(out)


def assert_same(one, other, atol=1e-5):
    texts = ["a b", "w3", "b w200 a"]
    np.testing.assert_allclose(one.encode_image(IMAGES), other.encode_image(IMAGES), atol=atol)
    np.testing.assert_allclose(one.encode_text(texts), other.encode_text(texts), atol=atol)
    assert one.logit_scale == pytest.approx(other.logit_scale)


@pytest.mark.parametrize("form", ["mlip", "hf_clip"])
def test_a_round_trip_changes_nothing(clip, tmp_path, form):
    before = mlip_jax.load(clip)
    after = exported(clip, tmp_path / form, form)
    assert_same(before, after, atol=1e-6)
    assert after.preprocess == before.preprocess
    np.testing.assert_array_equal(after.tokenize(["a b"]), before.tokenize(["a b"]))
    card = (tmp_path / form / "README.md").read_text()
    for words in ("## Data", "## Results", "## Licence and attributions", "## Config", "another"):
        assert words in card


def test_open_clip_from_hugging_face_and_back(clip, tmp_path, capsys):
    before = mlip_jax.load(clip)
    between = exported(clip, tmp_path / "open_clip", "open_clip")
    assert "one pixel beside" in capsys.readouterr().out
    config = json.loads((tmp_path / "open_clip/open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["pool_type"] == "argmax"
    assert config["model_cfg"]["vision_cfg"]["head_width"] == 16
    pixels = np.stack([before.preprocess(image) for image in IMAGES])
    np.testing.assert_allclose(
        between.encode_image_pixels(pixels), before.encode_image_pixels(pixels), atol=1e-6
    )
    back = exported(tmp_path / "open_clip", tmp_path / "back", "hf_clip")
    np.testing.assert_allclose(
        back.encode_image_pixels(pixels), before.encode_image_pixels(pixels), atol=1e-6
    )
    np.testing.assert_allclose(back.encode_text(["a"]), before.encode_text(["a"]), atol=1e-6)
    theirs = load_file(DATA / "hf_clip_tiny.safetensors")
    ours = load_file(tmp_path / "back/model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }


def test_what_a_folder_lacks_stays_lacking(tmp_path, capsys):
    source = hugging_face_folder(tmp_path / "bare")
    expected = reference("hf_clip")
    for form in ("mlip", "hf_clip", "open_clip"):
        model = exported(source, tmp_path / form, form)
        texts = model.encode_token_ids(expected["token_ids"])
        np.testing.assert_allclose(texts, unit(expected["text_features"]), atol=2e-6)
        with pytest.raises(UserError, match="tokenizer"):
            model.encode_text(["a"])
    assert "note:" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"has no preprocessor_config\.json"):
        mlip_jax.load(tmp_path / "mlip").encode_image(IMAGES)


def own_model(**changes):
    """A CLIP of this package's, as it is before training."""
    config = schema.default()
    sizes = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2}
    for key, value in sizes.items():
        config.model.image[key] = value
    config.model.update({"embed_dim": 16})
    config.model.text.update({"context_length": 8, "width": 16, "depth": 1, "heads": 2})
    config.model.text.tokenizer = "clip_8k"
    for key, value in changes.items():
        schema.set_key(config, key.replace("__", "."), value)
    text = config.model.text
    tokenizer = load_tokenizer(text.tokenizer, cleaning=text.cleaning)
    network = building.build(
        config, vocab_size=tokenizer.vocab_size, start_id=tokenizer.sot, end_id=tokenizer.eot
    )
    variables = building.initialise(network, config, jax.random.key(0))
    rng = np.random.default_rng(0)
    patch = variables["params"]["image_encoder"]["patch_embedding"]
    if "patch" in patch:
        patch["patch"]["bias"] = rng.normal(size=16).astype(np.float32)
    return Model(config, variables, tokenizer, Preprocessing.of(config))


def by_own_folder(model, path):
    path.mkdir()
    own.write(path, model)
    return path


@pytest.mark.parametrize("pre_norm, form", [(False, "open_clip"), (True, "hf_clip")])
def test_a_clip_trained_here_goes_out(tmp_path, pre_norm, form, capsys):
    model = own_model(model__image__pre_norm=pre_norm, model__text__norm_epsilon=1e-4)
    source = by_own_folder(model, tmp_path / "own")
    after = exported(source, tmp_path / form, form)
    assert "lays such images on white" in capsys.readouterr().out
    texts = ["a photo of a cat", "it's 2 dogs!"]
    np.testing.assert_allclose(after.encode_text(texts), model.encode_text(texts), atol=1e-5)
    pixels = np.stack([model.preprocess(image) for image in IMAGES])
    np.testing.assert_allclose(
        after.encode_image_pixels(pixels), model.encode_image_pixels(pixels), atol=1e-5
    )


ODD = ("it\u2019s \ufb01ne", "\uff26\uff35\uff2c\uff2c", "caf\u00c3\u00a9", "x <end_of_text> y")


@pytest.mark.parametrize(
    "cleaning, form, said, unsaid",
    [
        ("none", "open_clip", ["mends texts by ftfy", "<|startoftext|> and <|endoftext|>"], []),
        ("ftfy_whitespace", "open_clip", ["<|startoftext|> and <|endoftext|>"], ["ftfy"]),
        ("none", "hf_clip", ["HTML escapes", "letter by letter", "<|endoftext|>"], ["ftfy"]),
        ("ftfy_lower", "hf_clip", ["HTML escapes", "are not mended by ftfy there"], []),
    ],
)
def test_what_texts_lose_is_said_at_export_and_at_load(
    tmp_path, capsys, cleaning, form, said, unsaid
):
    model = own_model(model__image__pre_norm=True, model__text__cleaning=cleaning)
    after = exported(by_own_folder(model, tmp_path / "own"), tmp_path / form, form)
    printed = capsys.readouterr().out
    card = (tmp_path / form / "README.md").read_text()
    assert f"cleaning {cleaning!r}" in card
    for text in (printed, card, " ".join(after.about["lost"])):
        assert all(part in text for part in said), text
    assert not any(part in " ".join(after.about["lost"]) for part in unsaid)
    odd = model.encode_text(ODD[:3])
    differs = np.abs(after.encode_text(ODD[:3]) - odd).max(axis=1) > 1e-3
    assert differs.all() == ((form == "open_clip") != (cleaning != "none"))
    assert "lost" not in exported(tmp_path / "own", tmp_path / "mlip", "mlip").about


def test_cleanings_of_clips_own_tokenizer_go_out_to_open_clip(tmp_path):
    for cleaning, clean in (
        ("none", None),
        ("ftfy_whitespace", None),
        ("ftfy_lower", None),
        ("canonicalize", "canonicalize"),
        ("ftfy_canonicalize", "canonicalize"),
    ):
        model = own_model(model__text__tokenizer="clip", model__text__cleaning=cleaning)
        folder = tmp_path / cleaning
        after = exported(by_own_folder(model, tmp_path / f"own_{cleaning}"), folder, "open_clip")
        text_cfg = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"][
            "text_cfg"
        ]
        assert text_cfg.get("tokenizer_kwargs") == ({"clean": clean} if clean else None)
        theirs = "ftfy_canonicalize" if clean else "ftfy_whitespace"
        assert after.tokenizer.cleaning == after.config.model.text.cleaning == theirs
        if cleaning.startswith("ftfy_"):
            np.testing.assert_allclose(
                after.encode_text(ODD[:3]), model.encode_text(ODD[:3]), atol=1e-6
            )
        # As open_clip has it, the text ends there.
        ids = after.tokenize([ODD[3]])[0]
        assert (ids == after.tokenizer.eot).sum() == (1 if clean else 2)
        assert (model.tokenize([ODD[3]])[0] == model.tokenizer.eot).sum() == 1
        again = exported(folder, tmp_path / f"again_{cleaning}", "mlip")
        np.testing.assert_array_equal(again.tokenize(ODD), after.tokenize(ODD))


@pytest.mark.parametrize(
    "changes, form, reason",
    [
        ({}, "hf_clip", "its ViT has no norm before the blocks.*pre_norm=True"),
        ({"model__image__stem": "conv"}, "open_clip", "its stem is 'conv'"),
        ({"model__text__pooling": "mean"}, "open_clip", "its texts are pooled by 'mean'"),
        ({"model__text__causal": False}, "open_clip", "but not their padding"),
        (
            {"model__image__frequency__depth": 1, "model__image__merging__rate": 0.3},
            "open_clip",
            "Frequency Stage of 1 blocks; it merges tokens.*stablehlo and onnx take any",
        ),
        ({"model__head": "projection_block"}, "hf_clip", "projections are 'projection_block'"),
        (
            {"model__image__activation": "quick_gelu"},
            "open_clip",
            "one of its towers has quick_gelu",
        ),
        (
            {
                "perspectives__spatial_global__loss": "sigmoid",
                "perspectives__spatial_global__init_bias": -10.0,
            },
            "hf_clip",
            "its logits have a bias",
        ),
    ],
)
def test_what_has_no_place_is_refused_with_the_reason(tmp_path, changes, form, reason, capsys):
    source = by_own_folder(own_model(**changes), tmp_path / "own")
    out = tmp_path / "out"
    assert run("export", f"--workdir={source}", f"--out={out}", f"--format={form}") == 2
    error = capsys.readouterr().err
    assert re.search(reason, error), error
    assert os.listdir(tmp_path) == ["own"]


def test_a_run_is_exported_with_its_card(trained, tmp_path):
    before = mlip_jax.load(trained)
    after = exported(trained, tmp_path / "out", "mlip")
    np.testing.assert_array_equal(after.encode_image(IMAGES), before.encode_image(IMAGES))
    np.testing.assert_array_equal(
        after.encode_text(["picture 1"]), before.encode_text(["picture 1"])
    )
    assert after.step == before.step
    card = (tmp_path / "out/README.md").read_text()
    assert "training set: `jsonl:" in card and "Frequency Stage: 1 blocks" in card
    assert "R@1" in card and f"checkpoint: step {before.step}" in card
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1
    # Exporting an exported model loses neither its figures nor whom to thank.
    about = exported(tmp_path / "out", tmp_path / "twice", "mlip").about
    assert about == before.about
    assert "R@1" in (tmp_path / "twice/README.md").read_text()
    # With other settings, where they move no parameter.
    plain = exported(trained, tmp_path / "plain", "mlip", "--config.model.image.merging.rate=0.0")
    assert plain.config.model.image.merging.rate == 0
    # An exported model is evaluated like any other.
    assert run("evaluate", f"--workdir={tmp_path / 'out'}") == 0
    assert (tmp_path / "out/results.json").is_file()


def test_no_folder_is_written_over_or_half_written(clip, tmp_path, capsys, monkeypatch):
    (tmp_path / "there").mkdir()
    assert run("export", f"--workdir={clip}", f"--out={tmp_path / 'there'}") == 2
    assert "exists already" in capsys.readouterr().err
    assert run("export", f"--workdir={clip}") == 2
    assert "add --out=DIR" in capsys.readouterr().err
    assert run("export", f"--workdir={clip}", f"--out={tmp_path / 'x'}", "--format=onyx") == 2
    assert "did you mean 'onnx'" in capsys.readouterr().err
    monkeypatch.setattr("mlip_jax.export.card.write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("export", f"--workdir={clip}", f"--out={tmp_path / 'x'}")
    assert os.listdir(tmp_path) == ["there"]
    assert run("train", f"--workdir={clip}", "--format=mlip", "--config=x.py") == 2
    assert "--format goes with the subcommand export" in capsys.readouterr().err
    assert run("report", f"--workdir={clip}") == 2
    assert "holds a model alone; evaluate, export, search take that" in capsys.readouterr().err


def test_an_exported_folder_that_is_damaged_is_told(clip, tmp_path):
    out = tmp_path / "out"
    exported(clip, out, "mlip")
    config = json.loads((out / "mlip_config.json").read_text())

    def refused(values, message):
        (out / "mlip_config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=message):
            mlip_jax.load(out)

    refused(config | {"format": 2}, "format 2 is not known here")
    refused({"format": 1}, "damaged: KeyError")
    refused(config | {"config": {"no_such": 1}}, "unknown config key")

    def changed(section, **values):
        inner = copy.deepcopy(config["config"])
        inner["model"][section] |= values
        return config | {"config": inner}

    for values in ({"width": 0}, {"width": -1}, {"heads": 7}, {"depth": 0}, {"depth": 1_000_000}):
        refused(changed("image", **values), "config.model.image.")
    refused(changed("image", width=None), "must not be null")
    refused(changed("image", depth=999), "it has .* tensors, and this config's model has")
    refused(changed("text", width=0), "config.model.text.width=0 must be from 1")
    for values, message in (
        ({"interpolation": "x"}, "interpolation 'x' is none of nearest"),
        ({"short_side": 10_000_000}, "short_side 10000000 is not from 0 to 8,192"),
        ({"image_size": -1}, "image_size -1 is no whole number"),
        ({"std": [0.0, 1.0, 1.0]}, "std .* is none of three channels"),
        ({"mean": [float("nan")] * 3}, "mean .* is none of three channels"),
        ({"mean": [10**400, 0, 0]}, "mean .* is none of three channels"),
        ({"crop": 5}, "crop 5 is none of round, floor"),
    ):
        prepared = config["preprocessing"] | values
        refused(config | {"preprocessing": prepared}, message)
    refused(config | {"step": "x"}, "damaged: step or about")
    (out / "mlip_config.json").write_text(json.dumps(config))
    (out / "mlip_tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"mlip_tokenizer\.json: damaged"):
        mlip_jax.load(out)


def test_weights_that_are_no_weights_are_told(clip, tmp_path):
    out = tmp_path / "out"
    exported(clip, out, "mlip")
    file = out / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    broken = np.array(tensors[name])
    broken.flat[-1] = np.nan
    infinite = np.array(tensors[name])
    infinite.flat[0] = -np.inf
    for changes, message in (
        ({name: broken}, f"tensor {name} holds NaN or infinity"),
        ({name: infinite}, f"tensor {name} holds NaN or infinity"),
        ({"params": broken}, "holds no params"),
        ({"other/x": broken}, "holds 'other', which is no part of a model"),
    ):
        save_file(tensors | changes, file)
        with pytest.raises(UserError, match=message):
            mlip_jax.load(out)


def test_token_ids_that_have_no_row_are_told(clip):
    model = mlip_jax.load(clip)
    rows = model.tokenizer.vocab_size
    context = model.config.model.text.context_length
    whole = np.zeros((1, context), np.int64)
    assert np.isfinite(model.encode_token_ids(whole)).all()
    for token in (rows, 4_000_000_000, -1):
        ids = whole.copy()
        ids[0, 0] = token
        with pytest.raises(UserError, match=r"token id"):
            model.encode_token_ids(ids)
        with pytest.raises(UserError, match=r"token id"):
            model.encode_token_ids(ids.tolist())
    with pytest.raises(UserError, match="token ids are whole numbers"):
        model.encode_token_ids(whole + 0.5)


def test_stablehlo_runs_without_the_package(clip, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("export", f"--workdir={clip}", f"--out={out}", "--format=stablehlo") == 0
    assert "equal to the model within" in capsys.readouterr().out
    signature = json.loads((out / "signature.json").read_text())
    assert signature["programs"]["encode_image"]["input"] == ["batch", 32, 32, 3]
    model = mlip_jax.load(clip)
    program = jax_export.deserialize(bytearray((out / "encode_image.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    pixels = np.stack([model.preprocess(image) for image in IMAGES])
    np.testing.assert_allclose(program.call(pixels), model.encode_image(IMAGES), atol=1e-5)
    program = jax_export.deserialize(bytearray((out / "encode_text.stablehlo").read_bytes()))
    ids = model.tokenize(["a", "b"])
    np.testing.assert_allclose(program.call(ids), model.encode_token_ids(ids), atol=1e-5)


def test_a_program_that_errs_is_not_kept(clip):
    model = mlip_jax.load(clip)
    with pytest.raises(RunError, match="differ by"):
        programs.check(model, "encode_image", lambda rows: np.zeros((len(rows), 20), np.float32))

    def one_wrong(rows):
        embeddings = np.array(model.programs()["encode_image"].function(rows))
        embeddings[:1] += 0.01 * (len(embeddings) > 1)
        return embeddings

    with pytest.raises(RunError, match="differ by 1.0e-02"):
        programs.check(model, "encode_image", one_wrong)
    merging = mlip_jax.load(clip, overrides={"model.image.merging.rate": 0.25})
    model = merging
    assert programs.check(merging, "encode_image", one_wrong)[1:] == (16, 1)
    with pytest.raises(RunError, match=r"gives \(1, 3\) in place of"):
        programs.check(model, "encode_image", lambda rows: np.zeros((1, 3), np.float32))


def test_onnx_says_what_to_install(clip, tmp_path, capsys):
    if importlib.util.find_spec("jax2onnx") and importlib.util.find_spec("onnxruntime"):
        pytest.skip("it is installed")
    out = tmp_path / "out"
    assert run("export", f"--workdir={clip}", f"--out={out}", "--format=onnx") == 2
    assert "pip install 'mlip_jax[onnx]'" in capsys.readouterr().err
    assert not out.exists()


def test_onnx_runs_in_onnxruntime(clip, tmp_path, capsys):
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    assert run("export", f"--workdir={clip}", f"--out={out}", "--format=onnx") == 0
    session = onnxruntime.InferenceSession(str(out / "encode_image.onnx"))
    model = mlip_jax.load(clip)
    pixels = np.stack([model.preprocess(image) for image in IMAGES])
    (embeddings,) = session.run(None, {session.get_inputs()[0].name: pixels})
    np.testing.assert_allclose(embeddings, model.encode_image(IMAGES), atol=1e-5)


def test_foreign_folders_are_evaluated_and_merged(clip, pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(clip))
    command = ["evaluate", f"--workdir={clip}", f"--config.data.validation=jsonl:{pairs}"]
    assert run(*command, "--suite=retrieval") == 0
    assert "retrieval" in capsys.readouterr().out
    monkeypatch.setattr("mlip_jax.evaluations.merging_rates._SECONDS", 0.0)
    assert run(*command, "--suite=retrieval", "--rates=0.25,0.5") == 0
    out = capsys.readouterr().out
    assert "x1.00" in out and "Images/s" in out
    rows = json.loads(Path("runs/foreign/clip/merging.json").read_text())
    assert [row["tokens"] for row in rows] == [16, 12, 8]
    assert rows[0]["flops"] > rows[2]["flops"]
    assert all("retrieval/pairs/text_to_image_recall@1" in row["results"] for row in rows)
    assert sorted(os.listdir(clip)) == before
    for rates, message in (("0.99", "expected shares in [0, 0.95]"), ("0.95", "cannot be reached")):
        assert run(*command, f"--rates={rates}") == 2
        assert message in capsys.readouterr().err


def test_training_starts_from_a_folder(clip, pairs, tmp_path, capsys):
    config = Path(__file__).parents[1] / "configs/mlip.py"
    arguments = [
        f"--config={config}:pretrained={clip},data=jsonl:{pairs}",
        f"--workdir={tmp_path / 'run'}",
        "--config.batch_size=8",
        "--config.samples=16",
        "--config.data.workers=0",
        "--config.model.image.image_size=40",
        "--config.evaluation.every_samples=0",
        "--config.mesh.data=1",
    ]
    run_config = parse(arguments).config
    image = run_config.model.image
    assert (image.width, image.depth, image.frequency.depth) == (48, 4, 1)
    assert image.pre_norm and image.merging.proportional_attention
    assert run_config.optimizer.learning_rate == pytest.approx(3e-4)
    assert (
        run_config.optimizer.max_scale == 100 and run_config.perspectives.spatial_tokens.weight == 1
    )
    tokenizer = load_tokenizer(run_config.model.text.tokenizer, vocab_size=300)
    network = building.build(
        run_config, vocab_size=tokenizer.vocab_size, start_id=tokenizer.sot, end_id=tokenizer.eot
    )
    shapes = jax.eval_shape(lambda: building.initialise(network, run_config, jax.random.key(0)))
    variables = pretrained.read(run_config, shapes)
    assert variables["params"]["image_encoder"]["position"].shape == (5, 5, 48)
    lines = pretrained.summary(run_config, variables, shapes)
    assert "starts from" in lines[0] and "image_encoder/frequency_0" in lines[1]
    # Its Frequency Stage changes nothing yet: without merging it is the model it starts from.
    run_config.model.image.merging.rate = 0.0
    state = jax.jit(
        lambda variables: initial_state(network, make(run_config), run_config, variables)
    )(variables)
    run_config.evaluation.frequency_mix = 0.0
    prepared = Preprocessing(40, CLIP_MEAN, CLIP_STD, "drop_first", "bilinear", crop="floor")
    begun = Model(run_config, {"params": state.params}, tokenizer, prepared)
    assert_same(begun, mlip_jax.load(clip, image_size=40, tokenizer=tokenizer))
    run_config.model.image.heads = 6
    with pytest.raises(UserError, match=r"heads=6, but the model in .* has 3: set it so"):
        pretrained.read(run_config, shapes)


def test_a_model_that_cannot_be_trained_on_is_refused(clip, tmp_path, monkeypatch):
    # Other libraries have imported it by now where it is installed.
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    other = shutil.copytree(clip, tmp_path / "other")
    write_preprocessor(other)
    with pytest.raises(UserError, match="is none of clip, imagenet, siglip"):
        pretrained.adopt(schema.default(), str(other))
    config = schema.default()
    config.model.pretrained = config.model.text.pretrained = "bert"
    config.model.text.architecture = "bert"
    with pytest.raises(UserError, match=r"model\.text\.pretrained both say"):
        validate(config)
    bare = open_clip_folder(tmp_path / "bare")
    pretrained.adopt(schema.default(), str(bare))
    assert sys.modules.get("torch") is None


def test_the_size_for_other_libraries_exports_to_them(tmp_path):
    config = mlip_jax.config("clip:size=clip_hf,data=jsonl:x")
    tokenizer = load_tokenizer(config.model.text.tokenizer)
    network = building.build_for(config, tokenizer)
    variables = jax.jit(lambda: building.initialise(network, config, jax.random.key(0)))()
    model = Model(config, variables, tokenizer, Preprocessing.of(config))
    one, texts = Image.fromarray(IMAGES[0][:, :40]), ["a red car", "a dog runs on grass"]
    for form, write in (("hf_clip", hugging_face.write), ("open_clip", open_clip.write)):
        folder = tmp_path / form
        folder.mkdir()
        write(folder, model)
        again = mlip_jax.load(folder)
        np.testing.assert_allclose(again.encode_text(texts), model.encode_text(texts), atol=1e-5)
        np.testing.assert_allclose(again.encode_image([one]), model.encode_image([one]), atol=1e-4)
    assert model.encode_text("a red car").shape == (1, 192)
    np.testing.assert_array_equal(model.encode_text("a red car"), model.encode_text(["a red car"]))
    np.testing.assert_array_equal(model.tokenize("a red car"), model.tokenize(["a red car"]))
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert repr(model) == (
        "<Model clip: vit of 6 layers, 192 wide, 64 pixels; clip of 4 layers, 192 wide; "
        f"{count:,} parameters; no step; perspectives spatial_global>"
    )
    model.step = 1250
    assert "; step 1,250; " in repr(model)
