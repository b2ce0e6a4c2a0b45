"""Frozen image encoders: of timm's layout, of models of this package (LiT)."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mlip_jax
from mlip_jax import config as named
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.validation import validate
from mlip_jax.interop import pretrained
from mlip_jax.models import building

DATA = Path(__file__).parent / "data"


@pytest.fixture
def timm(tmp_path):
    """timm's ViT with layer scales, 16 wide, and what timm 1.0 computes with it."""
    folder = tmp_path / "timm"
    folder.mkdir()
    shutil.copy(DATA / "timm_tiny.safetensors", folder / "model.safetensors")
    shutil.copy(DATA / "timm_tiny_config.json", folder / "config.json")
    return folder


def clip_on(folder, **changes):
    config = named(f"clip:image={folder},data=jsonl:x")
    config.model.text.update(width=16, heads=2)
    config.update_from_flattened_dict(changes)
    validate(config)
    return config


def read(config):
    network = building.build(config, vocab_size=64, start_id=62, end_id=63, training=False)
    wanted = jax.eval_shape(lambda: building.initialise(network, config, jax.random.key(0)))
    return network, wanted, pretrained.read(config, wanted)


def change_tensors(folder, **changes):
    tensors = load_file(folder / "model.safetensors") | changes
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        folder / "model.safetensors",
    )


def test_timms_vit_is_computed_as_timm_does(timm):
    config = clip_on(timm)
    image = config.model.image
    assert (image.image_size, image.patch_size, image.width, image.heads) == (16, 4, 16, 2)
    assert (image.depth, image.normalization, config.optimizer.rates.image) == (2, "imagenet", 0)
    network, wanted, variables = read(config)
    reference = np.load(DATA / "timm_tiny_io.npz")
    params = building.initialise(network, config, jax.random.key(0))["params"]
    views = network.apply(
        {"params": params | jax.tree.map(jnp.asarray, variables["params"])},
        jnp.asarray(reference["images"]),
        method=lambda model, images: model.image_encoder(images, True),
    )
    np.testing.assert_allclose(views.spatial_global, reference["features"][:, 0], atol=2e-6)
    np.testing.assert_allclose(views.spatial_tokens, reference["features"][:, 1:], atol=2e-6)
    (line, new) = pretrained.summary(config, variables, wanted)
    assert line.startswith(f"starts from {timm}: ") and "image_heads" in new


def test_positions_are_fitted_to_another_image_size(timm):
    _, _, variables = read(clip_on(timm, **{"model.image.image_size": 24}))
    assert variables["params"]["image_encoder"]["position"].shape == (6, 6, 16)


def test_a_run_of_this_package_lends_its_encoder(trained, tmp_path):
    config = clip_on(trained)
    kept = mlip_jax.load(trained)
    assert config.model.image.frequency.depth == 1
    _, _, variables = read(config)
    encoder = variables["params"]["image_encoder"]
    jax.tree.map(np.testing.assert_array_equal, encoder, kept._variables["params"]["image_encoder"])
    assert set(variables["params"]) == {"image_encoder"}


def test_a_run_learns_on_a_frozen_encoder(timm, tiny, tmp_path, capsys):
    config = schema.from_json(tiny.with_suffix(".json").read_text())
    config.model.image.merging.rate = 0.0
    for view in ("frequency_tokens",):
        config.perspectives[view].weight = 0.0
    pretrained.adopt_image(config, str(timm))
    config.samples = 2 * config.batch_size
    config.evaluation.every_samples = 0
    mlip_jax.train(config, tmp_path / "run")
    assert f"starts from {timm}" in capsys.readouterr().err
    model = mlip_jax.load(tmp_path / "run")
    _, _, variables = read(config)
    encoder = variables["params"]["image_encoder"]
    jax.tree.map(
        np.testing.assert_array_equal, encoder, model._variables["params"]["image_encoder"]
    )


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"reg_token": np.zeros((1, 4, 16), np.float32)}, "has register tokens"),
        ({"fc_norm.weight": np.zeros(16, np.float32)}, "a mean over the tokens"),
        ({"cls_token": None}, "is no ViT with a class token in timm's layout"),
        ({"pos_embed": np.zeros((1, 16, 16), np.float32)}, "15 patches, which fill no square"),
        ({"blocks.1.attn.qkv.bias": None}, "blocks.1.attn.qkv.bias"),
        ({"blocks.1.attn.proj.bias": None}, "blocks.1.attn.proj.bias"),
        ({"norm.weight": np.full(16, np.nan, np.float32)}, "norm_spatial/scale holds NaN"),
        ({"surplus": np.zeros(2, np.float32)}, "surplus"),
    ],
)
def test_what_is_no_such_encoder(timm, tensors, words):
    change_tensors(timm, **tensors)
    with pytest.raises(UserError, match=words):
        read(clip_on(timm))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_args": {"num_heads": "two"}}, "num_heads is 'two'"),
        ({"model_args": [2]}, "model_args"),
        ({"pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}, "is none of clip, imagenet"),
        ({"pretrained_cfg": 5}, "pretrained_cfg is 5"),
        ({"architecture": ["x"]}, None),
    ],
)
def test_what_its_config_cannot_say(timm, values, words):
    file = timm / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    if words is None:
        read(clip_on(timm))
        return
    with pytest.raises(UserError, match=words):
        clip_on(timm)


def test_it_is_no_model_of_images_and_texts(timm):
    with pytest.raises(UserError, match="an image encoder of timm's alone: a run can start from"):
        mlip_jax.load(timm)
    with pytest.raises(UserError, match=r"has 2 and 0: set depth and frequency.depth so"):
        read(clip_on(timm, **{"model.image.depth": 3}))
    with pytest.raises(UserError, match=r"config.model.image.heads=4, but .* has 2: set it so"):
        read(clip_on(timm, **{"model.image.heads": 4}))


def test_lit_on_coco_is_big_visions(timm, tmp_path):
    run = "baselines:run=coco_lit_vit_b16"
    config = named(f"{run},image={timm}")
    validate(config)
    optimizer, text = config.optimizer, config.model.text
    assert config.samples == 5000 * config.batch_size == 5000 * 4096
    assert optimizer.learning_rate * optimizer.weight_decay == pytest.approx(0.01)
    assert optimizer.warmup_samples == 150 * 4096 and optimizer.clip_norm == 1
    assert optimizer.rates.image == 0 and optimizer.rates.text == 1
    assert (config.model.image.width, text.width, config.model.embed_dim) == (16, 768, 768)
    assert (text.architecture, text.pooling, text.context_length) == ("bert", "first", 16)
    assert config.perspectives.spatial_global.init_scale == 10
    bert = tmp_path / "bert"
    bert.mkdir()
    shutil.copy(DATA / "bert_tiny_config.json", bert / "config.json")
    shutil.copy(DATA / "bert_tiny.safetensors", bert / "model.safetensors")
    (bert / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat"]))
    adopted = named(f"{run},image={timm},text={bert}")
    validate(adopted)
    assert adopted.model.text.pretrained == str(bert) and adopted.model.text.width < 768
    assert adopted.model.text.pooling == "first" and adopted.optimizer.rates.text == 1
    for arguments in (run, f"baselines:image={timm}"):
        with pytest.raises(UserError, match="coco_lit_vit_b16 needs image=FOLDER"):
            named(arguments)
    with pytest.raises(UserError, match="text=FOLDER goes with run=coco_lit_vit_b16 alone"):
        named(f"baselines:text={bert}")
