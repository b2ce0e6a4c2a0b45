"""Training from Python: `mlip_jax.config`, `mlip_jax.train`, its sources and callbacks."""

import json

import numpy as np
import pytest

import mlip_jax
from mlip_jax import main as door
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.data.sets.opening import open_source
from mlip_jax.storage.saved import restore_fields
from mlip_jax.training import evaluation


@pytest.fixture(autouse=True)
def light(on_one_device, monkeypatch):
    on_one_device(monkeypatch)
    monkeypatch.setattr(evaluation, "write_report", lambda *_: "none")


class Heard(mlip_jax.Callback):
    """Writes down what it hears; raises in one event if asked."""

    def __init__(self, raises=""):
        self.events = []
        self.raises = raises

    def _hear(self, event, step, *more):
        self.events.append((event, step))
        if event == self.raises:
            raise KeyError("gone")

    def on_start(self, run, step):
        self.samples = run.config.samples
        self._hear("start", step)

    def on_step(self, step):
        self._hear("step", step)

    def on_metrics(self, step, metrics):
        assert np.isfinite(metrics["loss"]) and "images_per_second" in metrics
        self._hear("metrics", step)

    def on_evaluation(self, step, figures):
        assert "retrieval/pairs/text_to_image_recall@1" in figures
        self._hear("evaluation", step)

    def on_checkpoint(self, step, folder):
        assert folder.parent.name == "checkpoints" and folder.name == str(step)
        self._hear("checkpoint", step)

    def on_end(self, step):
        self._hear("end", step)


def test_a_config_by_name_or_path_with_overrides(tiny):
    config = mlip_jax.config("mlip:objective=jsd", {"samples": 640, "optimizer.name": "adamw"})
    assert (config.name, config.samples, config.optimizer.name) == ("mlip", 640, "adamw")
    assert config.perspectives.spatial_global.loss == "jsd"
    assert mlip_jax.config(str(tiny)).name == "tiny"
    for name, overrides, message in (
        ("miip", {}, "no config file miip; .*did you mean 'mlip'"),
        ("mlip", {"sample": 1}, "unknown config key sample; did you mean 'samples'"),
        ("mlip", {"samples": "many"}, "config.samples='many'"),
        ("mlip", {"optimizer.learning_rate": -1.0}, "learning_rate=-1.0 must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            mlip_jax.config(name, overrides)


def test_config_files_of_the_first_version_run(tmp_path):
    file = tmp_path / "old.py"
    file.write_text(
        "from mlip_jax.config import arguments, default\n\n\n"
        "def get_config(arg=None):\n    arguments(arg, a='')\n    return default()\n"
    )
    assert mlip_jax.config(f"{file}:a=b").name == "clip"


def test_callbacks_hear_steps_metrics_evaluations_and_checkpoints(tiny, trained, tmp_path):
    heard = Heard()
    result = mlip_jax.train(mlip_jax.config(str(tiny)), tmp_path / "run", callbacks=[heard])
    assert result.finished and (result.step, result.workdir) == (8, tmp_path / "run")
    assert result.figures["retrieval/pairs/text_to_image_recall@1"] >= 0
    steps = {
        event: [step for name, step in heard.events if name == event]
        for event in ("start", "step", "metrics", "evaluation", "checkpoint", "end")
    }
    assert steps == {
        "start": [0],
        "step": [*range(1, 9)],
        "metrics": [2, 4, 6, 8],
        "evaluation": [4, 8],
        "checkpoint": [2, 4, 6, 8],
        "end": [8],
    }
    assert heard.samples == 64
    # The run is that of the command line, to the bit.
    one, other = (restore_fields(folder)[0]["params"] for folder in (trained, tmp_path / "run"))
    assert json.dumps(one, default=lambda x: np.asarray(x).tobytes().hex()) == json.dumps(
        other, default=lambda x: np.asarray(x).tobytes().hex()
    )


@pytest.mark.parametrize(("event", "saved"), [("step", 2), ("evaluation", 4), ("checkpoint", 2)])
def test_a_callback_that_raises_is_named_and_the_run_is_saved(tiny, tmp_path, event, saved):
    heard = Heard(raises=event)
    config, run = mlip_jax.config(str(tiny)), tmp_path / "run"
    with pytest.raises(RunError, match=f"the callback Heard raised KeyError in on_{event}: 'gone'"):
        mlip_jax.train(config, run, callbacks=[heard])
    _, extras = restore_fields(run)
    assert extras["step"] == saved
    assert sum(name == event for name, _ in heard.events) == 1  # it is not called again
    assert mlip_jax.train(config, run).step == 8


def test_a_callback_that_raises_at_the_start_costs_no_step(tiny, tmp_path):
    with pytest.raises(RunError, match="in on_start"):
        mlip_jax.train(
            mlip_jax.config(str(tiny)), tmp_path / "run", callbacks=[Heard(raises="start")]
        )
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_source_of_ones_own(tiny, pairs, tmp_path, capsys):
    source = open_source(f"jsonl:{pairs}", "train")
    config, run = mlip_jax.config(str(tiny), {"data.train": "emoji"}), tmp_path / "run"
    result = mlip_jax.train(config, run, source=source)
    assert result.finished and not result.figures
    assert config.data.train == "emoji"  # the caller's own is left as it is
    assert json.loads((run / "config.json").read_text())["data"]["train"] == "object:pairs"
    assert "32 images of pairs; validation: none" in capsys.readouterr().err
    assert mlip_jax.train(config, run, source=source).step == 8
    assert mlip_jax.load(run).step == 8
    assert door.main(["mlip", "train", f"--config={tiny}", f"--workdir={run}"]) == 2
    assert "run of another config (data.train: object:pairs ->" in capsys.readouterr().err
    other_config = config.copy_and_resolve_references()
    other_config.data.train = "object:pairs"
    with pytest.raises(UserError, match="'pairs', a source object of a Python program"):
        mlip_jax.train(other_config, tmp_path / "other")
