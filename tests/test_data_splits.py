"""Which split of a dataset is opened, by its role and by its name after #."""

import json

import pytest
from PIL import Image

from mlip_jax.core import schema as config_lib
from mlip_jax.core.errors import UserError
from mlip_jax.data.regions.opening import open_region_set
from mlip_jax.data.sets.opening import open_evaluation, open_source, open_validation, split_spec
from mlip_jax.data.sets.records import MissingSplit


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


@pytest.fixture
def sets(tmp_path):
    """The same images and splits, kept in three ways: train 2, validation 1, test 3."""
    names = {
        split: [f"{split}{index}.png" for index in range(count)]
        for split, count in (("train", 2), ("val", 1), ("test", 3))
    }
    rows = [(name, split) for split, split_names in names.items() for name in split_names]
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(json.dumps({"file": n, "caption": n, "split": s}) for n, s in rows)
    )
    (tmp_path / "pairs.csv").write_text(
        "file,caption,split\n" + "".join(f"{n},{n},{s}\n" for n, s in rows)
    )
    for name, split in rows:
        draw(tmp_path / "tree" / split / "dog" / name)
    return [
        f"jsonl:{tmp_path / 'pairs.jsonl'}",
        f"csv:{tmp_path / 'pairs.csv'}",
        f"folder:{tmp_path / 'tree'}",
    ]


@pytest.mark.parametrize("kind", range(3))
def test_a_split_by_name(sets, kind):
    spec = sets[kind]
    for pin, split, count in (
        ("train", "train", 2),
        ("validation", "validation", 1),
        ("val", "validation", 1),
        ("dev", "validation", 1),
        ("Test", "test", 3),
        ("all", "all", 6),
    ):
        for source in (open_evaluation(f"{spec}#{pin}"), open_source(f"{spec}#{pin}", "train")):
            assert (source.split, len(source)) == (split, count)
            names = [source.name_of(index) for index in range(count)]
            assert len(set(names)) == count
            if pin != "all":
                assert source.parts == (split,)
    assert sorted(source.parts) == ["test", "train", "validation"]
    with pytest.raises(MissingSplit, match="has no split 'tets', only .*; did you mean 'test'"):
        open_evaluation(f"{spec}#tets")
    with pytest.raises(UserError, match="expected a split after #, such as .*#test"):
        open_evaluation(f"{spec}#")


@pytest.mark.parametrize("kind", range(3))
def test_a_split_by_role(sets, kind):
    train, validation = open_source(sets[kind], "train"), open_source(sets[kind], "validation")
    evaluation = open_evaluation(sets[kind])
    assert [len(source) for source in (train, validation, evaluation)] == [2, 1, 1]
    assert [source.split for source in (train, validation)] == ["train", "validation"]
    assert evaluation.split == "validation"


def test_a_set_without_splits(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"file": "a.png", "caption": "a"}')
    spec = f"jsonl:{tmp_path / 'a.jsonl'}"
    evaluation, train = open_evaluation(spec), open_source(spec, "train")
    assert evaluation.split == train.split == "train" and evaluation.parts == train.parts
    assert open_evaluation(f"{spec}#all").parts == train.parts
    with pytest.raises(MissingSplit, match="a.jsonl has no split 'test', only train, all"):
        open_evaluation(f"{spec}#test")


def test_test_stands_in_for_validation(tmp_path):
    draw(tmp_path / "test/dog/1.png")
    draw(tmp_path / "train/dog/2.png")
    evaluation = open_evaluation(f"folder:{tmp_path}")
    assert (evaluation.split, evaluation.parts) == ("validation", ("test",))
    draw(tmp_path / "val/dog/3.png")
    assert open_evaluation(f"folder:{tmp_path}").name_of(0) == str(tmp_path / "val/dog/3.png")
    draw(tmp_path / "dev/dog/4.png")
    with pytest.raises(UserError, match="dev and val are both validation: rename one"):
        open_evaluation(f"folder:{tmp_path}")


def test_validation_of_a_pinned_training_set(sets):
    data = config_lib.default().data
    for pin, count in (("", 1), ("#train", 1), ("#all", None), ("#test", None)):
        data.train = sets[0] + pin
        source = open_validation(data)
        assert (source and len(source)) == count
    data.validation = f"{sets[0]}#test"
    assert len(open_validation(data)) == 3


def test_a_path_may_hold_the_mark(tmp_path):
    path = tmp_path / "a#b.jsonl"
    path.write_text('{"file": "a.png", "caption": "a"}')
    assert split_spec(f"jsonl:{path}") == (f"jsonl:{path}", "")
    assert split_spec(f"jsonl:{path}#val") == (f"jsonl:{path}", "val")
    assert split_spec("coco#val") == ("coco", "val") and split_spec("emoji") == ("emoji", "")
    assert open_evaluation(f"jsonl:{path}#train").split == "train"
    missing = f"jsonl:{tmp_path}/c#/missing.jsonl"  # no split holds a "/"
    assert split_spec(missing) == (missing, "")
    assert split_spec(f"{missing}#val") == (missing, "val")
    with pytest.raises(UserError, match=f"cannot read {tmp_path}/c#/missing.jsonl"):
        open_evaluation(missing)


@pytest.mark.parametrize("opened", [open_evaluation, open_region_set])
def test_a_path_that_does_not_exist_and_holds_the_mark(tmp_path, opened, monkeypatch):
    kind = "jsonl" if opened is open_evaluation else "regions"
    message = f"#b.jsonl is taken for a split, as there is no {tmp_path}/a#b.jsonl either"
    with pytest.raises(UserError, match=message) as caught:
        opened(f"{kind}:{tmp_path}/a#b.jsonl")
    assert str(caught.value).endswith("either")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"the path is relative to {tmp_path}$"):
        opened(f"{kind}:a.jsonl")
