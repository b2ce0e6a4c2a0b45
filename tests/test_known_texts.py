"""A frozen text encoder that embeds captions once, against one that does so in each step."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from mlip_jax import main as door
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.validation import validate
from mlip_jax.storage.saved import restore_fields, saved_steps
from mlip_jax.training import known_texts

pytestmark = pytest.mark.usefixtures("small_runs")

FROZEN = (
    "--config.optimizer.name=adamw",
    "--config.optimizer.rates.text=0",
    "--config.perspectives.frequency_tokens.weight=0",
    "--config.perspectives.frequency_global.weight=1",
    "--config.evaluation.every_samples=0",
    "--config.checkpoint.every_samples=32",
    "--config.data.validation=",
    "--config.data.augment.flip=true",
    # Half of the words are left out, so that few of the captions are those of the dataset.
    "--config.data.caption.word_dropout=0.5",
    "--config.log_every=1",
)


def run(tiny, workdir, *flags):
    return door.main(["mlip", "train", f"--config={tiny}", f"--workdir={workdir}", *FROZEN, *flags])


@pytest.fixture(scope="module")
def once(tiny, tmp_path_factory):
    """A finished run. Copy it to change it."""
    folder = tmp_path_factory.mktemp("once") / "run"
    assert run(tiny, folder, "--config.model.text.embedded=once") == 0
    return folder


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return np.array([line["loss"] for line in lines])


def state(folder):
    fields = ("step", "params", "optimizer", "ema")
    return jax.tree.leaves([restore_fields(folder, [field])[0] for field in fields])


def test_it_equals_one_that_is_asked_each_step(tiny, once, tmp_path):
    assert run(tiny, tmp_path / "run") == 0
    np.testing.assert_allclose(losses(once), losses(tmp_path / "run"), rtol=1e-5)


def test_on_eight_devices_the_same_comes_out(tiny, once, tmp_path, capfd):
    devices = ("--config.mesh.data=4", "--config.mesh.fsdp=2")
    assert run(tiny, tmp_path / "run", "--config.model.text.embedded=once", *devices) == 0
    assert "captions: 32 embedded by the frozen text encoder, once" in capfd.readouterr().err
    np.testing.assert_allclose(losses(once), losses(tmp_path / "run"), rtol=1e-5)


def test_resumed_it_goes_on_bit_for_bit(tiny, once, tmp_path):
    folder = shutil.copytree(once, tmp_path / "run")
    assert saved_steps(folder) == [8, 4]
    shutil.rmtree(folder / "checkpoints/8")
    assert run(tiny, folder, "--config.model.text.embedded=once") == 0
    for one, two in zip(state(once), state(folder), strict=True):
        assert one.tobytes() == two.tobytes()


def test_too_many_captions_are_refused(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(known_texts, "_MOST_BYTES", 31 * 16 * 4)
    assert run(tiny, tmp_path / "run", "--config.model.text.embedded=once") == 2
    assert "set it to 'each_step'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.rates.text": 0.1}, "the text encoder is trained"),
        ({"perspectives.spatial_tokens.weight": 1.0}, "spatial_tokens has a weight"),
        ({"perspectives.other_caption.weight": 1.0}, "other_caption has a weight"),
        ({"perspectives.caption.weight": 1.0}, "caption has a weight"),
        ({"model.text.embedded": "twice"}, "model.text.embedded"),
    ],
)
def test_what_needs_more_than_one_vector_a_caption_is_refused(changes, message):
    config = schema.default()
    config.optimizer.rates.text = 0.0
    config.model.text.embedded = "once"
    validate(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        validate(config)
