"""The check of a new device: its time, entries and table, with a runner that trains nothing."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from mlip_jax.core.errors import UserError
from mlip_jax.storage.checkpoint import Checkpoints
from mlip_jax.training.step_cost import GIB


@pytest.fixture(scope="module")
def script():
    """All names of the script and of its two parts."""
    parts = ("device_check_children", "device_check_entries", "device_check")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "launch"))
        modules = [importlib.import_module(part) for part in parts]
        names = {name: value for module in modules for name, value in vars(module).items()}
        yield SimpleNamespace(**names)
    for part in parts:
        del sys.modules[part]


class FakeRun:
    """A device on which batches up to `fits` fit; each process takes `takes` seconds."""

    def __init__(self, script, fits=1024, takes=10.0, device="NVIDIA H200", aborts=()):
        self.script, self.fits, self.takes = script, fits, takes
        self.device, self.aborts = device, aborts
        self.seconds = 0.0
        self.batches = []

    def now(self):
        return self.seconds

    def __call__(self, arguments, log, seconds, stop_when=None):
        self.seconds += min(self.takes, seconds)
        if self.takes > seconds:
            return self.script.Ended(None, "")
        if arguments[0] == "-c":
            found = {"device": self.device, "devices": 1, "platform": "gpu", "cores": 16}
            found |= {"memory": 100 * GIB, "versions": {"jax": "0.10.2"}}
            return self.script.Ended(0, f"a warning\n{json.dumps(found)}\n")
        flags = dict(flag.lstrip("-").split("=", 1) for flag in arguments[3:])
        if any(flags["config"].startswith(name) for name in self.aborts):
            return self.script.Ended(-6, "F0000 Check failed: 256 vs. 32")
        if arguments[2] == "plan":
            return self.script.Ended(0, "h200:1: 1 devices\nfits: yes, 2.50 GiB a device of 105.75")
        return self.benchmark(flags)

    def benchmark(self, flags):
        batch = int(flags["config.batch_size"])
        self.batches.append(batch)
        if batch > self.fits:
            return self.script.Ended(2, f"error: ...: --config.batch_size={self.fits} fits; ...")
        result = {"name": "x", "batch_size": batch, "images_per_second": 1234.5}
        result |= {"utilisation": 0.432, "memory": 2 * GIB, "attention": {"image": "xla"}}
        folder = Path(flags["workdir"])
        folder.mkdir()
        (folder / "benchmark-1.json").write_text(json.dumps({"results": [result]}))
        return self.script.Ended(0, "")


def worked_on(script, folder, run, *only, seconds=1000):
    children = script.Children(folder, seconds, run, run.now)
    check = script.Check(children, folder, script.FULL)
    written = []
    note = lambda entries: written.append([entry.state for entry in entries])  # noqa: E731
    entries = script.work_on(check.tasks(only), children, note)
    assert len(written) == len(entries) == len(written[0]), "all are listed from the start"
    return {entry.name: entry for entry in entries}


def printed(script, entries):
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(script.table_of(list(entries.values())))
    return capture.get()


def test_a_batch_that_does_not_fit_is_replaced_by_the_one_that_is_named(script, tmp_path):
    run = FakeRun(script, fits=256)
    entries = worked_on(script, tmp_path, run, "largest", "merging", "plan")
    assert all(entry.state == "done" for entry in entries.values()), entries
    # The entries of a group start from what fitted the first.
    assert run.batches == [1024, 256, 1024, 256, 1024, 256, 256, 256]
    assert entries["clip B/16, largest batch"].words == (
        "batch 256, 1,234 images/s, 43.2% of peak, 2.00 GiB"
    )
    assert entries["plan of mlip B/16"].words == (
        "batch 256: 2.50 GiB planned, 2.00 GiB compiled here"
    )


@pytest.mark.parametrize(
    "output, smaller",
    [
        ("error: the step needs 9.0 GiB: --config.batch_size=384 fits; more", 384),
        ("error: clip: out of memory at batch 1024: halve --config.batch_size", 512),
        ("XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory", 512),
        ("error: the step needs 9.0 GiB: no batch fits; more", 0),
        ("--config.batch_size=1024 fits", 0),
        ("error: unknown flag", 0),
    ],
)
def test_the_next_batch(script, output, smaller):
    assert script.smaller_batch(output, 1024) == smaller


def test_halving_ends(script):
    assert script.smaller_batch("RESOURCE_EXHAUSTED", 2) == 0


def test_what_no_time_is_left_for_is_owed(script, tmp_path):
    run = FakeRun(script, takes=10)
    entries = worked_on(script, tmp_path, run, "largest", "merging", seconds=28)
    states = [(entry.state, entry.words == script.NO_TIME) for entry in entries.values()]
    # The third is begun and cut off.
    assert states == [("done", False)] * 2 + [("owed", True)] * 4
    assert run.seconds == 28
    table = printed(script, entries)
    assert table.count("owed: no time left") == 4
    assert max(map(len, table.splitlines())) <= 80


def test_an_entry_that_hangs_is_a_failed_one(script, tmp_path):
    run = FakeRun(script, takes=10_000)
    entries = worked_on(script, tmp_path, run, "largest", seconds=480)
    assert {entry.state for entry in entries.values()} == {"failed"}
    assert "took longer" in entries["environment"].words


def test_on_a_busy_machine_entries_have_more_time_as_the_whole_check_has(script, tmp_path):
    states = []
    for seconds in (480, 1200):
        run = FakeRun(script, takes=140)
        folder = tmp_path / str(seconds)
        folder.mkdir()
        entries = worked_on(script, folder, run, "largest", seconds=seconds)
        states.append([entry.state for entry in entries.values()])
    assert states == [["failed", "done", "done"], ["done"] * 3]


def test_an_abort_fails_its_entry_alone(script, tmp_path):
    entries = worked_on(script, tmp_path, FakeRun(script, aborts=("clip:",)), "largest", "plan")
    assert [entry.state for entry in entries.values()] == ["done", "failed", "done", "owed", "done"]
    table = printed(script, entries)
    assert "FAILED: exit code -6: F0000 Check failed" in table
    assert "owed: its step was not timed" in table


def test_what_cannot_be_had_is_owed(script, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    run = FakeRun(script, device="a new card")
    entries = worked_on(script, tmp_path, run, "largest", "open_clip", "plan")
    assert entries["clip B/16 and open_clip"].words.startswith("torch is not installed")
    assert entries["plan of clip B/16"].words == "plan does not know the device a new card"


def test_a_process_is_killed_when_its_time_is_over(script, tmp_path):
    run = partial(script.run_child, environment={})
    log = tmp_path / "log"
    assert run(["-c", "print('a')"], log, 60.0) == script.Ended(0, "a\n")
    assert run(["-c", "raise SystemExit('b')"], log, 60.0) == script.Ended(1, "b\n")
    assert run(["-c", "import time; time.sleep(600)"], log, 0.5).code is None
    assert log.read_text() == "a\nb\n"


def test_a_process_is_stopped_when_it_is_time(script, tmp_path):
    answers = iter((False, False, True))
    run = partial(script.run_child, environment={})
    program = "import signal; signal.pause()"
    assert run(["-c", program], tmp_path / "log", 60.0, lambda: next(answers)).code == -15


def test_states_are_compared_bit_by_bit(script, tmp_path):
    def state(value):
        params = {"a": np.full(3, value, np.float32)}
        return {"step": np.int32(4), "params": params, "optimizer": [np.zeros(2)]}

    for name, value in (("one", 0.0), ("same", 0.0), ("other", -0.0)):
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(4, state(value), {})
    assert script.differing(tmp_path / "one", tmp_path / "same") == []
    assert script.differing(tmp_path / "one", tmp_path / "other") == ["['params']['a']"]
    with pytest.raises(UserError, match="holds no checkpoint"):
        script.differing(tmp_path / "one", tmp_path / "none")
