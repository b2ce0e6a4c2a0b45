"""The embedded dataset. One build serves all tests here."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlip_jax.core import schema as config_lib
from mlip_jax.core.errors import UserError
from mlip_jax.data.images.preprocessing import decode
from mlip_jax.data.sets import emoji
from mlip_jax.data.sets.opening import open_source, open_validation
from mlip_jax.data.text.captions import clean_caption

BUILD = "import sys; from mlip_jax.data.sets import emoji; print(emoji.directory(sys.argv[1]))"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """A cache that a killed build left behind, then built by two processes at once."""
    folder = tmp_path_factory.mktemp("cache")
    command = [sys.executable, "-c", BUILD, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.Popen(command, env=environment)
    while not list(folder.glob("emoji_pairs/.1.0.0.*/tfds/emoji_pairs/*incomplete*")):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (folder / "emoji_pairs/1.0.0").exists()

    builds = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for build in builds:
        assert build.communicate(timeout=120)[0].strip() == str(folder / "emoji_pairs/1.0.0")
        assert build.returncode == 0
    assert os.listdir(folder / "emoji_pairs") == ["1.0.0"]
    assert all(path.is_file() for path in (folder / "emoji_pairs/1.0.0").iterdir())
    return str(folder)


def records(cache, split):
    source = open_source("emoji", split, cache_dir=cache)
    return source, [source[index] for index in range(len(source))]


def test_splits(cache):
    train_source, train = records(cache, "train")
    validation_source, validation = records(cache, "validation")
    concepts = len(emoji.concepts())
    assert 1850 < concepts < 2000
    assert len(train) + len(validation) == 2 * concepts and len(validation) == concepts // 2
    names = {record.name for record in train}
    assert len(names) == len(train)
    for record in validation:
        style, code = record.name.split("/")
        assert style == "twemoji"
        assert record.name not in names and f"openmoji/{code}" in names
        assert len(record.captions) == 1  # one right caption an image in retrieval
    assert any(len(record.captions) > 1 for record in train)
    assert train_source.class_names == validation_source.class_names
    assert len(train_source.class_names) > 90


def test_records(cache):
    source, train = records(cache, "train")
    by_name = {record.name: record for record in train}
    face = by_name["openmoji/1f600"]
    assert face.captions[0] == "grinning face"
    assert face.tags == ("Smileys and Emotion", "face smiling")
    assert source.class_names[face.label] == "face smiling"
    assert by_name["openmoji/1f1eb-1f1f7"].captions[:2] == ("flag of France", "France")
    for record in train:
        captions = [caption.lower() for caption in record.captions]
        assert len(set(captions)) == len(captions)
        assert all(caption and not set(":_") & set(caption) for caption in captions)
    for name, size in (("openmoji/1f600", (96, 96)), ("twemoji/2049", (72, 72))):
        image = decode(by_name[name].image)
        assert (image.mode, image.size) == ("RGB", size)
        assert np.asarray(image)[0, 0].tolist() == [255, 255, 255]


def test_cleaned_records(cache):
    source = open_source("emoji", "train", cache_dir=cache, cleaning="clip_lite")
    loaded = [source[index] for index in range(len(source))]
    texts = [text for record in loaded for text in (*record.captions, *record.tags)]
    assert list(source.captions()) == texts
    assert all(text and text == clean_caption(text) for text in texts)
    assert all(len(set(record.captions)) == len(record.captions) for record in loaded)


def test_the_half_held_out_is_stable():
    codes = [f"{code:x}" for code in range(0x1F600, 0x1F608)]
    assert emoji.held_out(codes) == emoji.held_out(codes[::-1])
    assert sorted(emoji.held_out(codes)) == ["1f600", "1f601", "1f602", "1f605"]


def test_source_by_config(cache, monkeypatch):
    monkeypatch.setenv("MLIP_JAX_CACHE", cache)
    source = open_validation(config_lib.default().data)
    assert source.name == "emoji" and source.split == "validation"
    assert "CC BY-SA 4.0" in source.attribution and "CC BY 4.0" in source.attribution


def test_source_opens_in_another_process(cache):
    source = open_source("emoji", "validation", cache_dir=cache)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(source.__getitem__, (7,)) == source[7]


def test_missing_package(tmp_path, monkeypatch):
    original = importlib.import_module

    def without_resvg(name):
        if name == "resvg_py":
            raise ModuleNotFoundError(name)
        return original(name)

    monkeypatch.setattr(importlib, "import_module", without_resvg)
    with pytest.raises(UserError, match="^the dataset 'emoji' needs .* pip install resvg-py$"):
        open_source("emoji", "train", cache_dir=str(tmp_path))


def test_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot build the dataset 'emoji' in"):
        open_source("emoji", "train", cache_dir=str(tmp_path / "file"))
