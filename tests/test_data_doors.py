"""What texts, paths and numbers of the user's files may be: one answer at every door."""

import inspect
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import index, picture, pictures, prepare, reasons, records, run, sample, tar

from mlip_jax.core import texts
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import open_lock, read_file
from mlip_jax.data.prepare import card
from mlip_jax.data.prepare.make import Made
from mlip_jax.data.regions.base import open_regions
from mlip_jax.data.sets.opening import open_source
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.evaluations import prompts
from mlip_jax.evaluations.concepts.definitions import read_concept

LENIENT = "--max-skipped-share=0.99"
HALF = "it is \ud83d"
LONG = "x" * (texts.MOST_TEXT + 1)
HALF_PATH, NUL_PATH, LONG_PATH = "\ud83d.png", "a\0.png", "x/" * 2100 + "a.png"


def jsonl(folder, path, text):
    rows = [{"file": "0.png", "caption": "fine"}, {"file": path, "caption": text}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_source(f"jsonl:{folder / 'a.jsonl'}", "train")


def table(folder, path, text):
    (folder / "a.csv").write_text(f"file,caption\n0.png,fine\n{path},{text}\n")
    return open_source(f"csv:{folder / 'a.csv'}", "train")


def coco(folder, path, text):
    (folder / "annotations").mkdir()
    (folder / "train2017").mkdir()
    content = {
        "images": [{"id": 1, "file_name": "0.png"}, {"id": 2, "file_name": path}],
        "annotations": [{"image_id": 1, "caption": "fine"}, {"image_id": 2, "caption": text}],
    }
    (folder / "annotations/captions_train2017.json").write_text(json.dumps(content))
    return open_source(f"coco:{folder}", "train")


def karpathy(folder, path, text):
    images = [
        {"filename": name, "split": "train", "sentences": [{"raw": raw}]}
        for name, raw in (("0.png", "fine"), (path, text))
    ]
    (folder / "a.json").write_text(json.dumps({"images": images}))
    return open_source(f"karpathy:{folder / 'a.json'}", "train")


def objects(folder, path, text):
    images = [{"file_name": "0.png", "objects": ["fine"]}, {"file_name": path, "objects": [text]}]
    (folder / "a.json").write_text(json.dumps({"images": images}))
    return open_source(f"objects:{folder / 'a.json'}", "train")


def instances(folder, path, text):
    content = {
        "images": [{"id": 1, "file_name": "0.png"}, {"id": 2, "file_name": path}],
        "categories": [{"id": 1, "name": "fine"}, {"id": 2, "name": text}],
        "annotations": [{"image_id": id, "category_id": id} for id in (1, 2)],
    }
    (folder / "a.json").write_text(json.dumps(content))
    return open_source(f"objects:{folder / 'a.json'}", "train")


def regions(folder, path, text):
    (folder / "0.png").write_bytes(picture(form="PNG"))
    box = [0, 0, 1, 1]
    rows = [{"file": "0.png", "caption": text, "box": box}]
    rows.append({"file": path, "caption": "fine", "box": box})
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_regions(folder / "a.jsonl", max_skipped_share=0.9)


DOORS = (jsonl, table, coco, karpathy, objects, instances, regions)


WRONG_PATHS = {
    HALF_PATH: "holds half of a surrogate pair, which is no character",
    NUL_PATH: "holds a NUL character",
    LONG_PATH: "has 4,205 bytes, at most 4,095 can be opened",
}


@pytest.mark.parametrize(
    ("door", "path"),
    # UTF-8, in which tables are, cannot hold half of a pair.
    [(door, path) for door in DOORS for path in WRONG_PATHS if (door, path) != (table, HALF_PATH)],
    ids=lambda value: ascii(value)[1:12] if isinstance(value, str) else value.__name__,
)
def test_a_path_that_cannot_be_is_an_error_with_its_place(tmp_path, door, path):
    with pytest.raises(UserError, match=r":2: |:3: |images\[1\]: ") as caught:
        door(tmp_path, path, "fine")
    assert WRONG_PATHS[path] in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("door", DOORS)
def test_a_text_that_is_too_long_is_an_error_with_its_place(tmp_path, door):
    with pytest.raises(UserError, match=r":1: |:2: |:3: |\[1\]: ") as caught:
        door(tmp_path, "0.png", LONG)
    assert "has 100,001 characters, at most 100,000 are read" in str(caught.value)


@pytest.mark.parametrize("door", [door for door in DOORS if door is not table])
def test_half_a_character_is_read_as_a_question_mark_and_said(tmp_path, door):
    (tmp_path / "1.png").write_bytes(picture(form="PNG"))
    source = door(tmp_path, "1.png", HALF)
    note = next(note for note in source.notes if "half of a surrogate pair" in note)
    assert " with one: 1 (" in note and note.isprintable()
    if door is regions:
        assert source[0].expression == "it is ?"
        assert "a.jsonl:1" in note
    else:
        assert list(source.captions()) == ["fine", "it is ?"]
    assert "it is ?" in getattr(source, "class_names", ()) or door not in (objects, instances)


def test_names_of_files_that_are_not_utf_8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/set"
    os.makedirs(folder + b"/caf\xe9")
    os.makedirs(folder + b"/dog")
    for name in (b"/caf\xe9/\xff.png", b"/dog/a\nb.png"):
        with open(folder + name, "wb") as file:
            file.write(picture(form="PNG"))
    source = open_source(f"folder:{tmp_path / 'set'}", "train")
    assert source.class_names == ("caf?", "dog")
    assert source.notes == (
        'half of a surrogate pair is no character and is read as "?"; class names with one: 1 '
        "(caf\\udce9)",
    )
    assert [source[i].captions for i in (0, 1)] == [("caf?",), ("dog",)]
    assert source[0].image == picture(form="PNG")
    assert source.name_of(0) == source[0].name == str(tmp_path / "set/caf\\udce9/\\udcff.png")
    assert source.name_of(1) == str(tmp_path / "set/dog/a\\nb.png")


def test_class_folders_of_any_depth(tmp_path):
    depth = 400
    folder = tmp_path / "set/dog"
    below = folder / "/".join("d" * depth)
    below.mkdir(parents=True)
    (below / "1.png").write_bytes(picture(form="PNG"))
    spec, limit = f"folder:{tmp_path / 'set'}", sys.getrecursionlimit()
    open_source(spec, "train")  # whatever is imported now, is not below
    sys.setrecursionlimit(len(inspect.stack()) + depth // 2)
    try:
        source = open_source(spec, "train")
    finally:
        sys.setrecursionlimit(limit)
    assert len(source) == 1 and source[0].image == picture(form="PNG")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"caption": 0}, '"caption" must be a text, found a number'),
        ({"caption": False}, '"caption" must be a text, found a truth value'),
        ({"caption": []}, '"caption" must be a text, found a list'),
        ({"label": 0}, '"label" must be a text, found a number'),
        ({"label": False}, '"label" must be a text, found a truth value'),
        ({"label": []}, '"label" must be a text, found a list'),
        ({"label": 10**400}, '"label" must be a text, found a number'),
        ({"captions": 0}, '"captions" must be a list of texts'),
        ({"captions": ""}, '"captions" must be a list of texts'),
        ({"labels": {}}, '"labels" must be a list of texts'),
        ({"caption": "a", "tags": 0}, '"tags" must be a list of texts'),
        ({"caption": "a", "split": "x" * 10**6}, "unknown split 'xxx"),
        ({"caption": "a", "split": 10**400}, "unknown split 1000"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_values_of_another_type_are_errors(tmp_path, row, reason):
    (tmp_path / "a.jsonl").write_text(json.dumps({"file": "0.png", **row}))
    with pytest.raises(UserError) as caught:
        open_source(f"jsonl:{tmp_path / 'a.jsonl'}", "train")
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}:1: {reason}")
    assert len(str(caught.value)) < 400


def test_null_is_none(tmp_path):
    rows = [{"file": "0.png", "caption": "a", "captions": None, "tags": None, "label": None}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    assert list(open_source(f"jsonl:{tmp_path / 'a.jsonl'}", "train").captions()) == ["a"]


@pytest.mark.parametrize(
    "edge", ["1e400", "NaN", "1" + "0" * 400, "true", '"1"', "[" * 90 + "]" * 90]
)
def test_boxes_are_of_numbers(tmp_path, edge):
    (tmp_path / "0.png").write_bytes(picture(form="PNG"))
    row = f'{{"file": "0.png", "caption": "a", "box": [0, 0, 1, {edge}]}}'
    (tmp_path / "a.jsonl").write_text(row)
    with pytest.raises(
        UserError, match=r"a.jsonl:1: a box must be .left, top, width, height."
    ) as e:
        open_regions(tmp_path / "a.jsonl")
    assert len(str(e.value)) < 300


def test_a_file_that_no_path_can_name_is_one_that_cannot_be_read(tmp_path):
    for path in ("a\0b", "\ud800", "x" * 300, "x/" * 3000, "."):
        with pytest.raises(OSError, match="."):
            read_file(tmp_path / path)


def test_texts_of_programs_and_commands(tmp_path):
    for name in ("clip", "wordpiece"):
        tokenizer = load_tokenizer(name, captions=lambda: [HALF, "it is a dog, it is ?"] * 3)
        assert (tokenizer.encode([HALF], 16) == tokenizer.encode(["it is ?"], 16)).all()
    (tmp_path / "names.json").write_text(json.dumps(["dog", HALF]))
    with pytest.raises(UserError, match="expected a list of class names"):
        prompts.find_class_names(str(tmp_path / "names.json"), ("a", "b"), "set")
    concept = {"name": "a", "sides": ["x", HALF], "pairs": [["he", "she"]], "templates": ["{}"]}
    (tmp_path / "c.json").write_text(json.dumps({**concept, "components": 1}))
    with pytest.raises(UserError, match="'sides': expected two different words"):
        read_concept(str(tmp_path / "c.json"))


def test_prepare_leaves_such_rows_out_by_name(tmp_path):
    pictures(tmp_path, 2)
    rows = [
        {"image": "0.jpg", "caption": HALF},
        *({"image": path, "caption": "a"} for path in (HALF_PATH, NUL_PATH, LONG_PATH)),
        {"image": "0.jpg", "caption": LONG},
        {"image": "0.jpg", "caption": 0},
        {"image": "x" * 300, "caption": "a"},
        {"image": "1.jpg", "label": 0},
        {"image": "0.jpg", "caption": "a", "\u0073plit": "holdout"},
    ]
    lines = [json.dumps(row) for row in rows]
    lines[-1] = lines[-1].replace('"split"', '"\\u0073plit"')
    lines += ['{"image": "0.jpg", "caption": ' + "[" * 100_000, '{"image": 1' + "0" * 5000 + "}"]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    out = prepare(tmp_path, f"jsonl:{tmp_path / 't.jsonl'}", LENIENT)
    kept = records(out)
    assert kept["0.jpg"].captions == ("it is ?",) and kept["1.jpg"].captions == ("0",)
    by_line = {
        int(name.removeprefix(f"{tmp_path}/t.jsonl:").split(" ")[0]): reason
        for name, reason in reasons(out).items()
    }
    assert by_line.pop(7).startswith(f"cannot read the image {'x' * 300}: file name too long")
    assert by_line == {
        2: "the path of the image holds half of a surrogate pair, which is no character",
        3: "the path of the image holds a NUL character",
        4: "the path of the image has 4,205 bytes, at most 4,095 can be opened",
        5: "the caption has 100,001 characters, at most 100,000 are read",
        6: "the caption must be a text, found a number",
        9: "unknown split 'holdout'",
        10: "nested too deeply to be read",
        11: "holds a whole number of too many digits",
    }


def test_texts_in_tars_that_are_too_long(tmp_path):
    members = [*sample("good"), *sample("long", LONG.encode())]
    out = prepare(tmp_path, f"webdataset:{tar(tmp_path / 'a.tar', members)}", LENIENT)
    (reason,) = reasons(out).values()
    assert reason == "the caption has 100,001 characters, at most 100,000 are read"


def test_classes_of_very_many_digits(tmp_path):
    pictures(tmp_path, 1)
    (tmp_path / "t.csv").write_text(f"image,label\n0.jpg,{'9' * 5000}\n")
    out = prepare(tmp_path, f"csv:{tmp_path / 't.csv'}")
    assert index(out)["class_keys"] == ["9" * 5000]
    with pytest.raises(UserError, match=r"^f has 1 classes; the class '999\d*\.\.\. is not one$"):
        card.classes(["9" * 5000], (), "f", ["a"])


@pytest.mark.parametrize(
    ("splits", "reason"),
    [
        (pa.array(["train", "holdout", None]), "unknown split 'holdout'"),
        (pa.array(["val", "testing", ""]), "unknown split 'testing'"),
        (pa.array(["train", "eval", None]).dictionary_encode(), "unknown split 'eval'"),
        (pa.array([None, 1, None]), "unknown split 1"),
        (pa.array([None, 2**50, None], pa.timestamp("ms")), "the split cannot be read: "),
        (pa.array([None, b"\xff", None], pa.binary()), "unknown split b'\\xff'"),
    ],
    ids=["holdout", "testing", "eval", "number", "date", "bytes"],
)
def test_splits_of_parquet_are_those_that_are_known(tmp_path, splits, reason):
    images = [picture(seed) for seed in range(3)]
    columns = {"image": images, "caption": ["a", "b", "c"], "split": splits}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    out = prepare(tmp_path, f"parquet:{tmp_path / 't.parquet'}", LENIENT)
    assert sum(shard["records"] for shard in index(out)["shards"]) == 2
    ((place, why),) = reasons(out).items()
    assert place == f"{tmp_path / 't.parquet'}[1]" and why.startswith(reason)


def test_values_of_parquet_that_python_cannot_hold(tmp_path):
    dates = pa.array([0, 2**50, 0], pa.timestamp("ms"))
    columns = {"image": [picture(seed) for seed in range(3)], "caption": ["a", "b", "c"]}
    pq.write_table(pa.table({**columns, "label": dates}), tmp_path / "t.parquet")
    out = prepare(tmp_path, f"parquet:{tmp_path / 't.parquet'}", LENIENT, code=2)
    assert not out.exists()  # no label is a date
    columns["caption"] = pa.array([b"a", b"\xff", b"c"], pa.binary())
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    out = prepare(tmp_path, f"parquet:{tmp_path / 't.parquet'}", LENIENT)
    assert [record.captions for record in records(out).values()] == [("a",), ("ÿ",), ("c",)]


def test_splits_that_can_be_no_name_of_a_file(tmp_path):
    part = tmp_path / "set"
    part.mkdir()
    (part / "dataset_dict.json").write_text(json.dumps({"splits": ["../set/x"]}))
    (part / "x").mkdir()
    data = pa.table({"image": [picture()], "caption": ["a"]})
    with (
        pa.OSFile(str(part / "x/data.arrow"), "wb") as file,
        pa.ipc.new_stream(file, data.schema) as stream,
    ):
        stream.write_table(data)
    (part / "x/state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (part / "x/dataset_info.json").write_text("{}")
    out = prepare(tmp_path, f"huggingface:{part}", code=2)
    assert not out.exists()


@pytest.fixture
def prepared(tmp_path):
    pictures(tmp_path, 4)
    rows = [json.dumps({"image": f"{i}.jpg", "caption": f"caption {i}"}) for i in range(4)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    return prepare(tmp_path, f"jsonl:{tmp_path / 't.jsonl'}")


def change(out, **changes):
    """Changes the index's first shard, or where there is none of this key, the index."""
    content = index(out)
    for key, value in changes.items():
        (content["shards"][0] if key in content["shards"][0] else content)[key] = value
    (out / "index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("records", 3, '"records" of the shard train-00000 is 3, but it counts 4 images'),
        ("records", -5, "the entry of the shard train-00000 is wrong"),
        ("records", "4", "the entry of the shard train-00000 is wrong"),
        ("records", True, "the entry of the shard train-00000 is wrong"),
        ("records", 10**400, "the entry of the shard train-00000 is wrong"),
        ("sizes", [1], "the entry of the shard train-00000 is wrong"),
        ("sizes", ["a", None], "the entry of the shard train-00000 is wrong"),
        ("sizes", 3, "'int' object is not iterable"),
        ("sums", [1, 2], "the entry of the shard train-00000 is wrong"),
        ("facts", [], "the entry of the shard train-00000 is wrong"),
        ("name", "../victim", "'../victim' is no shard's name: expected train-NNNNN"),
        ("name", "train-00000\0", r"'train-00000\x00' is no shard's name"),
        ("name", "test-00000", "'test-00000' is no shard's name: expected train-NNNNN"),
        ("name", 5, "5 is no shard's name"),
        ("split", "../x", "'../x' is no name of a split"),
        ("split", None, "None is no name of a split"),
        ("class_keys", ["a"], '"class_keys" and "class_names" are not of one length'),
        ("class_names", "a", '"class_names" must be a list, found a text'),
        ("notes", [3], "a class, a note, the attribution or the licence is no text"),
        ("shards", {}, '"shards" must be a list, found an object'),
        ("shards", [3], "'int' object is not a mapping"),
        ("multi_label", 1, '"multi_label" must be true or false'),
        ("inputs", {"files": "a"}, '"inputs" must be an object of counts'),
    ],
)
def test_odd_entries_of_a_prepared_index(prepared, key, value, reason):
    change(prepared, **{key: value})
    with pytest.raises(UserError) as caught:
        open_source(f"prepared:{prepared}", "train")
    assert str(caught.value).startswith(f"{prepared / 'index.json'} is damaged: {reason}")


def test_a_shard_with_other_records_than_the_index_says(prepared):
    facts = index(prepared)["shards"][0]["facts"]
    change(prepared, records=3, facts={**facts, "formats": {"JPEG": 3}})
    source = open_source(f"prepared:{prepared}", "train")
    with pytest.raises(OSError, match="is damaged at record 0: it has 4 records, not 3"):
        source[0]
    assert run("--check", f"--out={prepared}") == 0  # every file has its checksum


@pytest.mark.parametrize(
    "facts", [{}, {"captions": "5"}, {"formats": {"JPEG": 4, "a": "b"}}, {"short_sides": [1]}]
)
def test_odd_facts_of_a_shard_are_made_again(tmp_path, prepared, facts, capfd):
    whole = index(prepared)
    former = whole["shards"][0]["facts"]
    change(prepared, facts={**former, **facts} if facts else {})
    prepare(tmp_path, f"jsonl:{tmp_path / 't.jsonl'}")
    assert index(prepared) == whole
    assert '"facts" of the shard train-00000 are not counts of it' in capfd.readouterr().out


def test_nothing_outside_the_folder_is_removed(tmp_path, prepared):
    victim = tmp_path / "victim.array_record"
    victim.write_text("kept")
    (tmp_path / "victim.texts.jsonl").write_text("kept")
    entry = {**index(prepared)["shards"][0], "name": "../victim"}
    content = {**index(prepared), "shards": [entry]}
    (prepared / "index.json").write_text(json.dumps(content))
    prepare(tmp_path, f"jsonl:{tmp_path / 't.jsonl'}", code=2)
    drafts = prepared / ".prepare"
    drafts.mkdir(exist_ok=True)
    note = {"shard": {**entry, "sizes": [4, 4]}, "broken": []}
    with pytest.raises(ValueError, match="is no shard's name"):
        Made.from_json(json.dumps(note))
    (drafts / "train-00000.json").write_text(json.dumps(note))
    (prepared / "index.json").unlink()
    prepare(tmp_path, f"jsonl:{tmp_path / 't.jsonl'}", code=2)  # of another job
    assert victim.read_text() == "kept"


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    pictures(tmp_path, 1)
    (tmp_path / "t.csv").write_text("image,caption\n0.jpg,a\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lock").symlink_to(victim)
    prepare(tmp_path, f"csv:{tmp_path / 't.csv'}", code=2)
    (tmp_path / "dangling").symlink_to(tmp_path / "made")
    with pytest.raises(OSError, match="dangling is a link: remove it"):
        open_lock(tmp_path / "dangling")
    assert victim.read_text() == "kept" and not (tmp_path / "made").exists()
    with open_lock(tmp_path / "new") as file:
        file.write("here")
    with open_lock(tmp_path / "new") as file:
        assert file.read() == "here"


def test_odd_lines_of_a_shards_texts(prepared):
    file = prepared / "train-00000.texts.jsonl"
    for wrong in (
        "{}",
        '{"name": 3}',
        '{"name": "a", "captions": "b"}',
        '{"name": "a", "tags": [1]}',
    ):
        lines = file.read_text().splitlines()
        lines[1] = wrong + " " * (len(lines[1]) - len(wrong))
        (prepared / "changed").write_text("\n".join(lines) + "\n")
        (prepared / "changed").replace(file)
        source = open_source(f"prepared:{prepared}", "train")
        with pytest.raises(UserError, match="is damaged .no record of a mlip_jax prepared set"):
            list(source.captions())
        assert len(source) == 4 and isinstance(source[0].captions[0], str)
