"""Studies: a table of runs that can be stopped, and its Markdown."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from devices import with_devices

from mlip_jax import main as door
from mlip_jax.core.errors import UserError
from mlip_jax.study import runs, study
from mlip_jax.study.table import read_table

TABLES = sorted((Path(__file__).parents[1] / "docs/studies").glob("*.json"))

KEY = "retrieval/pairs/text_to_image_recall@1"

# In the place of `mlip train`: writes down that it was started, waits where it is told to, and
# leaves what a run leaves.
STAND_IN = """
import json, pathlib, shutil, signal, sys, time
values = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:])
workdir, here = pathlib.Path(values["workdir"]), pathlib.Path(sys.argv[0]).parent
workdir.mkdir(exist_ok=True)
with open(workdir / "starts", "a") as starts:
    starts.write("start\\n")
name = f"{workdir.parent.name}-{values['config.seed']}"
if (here / f"fails {name}").exists():
    sys.exit(1)
if (here / f"waits {name}").exists():
    (here / f"waits {name}").unlink()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (here / "waiting").touch()
    time.sleep(60)
shutil.copy(here / "config.json", workdir)
figure = 0.1 * int(values["config.seed"]) + (0.5 if workdir.parent.name == "second" else 0.25)
(workdir / "results.json").write_text(json.dumps({KEY: figure, "step": 8}))
line = {"step": 8, "samples": 64, "loss": 1.0, "images_per_second": 0.5}
(workdir / "metrics.jsonl").write_text(json.dumps(line))
"""


@pytest.fixture
def stand_in(tiny, tmp_path, monkeypatch):
    """A folder whose files "waits ROW-SEED" and "fails ROW-SEED" say what a run does."""
    folder = tmp_path / "stand_in"
    folder.mkdir()
    (folder / "train.py").write_text(STAND_IN.replace("KEY", repr(KEY)))
    (folder / "config.json").write_text(tiny.with_suffix(".json").read_text())
    monkeypatch.setattr(runs, "PROGRAM", (sys.executable, str(folder / "train.py")))
    return folder


@pytest.fixture
def table(tiny, tmp_path):
    values = {
        "rows": [
            {"name": "first", "config": str(tiny)},
            {"name": "second", "config": str(tiny), "overrides": {"log_every": 4}},
        ],
        "overrides": {"data.augment.crop": [0.5, 1.0]},
        "seeds": [0, 1],
        "figures": ["*_recall@1"],
    }
    file = tmp_path / "table.json"
    file.write_text(json.dumps(values))
    return file


def starts(folder, row, seed):
    file = folder / row / f"seed{seed}" / "starts"
    return len(file.read_text().splitlines()) if file.exists() else 0


def stop_when(file):
    """Has this process told to stop once a file is there."""

    def wait():
        while not file.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def test_a_study_that_is_stopped_goes_on_where_it_was(stand_in, table, tmp_path, capsys):
    folder = tmp_path / "study"
    (stand_in / "waits second-0").touch()
    stop_when(stand_in / "waiting")
    command = ["mlip", "study", f"--table={table}", f"--out={folder}"]
    assert door.main(command) == 75
    assert [starts(folder, row, 0) for row in ("first", "second")] == [1, 1]
    assert starts(folder, "first", 1) == 0
    assert "Not complete: second/seed0, first/seed1, second/seed1." in read(folder)
    assert door.main(command) == 0
    assert [starts(folder, *run) for run in (("first", 0), ("second", 0), ("first", 1))] == [
        1,
        2,
        1,
    ]
    log = runs.read_log(folder)
    assert log["second/seed0"].starts == 2 and log["second/seed0"].cpu_seconds > 0
    assert {logged.code for logged in log.values()} == {0}
    text = read(folder)
    head, first, second = (
        line
        for line in text.splitlines()
        if line.startswith(("| Row", "| fir", "| sec")) and "seed" not in line
    )
    assert "pairs text to image R@1" not in head and "text to image R@1" in head
    assert first.startswith("| first | 2 of 2 | 64 | 2.1 min |") and "30.00 ± 7.07 % |" in first
    assert "55.00 ± 7.07 % |" in second
    shown = f"`mlip train --config={table.parent}"
    assert shown.rpartition("/")[0] in text and "'--config.data.augment.crop=(0.5, 1.0)'" in text
    assert "complete: first/seed0" in capsys.readouterr().out


def read(folder):
    return (folder / "study.md").read_text("utf-8")


def test_a_run_that_fails_does_not_keep_the_others(stand_in, table, tmp_path, capsys):
    folder = tmp_path / "study"
    (stand_in / "fails first-0").touch()
    assert study(None, None, table=str(table), out=str(folder), parallel=2) == 1
    assert f"failed: first/seed0: see {folder}/first/seed0.log" in capsys.readouterr().out
    assert "| first | 1 of 2 |" in read(folder) and "| second | 2 of 2 |" in read(folder)
    (stand_in / "fails first-0").unlink()
    assert study(None, None, table=str(table), out=str(folder)) == 0
    assert starts(folder, "first", 0) == 2 and starts(folder, "second", 0) == 1


def test_another_command_in_the_same_place_is_refused(stand_in, table, tmp_path):
    folder = tmp_path / "study"
    assert study(None, None, table=str(table), out=str(folder)) == 0
    table.write_text(table.read_text().replace('"log_every": 4', '"log_every": 2'))
    with pytest.raises(UserError, match="seed0 was run by another command: mlip train"):
        study(None, None, table=str(table), out=str(folder))


def test_runs_at_a_time_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5, 7})
    assert runs._shares(2) == [{1, 5}, {3, 7}]
    assert runs._shares(5) == [{1}, {3}, {5}, {7}, {1}]


MISTAKES = [
    ({}, "has no rows"),
    ({"rows": []}, "at least one row"),
    ({"rows": [{"name": "a"}]}, "row 1 has no config"),
    ({"rows": [{"name": "a/b", "config": "clip"}]}, "must be a folder's name of its own"),
    ({"rows": [{"name": "a", "config": "clip"}] * 2}, "row 2: name='a' must be a folder's name"),
    ({"rows": [{"name": "a", "config": "clp"}]}, "did you mean 'clip'"),
    ({"rows": [{"name": "a", "config": "clip", "override": {}}]}, "did you mean 'overrides'"),
    ({"rows": [{"name": "a", "config": "clip"}], "seeds": [1, 1]}, "a list of different numbers"),
    ({"rows": [{"name": "a", "config": "clip"}], "overrides": {"sed": 1}}, "unknown config key"),
    ({"rows": [{"name": "a", "config": "clip"}], "figures": [1]}, "a list of keys of results.json"),
]


@pytest.mark.parametrize(("values", "message"), MISTAKES)
def test_a_table_with_a_mistake_is_refused_before_anything_runs(tmp_path, values, message):
    file = tmp_path / "table.py"
    file.write_text(f"STUDY = {values!r}\n")
    with pytest.raises(UserError, match=message):
        read_table(str(file), tmp_path)


@pytest.mark.slow
def test_a_real_run_is_stopped_and_resumed(tiny, table, tmp_path):
    """Told to stop in the middle of a run, a study ends in the bits of one that was not."""
    values = json.loads(table.read_text())
    values["rows"], values["seeds"] = values["rows"][:1], [0]
    values["overrides"] = {
        "samples": 8000,  # seconds: there is a middle to be stopped in
        "checkpoint.every_samples": 2000,
        "evaluation.every_samples": 0,
    }
    table.write_text(json.dumps(values))
    out, whole = tmp_path / "study", tmp_path / "whole"
    command = [sys.executable, "-m", "mlip_jax", "study", f"--table={table}"]
    environment = with_devices(1)
    going = subprocess.Popen([*command, f"--out={out}"], env=environment)
    while not (out / "first" / "seed0" / "metrics.jsonl").exists():
        assert going.poll() is None
        time.sleep(0.05)
    going.send_signal(signal.SIGTERM)
    assert going.wait() == 75
    for folder in (out, whole):
        done = subprocess.run([*command, f"--out={folder}"], env=environment, check=False)
        assert done.returncode == 0
    one, other = (
        json.loads((folder / "first" / "seed0" / "results.json").read_text())
        for folder in (out, whole)
    )
    assert one == other
    assert runs.read_log(out)["first/seed0"].starts == 2


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem)
def test_a_table_of_the_documentation_can_be_run(file):
    table = read_table(str(file), Path("studies") / file.stem)
    written = {run.workdir for run in table.runs}
    assert len(written) == len(table.runs) >= 2
    # A row that learns from another one's run comes after it.
    for number, run in enumerate(table.runs):
        for word in run.arguments[0].partition("teacher=")[2].split("+"):
            before = {each.workdir for each in table.runs[:number]}
            assert not word.startswith("studies/") or Path(word) in before
