"""Models in folders of open_clip and Hugging Face, against what those libraries compute.

tests/data/open_clip_tiny, hf_clip_tiny and siglip_tiny have random weights: of open_clip's CLIP, of
transformers 5.23's CLIPModel and of 5.24's SiglipModel; inputs and features are by those libraries.
"""

import json
import pickle
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as Encoder
from tokenizers import models, pre_tokenizers, processors

import mlip_jax
from mlip_jax.core.errors import UserError
from mlip_jax.data.images.preprocessing import CLIP_MEAN, Preprocessing
from mlip_jax.data.text.tokenizer import (
    OWN_FILE,
    Affixes,
    Tokenizer,
    folder_tokenizer,
    load_tokenizer,
)
from mlip_jax.interop import clip_layouts, layouts, open_clip, positions

DATA = Path(__file__).parent / "data"
ENDS = {"clip": 299, "siglip": 1}


def open_clip_folder(path, *, name="open_clip_model.safetensors", **changes):
    path.mkdir()
    shutil.copy(DATA / "open_clip_tiny.safetensors", path / name)
    config = json.loads((DATA / "open_clip_tiny_config.json").read_text())
    for key, value in changes.items():
        section, _, last = key.rpartition("__")
        node = (
            config["model_cfg"][section] if section and section in config["model_cfg"] else config
        )
        node = config.setdefault(section, {}) if section == "preprocess_cfg" else node
        node = config["model_cfg"] if not section else node
        node[last] = value
    (path / "open_clip_config.json").write_text(json.dumps(config))
    return path


def hugging_face_folder(path, kind="hf_clip", **changes):
    path.mkdir()
    shutil.copy(DATA / f"{kind}_tiny.safetensors", path / "model.safetensors")
    config = json.loads((DATA / f"{kind}_tiny_config.json").read_text())
    for key, value in changes.items():
        section, _, last = key.rpartition("__")
        (config[section] if section else config)[last] = value
    (path / "config.json").write_text(json.dumps(config))
    return path


def reference(kind):
    return dict(np.load(DATA / f"{kind}_tiny_io.npz"))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def pixels(kind):
    return reference(kind)["images_nchw"].transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("foreign")
    return {
        "open_clip": open_clip_folder(root / "open_clip"),
        "hf_clip": hugging_face_folder(root / "hf_clip"),
        "siglip": hugging_face_folder(root / "siglip", "siglip"),
    }


@pytest.fixture(scope="module")
def models_by_kind(folders):
    return {kind: mlip_jax.load(folder) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", ["open_clip", "hf_clip", "siglip"])
def test_features_are_those_of_the_other_library(models_by_kind, kind):
    model, expected = models_by_kind[kind], reference(kind)
    images = model.encode_image_array(pixels(kind))
    texts = model.encode_token_ids(expected["token_ids"])
    np.testing.assert_allclose(images, unit(expected["image_features"]), atol=2e-6)
    np.testing.assert_allclose(texts, unit(expected["text_features"]), atol=2e-6)
    if "logits_per_image" in expected:
        logits = model.logit_scale * images @ texts.T + model.logit_bias
        np.testing.assert_allclose(logits, expected["logits_per_image"], atol=2e-5)
    else:
        assert model.logit_scale == pytest.approx(float(expected["logit_scale"]))


def test_open_clips_siglip_is_timms(folders, tmp_path, monkeypatch, models_by_kind):
    # timm knows SigLIP's in the sizes of its papers alone: here one of them is tiny.
    monkeypatch.setitem(open_clip._TIMM_SIZES, "base", (32, 2, 4, 40))
    monkeypatch.setattr(open_clip, "_TIMM_TANH", re.compile(".*"))
    layout = clip_layouts.open_clip(
        text_prefix="text.", siglip=True, text_bias=True, image_bias=True
    )
    params = models_by_kind["siglip"]._variables["params"]
    folder = tmp_path / "timm"
    folder.mkdir()
    written = layouts.write(layout, params)
    assert written["visual.trunk.attn_pool.latent"].shape == (1, 1, 32)
    assert written["visual.trunk.pos_embed"].shape == (1, 4, 32)
    assert written["visual.trunk.patch_embed.proj.weight"].shape == (32, 3, 8, 8)
    save_file(written, folder / "open_clip_model.safetensors")
    model = {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 16,
            "timm_model_name": "vit_base_patch8_siglip_224",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 10,
            "vocab_size": 60,
            "hf_tokenizer_name": "timm/some",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 32,
            "heads": 2,
            "layers": 2,
            "mlp_ratio": 1.5,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"},
        },
    }
    prepared = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "size": 16}
    config = {"model_cfg": model, "preprocess_cfg": prepared}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    loaded, expected = mlip_jax.load(folder), reference("siglip")
    np.testing.assert_allclose(
        loaded.encode_image_array(pixels("siglip")), unit(expected["image_features"]), atol=2e-6
    )
    np.testing.assert_allclose(
        loaded.encode_token_ids(expected["token_ids"]), unit(expected["text_features"]), atol=2e-6
    )
    assert loaded.preprocess == Preprocessing(16, (0.5,) * 3, (0.5,) * 3, resize="squash")


@pytest.mark.parametrize(
    "layout",
    [
        clip_layouts.open_clip(text_prefix="", siglip=False, text_bias=False, image_bias=False),
        clip_layouts.hugging_face_clip(),
        clip_layouts.hugging_face_siglip(),
    ],
    ids=["open_clip", "hf_clip", "siglip"],
)
def test_what_is_read_is_written(models_by_kind, layout):
    kind = {"open_clip": "open_clip", "Hugging Face's CLIPModel": "hf_clip"}
    kind = kind.get(layout.name, "siglip")
    written = layouts.write(layout, models_by_kind[kind]._variables["params"])
    theirs = load_file(DATA / f"{kind}_tiny.safetensors")
    # A class token and its position are one parameter here.
    merged = [name for name in theirs if "position" in name and "text" not in name]
    merged += [name for name in theirs if "class_embedding" in name]
    assert written.keys() == theirs.keys()
    for name in theirs.keys() - set(merged if kind != "siglip" else []):
        expected = theirs[name].reshape(written[name].shape)
        np.testing.assert_array_equal(written[name], expected, err_msg=name)


def test_everything_is_read_from_the_config(tmp_path):
    prepared = {
        "mean": [0.1, 0.2, 0.3],
        "std": [1, 1, 1],
        "interpolation": "bilinear",
        "resize_mode": "longest",
    }
    folder = open_clip_folder(
        tmp_path / "quick",
        quick_gelu=True,
        **{f"preprocess_cfg__{key}": value for key, value in prepared.items()},
    )
    model = mlip_jax.load(folder)
    assert model.config.model.image.activation == "quick_gelu"
    assert model.config.model.text.activation == "quick_gelu"
    assert model.config.model.text.context_length == 16
    assert model.preprocess.mean == (0.1, 0.2, 0.3)
    assert (model.preprocess.interpolation, model.preprocess.resize) == ("bilinear", "longest")
    expected = reference("open_clip")["image_features"]
    assert not np.allclose(model.encode_image_array(pixels("open_clip")), expected, atol=1e-4)
    # What is left out is open_clip's default.
    plain = mlip_jax.load(open_clip_folder(tmp_path / "plain", name="model.safetensors"))
    assert plain.preprocess == Preprocessing(32)
    assert plain.encode_image([np.zeros((40, 50, 3), np.uint8)]).shape == (1, 32)


def write_preprocessor(folder, **changes):
    values = {
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": [0.3, 0.3, 0.3],
        "resample": 2,
        "size": {"shortest_edge": 36},
    }
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(values | changes))


def test_hugging_faces_preprocessing(tmp_path):
    folder = hugging_face_folder(tmp_path / "hf")
    write_preprocessor(folder)
    model = mlip_jax.load(folder)
    expected = Preprocessing(
        32, CLIP_MEAN, (0.3, 0.3, 0.3), "drop_first", "bilinear", "shortest", 36, "floor"
    )
    assert model.preprocess == expected
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    resized = image.resize((54, 36), Image.Resampling.BILINEAR).crop((11, 2, 43, 34))
    np.testing.assert_array_equal(model.preprocess(image), np.asarray(resized))
    write_preprocessor(folder, size={"height": 32, "width": 32}, do_center_crop=False)
    assert mlip_jax.load(folder).preprocess.resize == "squash"
    write_preprocessor(folder, size={"shortest_edge": 16})
    with pytest.raises(UserError, match="the model takes squares of 32"):
        mlip_jax.load(folder)
    write_preprocessor(folder, size={"shortest_edge": 10_000_000})
    with pytest.raises(UserError, match="short_side 10000000 is not from 0 to 8,192"):
        mlip_jax.load(folder)
    write_preprocessor(folder, do_rescale=False)
    with pytest.raises(UserError, match=r"preprocessor\.do_rescale is False"):
        mlip_jax.load(folder)


def test_the_ways_to_bring_an_image_to_size():
    image = Image.fromarray(np.full((20, 60, 3), 200, np.uint8))
    squash = Preprocessing(12, resize="squash")(image)
    assert squash.shape == (12, 12, 3) and (squash == 200).all()
    longest = Preprocessing(12, resize="longest")(image)
    assert (longest[4:8] == 200).all() and not longest[:4].any() and not longest[8:].any()
    # The colours of what is transparent mix with the others, or do not.
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0], rgba[1] = (255, 0, 0, 255), (0, 255, 0, 0)
    first = Preprocessing(1, transparency="drop_first")(rgba)
    assert first[0, 0, 1] > 100 and Preprocessing(1)(rgba)[0, 0, 1] < 10


def test_nothing_is_guessed(models_by_kind):
    with pytest.raises(UserError, match=r"names no tokenizer.*49408 tokens, the model 512"):
        models_by_kind["open_clip"].encode_text(["a"])
    with pytest.raises(UserError, match=r"hf_clip has no tokenizer\.json"):
        models_by_kind["hf_clip"].encode_text(["a"])
    with pytest.raises(UserError, match=r"has no preprocessor_config\.json"):
        models_by_kind["hf_clip"].encode_image([np.zeros((40, 50, 3), np.uint8)])


def test_what_a_folder_lacks_can_be_given(folders):
    preprocessing = Preprocessing(32, transparency="white")
    tokenizer = small_tokenizer()
    model = mlip_jax.load(folders["hf_clip"], preprocessing=preprocessing, tokenizer=tokenizer)
    assert model.encode_image([np.zeros((40, 50, 3), np.uint8)]).shape == (1, 20)
    assert model.encode_text(["a b"]).shape == (1, 20)


def small_encoder(end=299):
    words = {f"w{index}": index for index in range(298)} | {"<s>": 298, "</s>": end}
    words["a"], words["b"] = words.pop("w7"), words.pop("w9")
    encoder = Encoder(models.WordLevel(words, unk_token="w0"))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 298), ("</s>", end)]
    )
    return encoder


def small_tokenizer():
    return Tokenizer(small_encoder(), "none", Affixes((298,), (299,), 5, 300))


def test_a_folders_tokenizer_is_hugging_faces(tmp_path):
    folder = hugging_face_folder(tmp_path / "hf")
    encoder = small_encoder()
    encoder.enable_padding(length=12)
    encoder.enable_truncation(3)
    encoder.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "</s>"}}))
    model = mlip_jax.load(folder)
    ids = model.tokenize(["a b", "a " * 30])
    assert ids.tolist() == [[298, 7, 9, *[299] * 9], [298, *[7] * 10, 299]]
    np.testing.assert_array_equal(model.encode_text(["a b"]), model.encode_token_ids(ids[:1]))
    copy = Tokenizer.from_json(model._tokenizer.to_json())
    np.testing.assert_array_equal(copy.encode(["b a"], 6), [[298, 9, 7, 299, 299, 299]])
    assert (copy.sot, copy.eot, copy.pad, copy.vocab_size) == (298, 299, 299, 300)
    # An id for the end that the model does not look for would give it nonsense.
    hugging = hugging_face_folder(tmp_path / "other", text_config__eos_token_id=290)
    shutil.copy(folder / "tokenizer.json", hugging)
    shutil.copy(folder / "tokenizer_config.json", hugging)
    with pytest.raises(UserError, match="ends texts with the id 299, its config.json says 290"):
        mlip_jax.load(hugging).encode_text(["a"])


def test_sides_and_lengths_that_a_model_does_not_compute_are_refused(tmp_path, folders):
    settings = {"pad_token": "</s>", "truncation_side": "left", "model_max_length": 5}
    clip = hugging_face_folder(tmp_path / "clip")
    small_encoder().save(str(clip / "tokenizer.json"))
    (clip / "tokenizer_config.json").write_text(json.dumps(settings))
    model = mlip_jax.load(clip)
    ids = model.tokenize(["a a a b b", "a"])[:, :6]
    assert ids.tolist() == [[298, 7, 9, 9, 299, 299], [298, 7, *[299] * 4]]
    (clip / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    with pytest.raises(UserError, match="padding_side 'left', and CLIPModel masks padding"):
        mlip_jax.load(clip).encode_text(["a"])
    # SigLIP has no mask, and looks at the last token.
    siglip = tmp_path / "siglip"
    shutil.copytree(folders["siglip"], siglip)
    words = {"a": 0, "b": 1, "</s>": 2}
    encoder = Encoder(models.WordLevel(words, unk_token="a"))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    encoder.save(str(siglip / "tokenizer.json"))
    settings = {"pad_token": "</s>", "padding_side": "left", "model_max_length": 10}
    (siglip / "tokenizer_config.json").write_text(json.dumps(settings))
    assert mlip_jax.load(siglip).tokenize(["b a"]).tolist() == [[*[2] * 7, 1, 0, 2]]
    (siglip / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 9}))
    with pytest.raises(UserError, match="model_max_length 9, but SigLIP takes texts of 10 tokens"):
        mlip_jax.load(siglip).encode_text(["a"])


def test_the_highest_id_ends_a_text_in_old_files(tmp_path):
    folder = hugging_face_folder(tmp_path / "old", text_config__eos_token_id=2)
    expected = reference("hf_clip")
    np.testing.assert_allclose(
        mlip_jax.load(folder).encode_token_ids(expected["token_ids"]),
        unit(expected["text_features"]),
        atol=2e-6,
    )


def test_clips_two_files_are_its_tokenizer(tmp_path):
    original = load_tokenizer("clip_8k")
    inner = json.loads(original.to_json())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(inner["vocab"]))
    pairs = [" ".join(pair) for pair in inner["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    loaded = folder_tokenizer(tmp_path)
    texts = ["A photo of  a cat's  paw, 2 of them!", "ÉCOLE", ""]
    ours, theirs = original.encode(texts, 20), loaded.encode(texts, 20)
    for one, other in zip(ours, theirs, strict=True):
        end = list(one).index(original.eot) + 1
        np.testing.assert_array_equal(one[:end], other[:end])
        assert set(other[end:]) <= {original.eot}  # Hugging Face pads CLIP's with the end


def test_siglips_texts_are_cleaned(tmp_path):
    encoder = small_encoder()
    encoder.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 299)]
    )
    encoder.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = folder_tokenizer(tmp_path)
    assert tokenizer.cleaning == "siglip" and tokenizer.sot == -1
    assert tokenizer.encode(["A,  B!"], 4).tolist() == [[7, 9, 299, 299]]
    canonical = folder_tokenizer(tmp_path, "canonicalize", 400)
    assert canonical.encode(["a_B &amp; "], 4).tolist() == [[7, 9, 299, 299]]
    assert canonical.vocab_size == 400
    with pytest.raises(UserError, match="has 300 tokens, its model only 250"):
        folder_tokenizer(tmp_path, None, 250)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"")
    message = r"no tokenizer\.json \(tokenizer\.model alone is not read\)"
    with pytest.raises(UserError, match=message):
        folder_tokenizer(tmp_path)


def test_positions_are_resampled_for_another_size(folders):
    model = mlip_jax.load(folders["open_clip"], image_size=48)
    assert model.preprocess.image_size == model.config.model.image.image_size == 48
    position = model._variables["params"]["image_encoder"]["position"]
    assert position.shape == (6, 6, 64)
    assert model.encode_image([np.zeros((60, 50, 3), np.uint8)]).shape == (1, 32)
    flat = positions.resampled(np.ones((4, 4, 2), np.float32), 7)
    np.testing.assert_allclose(flat, 1, rtol=1e-6)
    with pytest.raises(UserError, match="image_size=7 is smaller than patch_size=8"):
        mlip_jax.load(folders["open_clip"], image_size=7)


@pytest.mark.parametrize("kind", ["open_clip", "hf_clip", "siglip"])
def test_the_last_pixels_of_a_grid_that_does_not_divide_are_not_seen(
    tmp_path, folders, models_by_kind, kind
):
    # A convolution whose stride is its kernel, as in those libraries, does not reach them.
    size = models_by_kind[kind].config.model.image.image_size
    if kind == "open_clip":
        folder = open_clip_folder(tmp_path / kind, vision_cfg__image_size=size + 5)
    else:
        folder = hugging_face_folder(tmp_path / kind, kind, vision_config__image_size=size + 5)
    noise = np.random.default_rng(0).normal(size=(len(pixels(kind)), size + 5, size + 5, 3))
    noise[:, :size, :size] = pixels(kind)
    images, expected = noise.astype(np.float32), unit(reference(kind)["image_features"])
    for model in (mlip_jax.load(folder), mlip_jax.load(folders[kind], image_size=size + 5)):
        np.testing.assert_allclose(model.encode_image_array(images), expected, atol=2e-6)
        assert model.preprocess.image_size == size + 5 or kind != "open_clip"
        np.testing.assert_array_equal(
            model.encode_image_array(images),
            models_by_kind[kind].encode_image_array(images[:, :size, :size]),
        )
    # Another size may come in place of one that does not divide.
    smaller = mlip_jax.load(folder, image_size=size)
    np.testing.assert_allclose(smaller.encode_image_array(pixels(kind)), expected, atol=2e-6)


@pytest.mark.parametrize("kind", ["open_clip", "siglip"])
def test_tokens_are_merged_after_the_fact(folders, models_by_kind, kind):
    model = mlip_jax.load(folders[kind], overrides={"model.image.merging.rate": 0.5})
    settings = model.config.model.image.merging
    assert settings.proportional_attention and settings.guidance == "none"
    size = model.preprocess.image_size
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    if kind == "open_clip":
        inspected = model.inspect(images)
        np.testing.assert_array_equal(inspected["sizes"].sum(axis=1), [16, 16])
        assert inspected["sizes"].shape == (2, 8)
    merged = model.encode_image_array(pixels(kind))
    unmerged = models_by_kind[kind].encode_image_array(pixels(kind))
    cosines = np.sum(merged * unmerged, axis=1)
    assert (cosines < 0.999999).all() and (cosines > 0.3).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: hugging_face_folder(path, model_type="bert"), "model_type is 'bert'"),
        (lambda path: hugging_face_folder(path, vision_config__hidden_act="relu"), "hidden_act"),
        (
            lambda path: hugging_face_folder(path, text_config__hidden_size="32"),
            r"text_config\.hidden_size is '32'; expected a whole number",
        ),
        (
            lambda path: hugging_face_folder(path, text_config__hidden_size=64),
            "has shape .*the configured model wants",
        ),
        (lambda path: hugging_face_folder(path, text_config=7), "text_config is int"),
        (
            lambda path: open_clip_folder(path, vision_cfg__attentional_pool=True),
            r"vision_cfg\.attentional_pool is True; only False",
        ),
        (
            lambda path: open_clip_folder(path, vision_cfg__something_new=3),
            r"vision_cfg\.something_new is 3",
        ),
        (
            lambda path: open_clip_folder(path, vision_cfg__timm_model_name="resnet50"),
            "of timm's models only SigLIP's",
        ),
        (
            lambda path: open_clip_folder(path, vision_cfg__layers=[1, 2, 2, 1]),
            "CLIP's ResNets are not read",
        ),
        (
            lambda path: open_clip_folder(path, text_cfg__hf_model_name="bert-base"),
            r"text_cfg\.hf_model_name is 'bert-base'",
        ),
        (lambda path: open_clip_folder(path, text_cfg__layers=3), "lacks tensor"),
        (
            lambda path: open_clip_folder(path, preprocess_cfg__resize_mode="random"),
            "resize_mode 'random'",
        ),
    ],
)
def test_another_model_is_refused_by_name(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        mlip_jax.load(make(tmp_path / "folder"))


ODD = [
    ("config.json", {"model_type": ["clip"]}, r"model_type is \['clip'\]"),
    ("config.json", {"vision_config": {"hidden_act": ["gelu"]}}, "hidden_act is .* one of gelu"),
    ("config.json", {"vision_config": {"image_size": [[1], [2]]}}, "image_size is .* whole number"),
    ("config.json", {"vision_config": {"intermediate_size": 10**400}}, "expected a whole number"),
    ("config.json", {"text_config": {"layer_norm_eps": 10**400}}, "expected a number above 0"),
    ("preprocessor_config.json", {"resample": [3]}, r"resample is \[3\]; expected one of 0, 1"),
    ("preprocessor_config.json", {"size": 0.5}, "images become 0.5"),
    ("preprocessor_config.json", {"image_mean": 10**400}, "expected three numbers"),
    (
        "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "cls_token": None},
        "its tokenizer has no token None",
    ),
    ("tokenizer_config.json", {"bos_token": ["<s>"]}, "bos_token is .*; expected a text"),
    ("tokenizer_config.json", {"additional_special_tokens": [3]}, "a token that is none: 3 is no"),
    ("tokenizer_config.json", {"additional_special_tokens": [{"a": 1}]}, "that is none: 'content'"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "a token that is none: invalid"),
    ("open_clip_config.json", {"text_cfg": {"pool_type": ["mean"]}}, "pool_type is .* one of"),
    ("open_clip_config.json", {"text_cfg": {"tokenizer_kwargs": "x"}}, "tokenizer_kwargs is 'x'"),
    (
        "open_clip_config.json",
        {"text_cfg": {"pool_type": "eos", "eos_id": "x"}},
        "eos_id is 'x'; expected one of 512 ids",
    ),
    ("open_clip_config.json", {"init_logit_bias": ["x"]}, "init_logit_bias is .* a number"),
]


@pytest.mark.parametrize(("name", "changes", "message"), ODD, ids=range(len(ODD)))
def test_values_of_odd_kinds_are_named(tmp_path, name, changes, message):
    folder = tmp_path / "folder"
    if name.startswith("open_clip"):
        open_clip_folder(folder)
    else:
        hugging_face_folder(folder)
        write_preprocessor(folder, size=32)
        small_encoder().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "</s>"}))
    values = json.loads((folder / name).read_text())
    inner = values["model_cfg"] if name.startswith("open_clip") else values
    for key, value in changes.items():
        inner[key] = {**inner.get(key, {}), **value} if isinstance(value, dict) else value
    (folder / name).write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        mlip_jax.load(folder).tokenize(["a"])


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_pickles_are_never_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = hugging_face_folder(tmp_path / "hf")
    weights = folder / "model.safetensors"
    for data in (pickle.dumps(Trap()), pickle.dumps(Trap(), 2), b"PK\x03\x04" + bytes(40)):
        weights.write_bytes(data)
        with pytest.raises(UserError, match=r"model\.safetensors: is a pickle.*convert"):
            mlip_jax.load(folder)
    index = folder / "model.safetensors.index.json"
    weights.unlink()
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="'../secret.safetensors', which is no file of its folder"):
        mlip_jax.load(folder)
    index.unlink()
    weights.write_bytes(b"\x80" + bytes(30))
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        mlip_jax.load(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors; pickled"):
        mlip_jax.load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"only pytorch_model\.bin, a pickle.*save_file"):
        mlip_jax.load(folder)
    assert not Path("executed").exists()


def test_a_folder_is_told_from_the_others(tmp_path, folders):
    with pytest.raises(UserError, match="is not a folder"):
        mlip_jax.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        mlip_jax.load(tmp_path)
    with pytest.raises(UserError, match="is no workdir: it has one model, and no step 3"):
        mlip_jax.load(folders["hf_clip"], step=3)
    # Both libraries' files of one model, as their hub has them.
    both = open_clip_folder(tmp_path / "both")
    shutil.copy(DATA / "hf_clip_tiny_config.json", both / "config.json")
    assert mlip_jax.load(both).config.model.embed_dim == 32
    (both / "open_clip_model.safetensors").unlink()
    shutil.copy(DATA / "hf_clip_tiny.safetensors", both / "model.safetensors")
    assert mlip_jax.load(both).config.model.embed_dim == 20


def test_threads_load_and_embed_at_once(folders):
    expected = reference("open_clip")
    images = np.random.default_rng(0).integers(0, 256, (9, 40, 50, 3), np.uint8)
    alone = mlip_jax.load(folders["open_clip"]).encode_image(images)
    shared = mlip_jax.load(folders["open_clip"])
    results, errors = [], []

    def work(own_model):
        try:
            model = mlip_jax.load(folders["open_clip"]) if own_model else shared
            for _ in range(3):
                results.append(
                    (model.encode_image(images), model.encode_token_ids(expected["token_ids"]))
                )
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index % 2,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(results) == 18
    for rows, texts in results:
        np.testing.assert_array_equal(rows, alone)
        np.testing.assert_allclose(texts, unit(expected["text_features"]), atol=2e-6)


@pytest.mark.parametrize(
    "affixes",
    [
        [[298], [-1], 5, 300],
        [[298], [299], -1, 300],
        [[298], [299], 5, 299],
        [[298], [299], 5, "x"],
        [[298], [299], 5, 300, False, False, "x"],
        [[298], [299], 5, 300, False, False, 0],
    ],
    ids=range(6),
)
def test_ids_that_no_table_has_are_refused(tmp_path, affixes):
    values = {"cleaning": "none", "encoder": small_encoder().to_str(), "affixes": affixes}
    (tmp_path / OWN_FILE).write_text(json.dumps(values))
    with pytest.raises(UserError, match="damaged: .* (no number of tokens|with the id)"):
        folder_tokenizer(tmp_path)


def test_a_text_that_the_library_cannot_encode_is_one_line():
    encoder = small_encoder()
    encoder.model.unk_token = "none"
    with pytest.raises(UserError, match="cannot encode these texts: WordLevel error: Missing"):
        Tokenizer(encoder, "none", Affixes((298,), (299,), 5, 300)).encode(["x"], 8)


def test_more_tokens_around_a_text_than_it_may_have_are_named():
    tokenizer = Tokenizer(small_encoder(), "none", Affixes((298,) * 9, (299,), 5, 300))
    assert tokenizer.encode(["a"], 10).tolist() == [[*[298] * 9, 299]]
    with pytest.raises(UserError, match="puts 10 tokens around a text, which may have 8 in all"):
        tokenizer.encode(["a"], 8)
