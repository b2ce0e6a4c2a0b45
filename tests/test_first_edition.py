"""What version 0.1.0 wrote, under jax 0.10, is still read: a run, and every form of export."""

import json
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image

import mlip_jax
from mlip_jax import main as door

ARCHIVE = Path(__file__).parent / "data" / "first_edition.tar.xz"


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """run/, a workdir; mlip/, hf_clip/, open_clip/ and stablehlo/; embeddings.npz; pairs/."""
    folder = tmp_path_factory.mktemp("first")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", ["run", "mlip", "hf_clip", "open_clip"])
def test_it_embeds_as_it_did(first, name):
    wrote = np.load(first / "embeddings.npz")
    model = mlip_jax.load(first / name)
    texts = [str(text) for text in wrote["texts"]]
    np.testing.assert_allclose(
        model.encode_image(wrote["images"]), wrote[f"{name}/image"], atol=2e-5
    )
    np.testing.assert_allclose(model.encode_text(texts), wrote[f"{name}/text"], atol=2e-5)


@pytest.mark.skipif(
    jax.version.__version_info__ < (0, 10), reason="JAX reads programs of older versions, not newer"
)
def test_programs_run(first):
    wrote = np.load(first / "embeddings.npz")
    program = jax_export.deserialize(
        bytearray((first / "stablehlo/encode_image.stablehlo").read_bytes())
    )
    model = mlip_jax.load(first / "run")
    pixels = np.stack([model.preprocess(Image.fromarray(image)) for image in wrote["images"]])
    np.testing.assert_allclose(np.asarray(program.call(pixels)), wrote["run/image"], atol=2e-5)


def test_the_run_is_evaluated_to_its_figures_and_exported(first, tmp_path, monkeypatch):
    shutil.copytree(first, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")  # the path of its data is relative
    wrote = json.loads(Path("run/results.json").read_text())
    assert door.main(["mlip", "evaluate", "--workdir=run"]) == 0
    assert json.loads(Path("run/results.json").read_text()) == wrote
    assert door.main(["mlip", "export", "--workdir=run", "--out=again"]) == 0
    images = np.load("embeddings.npz")["images"]
    np.testing.assert_allclose(
        mlip_jax.load("again").encode_image(images),
        mlip_jax.load("mlip").encode_image(images),
        atol=1e-6,
    )


def test_the_run_is_finished_and_says_so(first, tmp_path, monkeypatch, capsys):
    shutil.copytree(first, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    config = Path("written.py")
    config.write_text(
        "from pathlib import Path\nfrom mlip_jax.core.schema import from_json\n\n\n"
        "def get_config(arg=None):\n    return from_json(Path('run/config.json').read_text())\n"
    )
    assert door.main(["mlip", f"--config={config}", "--workdir=run"]) == 0
    assert "run holds this run: it is finished" in capsys.readouterr().err
