"""The subcommand benchmark: what it writes, in which order it times, and what it refuses."""

import collections
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax import main as door
from mlip_jax.benchmark import contender, input_speed, peak, peers, verb
from mlip_jax.benchmark.results import Timing, summarize
from mlip_jax.cli import command_line
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.training.step_cost import GIB
from mlip_jax.training.teachers import NO_TEACHERS


@pytest.fixture(autouse=True)
def quick(monkeypatch, on_one_device):
    monkeypatch.setattr(peak, "_SECONDS", 0.01)
    monkeypatch.setattr(peak, "_SIDES", {"cpu": (128,)})
    on_one_device(monkeypatch)


ADAMW = "--config.optimizer.name=adamw"  # Muon's products take long to compile


@pytest.fixture
def config(tiny):
    return command_line.parse([f"--config={tiny}", ADAMW]).config


def run(capfd, *arguments):
    capfd.readouterr()
    code = door.main(["mlip", "benchmark", *map(str, arguments)])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def read_results(folder):
    (path,) = folder.glob("benchmark-*.json")
    return json.loads(path.read_text())


def test_configs_are_timed_and_written(tiny, tmp_path, capfd):
    flags = [f"--config={tiny}", ADAMW, f"--workdir={tmp_path}", "--steps=5", "--warmup=1"]
    other = f"{tiny} --config.log_every=3"  # the same program: compiled once
    code, out, _ = run(capfd, *flags, f"--compare={other}")
    assert code == 0
    results = read_results(tmp_path)
    assert [result["name"] for result in results["results"]] == [str(tiny), other]
    for result in results["results"]:
        assert result["batch_size"] == 8 and result["steps"] == 5
        assert result["step_seconds_low"] <= result["step_seconds"] <= result["step_seconds_high"]
        assert result["images_per_second"] == pytest.approx(8 / result["step_seconds"])
        flops, seconds = result["model_flops"], result["step_seconds"]
        assert result["utilisation"] == pytest.approx(flops / seconds / results["matrix_peak"])
        assert result["memory"] > 0 and result["compile_seconds"] > 0
    assert "images a second" in out and "over the first" in out and f"2: {other}" in out
    assert results["environment"]


def test_the_input_alone_beside_pillow_and_the_step(tiny, tmp_path, capfd):
    flags = [f"--config={tiny}", ADAMW, f"--workdir={tmp_path}", "--steps=2", "--warmup=1"]
    code, out, _ = run(capfd, *flags, "--only=data")
    assert code == 0 and "Pillow, decode and resize alone" in out and "the step takes" in out
    measured = read_results(tmp_path)["input"]
    assert measured["per_core"] * measured["cores"] == pytest.approx(measured["images_per_second"])
    assert measured["step"] > 0 and measured["pillow_per_core"] > 0


def test_real_input_is_that_of_a_run(config, tiny):
    with contender.Contender("tiny", config, real_input=True) as side:
        timings = side.run(2)
        result = side.result(timings, 1e9)
    assert len(timings) == 2 and result.input == "data" and 0 < result.data_wait < 1
    source, _ = contender.open_input(config)
    measured = input_speed.measure_input(config, *contender.open_input(config), 1, 2)
    assert len(source) and measured.images_per_second > 0


def test_a_step_waits_for_what_it_computes(config):
    """Steps are timed to their ends: so many of them take so many times as long."""
    with contender.Contender("tiny", config, real_input=False) as side:
        before = int(side._state.step)
        timings = side.run(4)
        assert int(side._state.step) == before + 4
    assert len(timings) == 4 and all(t.seconds > 0 for t in timings)


def test_sides_take_turns():
    turns = []

    class Side:
        def __init__(self, name):
            self.name = name

        def run(self, steps):
            turns.append((self.name, steps))
            return [Timing(9.0, 0.0)] + [Timing(1.0, 0.0)] * (steps - 1)

    timings = verb.in_turns([Side("a"), Side("b")], 10, 3)
    assert timings == [[Timing(1.0, 0.0)] * 10] * 2  # none of the first of a turn
    assert turns[:2] == [("a", 3), ("b", 3)]
    assert [name for name, _ in turns[2:]] == ["a", "b"] * 4
    turns.clear()
    assert [len(times) for times in verb.in_turns([Side("a")], 10, 1)] == [10]
    assert turns == [("a", 1), ("a", 10)]


def test_figures_are_medians_and_quartiles():
    timings = [Timing(seconds, 0.1) for seconds in (1.0, 2.0, 3.0, 4.0, 100.0)]
    summary = summarize(
        timings,
        name="x",
        batch_size=6,
        dtype="float32",
        parameters=1,
        compile_seconds=0.0,
        model_flops=30.0,
        matrix_peak=20.0,
    )
    assert (summary.step_seconds, summary.step_seconds_low, summary.step_seconds_high) == (3, 2, 4)
    assert summary.images_per_second == 2 and summary.utilisation == 0.5
    assert summary.data_wait == pytest.approx(0.5 / 110)


def test_the_peak_is_of_the_product():
    assert peak.matrix_peak(jnp.dtype("float32")) > 1e8


def test_a_step_that_does_not_fit_names_a_batch_that_does(config, monkeypatch):
    """Here a program needs a GiB for each row of its batch."""
    config.batch_size = 64
    program = collections.namedtuple("program", "rows")
    monkeypatch.setattr(
        contender,
        "lower_step",
        lambda _, __, config, *___: types.SimpleNamespace(
            compile=lambda compiler_options=None: program(config.batch_size)
        ),
    )
    monkeypatch.setattr(
        contender.Memory, "of", lambda program: contender.Memory(program.rows * GIB, 0, 0, 0, 0)
    )
    for limit, words in [(20, "--config.batch_size=16 fits"), (1, "no batch fits")]:
        monkeypatch.setattr(contender, "device_memory", lambda limit=limit: limit * GIB)
        message = f"batch_size=64 needs 64.0 GiB a device, and there are {limit}.0 GiB: {words}"
        with pytest.raises(UserError, match=message):
            contender.Contender("tiny", config, real_input=False)


def test_a_device_without_memory_is_one_line(config):
    with contender.Contender("tiny", config, real_input=False) as side:

        def full(*_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

        side._step = full
        with pytest.raises(RunError, match="tiny: out of memory at batch 8: halve"):
            side.run(1)


REFUSED = [
    (["--against=open_clap"], "did you mean 'open_clip'"),
    (["--against=open_clip"], "needs torch, which is not installed: pip install 'mlip_jax.bench"),
    (["--only=dada"], "did you mean 'data'"),
    (["--input=dada"], "did you mean 'data'"),
    (["--steps=0"], "steps"),
    (["--compare=absent.py"], "there is no config file absent.py"),
    (["--topology=v5e:2x4"], "--topology goes with the subcommand plan, not with benchmark"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_a_mistake_is_one_line(tiny, tmp_path, capfd, monkeypatch, arguments, message):
    find = peers.importlib.util.find_spec
    monkeypatch.setattr(
        peers.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    code, _, err = run(capfd, f"--config={tiny}", f"--workdir={tmp_path / 'b'}", *arguments)
    assert code == 2 and message.split(".")[0] in err and err.count("\n") == 1
    assert not (tmp_path / "b").exists()


# A program that speaks as open_clip_step.py does.
PEER = """
import json, os, sys
sizes = json.loads(sys.argv[1])
assert sizes["threads"] == int(os.environ["OMP_NUM_THREADS"]) == 3
assert sizes["vision_cfg"]["layers"] == 3 and sizes["text_cfg"]["heads"] == 2, sizes
print(json.dumps({"compiled": False, "parameters": 7, "seconds": 1.5}), flush=True)
for line in sys.stdin:
    print(json.dumps({"seconds": [0.25] * int(line)}), flush=True)
"""


def test_a_peer_is_timed_in_its_own_process(config, tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.setattr(peers, "_PROGRAM", tmp_path / "peer.py")
    monkeypatch.setattr(peers, "cores", lambda: 3)
    with peers.started(config) as peer:
        timings = peer.run(3)
        result = peer.result(timings)
    assert timings == [Timing(0.25, 0.0)] * 3
    assert result.name == "open_clip, eager" and result.parameters == 7
    assert result.images_per_second == 32 and result.utilisation is None
    (tmp_path / "peer.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(RunError, match="open_clip ended with exit code 3"), peers.started(config):
        pass


@pytest.mark.parametrize(
    ("key", "value"), [("model.image.stem", "conv"), ("optimizer.name", "muon")]
)
def test_a_peer_that_has_no_such_model_is_refused(config, monkeypatch, key, value):
    config.optimizer.name = "adamw"
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: True)
    peers.check(config, "open_clip")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"needs config.{key}="):
        peers.check(config, "open_clip")


def test_random_batches_have_the_second_views(config):
    config.perspectives.augmented_image.weight = 1.0
    mesh = contender.parallel.make_mesh(config.mesh, 8)
    batch = next(contender._random(config, mesh, 99, NO_TEACHERS))
    assert batch["image"].shape == batch["image_2"].shape == (8, 16, 16, 3)
    assert batch["image"].dtype == np.uint8
