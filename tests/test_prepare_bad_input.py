"""What the subcommand prepare refuses or leaves out, by name: tars, tables, images, columns."""

import gzip
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from preparing import (
    broken,
    contents,
    index,
    picture,
    pictures,
    prepare,
    reasons,
    records,
    run,
    sample,
    tar,
)

from mlip_jax.data.sets.opening import open_source

LENIENT = "--max-skipped-share=0.99"


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_hostile_members_are_refused_by_name(tmp_path):
    path = tar(
        tmp_path / "in/a.tar",
        [
            *sample("good"),
            *sample("../../evil"),
            *sample("/etc/evil"),
            *sample("C:/evil"),
            *sample("in/..\\evil"),
            special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            special("hard.jpg", tarfile.LNKTYPE, "good.jpg"),
            special("pipe.jpg", tarfile.FIFOTYPE),
            special("null.jpg", tarfile.CHRTYPE),
            special("folder", tarfile.DIRTYPE),
            *sample("./folder/last"),
        ],
    )
    out = prepare(tmp_path, f"webdataset:{path}", LENIENT)
    assert set(records(out)) == {f"{path}/good", f"{path}/folder/last"}
    reason_of = reasons(out)
    for name in ("../../evil.jpg", "/etc/evil.txt", "C:/evil.jpg", "in/..\\evil.jpg"):
        assert reason_of[f"{path}/{name}"] == "its path leads out of the archive: refused"
    assert reason_of[f"{path}/link.jpg"] == "a symbolic link, not a regular file: refused"
    assert reason_of[f"{path}/hard.jpg"] == "a hard link, not a regular file: refused"
    assert reason_of[f"{path}/pipe.jpg"] == "a pipe, not a regular file: refused"
    assert reason_of[f"{path}/null.jpg"] == "a device, not a regular file: refused"
    assert sorted(p.name for p in tmp_path.rglob("*evil*")) == []


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names(tmp_path, form):
    key = "/".join(["folder" * 10] * 5) + "/ünïcode"
    path = tar(tmp_path / "a.tar", sample(key), format=form)
    assert set(records(prepare(tmp_path, f"webdataset:{path}"))) == {f"{path}/{key}"}


def test_truncated_and_damaged_tars_lose_only_what_is_damaged(tmp_path):
    # Classes, as records of equal images with captions would be one.
    members = [
        (f"{i}{end}", data)
        for i in range(4)
        for end, data in ((".jpg", picture(i)), (".cls", b"1"))
    ]
    tar_bytes = tar(tmp_path / "in/whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "in/whole.tar") as file:
        places = {member.name: member for member in file.getmembers()}
    cut = places["2.jpg"].offset_data + 100
    (tmp_path / "in/cut.tar").write_bytes(tar_bytes[:cut])
    at_a_border = places["2.jpg"].offset
    (tmp_path / "in/border.tar").write_bytes(tar_bytes[:at_a_border])
    damaged = bytearray(tar_bytes)
    damaged[places["1.jpg"].offset + 5] ^= 255
    (tmp_path / "in/header.tar").write_bytes(damaged)
    (tmp_path / "in/page.tar").write_bytes(b"<html>404 not found</html>" * 50)
    (tmp_path / "in/packed.tar").write_bytes(b"BZh9" + bytes(600))
    (tmp_path / "in/empty.tar").write_bytes(b"")
    out = prepare(tmp_path, f"webdataset:{tmp_path / 'in'}", LENIENT)
    record_names = set(records(out))
    kept_keys = {"whole": "0123", "cut": "01", "border": "01", "header": "023"}
    assert record_names == {
        f"{tmp_path}/in/{n}.tar/{k}" for n, keys in kept_keys.items() for k in keys
    }
    reason_of = {name.removeprefix(f"{tmp_path}/in/"): why for name, why in reasons(out).items()}
    assert "cut short or damaged" in reason_of["cut.tar/2.jpg"]
    assert "no end: it may be cut short" in reason_of[f"border.tar at byte {at_a_border}"]
    start = places["1.jpg"].offset
    assert "damaged: 1," in reason_of[f"header.tar at byte {start}"]
    assert reason_of["header.tar/1"] == "has no image"
    assert "not a tar file" in reason_of["page.tar at byte 0"]
    assert "packed by bzip2: unpack it first" in reason_of["packed.tar at byte 0"]
    assert reason_of["empty.tar"] == "the tar file is empty"


@pytest.mark.parametrize(
    ("size", "place_told", "message"),
    [
        (b"77777777777\0", "/0.txt", "its header says 8,589,934,591 bytes"),
        (b"\x80" + b"\xff" * 11, "/0.txt", "its header says 309,485,009,821,345,068,724,781,055"),
        (b"-0000001000\0", " at byte 1536", "the tar file is damaged: 1,024 bytes are passed over"),
    ],
)
def test_a_size_that_is_a_lie(tmp_path, size, place_told, message):
    path = tar(tmp_path / "a.tar", [*sample("0"), *sample("1")])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as file:
        place = file.getmember("0.txt").offset
    data[place + 124 : place + 136] = size
    data[place + 148 : place + 156] = b" " * 8
    data[place + 148 : place + 155] = b"%06o\0" % sum(data[place : place + 512])
    path.write_bytes(data)
    out = prepare(tmp_path, f"webdataset:{path}", LENIENT)
    assert set(records(out)) == {f"{path}/1"}
    assert message in reasons(out)[f"{path}{place_told}"]


def test_duplicate_keys_are_both_kept_and_members_need_not_be_neighbours(tmp_path, capsys):
    apart = [("x.jpg", picture(5)), ("y.jpg", picture(6)), ("x.txt", b"x"), ("y.txt", b"y")]
    path = tar(
        tmp_path / "a.tar",
        [
            *sample("k", b"first", 1),
            *sample("k", b"second", 2),
            *apart,
            ("lonely.jpg", picture()),
            ("word.txt", b"alone"),
            ("k.mp3", b"sound"),
        ],
    )
    out = prepare(tmp_path, f"webdataset:{path}", LENIENT)
    source = open_source(f"prepared:{out}", "train")
    assert [source[i].captions[0] for i in range(4)] == ["first", "second", "x", "y"]
    assert [source[i].image for i in range(4)] == [picture(i) for i in (1, 2, 5, 6)]
    assert reasons(out) == {
        f"{path}/lonely": "has no caption, class or JSON",
        f"{path}/word": "has no image",
    }
    output = capsys.readouterr().out
    assert "1 key came twice" in output and "neither image nor text: mp3 (1)" in output


@pytest.mark.parametrize("packed", [False, True])
def test_keys_with_dots_are_named(tmp_path, capsys, packed):
    path = tar(tmp_path / "a.tar", [*sample("whole"), *sample("a/x.5"), *sample("a/y.6")])
    where = ""
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
        path, where = (
            path.rename(tmp_path / "a.tar.gz"),
            " beside it, as it must in a packed tar file",
        )
    out = prepare(tmp_path, f"webdataset:{path}", LENIENT)
    assert list(records(out)) == [f"{path}/whole"]
    cut = "is cut at its first dot, to the key"
    lacking = f"has no caption, class or JSON{where}: the name"
    assert reasons(out) == {
        f"{path}/a/x": f"{lacking} a/x.5.jpg {cut} a/x",
        f"{path}/a/y": f"{lacking} a/y.6.jpg {cut} a/y",
    }
    message = "2 texts are left out, since names are cut at their first dot: the first is "
    assert f"{message}{path}/a/x.5.txt; keys must have no dots" in capsys.readouterr().out


def test_what_is_hidden_is_left_out(tmp_path, capsys):
    hidden = [
        *sample("a/.ipynb_checkpoints/1"),
        *sample("__MACOSX/1"),
        ("a/._1.jpg", b"attributes"),
    ]
    tar(tmp_path / "in/1.tar", [*sample("./a/1"), *hidden])
    (tmp_path / "in/._1.tar").write_bytes(b"attributes")
    tar(tmp_path / "in/.trash/2.tar", sample("2"))
    out = prepare(tmp_path, f"webdataset:{tmp_path / 'in'}")
    assert list(records(out)) == [f"{tmp_path}/in/1.tar/a/1"]
    assert "5 members are neither image nor text: hidden (5)" in capsys.readouterr().out


def test_captions_of_every_encoding_and_length(tmp_path):
    long = "word " * 20_000
    texts = {
        "utf8": "schön".encode(),
        "mark": "schön".encode("utf-8-sig"),
        "latin": "schön".encode("latin-1"),
        "utf16": "schön".encode("utf-16"),
        "odd": b"a \x81 b",
        "long": long.encode(),
        "blank": b" \n",
    }
    path = tar(tmp_path / "a.tar", [e for key, text in texts.items() for e in sample(key, text)])
    out = prepare(tmp_path, f"webdataset:{path}", LENIENT)
    caption_of = {
        name.rpartition("/")[2]: record.captions[0] for name, record in records(out).items()
    }
    assert {caption_of[key] for key in ("utf8", "mark", "latin", "utf16")} == {"schön"}
    assert caption_of["odd"] == "a \x81 b" and caption_of["long"] == long.strip()
    assert reasons(out) == {f"{path}/blank": "has neither caption nor class"}
    card = (out / "README.md").read_text()
    assert "not in UTF-8: 3." in card and "100,000 characters" in card


def test_json_members(tmp_path):
    rows = {
        "a": b'{"caption": "from JSON", "label": 3, "tags": ["t"]}',
        "half": b'{"caption": "cut',
        "twice": b'{"caption": "a", "caption": "b"}',
        "number": b'{"caption": 5}',
        "deep": b"[" * 100_000,
        "lone": b'{"caption": "\\ud800 x"}',
    }
    members = [(f"{k}.json", text) for k, text in rows.items()]
    members = sorted([*members, *((f"{k}.png", picture(form="PNG")) for k in rows)])
    path = tar(tmp_path / "a.tar", [*members, ("c.jpg", picture()), ("c.cls", b"1\n")])
    out = prepare(tmp_path, f"webdataset:{path}", LENIENT)
    record_of = {name.rpartition("/")[2]: record for name, record in records(out).items()}
    assert record_of["a"].captions == ("from JSON",) and record_of["a"].tags == ("t",)
    assert [record_of[key].label for key in ("a", "c", "lone")] == [3, 1, -1]
    assert record_of["lone"].captions == ("? x",) and set(record_of) == {"a", "c", "lone"}
    reason_of = {name.rpartition("/")[2]: why for name, why in reasons(out).items()}
    assert reason_of["half"].startswith("not JSON") and "nested too deeply" in reason_of["deep"]
    assert reason_of["twice"] == "the key 'caption' occurs twice"
    assert reason_of["number"] == "the caption must be a text, found a number"


def bomb(width, height):
    """A PNG whose header says so many pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_images_of_every_kind(tmp_path):
    folder = tmp_path / "in/a"
    pictures(folder, 1)
    Image.new("CMYK", (20, 10)).save(folder / "cmyk.jpg")
    Image.fromarray(np.full((10, 20), 40000, np.uint16)).save(folder / "deep.png")
    frames = [Image.new("RGB", (10, 10), color) for color in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    (folder / "truncated.jpg").write_bytes(picture(3, (200, 200))[:-400])
    for side in (9_500, 60_000):
        (folder / f"bomb{side}.png").write_bytes(bomb(side, side))
    (folder / "wide.bmp").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404</html>")
    (folder / "script.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    )
    with open(os.fsencode(folder) + b"/sch\xf6n.jpg", "wb") as file:
        file.write(picture(7))
    with open(os.fsencode(folder) + b"/b\xf6se.jpg", "wb") as file:
        file.write(b"no image")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "endless.jpg").symlink_to("/dev/zero")
    out = prepare(tmp_path, f"folder:{tmp_path / 'in'}", LENIENT)
    images = {name.rpartition("/")[2]: record.image for name, record in records(out).items()}
    assert images.pop("sch\\udcf6n.jpg") == picture(7)
    assert set(images) == {"0.jpg", "cmyk.jpg", "deep.png", "moving.gif"}
    assert all(images[name] == (folder / name).read_bytes() for name in images)
    reason_of = {name.rpartition("/")[2]: why for name, why in reasons(out).items()}
    assert all("header says" in reason_of[f"bomb{side}.png"] for side in (9_500, 60_000))
    assert (
        "truncated" in reason_of["truncated.jpg"] and reason_of["wide.bmp"] == "the image is empty"
    )
    for name in ("text.jpg", "script.jpg", "b\\udcf6se.jpg"):
        assert reason_of[name] == "the image cannot be decoded: not an image of a known format"
    assert "is not a file" in reason_of["pipe.jpg"] and "is not a file" in reason_of["endless.jpg"]
    assert reason_of["gone.jpg"] == "No such file or directory"
    card = (out / "README.md").read_text()
    assert "CMYK 1" in card and "I;16 1" in card and "Animations: 1;" in card


def test_rows_of_a_table_that_are_wrong(tmp_path):
    pictures(tmp_path, 3)
    rows = [
        b"file,caption,split",
        b"0.jpg,fine,train",
        b"1.jpg",
        b'1.jpg,"a quotation mark that nobody closes,train',
        b"1.jpg,sch\xf6n,train",
        b",no image,train",
        b"2.jpg,x,trian",
        b"none.jpg,gone,train",
        b"https://a.b/c.jpg,an address,train",
        b"2.jpg,last,train",
        b"2.jpg,,train",
    ]
    table = tmp_path / "t.csv"
    table.write_bytes(b"\r\n".join(rows))
    out = prepare(tmp_path, f"csv:{table}", LENIENT)
    assert {name: r.captions for name, r in records(out).items()} == {
        "0.jpg": ("fine",),
        "1.jpg": ("schön",),
        "2.jpg": ("last",),
    }
    reason_of = {name.removeprefix(f"{table}:"): why for name, why in reasons(out).items()}
    assert reason_of == {
        "3": "has 1 column, not 3",
        "4": reason_of["4"],
        "6": "the path of the image is empty",
        "7": "unknown split 'trian'",
        "8 none.jpg": "cannot read the image none.jpg: no such file or directory",
        "9 https://a.b/c.jpg": "it is an address, and nothing is downloaded: fetch images with "
        "img2dataset",
    }
    assert reason_of["4"].startswith("a quotation mark opens a field that is not closed before")


@pytest.mark.parametrize("closing", ["fine 4", 'it is 5 ft 6"', '"so" they say'])
def test_a_quotation_mark_takes_no_other_row_with_it(tmp_path, closing):
    pictures(tmp_path, 8)
    captions = [f"fine {row}" for row in range(8)]
    captions[2], captions[4] = '"Best day ever', closing
    for suffix, comma, lost in ((".csv", ",", 1 + (closing[0] == '"')), (".tsv", "\t", 0)):
        table = tmp_path / f"t{suffix}"
        rows = [f"{row}.jpg{comma}{caption}" for row, caption in enumerate(captions)]
        table.write_text("\n".join([f"image{comma}caption", *rows]))
        out = tmp_path / f"out{suffix}"
        assert run(f"--source=csv:{table}", f"--out={out}", LENIENT) == 0
        kept = {name: r.captions[0] for name, r in records(out).items()}
        expected = {f"{row}.jpg": text for row, text in enumerate(captions)}
        assert kept.items() <= expected.items() and len(kept) == 8 - lost
        assert [name for name in reasons(out) if name == f"{table}:4"] == [f"{table}:4"] * (
            lost > 0
        )


def test_a_line_that_is_too_long_is_one_record_that_is_left_out(tmp_path):
    pictures(tmp_path, 2)
    texts = {"1.jpg": "x" * 40 * 2**20, "0.jpg": "fine"}
    lines = [json.dumps({"image": name, "caption": text}) for name, text in texts.items()]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    out = prepare(tmp_path, f"jsonl:{tmp_path / 't.jsonl'}", LENIENT)
    assert {name: r.captions for name, r in records(out).items()} == {"0.jpg": ("fine",)}
    (reason,) = reasons(out).values()
    assert reason == "the line has 41,943,074 bytes, at most 16,777,216 are read"


def test_lines_of_json_that_are_wrong(tmp_path):
    pictures(tmp_path, 1)
    lines = [
        b'{"image": "0.jpg", "caption": "fine"}',
        b'{"image": "0.jpg", "caption": ',
        b'{"caption": "no image"}',
        b'{"image": 3, "caption": "x"}',
        b'{"image": "0.jpg"}',
        b'{"image": "0.jpg\\u0000", "caption": "x"}',
        b'{"image": "0.jpg", "captions": ["x", {"a": 1}]}',
        b'{"image": "0.jpg", "caption": "x", "split": "tset"}',
    ]
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n".join(lines))
    out = prepare(tmp_path, f"jsonl:{path}", LENIENT)
    assert len(records(out)) == 1
    broken_lines = {each["record"].split(":")[1].split()[0] for each in broken(out)}
    assert broken_lines == set("2345678")


def test_columns_that_are_wrong(tmp_path):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = [{"bytes": picture()}, None, {"bytes": b"no image"}, {"bytes": picture()}]
    table = pa.table(
        {"image": pa.array(images, kind), "caption": ["a", "b", "c", None], "label": [0, 0, 0, -1]}
    )
    path = tmp_path / "in/x.parquet"
    path.parent.mkdir()
    pq.write_table(table, path)
    (tmp_path / "in/y.parquet").write_bytes(path.read_bytes()[:-50])
    # The name of a column is no UTF-8.
    renamed = path.read_bytes().replace(b"caption", b"c\xedption")
    (tmp_path / "in/z.parquet").write_bytes(renamed)
    out = prepare(tmp_path, f"parquet:{tmp_path / 'in'}", LENIENT)
    assert set(records(out)) == {f"{path}[0]"}
    reason_of = {name.rpartition("/")[2]: why for name, why in reasons(out).items()}
    assert reason_of["x.parquet[1]"] == "it has no image"
    assert reason_of["x.parquet[2]"].endswith("not an image of a known format")
    assert reason_of["x.parquet[3]"] == "has neither caption nor class"
    assert reason_of["y.parquet"].startswith("cannot be read")
    assert reason_of["z.parquet"].startswith("cannot be read: 'utf-8' codec can't decode")


def test_too_much_that_is_broken_is_an_error_whose_work_is_kept(tmp_path, capsys):
    pictures(tmp_path / "in/a", 3)
    (tmp_path / "in/a/x.jpg").write_bytes(b"no image")
    source = f"folder:{tmp_path / 'in'}"
    out = prepare(tmp_path, source, code=2)
    error = capsys.readouterr().err
    assert "1 of 4 records (25.00%) are broken" in error and "in/a/x.jpg (the image cannot" in error
    assert not (out / "index.json").exists() and error.count("\n") == 1
    shard = (out / "train-00000.array_record").stat()
    prepare(tmp_path, source, "--max-skipped-share=0.25")
    assert (out / "train-00000.array_record").stat().st_mtime_ns == shard.st_mtime_ns
    assert index(out)["shards"][0]["records"] == 3


def test_nothing_of_the_users_is_overwritten(tmp_path, capsys):
    pictures(tmp_path / "in/a", 3)
    source = f"--source=folder:{tmp_path / 'in'}"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert run(source, f"--out={tmp_path / 'mine'}") == 2
    assert "is not empty and holds no prepared dataset" in capsys.readouterr().err
    out = prepare(tmp_path, source.removeprefix("--source="))
    before = contents(out)
    assert run(source, f"--out={out}", "--resize=10") == 2
    assert "prepared differently (resize: 0 -> 10)" in capsys.readouterr().err
    assert contents(out) == before
    (tmp_path / "file").write_text("")
    assert run(source, f"--out={tmp_path / 'file'}") == 2
    assert "cannot use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "add --out=DIR"),
        (("--out=x",), "add --source=KIND:PATH"),
        (("--out=x", "--source=webdatset:a"), "did you mean 'webdataset:'"),
        (("--out=x", "--source=webdataset:/no/" + 40 * "{a,b}"), "no such file: /no/aaaa"),
        (("--out=x", "--source=parquet:/no/{0..99999999999}"), "no such file: /no/0"),
        (("--out=x", "--source=webdataset:/no/*.tar"), "no such file: /no/*.tar"),
        (("--out=x", "--source=webdataset:{9..1}.tar"), "the second number must be the larger"),
        (("--out=x", "--source=csv:/no/t.csv"), "cannot read /no/t.csv"),
        (("--out=x", "--source=huggingface:/no"), "has written: it has no state.json"),
        (("--out=x", "--source=prepared:y"), "expected KIND:PATH"),
        (("--out=x", "--source=folder:y", "--resize=big"), "--resize=big: expected a whole number"),
        (("--out=x", "--source=folder:y", "--workers=-2"), "--workers=-2: expected"),
        (("--out=x", "--source=folder:y", "--shard-records=0"), "at least 1"),
        (("--out=x", "--source=folder:y", "--max-skipped-share=2"), "expected a share in"),
        (("--out=x", "--source=folder:y", "--split=tran"), "expected train, validation or test"),
        (("--out=x", "--source=folder:y", "--columns=img=a"), "did you mean 'image'"),
        (("--out=x", "--source=folder:y", "--columns=image=a"), "--columns is for tables"),
        (
            ("--out=x", "--config=configs/clip.py"),
            "prepare takes --config with --teacher alone",
        ),
        (("--out=x", "--sourc=folder:y"), "did you mean 'source'"),
        (("--out=x", "--check"), "x holds no prepared dataset"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_tables_without_the_columns(tmp_path, capsys):
    for text, message in (
        ("a,b\n1,2\n", "needs a column file (or image, path)"),
        ("file,caption,caption\n", "the column 'caption' occurs twice"),
        ("", "found nothing"),
    ):
        (tmp_path / "t.csv").write_text(text)
        assert run(f"--source=csv:{tmp_path / 't.csv'}", f"--out={tmp_path / 'o'}") == 2
        assert message in capsys.readouterr().err
    (tmp_path / "t.csv").write_text("file,caption\n", encoding="utf-16")
    assert run(f"--source=csv:{tmp_path / 't.csv'}", f"--out={tmp_path / 'o'}") == 2
    assert "is in UTF-16: save it as UTF-8" in capsys.readouterr().err
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    assert run(f"--source=parquet:{tmp_path / 't.parquet'}", f"--out={tmp_path / 'o'}") == 2
    assert "needs a column with image bytes" in capsys.readouterr().err


def test_an_index_of_another_kind(tmp_path, capsys):
    for text, message in (
        ("{", "index.json: not JSON: Expecting property name enclosed in double quotes, line 1"),
        ("[]", "index.json: expected a JSON object, found a list"),
        (json.dumps({"format": "other"}), "it is no index of"),
    ):
        (tmp_path / "index.json").write_text(text)
        assert run("--check", f"--out={tmp_path}") == 2
        assert message in capsys.readouterr().err


def test_what_cannot_begin_leaves_nothing(tmp_path, capsys):
    def refused(message, *options):
        prepare(tmp_path, *options, code=2)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()

    pictures(tmp_path / "cls/a", 2)
    refused("cannot read nowhere.json", f"folder:{tmp_path / 'cls'}", "--classes=nowhere.json")
    (tmp_path / "none.csv").write_text("image,caption\n")
    refused("has no records", f"csv:{tmp_path / 'none.csv'}")
    (tmp_path / "no.parquet").write_text("no parquet")
    refused("has no usable record", f"parquet:{tmp_path / 'no.parquet'}", LENIENT)


def test_what_is_broken_is_listed_even_if_it_is_too_much(tmp_path):
    pictures(tmp_path, 2)
    (tmp_path / "t.csv").write_text("image,caption\n0.jpg,a\nx.jpg,b\n")
    out = prepare(tmp_path, f"csv:{tmp_path / 't.csv'}", code=2)
    assert list(reasons(out)) == [f"{tmp_path / 't.csv'}:3 x.jpg"]
    first = contents(prepare(tmp_path, f"csv:{tmp_path / 't.csv'}", LENIENT))
    again = tmp_path / "again"
    assert run(f"--source=csv:{tmp_path / 't.csv'}", f"--out={again}", LENIENT) == 0
    assert contents(again) == first
