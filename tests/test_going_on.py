"""Runs that are made longer, branched off, or gone on with by their folder alone."""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax import main as door
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.recipes import lengths
from mlip_jax.storage.saved import restore_fields, saved_steps
from mlip_jax.training.optimizer import last_step_before_cooldown, learning_rate

pytestmark = pytest.mark.usefixtures("small_runs")

STATE = ("step", "params", "optimizer", "ema")
WSD = ("--config.optimizer.schedule=wsd", "--config.optimizer.cooldown_samples=16")
FAST = (
    "--config.evaluation.every_samples=0",
    "--config.checkpoint.every_samples=0",
    "--config.checkpoint.keep_last=1",
    "--config.data.validation=",
    "--config.optimizer.name=adamw",
)


def run(*flags):
    return door.main(["mlip", "train", *map(str, flags)])


@pytest.fixture(scope="module")
def cooled(tiny, tmp_path_factory):
    """A finished run of 8 steps, the last two of which cool down. Copy it to change it."""
    folder = tmp_path_factory.mktemp("cooled") / "run"
    assert run(f"--config={tiny}", f"--workdir={folder}", *WSD, *FAST) == 0
    return folder


@pytest.fixture
def workdir(cooled, tmp_path):
    return shutil.copytree(cooled, tmp_path / "run")


def state(folder):
    return jax.tree.leaves([restore_fields(folder, [field])[0] for field in STATE])


def error(capfd, *flags):
    capfd.readouterr()
    assert run(*flags) == 2
    output = capfd.readouterr().err
    assert output.count("error:") == 1
    return output[output.index("error:") :]


def rates(config, steps):
    return np.asarray(learning_rate(config)(jnp.arange(steps, dtype=jnp.int32)))


def scheduled(**values):
    config = schema.default()
    config.batch_size, config.samples = 10, 1000
    config.optimizer.warmup_samples, config.optimizer.learning_rate = 100, 1.0
    for key, value in values.items():
        config.optimizer[key] = value
    return lengths.resolve(config, 100)


def test_wsd_is_constant_between_warm_up_and_cooldown():
    config = scheduled(schedule="wsd")
    assert config.optimizer.cooldown_samples == 200
    values = rates(config, 100)
    np.testing.assert_allclose(values[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert set(values[9:80].tolist()) == {1.0}
    np.testing.assert_allclose(values[80:], np.arange(19, -1, -1) / 20, atol=1e-6)
    last = last_step_before_cooldown(config)
    assert 70 < last < 80 and values[last] == 1.0


def test_rsqrt_falls_by_the_root_of_the_samples_then_cools_down():
    values = rates(scheduled(schedule="rsqrt", cooldown_samples=100), 100)
    seen = 10 * np.arange(10, 91)
    np.testing.assert_allclose(values[9:90], np.sqrt(100 / seen), rtol=1e-6)
    assert values[-1] == 0.0


def test_a_cooldown_goes_with_every_schedule_and_is_off_by_default():
    assert rates(scheduled(schedule="constant", cooldown_samples=100), 100)[-1] == 0.0
    assert rates(scheduled(schedule="constant"), 100)[-1] == 1.0
    assert last_step_before_cooldown(scheduled(schedule="cosine")) == 0


def test_a_cooldown_longer_than_what_is_left_is_refused():
    with pytest.raises(UserError, match="cooldown_samples=901 is longer than the 900 samples that"):
        scheduled(schedule="wsd", cooldown_samples=901)


def test_a_lengthened_run_equals_one_that_was_that_long(tiny, workdir, tmp_path, capfd):
    kept = saved_steps(workdir)
    assert kept == [8, 5]  # the last, and the last but one before the cooldown
    capfd.readouterr()
    assert run(f"--workdir={workdir}", "--config.samples=96") == 0
    output = capfd.readouterr().err
    assert f"{workdir} goes on from step 5 with samples: 64 -> 96; 1 later" in output
    assert (workdir / "checkpoints/replaced-8").is_dir() and saved_steps(workdir) == [12, 9]
    other = tmp_path / "other"
    long = (f"--config={tiny}", f"--workdir={other}", *WSD, *FAST, "--config.samples=96")
    assert run(*long) == 0
    for one, two in zip(state(workdir), state(other), strict=True):
        assert one.dtype == two.dtype and one.tobytes() == two.tobytes()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    capfd.readouterr()
    assert run(f"--workdir={workdir}") == 0  # alone, it goes on with what is there
    assert "it is finished" in capfd.readouterr().err


def test_a_length_that_changes_the_rates_of_the_past_is_refused(workdir, capfd):
    words = error(capfd, f"--workdir={workdir}", "--config.samples=80", "--config.seed=1")
    assert "holds a run of another config" in words and f"--from={workdir} --workdir=NEW" in words
    long = "--config.optimizer.cooldown_samples=48"
    words = error(capfd, f"--workdir={workdir}", "--config.samples=72", long)
    assert "Its cooldown would begin at sample 24, which is past. Or start a branch" in words
    words = error(capfd, f"--workdir={workdir}", "--config.optimizer.schedule=cosine")
    assert "A run of schedule='wsd' or 'rsqrt' can be made longer." in words
    assert saved_steps(workdir) == [8, 5]
    assert schema.from_file(workdir / "config.json").samples == 64


def test_a_branch_starts_from_weights_and_optimizer(cooled, tmp_path, capfd):
    new = tmp_path / "new"
    flags = (f"--from={cooled}", f"--workdir={new}", "--config.samples=16")
    flags = (*flags, "--config.optimizer.learning_rate=1e-20", "--config.optimizer.ema=0.5")
    flags = (*flags, "--config.optimizer.warmup_samples=0", "--config.model.text.dropout=0.0")
    capfd.readouterr()
    assert run(*flags) == 0
    output = capfd.readouterr().err
    assert f"starts from {cooled} at step 8: weights and optimizer" in output
    assert "  optimizer.learning_rate: 0.001 -> 1e-20" in output
    start = json.loads((new / "start.json").read_text())
    assert start[0] in output and "  samples: 64 -> 16" in start
    read = functools.partial(restore_fields, fields=["params", "optimizer", "step"])
    (before, _), (after, _) = read(cooled), read(new)
    assert int(after["step"]) == 2
    for one, two in zip(*map(jax.tree.leaves, (before["params"], after["params"])), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-12)
    counts = {8 + 2, 2}  # Adam's goes on, the schedule's starts anew
    found = {int(leaf) for leaf in jax.tree.leaves(after["optimizer"]) if leaf.dtype == np.int32}
    assert found == counts
    assert run(f"--workdir={new}") == 0
    assert "it is finished" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.model.text.width=32"], "is of another model: tensor .*text_encoder.* is float"),
        (["--config.optimizer.name=sgd"], "optimizer.name: adamw -> sgd cannot change in a branch"),
        (["--config.optimizer.ema=0"], "optimizer.ema: 0.9 -> 0.0 cannot change in a branch"),
        (["--config.model.text.cleaning=clip_lite"], "model.text.cleaning: none -> clip_lite cann"),
    ],
)
def test_what_a_branch_cannot_change_is_named(cooled, tmp_path, capfd, flags, message):
    words = error(capfd, f"--from={cooled}", f"--workdir={tmp_path}/new", *flags)
    assert re.search(message, words), words
    assert not (tmp_path / "new").exists()


def test_a_branch_needs_two_folders(cooled, tmp_path, capfd):
    assert "add --workdir=DIR for it" in error(capfd, f"--from={cooled}")
    words = error(capfd, f"--from={cooled}", f"--workdir={cooled}")
    assert "a branch needs a folder of its own" in words
    words = error(capfd, f"--from={tmp_path}", f"--workdir={tmp_path}/new")
    assert "is no workdir of a run: it has no config.json" in words
