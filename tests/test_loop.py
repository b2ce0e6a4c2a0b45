"""The loop from a config to a report: bit for bit, stopped, killed, resumed and refused."""

import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from devices import with_devices

from mlip_jax import main as door
from mlip_jax.core import versions
from mlip_jax.devices import parallel
from mlip_jax.storage.saved import restore_fields
from mlip_jax.training import evaluation, loop, pace, repeatability, stages, start
from mlip_jax.training.run import score
from mlip_jax.training.signals import Stop, Stopped

COMPILE, REPORT = start.compile_step, evaluation.write_report
ROOT = Path(__file__).parents[1]
STATE = ("step", "params", "optimizer", "ema")


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch, compiled, on_one_device):
    """Runs that differ in nothing that the step depends on share it; none draws a report."""

    def compile_step(step, run, abstract):
        config = run.config.to_dict()
        for key in ("data", "checkpoint", "evaluation", "log_every"):
            del config[key]
        key = json.dumps(config)
        if key not in compiled:
            compiled[key] = COMPILE(step, run, abstract)
        return compiled[key]

    monkeypatch.setattr(start, "compile_step", compile_step)
    monkeypatch.setattr(evaluation, "write_report", lambda *_: "none")
    on_one_device(monkeypatch)


@pytest.fixture(scope="module")
def compiled():
    return {}


@pytest.fixture
def train(tiny, tmp_path, capfd):
    """Trains `tiny` in `tmp_path/run` by the command line: exit code, what it printed."""

    def act(**overrides):
        workdir = overrides.pop("workdir", tmp_path / "run")
        flags = [f"--config.{key}={value}" for key, value in overrides.items()]
        capfd.readouterr()
        code = door.main(["mlip", f"--config={tiny}", f"--workdir={workdir}", *flags])
        return code, capfd.readouterr().err

    return act


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(trained, tmp_path / "run")


def one_line(output):
    """The error that a failed command ends with; before it stands only the run's own summary."""
    assert output.count("error:") == 1 and "Traceback" not in output, output
    return output[output.index("error:") :].rstrip("\n")


def assert_same_state(one, other):
    for field in STATE:
        a, b = (restore_fields(folder, [field])[0] for folder in (one, other))
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), field


def steps_of(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def metrics(folder):
    """The lines of metrics.jsonl without what depends on the clock."""
    clock = ("time", "images_per_second", "data_wait")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def interrupt(monkeypatch, place, name, when=1):
    """Sends this process a SIGTERM at the `when`-th call of a function."""
    original, calls = getattr(place, name), []

    def act(*arguments, **options):
        calls.append(1)
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(place, name, act)


def test_a_run_leaves_what_the_workdir_promises(trained):
    assert {"tensorboard", "report.html", "results.json", "environment.json"} <= {
        path.name for path in trained.iterdir()
    }
    assert steps_of(trained)[-1] == 8 and len(steps_of(trained)) <= 3
    assert list((trained / "tensorboard").iterdir())
    lines = metrics(trained)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert {"loss/spatial_global", "loss/frequency_tokens", "gradient_norm"} <= lines[0].keys()
    figure = "retrieval/pairs/text_to_image_recall@1"
    assert [line["step"] for line in lines if figure in line] == [4, 8]
    assert json.loads((trained / "results.json").read_text())[figure] == lines[-1][figure]
    assert not (trained / "attribution.txt").exists()  # these pictures ask for none
    config = json.loads((trained / "config.json").read_text())
    assert config["batch_size"] == 8 and config["name"] == "tiny"


def test_a_finished_run_says_so_and_is_evaluated(train, workdir, trained, monkeypatch):
    before = (workdir / "results.json").read_text()
    (workdir / "results.json").unlink()
    (workdir / "report.html").unlink()
    monkeypatch.setattr(start, "compile_step", None)  # there is nothing to compile
    monkeypatch.setattr(evaluation, "write_report", REPORT)
    code, output = train()
    assert code == 0 and f"{workdir} holds this run: it is finished" in output
    assert (workdir / "results.json").read_text() == before
    assert (workdir / "report.html").exists() and metrics(workdir) == metrics(trained)


def test_one_seed_is_one_model_from_one_trace_without_a_hidden_transfer(
    train, trained, tmp_path, monkeypatch
):
    traces, make, steps = [], start.make_train_step, loop.run_steps

    def counted(*arguments):
        step = make(*arguments)

        @functools.wraps(step)  # its name is part of what the compiler's cache goes by
        def traced(state, batch):
            traces.append(1)
            return step(state, batch)

        return traced

    def guarded(*arguments):
        with jax.transfer_guard("disallow"):
            return steps(*arguments)

    monkeypatch.setattr(start, "compile_step", COMPILE)
    monkeypatch.setattr(start, "make_train_step", counted)
    monkeypatch.setattr(loop, "run_steps", guarded)
    assert train()[0] == 0
    assert len(traces) == 1
    assert_same_state(trained, tmp_path / "run")
    assert metrics(trained) == metrics(tmp_path / "run")


def test_another_seed_is_another_start(train, tmp_path, monkeypatch):
    starts = []
    monkeypatch.setattr(start, "compile_step", lambda *_: None)
    monkeypatch.setattr(loop.summary, "print_compiled", lambda *_: None)
    monkeypatch.setattr(loop, "run_steps", lambda *arguments: (arguments[2], None))
    monkeypatch.setattr(loop, "finish", lambda _, state, __: starts.append(state.params) or (0, {}))
    for seed in (0, 1):
        assert train(seed=seed, workdir=tmp_path / str(seed))[0] == 0
    one, other = ([np.asarray(x) for x in jax.tree.leaves(params)] for params in starts)
    assert any(np.abs(x - y).max() > 0.01 for x, y in zip(one, other, strict=True))


def test_killed_at_any_moment_it_goes_on_to_the_same_bits(train, tiny, trained, tmp_path):
    run = tmp_path / "run"
    command = ["-m", "mlip_jax.main", f"--config={tiny}", f"--workdir={run}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=with_devices(1), stderr=log
        )
    while not (run / "checkpoints" / "2").is_dir():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (last_step,) = steps_of(run)[-1:]
    assert last_step < 8
    code, output = train()
    assert code == 0 and f"going on from step {last_step}" in output, output
    assert_same_state(trained, run)
    assert metrics(trained) == metrics(run)


@pytest.mark.slow
@pytest.mark.parametrize("ten", ["first", "last"])  # of 20 kills; two processes share them out
def test_killed_at_10_random_moments_it_ends_with_the_same_bits(train, tiny, tmp_path, ten):
    """A save at every step, so that many of the moments lie in one."""
    rng, kills, unfinished = np.random.default_rng(), 0, 0
    run, other = tmp_path / "run", tmp_path / "other"
    flags = {"samples": 800, "checkpoint.every_samples": 8, "evaluation.every_samples": 0}
    assert train(**flags, workdir=other)[0] == 0
    command = [sys.executable, "-m", "mlip_jax.main", f"--config={tiny}", f"--workdir={run}"]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    while kills < 10:
        before = steps_of(run)[-1:] if run.exists() else []
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=with_devices(1), stderr=log)
        while not (run / "checkpoints").is_dir() or steps_of(run)[-1:] == before:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed 10 times"
        kills += 1
        drafts = [p.name for p in (run / "checkpoints").iterdir() if not p.name.isdigit()]
        unfinished += bool(drafts)
    code, output = train(**flags)
    assert code == 0 and "damaged" not in output, output
    assert unfinished > 0, "no kill hit a save"
    assert_same_state(other, run)
    assert [line["step"] for line in metrics(run)] == [line["step"] for line in metrics(other)]


@pytest.fixture(scope="module")
def stopped(tiny, on_one_device, tmp_path_factory):
    """A run that a SIGTERM stopped at step 3."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        interrupt(patch, loop.parallel, "global_batch", 3)
        assert door.main(["mlip", f"--config={tiny}", f"--workdir={folder}"]) == 75
    assert steps_of(folder)[-1] == 3
    return folder


def test_stopped_by_a_signal_it_goes_on_to_the_same_bits(train, stopped, trained, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    code, output = train()
    assert code == 0 and "going on from step 3" in output
    assert_same_state(trained, tmp_path / "run")
    # One line more than the uninterrupted run: that of the step it stopped at.
    assert [line["step"] for line in metrics(tmp_path / "run")] == [2, 3, 4, 4, 6, 8, 8]


def test_it_goes_on_under_another_version_and_says_so(train, stopped, monkeypatch, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    now = versions.installed()
    monkeypatch.setattr(versions, "installed", lambda: now | {"jax": "99.1"})
    code, output = train()
    assert code == 0 and f"saved with other versions (jax {now['jax']} -> 99.1)" in output


def test_it_goes_on_on_another_mesh(train, stopped, trained, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    code, output = train(**{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    assert code == 0 and "going on from step 3" in output
    assert "as data 2, fsdp 2, tensor 2" in output and re.search(r"qkv.*fsdp, tensor", output)
    one, other = (restore_fields(folder)[0]["params"] for folder in (trained, run))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)
    # The same pictures in the same order: the losses agree far better than two epochs would.
    losses = [[line["loss"] for line in metrics(f) if "loss" in line][-1] for f in (trained, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_signal_during_an_evaluation_saves_without_its_figures(
    train, stopped, tmp_path, monkeypatch
):
    run = shutil.copytree(stopped, tmp_path / "run")
    interrupt(monkeypatch, evaluation, "evaluate")
    code, output = train()
    assert code == 75 and "everything is saved at step 4" in output
    assert steps_of(run)[-1] == 4
    assert not any(key.startswith("retrieval/") for line in metrics(run) for key in line)


def test_a_signal_during_the_last_evaluation_asks_to_be_started_again(train, workdir, monkeypatch):
    before = (workdir / "results.json").stat().st_mtime_ns
    interrupt(monkeypatch, evaluation, "evaluate")
    code, output = train()
    assert code == 75 and "everything is saved at step 8" in output
    assert (workdir / "results.json").stat().st_mtime_ns == before


@pytest.fixture
def heard_interrupt():
    """A Ctrl-C is heard, also where the tests run in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_error_after_a_signal_is_a_stop():
    with Stop().listening() as stop:
        with pytest.raises(ValueError), stop.interrupting():
            raise ValueError("of its own")
        with pytest.raises(Stopped), stop.interrupting():
            stop.ask()
            raise ValueError("what a library made of it")


def late(monkeypatch, after, act):
    """Has the input stall at a batch; `act` is called first."""
    original, release = stages.train_batches, threading.Event()

    def batches(*arguments, **options):
        for number, batch in enumerate(original(*arguments, **options)):
            if number == after:
                act()
                release.wait()
            yield batch

    monkeypatch.setattr(stages, "train_batches", batches)
    monkeypatch.setattr("mlip_jax.data.batches.feed._FAREWELL", 0.1)
    monkeypatch.setattr("mlip_jax.core.stopping._leaves", False)
    return release


def test_input_that_does_not_come_is_said_and_costs_no_step(train, trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        release = late(patch, 3, lambda: None)
        patch.setenv("MLIP_INPUT_SECONDS", "1")
        code, output = train(log_every=1)
        release.set()
    assert code == 1 and steps_of(tmp_path / "run")[-1] == 3
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    assert re.search("no batch came within 1 s .*everything is saved at step 3", one_line(output))
    with monkeypatch.context() as patch:
        release = late(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        code, output = train()
        release.set()
    assert code == 75 and "everything is saved at step 5" in output
    assert train()[0] == 0
    assert_same_state(trained, tmp_path / "run")


@pytest.mark.usefixtures("heard_interrupt")
def test_signals():
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stop().listening() as stop:
        with stop.interrupting():
            pass
        os.kill(os.getpid(), signal.SIGINT)  # the first is noted
        assert stop.asked
        with pytest.raises(Stopped), stop.interrupting():
            raise AssertionError("not to be begun")
        with pytest.raises(KeyboardInterrupt):  # the second interrupts
            os.kill(os.getpid(), signal.SIGINT)
    with Stop().listening() as stop, pytest.raises(Stopped), stop.interrupting():
        os.kill(os.getpid(), signal.SIGTERM)
    assert former == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_a_signal_before_the_first_step_does_not_wait_for_the_compiler(tiny, tmp_path):
    # Like XLA's compiler, it lets no handler of Python run in the main thread.
    code = f"""
import hashlib, sys
from jax.stages import Lowered
from mlip_jax import main

def compile(*_, **options):
    print("compiling", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

Lowered.compile = compile
sys.exit(main.main(["mlip", "--config={tiny}", "--workdir={tmp_path / "run"}"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "compiling\n", process.communicate()[1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    output = process.communicate()[1]
    assert "SIGTERM: stopping; no step was done since the start" in output


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_terms(
    train, stopped, tmp_path, monkeypatch
):
    run = shutil.copytree(stopped, tmp_path / "run")
    share, calls = start.compile_step, []

    def compile_step(*arguments):
        step = share(*arguments)

        def broken(state, batch):
            calls.append(1)
            if len(calls) == 2:  # step 5
                params = jax.tree.map(lambda x: x * np.float32(np.inf), state.params)
                state = state.replace(params=params)
            return step(state, batch)

        return broken

    monkeypatch.setattr(start, "compile_step", compile_step)
    monkeypatch.setattr(loop.summary, "print_compiled", lambda *_: None)
    code, output = train()
    assert code == 1
    error = one_line(output)
    assert error.startswith("error: step 5: the loss of ") and " is nan; stopped" in error
    assert "spatial_global" in error and "frequency_tokens" in error
    fields, extras = restore_fields(run, ("params", "ema"))
    assert extras["step"] == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fields))


@pytest.fixture
def torn(pairs, tmp_path):
    """The pairs with two pictures that cannot be read."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows:
        row["file"] = str(pairs.parent / row["file"])
    (tmp_path / "torn.png").write_bytes(Path(rows[3]["file"]).read_bytes()[:70])
    rows[3]["file"], rows[7]["file"] = "torn.png", "gone.png"
    path = tmp_path / "torn.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_unreadable_pictures_are_left_out_and_counted(train, torn, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "finish", lambda *_: (0, {}))
    overrides = {"data.train": f"jsonl:{torn}", "data.validation": ""}
    code, output = train(**overrides, **{"data.max_skipped_share": 0.1})
    assert code == 0
    assert re.search(r"2 of 32 images \(6\.25%\) cannot be read: .*torn\.png, .*gone\.png", output)
    code, output = train(**overrides, **{"data.max_skipped_share": 0.01}, workdir=tmp_path / "b")
    assert code == 2
    assert "cannot be read" in one_line(output) and "max_skipped_share=0.01" in one_line(output)


def test_a_run_without_validation(train, tmp_path, capfd):
    run = tmp_path / "run"
    code, output = train(**{"data.validation": "", "checkpoint.every_samples": 0})
    assert code == 0 and "no figures" not in output
    assert "--config.data.validation=5% with a new --workdir holds that share" in output
    assert [line["step"] for line in metrics(run)] == [2, 4, 6, 8]
    assert json.loads((run / "results.json").read_text()) == {"step": 8}
    assert door.main(["mlip", "report", f"--workdir={run}"]) == 0
    assert "--config.data.validation=5% with a new" in (run / "report.html").read_text()
    capfd.readouterr()
    assert door.main(["mlip", "evaluate", f"--workdir={run}"]) == 2
    assert "names no dataset to evaluate on: add --config.data.valid" in capfd.readouterr().err


def test_a_name_for_the_best_that_is_no_figure_costs_no_steps(train, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    code, output = train(**{"checkpoint.best": "retrieval/pairs/text_to_image_recal@1"})
    assert code == 2
    assert "did you mean 'retrieval/pairs/text_to_image_recall@1'" in one_line(output)
    assert steps_of(run)[-1] == 4


def test_the_best_checkpoint_is_kept():
    figures = {"retrieval/a/x_recall@1": 0.2, "retrieval/b/x_recall@1": 0.4, "zero_shot/a/top1": 1}
    assert score("", figures) == pytest.approx(0.3)
    assert score("zero_shot/a/top1", figures) == 1
    assert score("", {"zero_shot/a/top1": 0.5, "zero_shot/a/top5": 0.9}) == 0.5


def test_a_disk_that_takes_no_more_is_one_line(train, stopped, tmp_path, monkeypatch):
    run = shutil.copytree(stopped, tmp_path / "run")
    steps, former = loop.run_steps, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, former[1]))
        return steps(*arguments)

    monkeypatch.setattr(loop, "run_steps", limited)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: loop.Results())
    try:
        code, output = train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert code == 1
    error = one_line(output)
    assert "\n" not in error
    assert re.match("error: cannot write the checkpoint of step 4 to .*: File too large", error)
    assert steps_of(run)[-1] == 3


# What is refused before anything is compiled: overrides of `tiny`, and what the one line says.
REFUSED = [
    (
        {"batch_size": 12, "mesh.data": 8},
        r"batch_size=12 is not divided by data\*fsdp=8 .* nearest: 8 or 16",
    ),
    ({"mesh.data": 3}, "mesh .* does not fit the 8 devices"),
    ({"data.train": "jsonl:absent.jsonl"}, "absent.jsonl"),
    ({"data.train": "emojy"}, "unknown dataset 'emojy'.*did you mean 'emoji'"),
    ({"data.validation": "folder:absent"}, "absent"),
    ({"evaluation.retrieval": "('jsonl:absent.jsonl',)"}, "absent.jsonl"),
    ({"evaluation.zero_shot": "('validation','folder:absent')"}, "absent"),
    ({"evaluation.templates": "clip_8"}, "did you mean 'clip_80'"),
    ({"model.image.merging.rate": 0.9}, "largest rate here is"),
    (
        {"perspectives.spatial_global.weight": 0.0},
        "no embedding of a whole image: give config.perspectives.spatial_global.weight",
    ),
    ({"checkpoint.keep_last": 0}, "keep_last=0 must be at least 1"),
    ({"compute_dtype": "float23"}, "did you mean 'float32'"),
    ({"accumulation": 5}, "is no multiple of config.accumulation=5 parts"),
    ({"data.workers": 1000, "batch_size": 2**20, "samples": 2**21}, "needs .* MiB of /dev/shm"),
    ({"checkpoint.best": "foo"}, "checkpoint.best='foo' is no figure .* FAMILY/SET/FIGURE"),
    ({"checkpoint.best": "svm/pairs/map"}, "with a family of retrieval, zero_shot"),
    ({"name": ""}, "config.name='' must be a name"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_what_cannot_be_is_refused_at_once_and_leaves_no_workdir(
    train, tmp_path, overrides, message
):
    code, output = train(**overrides)
    assert code == 2
    assert re.search(message, one_line(output)), output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    if "checkpoint.keep_last" not in overrides:
        assert not (tmp_path / "run").exists()


LINES = [
    ('{"file": "a.png", "caption": "a"}\n{"file": "b.png", "caption"\n', r"lines\.jsonl:2"),
    ('{"file": "a.png", "caption": " "}\n' * 3, "3 of 3 rows have no caption"),
    ("", "lines.jsonl"),
]


@pytest.mark.parametrize(("text", "message"), LINES)
def test_a_list_of_pairs_that_cannot_be_used_is_named(train, tmp_path, text, message):
    path = tmp_path / "lines.jsonl"
    path.write_text(text)
    code, output = train(**{"data.train": f"jsonl:{path}"})
    assert code == 2 and re.search(message, one_line(output)), output


def test_the_workdir_of_another_run_is_refused(train, workdir):
    code, output = train(seed=5)
    assert code == 2
    assert f"{workdir} holds a run of another config (seed: 0 -> 5)" in one_line(output)
    assert steps_of(workdir)[-1] == 8


@pytest.mark.parametrize("samples", [34_000_000_000])
def test_runs_of_billions_of_samples_end_and_resume(train, tmp_path, monkeypatch, samples):
    initialise = start._initialise

    def near_the_end(opened):
        state = initialise(opened)
        step = jax.device_put(np.int32(opened.run.steps - 4), state.step.sharding)
        return state.replace(step=step)

    monkeypatch.setattr(start, "_initialise", near_the_end)
    run = {
        "samples": samples,
        "batch_size": 16,
        "optimizer.warmup_samples": samples // 2,
        "perspectives.frequency_tokens.warmup_samples": samples,
        "checkpoint.every_samples": 2**31 + 5,
        "evaluation.every_samples": 2**32 + 5,
        "log_every": 1,
    }
    with monkeypatch.context() as stopped:
        interrupt(stopped, loop.Log, "add", when=1)
        assert train(**run)[0] == 75
    steps = samples // 16
    assert steps_of(tmp_path / "run") == [steps - 2]
    code, output = train(**run)
    assert code == 0 and f"going on from step {steps - 2}" in output
    assert steps_of(tmp_path / "run")[-1] == steps
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line["samples"] for line in lines] == [16 * (steps - left) for left in (3, 2, 1, 0)]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert all(0 <= line["learning_rate"] < 1e-6 for line in lines)  # the end of the cosine


def test_where_a_step_is_probed_the_run_is_the_same(train, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(repeatability, "_PROBED", ("cpu",))
    monkeypatch.setattr(parallel, "memory_limit", lambda: 3 * 2**30)
    code, output = train()
    assert code == 0
    assert re.search(r"\n  in all 0\.\d\d of the 3\.00 GiB that JAX takes of a device\n", output)
    assert output.count("\nrepeatable: a step taken twice gave the same bits.") == 1
    assert_same_state(trained, tmp_path / "run")
    assert "repeatable" not in train()[1]  # a run that is there already is not probed


def test_a_step_with_other_bits_each_time_is_named(train, monkeypatch):
    compile_step, calls = start.compile_step, iter(range(1_000_000))

    def unsteady(*arguments):
        step = compile_step(*arguments)

        def noisy(state, batch):
            state, metrics = step(state, batch)
            scale = state.params["log_scale_spatial_global"]
            bits = scale.view(np.int32) + next(calls)
            changed = jax.device_put(bits.view(np.float32), scale.sharding)
            return state.replace(
                params=state.params | {"log_scale_spatial_global": changed}
            ), metrics

        return noisy

    monkeypatch.setattr(start, "compile_step", unsteady)
    monkeypatch.setattr(start.summary, "print_compiled", lambda *_: None)
    monkeypatch.setattr(repeatability, "_PROBED", ("cpu",))
    code, output = train(samples=8)
    assert code == 0 and "\nnot repeatable: a step taken twice gave other bits" in output


def test_a_run_in_passes_is_resumed_by_the_same_command(train, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "_FEWEST_STEPS", 8)
    code, output = train(epochs=2)
    assert code == 0 and "length: 32 pairs, 2 passes, 64 samples in 8 steps of 8" in output
    assert re.search(r"expected: about \d+ seconds? here at [\d,]+ images/s", output)
    assert_same_state(tmp_path / "run", trained)  # the steps that were timed are forgotten
    code, output = train(epochs=2)
    assert code == 0 and "it is finished" in output and "expected:" not in output
