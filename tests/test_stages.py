"""Runs in stages: what a table of them says, refuses and does, in one walk and over its borders."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import preparing
import pytest

from mlip_jax import load
from mlip_jax import main as door
from mlip_jax.cli import command_line
from mlip_jax.core import schema, stages
from mlip_jax.core.errors import UserError
from mlip_jax.core.validation import validate
from mlip_jax.data.batches import training as batches
from mlip_jax.data.sets.opening import open_training
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.devices import parallel
from mlip_jax.recipes import lengths
from mlip_jax.storage.saved import restore_fields, saved_steps, set_aside
from mlip_jax.training import stages as parts
from mlip_jax.training import start
from mlip_jax.training.optimizer import learning_rate

pytestmark = pytest.mark.usefixtures("small_runs")

FIELDS = ("step", "params", "optimizer", "ema")
TABLE = "0.5 image_size=8 context_length=4 patch_dropout=0.25 word_dropout=0.5,0.5 batch_size=4"
# Small, and with nothing that takes long to compile.
PLAIN = {
    "model.image.merging.rate": 0.0,
    "model.image.frequency.depth": 0,
    "perspectives.frequency_tokens.weight": 0.0,
    "optimizer.name": "adamw",
    "data.validation": "",
    "evaluation.every_samples": 0,
    "checkpoint.every_samples": 4,
    "checkpoint.keep_last": 20,
    "stages": TABLE,
}


def flags(**overrides):
    return [f"--config.{key}={value}" for key, value in (PLAIN | overrides).items()]


def train(tiny, folder, **overrides):
    return door.main(
        ["mlip", "train", f"--config={tiny}", f"--workdir={folder}", *flags(**overrides)]
    )


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run of 12 steps: 4 of 8 rows in 8 pixels, then 8 of 4 rows in 16."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(tiny, folder) == 0
    return folder


def state(folder, fields=FIELDS):
    return jax.tree.leaves([restore_fields(folder, [field])[0] for field in fields])


def equal(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


def of(*texts, **values):
    config = schema.default()
    config.batch_size, config.samples = 10, 1000
    config.optimizer.warmup_samples, config.optimizer.learning_rate = 100, 1.0
    config.update_from_flattened_dict(values)
    config.stages = texts
    validate(config)
    return stages.of(lengths.resolve(config, 100))


def test_a_run_without_stages_is_one():
    (stage,) = of()
    assert stage.place == stages.WHOLE and stage.last == 100 and stage.seen(7) == 70
    assert stage.config.to_dict() == (of()[0]).config.to_dict()


def test_each_stage_is_a_plain_config_from_one_sample_to_another():
    first, second, third = of(
        "0.5 image_size=16 model.text.context_length=8",
        "0.33 batch_size=16 image_size=32",
        "0.17 batch_size=4 patch_dropout=0.5",
    )
    assert first.config.model.image.image_size == 16 and first.config.model.text.context_length == 8
    assert second.config.model.image.image_size == 32 and third.config.model.image.image_size == 48
    assert not any(stage.config.stages for stage in (first, second, third))
    assert (first.place.samples, first.seen(50), first.last) == (0, 500, 50)
    # The second begins at a whole batch of its own; the third where the second ended.
    assert second.place == stages.Place(50, 512, 0) and second.steps == 19
    assert third.place.samples == 816 and third.seen(third.last) == 1000
    assert [
        stages.at((first, second, third), step).number for step in (1, 50, 51, 69, 70, 999)
    ] == [*(1, 1, 2, 2, 3, 3)]
    assert "stage 2 of 3: samples 512 to 816 in 19 steps of 16, batch_size 16" in str(second)


def rates(stage):
    steps = jnp.arange(stage.place.first, stage.last, dtype=jnp.int32)
    return np.asarray(learning_rate(stage.config, stage.place)(steps))


def test_one_schedule_goes_over_the_borders_by_samples():
    (alone,) = of()
    first, second = of("0.5", "0.5 batch_size=20")
    np.testing.assert_allclose(rates(first), rates(alone)[:50], rtol=1e-6)
    np.testing.assert_allclose(rates(second), rates(alone)[51::2], rtol=1e-5, atol=1e-7)


def test_a_stage_with_a_rate_begins_a_schedule_of_its_own():
    values = {"optimizer.schedule": "wsd", "optimizer.cooldown_samples": 200}
    first, second, third = of(
        "0.4", "0.5 learning_rate=0.5 warmup_samples=50", "0.1 batch_size=20", **values
    )
    one, two, three = map(rates, (first, second, third))
    assert one[0] == pytest.approx(0.1) and one[10:30].tolist() == [1.0] * 20
    assert one[-1] == 0.0 and one[-2] > 0  # at sample 400: a fifth of 400 cools down
    np.testing.assert_allclose(two[:5], 0.5 * np.arange(1, 6) / 5, rtol=1e-6)
    assert two[5:40].tolist() == [0.5] * 35  # until 120 before sample 1000
    assert three[-1] == 0.0 and len(three) == 5 and (np.diff([*two[-3:], *three]) < 0).all()
    # Without a warm-up of its own it has none.
    assert rates(of("0.5", "0.5 learning_rate=0.5")[1])[0] > 0.49


@pytest.mark.parametrize(
    "texts, message",
    [
        (["0.5", "0.4"], "the shares add up to 0.9: they must be 1"),
        (["0.5", "0.004", "0.496"], "stage 2 has 0.004 of 1,000 samples, which is no step of 10"),
        (["half", "0.5"], "stage 1, 'half', must begin with its share"),
        (["0.5 width=64", "0.5"], "stage 1 cannot change 'width': expected NAME=VALUE with a name"),
        (["0.5 optimizer.batch_size=8", "0.5"], "stage 1 cannot change 'optimizer.batch_size'"),
        (["0.5 image_sise=16", "0.5"], "did you mean 'image_size'"),
        (["0.5 image_size=20", "0.5"], "stage 1, image_size=20: is no multiple of .*patch_size=8"),
        (["0.5 image_size=16.5", "0.5"], "stage 1, image_size='16.5': expected a whole number"),
        (["0.5 batch_size=0", "0.5"], "stage 1, batch_size=0: must be at least 1"),
        (["0.5 batch_size=1", "0.5"], "in stage 1, config.batch_size=1 must be at least 2"),
        (["0.5 patch_dropout=1", "0.5"], "in stage 1, config.model.image.patch_dropout=1.0 must"),
        (["0.5 batch_size=8 batch_size=4", "0.5"], "stage 1 gives batch_size twice"),
        (["0.5", "0.5 image_size=64"], "stage 2 is the last, whose image_size is the model's"),
        (["0.5 context_length=99", "0.5"], "at most as long as the config's, 77"),
        (["0.5", "0.5 warmup_samples=9"], "stage 2 gives warmup_samples without a learning_rate"),
    ],
)
def test_a_table_that_cannot_be_is_refused_in_one_line(texts, message):
    with pytest.raises(UserError, match=message) as caught:
        of(*texts)
    assert "\n" not in str(caught.value)


def error(capfd, tiny, folder, *more, **overrides):
    capfd.readouterr()
    arguments = ["mlip", "train", f"--config={tiny}", f"--workdir={folder}", *flags(**overrides)]
    assert door.main([*arguments, *more]) == 2
    output = capfd.readouterr().err
    assert output.count("error:") == 1 and "Traceback" not in output
    return output[output.index("error:") :]


def test_what_only_a_run_can_see_is_refused_before_it_compiles(
    tiny, whole, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(start, "compile_step", None)
    said = error(
        capfd, tiny, tmp_path / "new", **{"accumulation": 4, "stages": "0.5 batch_size=6,0.5"}
    )
    assert "in stage 1, config.batch_size=6 is no multiple of config.accumulation=4" in said
    said = error(
        capfd, tiny, tmp_path / "new", **{"mesh.data": 8, "stages": "0.5,0.5 batch_size=12"}
    )
    assert "in stage 2, config.batch_size=12 is not divided by data*fsdp=8" in said
    assert not (tmp_path / "new").exists()
    said = error(capfd, tiny, whole, stages="0.5 image_size=8,0.5 batch_size=4")
    assert "holds a run of another config (stages:" in said
    said = error(capfd, tiny, whole, samples=96)
    assert "in stages, whose borders would move (samples: 64 -> 96)" in said
    said = error(capfd, tiny, tmp_path / "new", f"--from={whole}")
    assert "config.stages begin another run" in said


def test_the_run_ends_at_the_last_stages_size_and_says_its_stages(whole, capfd):
    model = load(whole)
    assert model.preprocess.image_size == 16 and model.step == 12
    assert model.variables["params"]["image_encoder"]["position"].shape[:2] == (4, 4)
    # Stage 1 has trained a grid of 2 x 2; what is loaded of it has the model's size.
    early = load(whole, step=3)
    assert early.variables["params"]["image_encoder"]["position"].shape[:2] == (4, 4)
    saved = restore_fields(whole, ["params"], 3)[0]["params"]["image_encoder"]
    assert saved["position"].shape[:2] == (2, 2)
    np.testing.assert_allclose(np.linalg.norm(early.encode_text(["picture 1"])), 1, rtol=1e-5)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    told = [(line["step"], line["samples"], line["stage"]) for line in lines if "loss" in line]
    first = [(step, 8 * step, 1) for step in range(1, 5)]
    assert told == first + [(step, 16 + 4 * step, 2) for step in range(5, 13)]


# Across the border; killed just before the first step of the next stage, and just after it.
@pytest.mark.parametrize("kept", [pytest.param(3, marks=pytest.mark.slow), 4, 5])
def test_resumed_around_a_border_it_ends_with_the_same_bits(whole, tiny, tmp_path, kept):
    folder = tmp_path / "run"
    # What a run that is killed after this step has left.
    shutil.copytree(whole, folder)
    set_aside(folder, [step for step in saved_steps(folder) if step > kept])
    assert saved_steps(folder)[0] == kept
    assert train(tiny, folder) == 0
    equal(state(folder), state(whole))
    assert (folder / "metrics.jsonl").read_text().count('"stage"') == 12


def test_averages_slow_weights_and_second_moments_are_carried_over(tiny):
    config = command_line.parse([f"--config={tiny}", *flags()]).config
    run_stages = stages.of(lengths.resolve(config, 32))
    mesh = parallel.make_mesh(config.mesh, config.batch_size)
    before, after = parts.parts(run_stages, load_tokenizer("clip", cleaning="none"), mesh)
    rng = np.random.default_rng(0)
    full = jax.tree.map(
        lambda leaf: jnp.asarray(np.square(rng.normal(size=leaf.shape)), leaf.dtype),
        before.abstract,
    )
    carried = parts.carried(full, after.abstract)
    assert jax.tree.map(jnp.shape, carried) == jax.tree.map(lambda leaf: leaf.shape, after.abstract)
    for field in ("params", "ema", "optimizer"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(carried, field)):
            if not parallel.path_name(path).endswith("image_encoder/position"):
                continue
            assert leaf.shape[:2] == (4, 4)
            if field == "optimizer":
                assert float(leaf.min()) >= 0
    moved = full.params["image_encoder"]["position"]
    # A constant stays one.
    same = parts.carried(
        full.replace(params=jax.tree.map(jnp.ones_like, full.params)), after.abstract
    )
    np.testing.assert_allclose(same.params["image_encoder"]["position"], 1.0, rtol=1e-5)
    assert moved.shape[:2] == (2, 2)


def test_the_data_is_a_function_of_seed_and_step_alone(tiny):
    """No batch depends on where a run begins, and no record comes twice in a pass."""
    config = command_line.parse([f"--config={tiny}", *flags()]).config
    config = lengths.resolve(config, 32)
    source = open_training(config.data, config.model.text.cleaning)
    run = SimpleNamespace(
        stages=stages.of(config),
        source=source,
        tokenizer=load_tokenizer("clip", cleaning="none"),
        mesh=parallel.make_mesh(config.mesh, config.batch_size),
        teachers=SimpleNamespace(inputs=batches.NO_INPUTS),
    )
    all_of_them = list(parts.batches(run, 0))
    assert [len(batch["record"]) for batch in all_of_them] == [8] * 4 + [4] * 8
    assert {batch["image"].shape[1] for batch in all_of_them[:4]} == {8}
    assert {batch["token_ids"].shape[1] for batch in all_of_them} == {4, 8}
    records = np.concatenate([batch["record"] for batch in all_of_them])
    assert sorted(records[:32]) == sorted(records[32:]) == list(range(32))
    for begin in (3, 4, 5):
        for one, other in zip(parts.batches(run, begin), all_of_them[begin:], strict=True):
            assert one.keys() == other.keys()
            for key in one:
                np.testing.assert_array_equal(one[key], other[key])


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {"mesh.data": 8},
        {"mesh.data": 4, "mesh.fsdp": 2, "accumulation": 2},
    ],
    ids=["data", "fsdp_in_parts"],
)
def test_several_devices_give_the_losses_of_one(tiny, tmp_path, overrides):
    table = "0.5 image_size=8 context_length=4,0.5 batch_size=32"
    both = {"samples": 128, "batch_size": 16, "stages": table}
    assert train(tiny, tmp_path / "one", **both) == 0
    assert train(tiny, tmp_path / "several", **both, **overrides) == 0
    np.testing.assert_allclose(
        losses(tmp_path / "several"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lookahead", "parts", "prepared", "mixed", "webdataset"])
def test_whatever_a_run_has_it_resumes_over_a_border(tiny, pairs, tmp_path, kind):
    out = tmp_path / "prepared"
    if kind in ("prepared", "mixed"):
        preparing.run(f"--source=jsonl:{pairs}", f"--out={out}")
    if kind == "webdataset":
        samples = [member for n in range(32) for member in preparing.sample(f"{n:03}")]
        preparing.tar(tmp_path / "shard-000000.tar", samples)
    overrides = {
        "lookahead": {"optimizer.lookahead.period": 3, "optimizer.ema": 0.0},
        "parts": {"accumulation": 2},
        "prepared": {"data.train": f"prepared:{out}"},
        "mixed": {"data.train": f"mix:prepared:{out}*1+jsonl:{pairs}*2"},
        "webdataset": {"data.train": f"webdataset:{tmp_path}/shard-000000.tar"},
    }[kind]
    assert train(tiny, tmp_path / "whole", **overrides) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    set_aside(tmp_path / "run", [step for step in saved_steps(tmp_path / "run") if step > 4])
    assert train(tiny, tmp_path / "run", **overrides) == 0
    fields = (*FIELDS[:-1], "slow") if kind == "lookahead" else FIELDS
    equal(state(tmp_path / "run", fields), state(tmp_path / "whole", fields))
