"""Tables of things by name, and CONTRIBUTING's examples of what users add from outside."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mlip_jax
from mlip_jax import main as door
from mlip_jax.core import registry
from mlip_jax.core.errors import UserError
from mlip_jax.core.registry import DATASETS, EVALUATIONS, IMAGE_ENCODERS, LOSSES, Table

ROOT = Path(__file__).parents[1]
TABLES = {name: table for name, table in vars(registry).items() if isinstance(table, Table)}
SMALL = (
    "--config.batch_size=8",
    "--config.samples=32",
    "--config.evaluation.every_samples=16",
    "--config.model.text.tokenizer=wordpiece",
    "--config.model.text.vocab_size=64",
    "--config.model.image.width=16",
    "--config.model.image.image_size=16",
    "--config.model.image.stem=patch",
    "--config.model.text.width=16",
)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    """CONTRIBUTING's code blocks as files of the names that stand above them."""
    folder = tmp_path_factory.mktemp("examples")
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^`(\w+\.py)`.*?^```python\n(.*?)^```$", text, re.M | re.S)
    for name, code in blocks:
        (folder / name).write_text(code)
    names = {"hinge.py", "interactive.py", "lines.py", "spread.py", "convolutions.py"}
    assert names <= {name for name, _ in blocks}
    return folder


@pytest.fixture(autouse=True)
def nothing_stays(on_one_device, monkeypatch):
    """Takes away what a test has registered."""
    on_one_device(monkeypatch)
    yield
    for table in TABLES.values():
        for name in list(table._registered):
            table.unregister(name)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_place_holds_something(table):
    for name in table:
        if name != "onnx":  # needs an extra
            assert table[name] is not None, name


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match="unknown loss 'softmx': .*did you mean 'softmax'"):
        LOSSES["softmx"]
    with pytest.raises(UserError, match="config.a.loss='hinge' is no loss: .*--import=FILE"):
        LOSSES.check("a.loss", "hinge")


def test_a_taken_name_is_refused_and_a_file_may_run_twice(tmp_path):
    with pytest.raises(UserError, match="a loss named 'jsd' is already registered by mlip_jax"):
        LOSSES.register("jsd", LOSSES["softmax"])
    code = "from mlip_jax.core.registry import LOSSES\nLOSSES.register('mine', LOSSES['softmax'])\n"
    for name in ("one.py", "other.py"):
        (tmp_path / name).write_text(code)
    runpy.run_path(str(tmp_path / "one.py"))
    runpy.run_path(str(tmp_path / "one.py"))
    assert "mine" in LOSSES and list(LOSSES)[-1] == "mine"
    with pytest.raises(UserError, match=r"already registered by .*one\.py: choose another"):
        runpy.run_path(str(tmp_path / "other.py"))


def trained(examples, name, pairs, workdir, *flags):
    command = [f"--config={examples / name}:data=jsonl:{pairs}", f"--workdir={workdir}"]
    assert door.main(["mlip", *command, *SMALL, "--config.data.workers=0", *flags]) == 0
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_loss_from_outside(examples, pairs, tmp_path):
    lines = trained(examples, "hinge.py", pairs, tmp_path / "run", "--config.log_every=2")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["perspectives"]["spatial_global"]["loss"] == "hinge"
    LOSSES.unregister("hinge")
    evaluate = ["mlip", "evaluate", f"--workdir={tmp_path / 'run'}"]
    assert door.main(evaluate) == 2  # another process has not registered it
    assert door.main([*evaluate, f"--import={examples / 'hinge.py'}"]) == 0


def test_a_way_to_learn_from_outside(examples, pairs, tmp_path):
    lines = trained(examples, "interactive.py", pairs, tmp_path / "run", "--config.log_every=4")
    losses = [line["loss/spatial_global/interactive"] for line in lines if "loss" in line]
    assert losses and min(losses) > 0


def test_a_dataset_from_outside_is_read_in_worker_processes(examples, pairs, tmp_path):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    lines = tmp_path / "pairs.txt"
    lines.write_text("".join(f"{pairs.parent / row['file']} | {row['caption']}\n" for row in rows))
    command = [f"--config={examples / 'lines.py'}:data=lines:{lines}"]
    command += [f"--workdir={tmp_path / 'run'}", "--config.data.workers=1"]
    assert door.main(["mlip", *command, *SMALL]) == 0
    assert "lines" in DATASETS and mlip_jax.load(tmp_path / "run").step == 4


def test_an_evaluation_from_outside(examples, pairs, tmp_path):
    lines = trained(examples, "spread.py", pairs, tmp_path / "run")
    key = "spread/pairs/mean_cosine"
    assert [line["step"] for line in lines if key in line] == [2, 4]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert -1 <= results[key] <= 1 and results[f"examples/{key}"] == 8
    assert "spread" in EVALUATIONS


def test_an_encoder_from_outside(examples, pairs, tmp_path):
    trained(examples, "convolutions.py", pairs, tmp_path / "run")
    assert "convolutions" in IMAGE_ENCODERS
    model = mlip_jax.load(tmp_path / "run")
    image = Image.fromarray(np.zeros((20, 20, 3), np.uint8))
    assert np.linalg.norm(model.encode_image([image])) == pytest.approx(1, abs=1e-5)
    out = tmp_path / "exported"
    assert door.main(["mlip", "export", f"--workdir={tmp_path / 'run'}", f"--out={out}"]) == 0
    np.testing.assert_allclose(
        mlip_jax.load(out).encode_image([image]), model.encode_image([image]), atol=1e-6
    )
