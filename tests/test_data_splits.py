"""Which split of a dataset is opened, by its role and by its name after #."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from mlip_jax.core import schema as config_lib
from mlip_jax.core.errors import UserError
from mlip_jax.data.regions.opening import open_region_set
from mlip_jax.data.sets.held_out import overlap
from mlip_jax.data.sets.opening import (
    open_evaluation,
    open_source,
    open_training,
    open_validation,
    split_spec,
)
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


@pytest.fixture
def many(tmp_path):
    """200 images for training, kept in four ways."""
    names = [f"photo{index}.png" for index in range(200)]
    for index, name in enumerate(names):
        draw(tmp_path / "tree" / f"class{index % 2}" / name)
    rows = [{"file": f"tree/class{i % 2}/{n}", "caption": n} for i, n in enumerate(names)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [f"{row['file']},{row['caption']}\n" for row in rows]
    (tmp_path / "pairs.csv").write_text("file,caption\n" + "".join(lines))
    archive = tmp_path / "tree.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for row in rows:
            file.write(tmp_path / row["file"], row["file"].removeprefix("tree/"))
    return [
        f"jsonl:{tmp_path / 'pairs.jsonl'}",
        f"csv:{tmp_path / 'pairs.csv'}",
        f"folder:{tmp_path / 'tree'}",
        f"zip:{archive}",
    ]


def names_in(source):
    return [source.name_of(index) for index in range(len(source))]


@pytest.mark.parametrize("kind", range(4))
def test_a_share_of_a_split_by_the_names(many, kind):
    spec = many[kind]
    whole = open_source(spec, "train")
    most, rest = (open_source(f"{spec}#train{part}", "train") for part in ("[:90%]", "[90%:]"))
    assert sorted(names_in(most) + names_in(rest)) == sorted(names_in(whole))
    assert 8 <= len(rest) <= 35
    assert rest.split == "train[90%:]" and rest.parts == ("train[90%:]",)
    assert rest[0] == whole[names_in(whole).index(names_in(rest)[0])]
    assert list(rest.captions()) == [text for record in rest for text in record.captions]
    assert any("train[90%:]" in note and "of 200 records" in note for note in rest.notes)
    middle = open_source(f"{spec}#all[10.5%:90%]", "train")
    assert set(names_in(middle)) < set(names_in(most))


def test_where_a_record_falls_is_a_matter_of_its_name(many, tmp_path):
    before = names_in(open_source(f"{many[0]}#train[:50%]", "train"))
    moved = tmp_path / "elsewhere"
    (tmp_path / "pairs.jsonl").rename(tmp_path / "old.jsonl")
    shutil.copytree(tmp_path / "tree", moved / "tree")
    rows = (tmp_path / "old.jsonl").read_text().splitlines()
    more = [json.dumps({"file": f"new{index}.png", "caption": "new"}) for index in range(50)]
    for row in more:
        draw(moved / json.loads(row)["file"])
    (moved / "pairs.jsonl").write_text("\n".join([*more, *reversed(rows)]))
    after = names_in(open_source(f"jsonl:{moved / 'pairs.jsonl'}#train[:50%]", "train"))
    kept = {str(Path(name).relative_to(moved)) for name in after}
    assert {str(Path(name).relative_to(tmp_path)) for name in before} == {
        name for name in kept if not name.startswith("new")
    }


@pytest.mark.parametrize("part", ["[5%]", "[95%:5%]", "[:105%]", "[a:b]", "[:5%]x", "[:95]"])
def test_a_share_that_is_none_is_refused(many, part):
    with pytest.raises(UserError, match="expected a share of a split in percent.*train.:95%"):
        open_source(f"{many[0]}#train{part}", "train")


def test_a_share_that_holds_no_record_is_refused(many):
    with pytest.raises(UserError, match=r"train\[:0.001%\] of pairs is empty: none of its 200"):
        open_source(f"{many[0]}#train[:0.001%]", "train")


def data(train, validation):
    config = config_lib.default().data
    config.train, config.validation = train, validation
    return config


@pytest.mark.parametrize("kind", range(4))
def test_a_set_with_one_split_holds_out_a_share(many, kind):
    config = data(many[kind], "10%")
    train, validation = open_training(config), open_validation(config)
    everything = names_in(open_source(many[kind], "train"))
    assert sorted(names_in(train) + names_in(validation)) == sorted(everything)
    assert names_in(validation) == names_in(open_source(f"{many[kind]}#train[90%:]", "train"))
    part = data(f"{many[kind]}#train[:50%]", "10%")
    inner = set(names_in(open_validation(part)))
    assert inner and inner == set(names_in(open_source(f"{many[kind]}#train[45%:50%]", "train")))
    assert not inner & set(names_in(open_training(part)))


def test_a_mixture_holds_out_a_share_of_its_first_set(many):
    config = data(f"mix:{many[0]}*0.5+{many[2]}*0.5", "10%")
    held_out = open_validation(config)
    assert len(open_training(config)) == 400 - len(held_out)


@pytest.mark.parametrize("share", ["0%", "100%", "250%"])
def test_a_held_out_share_that_leaves_a_side_empty_is_refused(many, share):
    for open_side in (open_training, open_validation):
        with pytest.raises(UserError, match=f"validation='{share}' leaves nothing on one side"):
            open_side(data(many[0], share))


def test_shares_overlap_where_their_ranges_do():
    assert overlap(("train[:95%]",), ("train",)) and overlap(("a", "train"), ("train[95%:]",))
    assert overlap(("train[:95%]",), ("train[90%:]",))
    assert not overlap(("train[:95%]",), ("train[95%:]", "val"))
