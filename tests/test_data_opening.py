"""What users bring: JSONL, CSV, class folders, and their mistakes."""

import json
import pickle
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from mlip_jax.core import schema as config_lib
from mlip_jax.core.errors import UserError
from mlip_jax.data.images.preprocessing import decode
from mlip_jax.data.sets.opening import open_evaluation, open_source, open_validation
from mlip_jax.data.sets.records import MissingSplit


def draw(path: Path, color: str = "red") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), color).save(path)
    return path.name


def jsonl(folder: Path, rows: list, name: str = "pairs.jsonl") -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"jsonl:{folder / name}"


def test_jsonl(tmp_path):
    draw(tmp_path / "images/a.png")
    draw(tmp_path / "images/b.png")
    spec = jsonl(
        tmp_path,
        [
            {
                "file": "images/a.png",
                "captions": [" a  réd\tsquare ", "", "square"],
                "split": "train",
            },
            "",
            {"image": "images/b.png", "caption": "another", "split": "dev", "tags": ["shape"]},
            {"path": "images/none.png", "caption": "gone"},
        ],
    )
    train = open_source(spec, "train")
    assert (train.name, train.split, len(train)) == ("pairs", "train", 2)
    assert train[0].captions == ("a réd square", "square")
    assert train[0].label == -1 and train[0].tags == ()
    assert train[0].name == train.name_of(0) == str(tmp_path / "images/a.png")
    assert train[0].image == (tmp_path / "images/a.png").read_bytes()
    with pytest.raises(OSError):
        train[1]
    validation = open_source(spec, "validation")
    assert [validation[0].captions, validation[0].tags] == [("another",), ("shape",)]
    assert pickle.loads(pickle.dumps(train))[0] == train[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"file": "a.png", "caption": "x"', r"pairs.jsonl:2: not JSON"),
        ("[1, 2]", r"pairs.jsonl:2: expected a JSON object, found a list"),
        ({"caption": "x"}, r"pairs.jsonl:2: needs \"file\""),
        ({"file": "a.png"}, r"pairs.jsonl:2: needs \"caption\""),
        (
            {"file": "a.png", "caption": 3},
            r"pairs.jsonl:2: \"caption\" must be a text, found a num",
        ),
        (
            {"file": "a.png", "captions": "x"},
            r"pairs.jsonl:2: \"captions\" must be a list of texts",
        ),
        (
            {"file": "a.png", "captions": [1]},
            r"pairs.jsonl:2: \"captions\" must be a list of texts",
        ),
        ({"file": "a.png", "caption": "x", "split": "trian"}, r":2: unknown split.*'train'"),
    ],
)
def test_malformed_jsonl_row(tmp_path, row, message):
    spec = jsonl(tmp_path, [{"file": "a.png", "caption": "fine"}, row])
    with pytest.raises(UserError, match=message) as caught:
        open_source(spec, "train")
    assert "\n" not in str(caught.value)


def test_jsonl_encoding(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = b'{"file": "a.png", "caption": "x"}\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + row + row.replace(b"a.png", b"b.png"))
    source = open_source(f"jsonl:{path}", "train")
    assert [source.name_of(row) for row in (0, 1)] == [str(tmp_path / f"{n}.png") for n in "ab"]
    path.write_bytes(row + b'{"file": "a.png", "caption": "\xff"}\n')
    with pytest.raises(UserError, match="pairs.jsonl:2: not UTF-8"):
        open_source(f"jsonl:{path}", "train")


def test_rows_without_captions_are_named(tmp_path):
    draw(tmp_path / "a.png")
    rows = [{"file": f"{number}.png", "caption": "x"} for number in range(9)]
    rows += [{"file": "a.png", "captions": [" ", ""]}, {"file": "a.png", "caption": None}]
    spec = jsonl(tmp_path, rows)
    source = open_source(spec, "train", max_skipped_share=0.2)
    assert len(source) == 9
    (note,) = source.notes
    assert "2 of 11 rows" in note and "pairs.jsonl:10" in note and "pairs.jsonl:11" in note
    with pytest.raises(UserError, match="2 of 11 rows have no caption.*max_skipped_share=0.01"):
        open_source(spec, "train")
    with pytest.raises(UserError, match="1 of 1 rows"):
        open_source(jsonl(tmp_path, [{"file": "a.png", "caption": ""}]), "train")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_of_one_image_are_one_record(tmp_path, kind):
    rows = [
        ("a.png", "a red square", "train"),
        ("b.png", "a blue square", "train"),
        ("./a.png", "something red", "train"),
        ("a.png", "a red square", "train"),
        ("a.png", "held out", "val"),
    ]
    for name in "ab":
        draw(tmp_path / f"{name}.png")
    if kind == "jsonl":
        keys = "file", "caption", "split"
        spec = jsonl(tmp_path, [dict(zip(keys, row, strict=True)) for row in rows])
    else:
        lines = [",".join(row) for row in (("file", "caption", "split"), *rows)]
        (tmp_path / "pairs.csv").write_text("\n".join(lines))
        spec = f"csv:{tmp_path / 'pairs.csv'}"
    source = pickle.loads(pickle.dumps(open_source(spec, "train")))
    assert [source[index].captions for index in range(len(source))] == [
        ("a red square", "something red"),
        ("a blue square",),
    ]
    assert source.name_of(0) == str(tmp_path / "a.png")
    assert list(source.captions()) == ["a red square", "something red", "a blue square"]
    assert source.notes == ("4 rows are of 2 images: rows of one image are one record",)
    assert open_source(spec, "validation")[0].captions == ("held out",)
    assert len(open_evaluation(f"{spec}#all")) == 2


def test_cleaned_captions(tmp_path):
    draw(tmp_path / "a.png")
    row = {"file": "a.png", "captions": ["A dog!", "a dog", "...", "Left-hand"], "tags": ["Pet?"]}
    spec = jsonl(tmp_path, [row, {"file": "a.png", "caption": "?!", "split": "val"}])
    plain, cleaned = (open_source(spec, "train", cleaning=name) for name in ("none", "clip_lite"))
    assert plain[0].captions == ("A dog!", "a dog", "...", "Left-hand")
    assert (cleaned[0].captions, cleaned[0].tags) == (("a dog", "left hand"), ("pet",))
    assert list(plain.captions()) == ["A dog!", "a dog", "...", "Left-hand", "Pet?"]
    assert list(cleaned.captions()) == ["a dog", "left hand", "pet"]
    assert pickle.loads(pickle.dumps(cleaned))[0] == cleaned[0]
    assert open_evaluation(spec)[0].captions == ("?!",)
    with pytest.raises(
        UserError,
        match="1 of 1 rows have no caption .of 1, nothing is left after the cleaning 'clip_lite'."
        " and are left out: .*pairs.jsonl:2; more than max_skipped_share",
    ):
        open_evaluation(spec, cleaning="clip_lite")
    data = config_lib.default().data
    data.train, data.validation = spec, spec.replace("pairs", "other")
    jsonl(tmp_path, [row], "other.jsonl")
    assert open_validation(data, "clip_lite")[0].captions == cleaned[0].captions
    with pytest.raises(UserError, match="config.model.text.cleaning='clip_light'"):
        open_source(spec, "train", cleaning="clip_light")


def test_rows_that_clean_to_nothing_are_named(tmp_path):
    rows = [{"file": "a.png", "caption": text} for text in ("fine", "...", " ", "(?)")]
    spec = jsonl(tmp_path, rows)
    options = {"max_skipped_share": 0.8, "cleaning": "clip_lite"}
    source = open_source(spec, "train", **options)
    (note,) = source.notes
    assert len(source) == 1 and "3 of 4 rows have no caption (of 2, nothing is left" in note
    assert all(f"pairs.jsonl:{line}" in note for line in (2, 3, 4))
    table = tmp_path / "pairs.csv"
    table.write_text("file,caption\n" + "".join(f"a.png,{row['caption']}\n" for row in rows))
    source = open_source(f"csv:{table}", "train", **options)
    assert list(source.captions()) == ["fine"]
    assert source.notes == (
        note.replace(".jsonl:2", ".csv:3")
        .replace(".jsonl:3", ".csv:4")
        .replace(".jsonl:4", ".csv:5"),
    )


@pytest.mark.parametrize(("suffix", "comma"), [(".csv", ","), (".tsv", "\t")])
def test_table(tmp_path, suffix, comma):
    draw(tmp_path / "a.png")
    path = tmp_path / f"pairs{suffix}"
    rows = [
        ("Image", "caption", "split"),
        ("a.png", '"one, with a comma"', "train"),
        ("b.png", "other", "val"),
        ("a.png", "two", "train"),
        ("a.png", "two", "train"),
    ]
    path.write_text("\n".join(comma.join(row) for row in rows), encoding="utf-8")
    train = open_source(f"csv:{path}", "train")
    assert len(train) == 1 and train[0].captions == ("one, with a comma", "two")
    assert open_source(f"csv:{path}", "validation").name_of(0) == str(tmp_path / "b.png")
    assert pickle.loads(pickle.dumps(train))[0] == train[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", r"pairs.csv:1: needs a column file"),
        ("", r"pairs.csv:1: .*found nothing"),
        ("file,caption\na.png,x\na.png\n", r"pairs.csv:3: has 1 column, not 2"),
        ("file,caption\na.png,x,y\n", r"pairs.csv:2: has 3 columns, not 2"),
        ("file,caption\n,x\n", r"pairs.csv:2: the image column is empty"),
        (b"file,caption\na.png,x\nb.png,sch\xf6n\n", r"pairs.csv:3: not UTF-8"),
        ('file,"caption\na.png,x\n', r"pairs.csv:1: a quotation mark opens a field that is not"),
        ('file,caption\na.png,"5" wide"\n', r"pairs.csv:2: ',' expected after"),
        (f"file,caption\na.png,{'x' * 2**24}\n", r"pairs.csv:2: the line has 16,777,223 bytes, at"),
    ],
)
def test_malformed_table(tmp_path, content, message):
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(f"csv:{tmp_path / 'pairs.csv'}", "train")


def table_of_eight(tmp_path, suffix, form="{}.png", **odd):
    """Rows 0 to 7, line 2 on; `odd` are captions of some."""
    comma = "\t" if suffix == ".tsv" else ","
    captions = [odd.get(f"row_{row}", f"caption {row}") for row in range(8)]
    rows = [f"{form.format(row)}{comma}{caption}" for row, caption in enumerate(captions)]
    path = tmp_path / f"pairs{suffix}"
    path.write_text("\n".join([f"file{comma}caption", *rows]))
    return path


@pytest.mark.parametrize("form", ["{}.png", "{}"])
@pytest.mark.parametrize("closing", ["caption 4", 'it is 5 ft 6"', '"so" they say'])
def test_a_quotation_mark_takes_no_other_row_with_it(tmp_path, form, closing):
    odd = {"row_2": '"Best day ever', "row_4": closing}
    with pytest.raises(UserError, match=r"pairs.csv:4: a quotation mark opens a field that is not"):
        open_source(f"csv:{table_of_eight(tmp_path, '.csv', form, **odd)}", "train")
    # Tabs need no quotation marks.
    table = open_source(f"csv:{table_of_eight(tmp_path, '.tsv', form, **odd)}", "train")
    assert list(table.captions()) == [odd.get(f"row_{i}", f"caption {i}") for i in range(8)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_texts_in_quotation_marks_may_have_several_lines(tmp_path, suffix):
    caption = '"one,\ntwo ""three"",\r\nof, say, five"'
    path = table_of_eight(tmp_path, suffix, row_2=caption, row_3='""', row_5='a 5" pipe')
    source = open_source(f"csv:{path}", "train", max_skipped_share=0.2)
    texts = list(source.captions())
    assert texts[2] == 'one, two "three", of, say, five'
    assert texts[3:] == ["caption 4", 'a 5" pipe', "caption 6", "caption 7"]
    assert "pairs" + suffix + ":7" in source.notes[0]


def test_tables_may_begin_with_a_mark_and_end_lines_by_any_break(tmp_path):
    for name, line_break in (("a", "\r"), ("b", "\r\n"), ("c", "\n")):
        path = tmp_path / f"{name}.csv"
        text = line_break.join(["file,caption", "1.png,one", "", '2.png,"t,wo"'])
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert list(open_source(f"csv:{path}", "train").captions()) == ["one", "t,wo"]


def test_class_folders(tmp_path):
    for name in ("train/big_cat/1.jpg", "train/dog/x.PNG", "test/dog/2.jpg", "test/emu/3.webp"):
        draw(tmp_path / name)
    (tmp_path / "train/dog/notes.txt").write_text("no image")
    train = open_source(f"folder:{tmp_path}", "train")
    assert train.class_names == ("big cat", "dog", "emu")
    assert [(train[i].captions, train[i].label) for i in (0, 1)] == [
        (("big cat",), 0),
        (("dog",), 1),
    ]
    validation = open_source(f"folder:{tmp_path}", "validation")
    assert validation.class_names == train.class_names
    assert [validation[i].label for i in range(len(validation))] == [1, 2]


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train/1.png", "tram/2.png"):
        draw(tmp_path / name)
    assert open_source(f"folder:{tmp_path}", "train").class_names == ("train", "tram")


def test_cleaned_class_folders(tmp_path):
    for name in ("Big_Cat!/1.jpg", "big cat/2.jpg", "(?)/3.jpg"):
        draw(tmp_path / name)
    options = {"max_skipped_share": 0.5, "cleaning": "clip_lite"}
    source = open_source(f"folder:{tmp_path}", "train", **options)
    assert source.class_names == ("(?)", "Big Cat!", "big cat")
    assert [source[i].label for i in range(2)] == [1, 2]
    assert list(source.captions()) == ["big cat", "big cat"]
    assert "1 of 3 images have no caption (of 1, nothing" in source.notes[0]
    assert str(tmp_path / "(?)/3.jpg") in source.notes[0]


def test_folder_without_images(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        open_source(f"folder:{tmp_path}", "train")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("emojis", "did you mean 'emoji'"),
        ("jsonk:a.jsonl", "did you mean 'jsonl:'"),
        ("jsonl:", "expected emoji, jsonl:PATH"),
        ("jsonl:/no/such.jsonl", "cannot read /no/such.jsonl: No such file"),
        ("csv:/no/such.csv", "cannot read /no/such.csv"),
        ("folder:/no/such", "no such folder: /no/such"),
        ("tfds:no_such_set_at_all", "cannot open the dataset 'tfds:no_such_set_at_all'"),
    ],
)
def test_unknown_sets(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(spec, "train")
    assert "\n" not in str(caught.value)


def test_unknown_split(tmp_path):
    with pytest.raises(UserError, match="did you mean 'train'"):
        open_source("emoji", "trian")


def test_validation_by_config(tmp_path):
    draw(tmp_path / "a.png")
    with_split = jsonl(
        tmp_path,
        [{"file": "a.png", "caption": "t"}, {"file": "a.png", "caption": "v", "split": "test"}],
    )
    without = jsonl(tmp_path, [{"file": "a.png", "caption": "all"}], "plain.jsonl")
    data = config_lib.default().data
    for train, validation, caption in (
        (with_split, "auto", "v"),
        (without, "auto", None),
        (with_split, "", None),
        (with_split, without, "all"),
        (without, with_split, "v"),
    ):
        data.train, data.validation = train, validation
        source = open_validation(data)
        assert (source and source[0].captions[0]) == caption
    with pytest.raises(MissingSplit, match="no validation split, only train"):
        open_source(without, "validation")
    with pytest.raises(UserError, match="did you mean 'emoji'"):
        open_evaluation("emojy")


def test_classes_that_are_numbers_are_in_the_order_of_the_numbers(tmp_path):
    numbers = [str(number) for number in range(12)]
    for name in numbers:
        draw(tmp_path / "set" / name / "a.png")
    source = open_source(f"folder:{tmp_path / 'set'}", "train")
    assert source.class_names == tuple(numbers)
    assert source.name_of(2).endswith("set/2/a.png") and source[2].label == 2
    rows = [{"file": f"set/{name}/a.png", "label": name} for name in numbers]
    assert open_source(jsonl(tmp_path, rows), "train").class_names == tuple(numbers)
    draw(tmp_path / "set" / "other" / "a.png")  # then they are words like any other
    source = open_source(f"folder:{tmp_path / 'set'}", "train")
    assert source.class_names == tuple(sorted([*numbers, "other"]))


def test_images_that_cannot_be_read_here_are_not_passed_over(tmp_path):
    draw(tmp_path / "cat/a.png")
    for name in ("b.jfif", "c.JPE"):
        (tmp_path / "cat" / name).write_bytes((tmp_path / "cat/a.png").read_bytes())
    (tmp_path / "cat/d.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "cat/notes.txt").write_text("no image")
    source = open_source(f"folder:{tmp_path}", "train")
    names = {Path(source.name_of(index)).name for index in range(len(source))}
    assert names == {"a.png", "b.jfif", "c.JPE", "d.heic"}
    with pytest.raises(OSError, match="not an image of a known format"):
        decode(source[3].image)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("listed", ["NFC", "NFD"])
def test_names_of_other_systems_are_found(tmp_path, kind, listed):
    there = {"NFC": "NFD", "NFD": "NFC"}[listed]
    draw(tmp_path / unicodedata.normalize(there, "Bücher") / unicodedata.normalize(there, "é.png"))
    file = unicodedata.normalize(listed, "Bücher\\é.png")
    spec = jsonl(tmp_path, [{"file": file, "caption": "x"}])
    if kind == "csv":
        (tmp_path / "pairs.csv").write_text(f"file,caption\n{file},x\n")
        spec = f"csv:{tmp_path / 'pairs.csv'}"
    assert open_source(spec, "train")[0].image.startswith(b"\x89PNG")
