"""The schema: what it refuses, and that it survives being written down."""

import math

import pytest

from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.validation import validate


@pytest.fixture
def config():
    return schema.default()


def test_the_default_is_valid(config):
    validate(config)


MISTAKES = [
    ("batch_size", 1, r"at least 2 \(a contrastive loss compares pairs\)"),
    ("samples", 10, "less than one batch"),
    ("log_every", 0, "config.log_every=0 must be at least 1"),
    ("optimizer.warmup_samples", -2, "must be at least -1"),
    ("optimizer.name", "adam", "did you mean 'adamw'"),
    ("data.caption.first", 1.5, r"config.data.caption.first=1.5 must be in \[0, 1\]"),
    ("compute_dtype", "bfloat", "did you mean 'bfloat16'"),
    ("model.text.pooling", "las", "did you mean 'last'"),
    ("model.image.heads", 7, "not a multiple of heads=7"),
    ("model.image.image_size", 7, "smaller than patch_size=8"),
    ("model.image.frequency.depth", 6, "the Spatial Stage needs at least one"),
    ("perspectives.spatial_global.loss", "sigmod", "did you mean 'sigmoid'"),
    ("perspectives.spatial_global.weight", 0.0, "nothing to train on"),
    ("perspectives.frequency_global.weight", 1.0, "needs a Frequency Stage"),
    ("perspectives.spatial_tokens.weight", -1.0, "must be at least 0"),
    ("perspectives.spatial_tokens.odds", -1.0, "must be at least 0"),
    ("optimizer.learning_rate", 0.0, "config.optimizer.learning_rate=0.0 must be above 0"),
    ("optimizer.learning_rate", math.nan, "config.optimizer.learning_rate=nan must be"),
    ("optimizer.ema", 1.5, r"must be in \[0, 1\)"),
    ("model.image.image_size", 0, "must be from 1 to 8,192"),
    ("model.text.context_length", 2, "a text has a start, a word and an end"),
    ("data.augment.crop", (0.9, 0.1), "the smaller first"),
    ("data.workers", -2, "must be from -1 to 1,024"),
    ("data.workers", 100_000, "must be from -1 to 1,024"),
    ("data.window", -2, "must be from -1 to 100,000"),
    ("perspectives.spatial_global.init_bias", math.nan, "init_bias=nan must be finite"),
    ("perspectives.spatial_global.init_scale", math.inf, "init_scale=inf must be finite"),
    ("optimizer.weight_decay", math.inf, "weight_decay=inf must be finite"),
    ("optimizer.rates.image", math.inf, "rates.image=inf must be finite"),
    ("optimizer.learning_rate", 1e300, "must be finite, and at most 3.4e"),
    ("evaluation.frequency_mix", math.inf, "frequency_mix=inf must be finite"),
    ("data.augment.crop", (math.nan, 1.0), "must be finite"),
    ("data.augment.crop", ("a", "b"), "expected a value of type tuple of float"),
    ("evaluation.probe.shots", (1, 2.5), "expected a value of type tuple of int"),
    ("evaluation.probe.shots", (), "must be numbers of images a class"),
    ("evaluation.retrieval", ("validation", ""), "has an empty element"),
    ("name", "", "config.name='' must be a name that a folder can have"),
    ("name", "a/../b", "must be a name that a folder can have"),
    ("name", "x" * 300, "must be a name that a folder can have"),
    ("name", "a\0b", "a character that no path can have"),
    ("data.train", "jsonl:\ud800", "a character that no path can have"),
    ("seed", 99999999999999999999, "config.seed has a value of more than 9,223,372"),
    ("seed", -1, "config.seed=-1 must be at least 0"),
    ("batch_size", True, "config.batch_size=True: expected a value of type int"),
    ("batch_size", 2**40, "config.batch_size has a value of more than 2,147,483,647"),
    ("model.image.mlp_ratio", 0.0001, "mlp_ratio=0.0001 leaves nothing of the width 192"),
    ("model.text.mlp_ratio", 1e9, "must be above 0 and at most 1,000"),
    ("model.image.depth", 1_000_000, "must be from 1 to 1,000"),
    ("model.image.image_size", 10_000_000, "must be from 1 to 8,192"),
    ("model.image.merging.rate", math.nan, "must be finite"),
]


@pytest.mark.parametrize(("key", "value", "message"), MISTAKES)
def test_a_mistake_is_named(config, key, value, message):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        validate(config)


def test_null_is_no_value(config):
    with pytest.raises(UserError, match="config.model.image.width=None: leave it out"):
        schema.set_key(config, "model.image.width", None)
    with pytest.raises(TypeError, match="model.image.width must not be null"):
        schema.from_json('{"model": {"image": {"width": null}}}')


def test_the_largest_seed_is_one(config):
    config.seed = 2**63 - 1
    validate(config)


def test_a_name_may_be_of_a_folder_in_a_folder(config):
    config.name = "clip/B 32"
    validate(config)


def test_frequency_guidance_needs_a_frequency_stage(config):
    config.model.image.merging.rate = 0.5
    with pytest.raises(UserError, match="needs a Frequency Stage"):
        validate(config)


def test_jsd_shifts_stay_within_the_batch(config):
    config.perspectives.spatial_global.loss = "jsd"
    config.perspectives.spatial_global.shifts = config.batch_size
    with pytest.raises(UserError, match="shifts=256 must be from 1 to 255"):
        validate(config)


@pytest.mark.parametrize(("key", "value"), [("odds", 2.0), ("learn_bias", True)])
def test_what_weighs_few_negatives_is_not_for_losses_over_all_pairs(config, key, value):
    config.perspectives.spatial_global[key] = value
    with pytest.raises(UserError, match=f"{key}={value} is of losses that score few pairs"):
        validate(config)
    config.perspectives.spatial_global.loss = "jsd"
    validate(config)


def test_json_keeps_every_value_and_type(config):
    again = schema.from_json(schema.to_json(config))
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.data.augment.crop, tuple)


def test_json_of_an_older_version_takes_defaults():
    assert schema.from_json('{"seed": 4}').batch_size == schema.default().batch_size


def test_json_with_an_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match="data.trian; did you mean 'train'"):
        schema.from_json('{"data": {"trian": "x"}}')


def test_a_key_of_another_name_is_found(config):
    with pytest.raises(UserError, match="key lr; did you mean 'optimizer.learning_rate'"):
        schema.set_key(config, "lr", 1e-3)
    with pytest.raises(
        UserError, match="key optimizer.weigth_decay; did you mean 'optimizer.weight_decay'"
    ):
        schema.set_key(config, "optimizer.weigth_decay", 1)


def test_differences_leave_out_what_may_change_at_a_resume(config):
    other = schema.from_json(schema.to_json(config))
    other.log_every = 1
    other.mesh.fsdp = 2
    other.checkpoint.keep_last = 5
    assert schema.differences(config, other) == []
    other.optimizer.learning_rate = 0.5
    assert schema.differences(config, other) == ["optimizer.learning_rate: 0.001 -> 0.5"]


def test_arguments_of_a_config_file():
    assert schema.arguments("size=B/16", size="S/16", data="emoji") == {
        "size": "B/16",
        "data": "emoji",
    }
    assert schema.arguments(None, size="S/16") == {"size": "S/16"}
    with pytest.raises(UserError, match="did you mean 'size'"):
        schema.arguments("siz=B/16", size="S/16")
