"""Encoders that a config takes from files of other programs, as a run starts from them."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mlip_jax import config as named
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.validation import validate
from mlip_jax.interop import pretrained
from mlip_jax.models import building
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training.state import initial_state

DATA = Path(__file__).parent / "data"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{index}" for index in range(56))]


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face BERT folder: two layers, 32 wide, 60 words."""
    path = tmp_path / "bert"
    path.mkdir()
    shutil.copy(DATA / "bert_tiny.safetensors", path / "model.safetensors")
    shutil.copy(DATA / "bert_tiny_config.json", path / "config.json")
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return path


def config_with(folder, **changes):
    config = schema.default()
    image = config.model.image
    image.image_size, image.patch_size, image.width, image.depth, image.heads = 8, 4, 8, 1, 2
    pretrained.adopt_bert(config, str(folder))
    config.update_from_flattened_dict(changes)
    validate(config)
    return config


def build(config):
    return building.build(config, vocab_size=len(WORDS), start_id=2, end_id=3)


def shapes(config, network=None):
    network = network or build(config)
    return jax.eval_shape(lambda: building.initialise(network, config, jax.random.key(0)))


def test_a_folder_gives_sizes_vocabulary_and_weights(folder):
    config = config_with(folder, **{"optimizer.rates.text": 0.0})
    text = config.model.text
    assert (text.width, text.depth, text.heads, text.context_length) == (32, 2, 4, 24)
    assert config.model.embed_dim == 256
    assert text.tokenizer == f"wordpiece:{folder}"
    network, optimizer = build(config), optimizers.make(config)
    variables = pretrained.read(config, shapes(config))
    state = jax.jit(lambda variables: initial_state(network, optimizer, config, variables))(
        variables
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(state.params["text_encoder"]),
        variables["params"]["text_encoder"],
    )
    # The image encoder is what it is without.
    fresh = jax.jit(lambda: initial_state(network, optimizer, config))()
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(state.params["image_encoder"]),
        jax.device_get(fresh.params["image_encoder"]),
    )


@pytest.mark.parametrize("name", ["mlip", "clip", "siglip", "filip"])
def test_a_text_tower_is_a_named_choice(folder, name):
    config = named(f"{name}:text={folder}")
    validate(config)
    text = config.model.text
    assert (text.architecture, text.pretrained, text.pooling) == ("bert", str(folder), "mean_all")
    assert config.optimizer.rates.text == 0.0
    config.model.pretrained = "elsewhere"
    with pytest.raises(UserError, match="both say what the run starts from"):
        validate(config)


@pytest.mark.parametrize("name", ["mlip", "clip", "siglip"])
def test_the_sizes_for_photographs_embed_captions_once(folder, name):
    config = named(f"{name}:size=tiny_64,data=jsonl:pairs.jsonl,text={folder}")
    validate(config)
    assert config.model.text.embedded == "once"
    assert config.perspectives.spatial_tokens.weight == 0
    assert named(f"{name}:text={folder}").model.text.embedded == "each_step"


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ({"mean_tokens": True, "cls_token": False}, "mean_all"),
        ({"mean_tokens": False, "cls_token": True}, "first"),
        ({"mean_tokens": True, "max_tokens": True}, None),
        ({"mean_tokens": False}, None),
    ],
)
def test_sentence_transformers_say_how_a_text_is_pooled(folder, modes, expected):
    (folder / "1_Pooling").mkdir()
    values = {f"pooling_mode_{key}": value for key, value in modes.items()}
    (folder / "1_Pooling/config.json").write_text(json.dumps({"dimension": 32, **values}))
    if expected:
        assert named(f"clip_lite:text={folder}").model.text.pooling == expected
        return
    with pytest.raises(UserError, match="1_Pooling.*only .* is supported"):
        named(f"clip_lite:text={folder}")


def test_a_resnet_brings_its_statistics():
    config = schema.default()
    config.update_from_flattened_dict(
        {
            "model.image.architecture": "resnet",
            "model.image.pretrained": str(DATA / "resnet18_tiny.safetensors"),
            "model.image.stem": "imagenet",
            "model.image.depth": 18,
            "model.image.width": 3,
            "model.image.image_size": 32,
            "model.text.context_length": 8,
        }
    )
    variables = pretrained.read(config, shapes(config))
    stats = variables["batch_stats"]["image_encoder"]["stem_norm"]
    assert np.abs(stats["mean"]).max() > 0 and variables["params"].keys() == {"image_encoder"}
    config.model.image.width = 4
    with pytest.raises(UserError, match=r"tensor bn1.bias has shape \(3,\).*wants \(4,\)"):
        pretrained.read(config, shapes(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # No tensor's shape tells the number of heads.
        ({"model.text.heads": 8}, "heads=8, but the model in .* has 4: set it so"),
        ({"model.text.activation": "quick_gelu"}, "activation=quick_gelu, but .* has gelu"),
        ({"model.text.width": 16}, "width=16, but the model in .* has 32"),
        ({"model.text.context_length": 30}, "position_embeddings.*context_length to 24 or less"),
    ],
)
def test_another_encoder_than_the_folders_is_refused(folder, changes, message):
    config = config_with(folder, **changes)
    with pytest.raises(UserError, match=message):
        pretrained.read(config, shapes(config))


def test_another_vocabulary_is_refused_with_both_shapes(folder):
    config = config_with(folder)
    network = building.build(config, vocab_size=61, start_id=2, end_id=3)
    message = re.escape("word_embeddings.weight has shape (60, 32), the configured model wants (61")
    with pytest.raises(UserError, match=message):
        pretrained.read(config, shapes(config, network))


def test_nothing_is_read_where_nothing_is_named():
    config = schema.default()
    assert pretrained.read(config, shapes(config)) == {}
    config.model.text.pretrained = "somewhere"
    with pytest.raises(UserError, match="pretrained is for .*architecture='bert'"):
        validate(config)


def run_folder(tmp_path, **changes):
    """A workdir as far as a config that starts from it looks."""
    config = named("mlip")
    config.update_from_flattened_dict(changes)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(schema.to_json(config))
    return tmp_path / "run"


OWN = {
    "perspectives.spatial_tokens.weight": 0.0,
    "perspectives.frequency_tokens.weight": 0.1,
    "perspectives.spatial_global.init_scale": 5.0,
    "perspectives.spatial_global.warmup_samples": 9,
    "optimizer.max_scale": 12.0,
    "model.image.merging.rate": 0.5,
}


def test_a_run_of_the_same_config_keeps_what_it_was_trained_for(tmp_path):
    folder = run_folder(tmp_path, **OWN)
    config = named(f"mlip:pretrained={folder},data=jsonl:x")
    kept = schema.flatten(config.to_dict())
    wanted = OWN | {
        "perspectives.spatial_global.warmup_samples": 0,
        "model.image.merging.proportional_attention": False,
        "evaluation.frequency_mix": 1.0,
        "model.image.frequency.depth": 1,
        "model.image.depth": 3,
    }
    assert {key: kept[key] for key in wanted} == wanted
    config = named(f"mlip:pretrained={folder},data=jsonl:x,objective=sigmoid")
    assert config.perspectives.spatial_global.loss == "sigmoid"
    assert config.perspectives.spatial_tokens.weight == 0


def test_a_run_of_another_config_brings_its_model_alone(tmp_path):
    config = named(f"clip:pretrained={run_folder(tmp_path, **OWN)},data=jsonl:x")
    used = [view for view, each in config.perspectives.items() if each.weight]
    assert used == ["spatial_global"] and config.perspectives.spatial_global.init_scale > 14
    assert config.optimizer.max_scale == 12


def test_the_summary_counts_what_was_taken():
    config = named("mlip")
    config.model.pretrained = "somewhere"
    network = building.build(config, vocab_size=60, start_id=2, end_id=3)
    wanted = shapes(config, network)
    whole = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), wanted)
    count = len(jax.tree.leaves(wanted))
    lines = pretrained.summary(config, whole, wanted)
    assert lines == [
        f"starts from somewhere: {count} of {count} tensors, 100.0 % of the parameters"
    ]
    down = whole["params"]["image_encoder"]["frequency_0"]["mlp"]["down"]
    for name in down:
        down[name] = np.zeros_like(down[name])  # as `read` fills them in
    lines = pretrained.summary(config, whole, wanted)
    assert lines[0].startswith(f"starts from somewhere: {count - 2} of {count} tensors")
    assert lines[1] == "  new: image_encoder/frequency_0"
