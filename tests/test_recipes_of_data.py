"""Public datasets by one word: where they are looked for, and the error when they are missing."""

import json
from pathlib import Path

import pytest
from preparing import pictures, prepare

from mlip_jax import main as door
from mlip_jax.cli import command_line
from mlip_jax.core.errors import UserError
from mlip_jax.data.sets import public
from mlip_jax.data.sets.opening import open_evaluation, open_source

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", public.PLACES)
def test_a_set_that_is_not_there_says_what_to_put_where(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLIP_JAX_CACHE", str(tmp_path))
    assert door.main(["mlip", f"--config={ROOT}/configs/mlip.py:data={name}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: the dataset {name!r} belongs in {tmp_path / name}, which lacks"
    )
    assert public.instructions(name, tmp_path / name) in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["quick", "S/32"])
@pytest.mark.parametrize("name", public.PLACES)
def test_every_set_is_a_valid_config(name, size):
    argument = f"--config={ROOT}/configs/mlip.py:size={size},data={name}"
    config = command_line.parse([argument]).config
    assert config.data.train == name
    assert config.optimizer.warmup_samples < config.samples


def test_the_documentation_gives_the_same_instructions():
    text = " ".join((ROOT / "docs/data.md").read_text().replace("<", "").replace(">", "").split())
    for name in public.PLACES:
        assert public.instructions(name, f"CACHE/{name}") in text.replace("`", ""), name


def class_folders(folder):
    for split in ("train", "val"):
        pictures(folder / split / "n01440764", 2)
    (folder / "classes.json").write_text('{"n01440764": "tench"}')


def flickr(folder):
    pictures(folder / "images", 3)
    images = [
        {"filename": f"{i}.jpg", "split": split, "sentences": [{"raw": f"a {i}"}]}
        for i, split in enumerate(("train", "val", "test"))
    ]
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))


def voc(folder):
    lists = folder / "VOCdevkit/VOC2007/ImageSets/Main"
    lists.mkdir(parents=True)
    pictures(folder / "VOCdevkit/VOC2007/JPEGImages", 2)
    (lists / "cat_trainval.txt").write_text("0 1\n")
    (lists / "cat_test.txt").write_text("1 1\n")


def coco(folder):
    (folder / "annotations").mkdir(parents=True)
    for part in ("train2017", "val2017"):
        pictures(folder / part, 1)
        content = {
            "images": [{"id": 1, "file_name": "0.jpg"}],
            "annotations": [{"image_id": 1, "caption": part}],
        }
        (folder / f"annotations/captions_{part}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "make", "train", "evaluation"),
    [
        ("imagenet", class_folders, "tench", "tench"),
        ("flickr30k", flickr, "a 0", "a 2"),
        ("voc", voc, "cat", "cat"),
        ("coco", coco, "train2017", "val2017"),
    ],
)
def test_a_set_that_is_there_is_opened(tmp_path, name, make, train, evaluation):
    make(tmp_path / name)
    where = {"cache_dir": str(tmp_path)}
    assert open_source(name, "train", **where)[0].captions == (train,)
    assert open_evaluation(name, **where)[0].captions == (evaluation,)


def test_a_set_of_the_web_is_prepared(tmp_path):
    pictures(tmp_path / "in/a", 2)
    prepare(tmp_path, f"folder:{tmp_path / 'in'}").rename(tmp_path / "cc3m")
    assert len(open_source("cc3m", "train", cache_dir=str(tmp_path))) == 2
    with pytest.raises(UserError, match="did you mean 'cc3m'"):
        open_source("cc4m", "train")
