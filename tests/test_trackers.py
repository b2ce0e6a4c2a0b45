"""Runs in Weights & Biases and MLflow: what they keep, read back by their own means."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.training.trackers import FILE, TRACKERS, MLflow, Tracker, Wandb, trackers

RECALL = "retrieval/photos/text_to_image_recall@1"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What a tracker sees of a run, without anybody's keys."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "photos").mkdir()
    console = Console(file=io.StringIO(), width=300)
    return SimpleNamespace(
        folder=tmp_path / "photos",
        config=schema.default(),
        console=console,
        steps=20,
        seen=lambda step: 256 * step,
    )


def follow(callback, run, *steps):
    callback.on_start(run, steps[0] - 10)
    for step in steps:
        callback.on_metrics(step, {"loss": 1 / step})
    callback.on_evaluation(steps[-1], {RECALL: 0.25})
    callback.on_end(steps[-1])


def said(run):
    return run.console.file.getvalue()


def records(file):
    """What an offline file of wandb holds: LevelDB's log of records in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = file.read_bytes(), 7, []  # after the name of the format
    while at + 7 <= len(content):
        left = -at % 32768
        if 0 < left < 7:  # no room for a head
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def items(updates):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


@pytest.mark.filterwarnings("default")
def test_wandb_keeps_a_run_offline_without_a_key(run):
    wandb = pytest.importorskip("wandb")
    for step in (10, 20):  # the second one goes on
        follow(Wandb(), run, step)
    wandb.teardown()  # its own process has written everything
    known = json.loads((run.folder / FILE).read_text())["wandb"]
    files = sorted(run.folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert files and all(known in file.name for file in files)
    history, config, name = [], {}, ""
    for file in files:
        for record in records(file):
            if record.HasField("history"):
                history.append(items(record.history.item))
            if record.HasField("run"):
                config |= items(record.run.config.update)
                name = record.run.display_name
            if record.HasField("config"):
                config |= items(record.config.update)
    assert name == "photos" and config["optimizer.learning_rate"] == 0.001
    rows = [(row["_step"], row["loss"], row[RECALL], row["samples"]) for row in history]
    assert rows == [(10, 0.1, 0.25, 2560), (20, 0.05, 0.25, 5120)]
    assert "failed" not in said(run) and said(run).count("offline in") == 2


@pytest.mark.filterwarnings("default")
def test_mlflow_keeps_a_run_in_the_workdir(run):
    mlflow = pytest.importorskip("mlflow")
    follow(MLflow(), run, 10)
    client = mlflow.MlflowClient(f"sqlite:///{run.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mlip_jax").experiment_id
    assert [each.info.status for each in client.search_runs([experiment])] == ["KILLED"]
    follow(MLflow(), run, 20)
    (kept,) = client.search_runs([experiment])
    assert kept.info.run_name == "photos" and kept.info.status == "FINISHED"
    assert kept.data.params["optimizer.learning_rate"] == "0.001"
    history = client.get_metric_history(kept.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(10, 0.1), (20, 0.05)]
    assert kept.data.metrics["retrieval/photos/text_to_image_recall_at_1"] == 0.25
    assert "failed" not in said(run) and "mlflow ui --backend-store-uri=sqlite:///" in said(run)


class Broken(Tracker):
    name, title = "json", "Broken"

    def __init__(self, *fails):
        super().__init__()
        self.fails = fails
        self.called = []

    def _act(self, event):
        self.called.append(event)
        if event in self.fails:
            raise ConnectionError(f"no {event}\nto this host")

    def open(self, run, known):
        self._act("open")
        return "id", "somewhere"

    def log(self, step, values):
        self._act("log")

    def close(self, finished):
        self._act("close")


def test_a_tracker_that_fails_is_told_and_ends_nothing(run):
    never = Broken("open")
    follow(never, run, 10, 20)
    (line,) = said(run).splitlines()
    assert line.startswith("warning: Broken failed (ConnectionError: no open")
    assert never.called == ["open"] and not (run.folder / FILE).exists()
    lost = Broken("log", "close")
    follow(lost, run, *range(10, 60, 10))
    assert lost.called == ["open", "log", "log", "log", "close"]
    assert json.loads((run.folder / FILE).read_text()) == {"json": "id"}


@pytest.mark.parametrize("name", list(TRACKERS))
def test_what_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    message = rf"{name} is not installed: pip install 'mlip_jax\[{name}\]'"
    with pytest.raises(UserError, match=message):
        trackers(name)
    assert trackers("") == []
