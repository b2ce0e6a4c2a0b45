"""Lengths that follow from the size of the training set, and what a run says about its own."""

import io

import pytest
from rich.console import Console

from mlip_jax import config as named
from mlip_jax.cli import command_line
from mlip_jax.core import schema, stages
from mlip_jax.core.errors import UserError
from mlip_jax.core.validation import validate
from mlip_jax.recipes import lengths, sizes
from mlip_jax.recipes.recipes import clip_lite, recipe
from mlip_jax.training import pace, summary


class Pairs:
    name = "photos"

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


@pytest.mark.parametrize(
    ("pairs", "epochs"), [(1, 60), (10_000, 60), (100_000, 46), (1_000_000, 32), (10**9, 32)]
)
def test_smaller_sets_are_seen_more_often(pairs, epochs):
    assert lengths.suitable_epochs(pairs) == epochs


@pytest.mark.parametrize("size", sizes.SIZES)
def test_every_size_is_as_long_as_suits_the_set(size):
    config = recipe(size, "jsonl:pairs.jsonl")
    validate(config)
    resolved = lengths.resolve(config, 5_000)
    assert (resolved.samples, resolved.epochs, config.epochs) == (300_000, 0.0, -1.0)
    assert resolved.optimizer.warmup_samples == 15_000
    assert resolved.evaluation.every_samples == resolved.checkpoint.every_samples == 15_000
    validate(resolved)
    assert lengths.resolve(resolved, 7_000).to_dict() == resolved.to_dict()


def test_the_recipe_of_the_literature_is_as_it_was_on_as_many_pairs():
    resolved = lengths.resolve(recipe("B/16", "jsonl:pairs.jsonl"), 15_000_000)
    assert resolved.samples == 32 * 15_000_000
    assert resolved.optimizer.warmup_samples == 2500 * 4096
    assert resolved.evaluation.every_samples == 24_000_000
    assert resolved.checkpoint.every_samples == 1000 * 4096


def test_the_quick_size_stays_quick_on_a_large_set():
    assert lengths.resolve(recipe("quick", "coco"), 118_287).samples == 320_000
    assert lengths.resolve(recipe("quick", "emoji"), 1904).samples == 160_000


def test_clip_lite_keeps_its_own_length_on_coco():
    assert lengths.resolve(clip_lite("RN50", "coco:x"), 118_287).samples == 250_000 * 1024
    assert lengths.resolve(clip_lite("RN50", "jsonl:x"), 5_000).samples == 300_000


def test_a_length_in_passes():
    config = named("mlip", {"epochs": 2.5, "data.train": "jsonl:x"})
    assert lengths.resolve(config, 1000).samples == 2500
    assert lengths.resolve(named("mlip:data=jsonl:x", {"samples": 6400}), 5000).samples == 6400


def test_a_length_on_the_command_line_counts():
    for flag, samples in (("epochs=3", 15_000), ("samples=6400", 6_400), ("epochs=-1", 300_000)):
        config = command_line.parse(["--config=mlip:data=jsonl:x", f"--config.{flag}"]).config
        assert lengths.resolve(config, 5_000).samples == samples, flag


@pytest.mark.parametrize("epochs", [-0.5, -2.0, float("nan"), float("inf")])
def test_a_wrong_number_of_passes_is_named(epochs):
    config = schema.default()
    config.epochs = epochs
    with pytest.raises(UserError, match="config.epochs=.* must be (above 0|finite)"):
        validate(config)


def test_a_length_given_twice_is_refused():
    with pytest.raises(UserError, match=r"samples=9000 and config.epochs=2 both say how long"):
        named("mlip", {"epochs": 2.0, "samples": 9000})


def test_passes_that_make_no_batch_are_refused():
    with pytest.raises(UserError, match=r"epochs=0.1 of 300 pairs is less than one batch of 128"):
        lengths.resolve(named("mlip", {"epochs": 0.1}), 300)


def printed(pairs, **values):
    config = schema.default()
    for key, value in values.items():
        config[key] = value
    console = Console(file=io.StringIO(), width=200)
    summary.print_length(console, config, Pairs(pairs), stages.of(config))
    return console.file.getvalue()


def test_the_summary_says_how_long_the_run_is():
    text = printed(5_000, samples=300_000, batch_size=128)
    assert text == "length: 5,000 pairs, 60 passes, 300,000 samples in 2,343 steps of 128\n"


def test_a_set_that_is_seen_too_often_is_warned_of():
    text = printed(5_000, samples=480_000_000)
    assert "warning: the run sees the 5,000 pairs of photos 96,000 times each" in text
    assert "--config.epochs=60 suits" in text
    assert "warning" not in printed(5_000, samples=300 * 5_000)


def test_a_batch_larger_than_the_set_is_warned_of():
    assert "a batch of 256 holds each of the 255 pairs more than once" in printed(255, samples=512)
    assert "warning" not in printed(256, samples=512)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (29, "29 seconds"),
        (100, "2 minutes"),
        (3600, "1 hour"),
        (12_060, "3 hours 21 minutes"),
        (90_000, "1 day 1 hour"),
    ],
)
def test_a_time_in_words(seconds, words):
    assert pace.duration(seconds) == words
