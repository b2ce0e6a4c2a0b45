"""The subcommand prepare on inputs that are as they should be, and what comes back of each."""

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from preparing import broken, contents, index, picture, pictures, prepare, run

from mlip_jax import main as door
from mlip_jax.data.images.preprocessing import decode, flatten
from mlip_jax.data.sets.kinds import Opening
from mlip_jax.data.sets.opening import open_evaluation, open_source
from mlip_jax.data.sets.prepared import open_prepared
from mlip_jax.data.sets.splits import Wanted

ROOT = Path(__file__).parents[1]


def test_class_folders_come_back_as_they_are(tmp_path):
    for name in ("train/big_cat", "train/dog", "val/dog"):
        pictures(tmp_path / "in" / name, 3)
    before = open_source(f"folder:{tmp_path / 'in'}", "train")
    out = prepare(tmp_path, f"folder:{tmp_path / 'in'}", "--shard-records=4", "--licence=CC0")
    after = open_source(f"prepared:{out}", "train")
    assert after.class_names == before.class_names == ("big cat", "dog")
    assert [after[i] for i in range(len(after))] == [before[i] for i in range(len(before))]
    assert list(after.captions()) == list(before.captions())
    assert len(open_source(f"prepared:{out}", "validation")) == 3
    assert "Licence: CC0." in (out / "README.md").read_text()
    assert [shard["records"] for shard in index(out)["shards"]] == [4, 2, 3]


def test_several_classes_an_image(tmp_path):
    pictures(tmp_path, 3)
    rows = [{"image": f"{i}.jpg", "labels": labels} for i, labels in enumerate(["a", "ab", ""])]
    rows = [{**row, "labels": list(row["labels"])} for row in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = open_source(f"jsonl:{tmp_path / 'pairs.jsonl'}", "train")
    after = open_source(f"prepared:{prepare(tmp_path, f'jsonl:{tmp_path}/pairs.jsonl')}", "train")
    assert after.class_names == before.class_names
    assert (after.targets() == before.targets()).all()
    assert [after[i].captions for i in range(3)] == [before[i].captions for i in range(3)]


def test_difficult_classes_stay_difficult(tmp_path):
    lists = tmp_path / "VOC2007/ImageSets/Main"
    lists.mkdir(parents=True)
    pictures(tmp_path / "VOC2007/JPEGImages", 4)
    for split, images in (("trainval", "01"), ("train", "0"), ("val", "1"), ("test", "23")):
        for name in ("cat", "dog"):
            lines = [f"{i} {(int(i) + (name == 'dog')) % 3 - 1}" for i in images]
            (lists / f"{name}_{split}.txt").write_text("\n".join(lines))
    spec = f"voc:{tmp_path / 'VOC2007'}"
    out = prepare(tmp_path, spec)
    for opener in (lambda s: open_source(s, "train"), open_evaluation):
        before, after = opener(spec), opener(f"prepared:{out}")
        assert (after.targets() == before.targets()).all()
        assert after[1].image == before[1].image


def test_tables_group_rows_of_an_image(tmp_path):
    pictures(tmp_path, 3)
    table = tmp_path / "pairs.tsv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["Image", "caption", "split"])
        writer.writerows(
            [
                ["0.jpg", 'one,\n"two lines"', "train"],
                ["1.jpg", "other", ""],
                ["2.jpg", "held out", "val"],
                ["0.jpg", "again", "train"],
                ["0.jpg", "again", "train"],
            ]
        )
    out = prepare(tmp_path, f"csv:{table}")
    train = open_source(f"prepared:{out}", "train")
    assert [train[i].captions for i in range(2)] == [('one, "two lines"', "again"), ("other",)]
    assert train.name_of(0) == "0.jpg" and not broken(out)
    assert open_source(f"prepared:{out}", "validation")[0].captions == ("held out",)


def test_columns_can_be_named(tmp_path):
    pictures(tmp_path, 1)
    (tmp_path / "t.csv").write_text("where,what,caption\n0.jpg,this,not this\n")
    source = f"csv:{tmp_path / 't.csv'}"
    out = prepare(tmp_path, source, "--columns=image=where,caption=what")
    assert open_source(f"prepared:{out}", "train")[0].captions == ("this",)


def test_coco_captions(tmp_path):
    for year in ("train2017", "val2017"):
        pictures(tmp_path / year, 2)
        images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)]
        annotations = [{"image_id": i % 2, "caption": f"{year} {i}"} for i in range(4)]
        annotations += [{"image_id": 9, "caption": "of no image"}, {"image_id": 1, "caption": 3}]
        file = tmp_path / "annotations" / f"captions_{year}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"images": images, "annotations": annotations}))
    out = prepare(tmp_path, f"coco:{tmp_path}", "--max-skipped-share=0.5")
    train = open_source(f"prepared:{out}", "train")
    assert [train[i].captions for i in range(2)] == [
        ("train2017 0", "train2017 2"),
        ("train2017 1", "train2017 3"),
    ]
    assert train.name_of(1) == str(tmp_path / "train2017/1.jpg")
    assert len(open_source(f"prepared:{out}", "validation")) == 2
    assert [each["record"].partition(": ")[2] for each in broken(out)[:2]] == [
        "annotations[4]",
        "annotations[5]",
    ]


def parquet_table(number=5, **extra):
    images = [{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(number)]
    return pa.table(
        {
            "image": pa.array(images),
            "caption": pa.array([[f"one {i}", f"two {i}"] for i in range(number)]),
            "label": pa.array([i % 2 for i in range(number)], pa.int64()),
            **extra,
        }
    )


FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["tabby_cat", "dog"], "_type": "ClassLabel"},
}


def test_parquet(tmp_path):
    metadata = {b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()}
    table = parquet_table().replace_schema_metadata(metadata)
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}-00000.parquet", row_group_size=2)
    out = prepare(tmp_path, f"parquet:{tmp_path}", "--shard-records=3")
    train = open_source(f"prepared:{out}", "train")
    assert [train[i].captions for i in (0, 4)] == [("one 0", "two 0"), ("one 4", "two 4")]
    assert train.class_names == ("tabby cat", "dog") and train[3].label == 1
    assert train[4].image == picture(4)
    assert train.name_of(4) == f"{tmp_path}/train-00000.parquet[4]"
    assert len(open_source(f"prepared:{out}", "validation")) == 5


def test_parquet_with_columns_of_other_names(tmp_path):
    table = pa.table({"blob": [picture(1)], "ALT": ["a"], "split": ["validation"]})
    pq.write_table(table, tmp_path / "x.parquet")
    out = prepare(tmp_path, f"parquet:{tmp_path / 'x.parquet'}", "--columns=caption=ALT")
    assert open_source(f"prepared:{out}", "validation")[0].captions == ("a",)


def test_numbers_in_a_column_of_splits_name_none(tmp_path):
    images, splits = [picture(seed) for seed in range(3)], ["1", "0", "val"]
    table = pa.table({"image": images, "text": ["a", "b", "c"], "split": splits})
    for number, column in enumerate((table["split"], pa.array([1, 0, 2]))):
        file = tmp_path / f"{number}.parquet"
        pq.write_table(table.set_column(2, "split", column), file)
    out = prepare(tmp_path, f"parquet:{tmp_path / '0.parquet'}", "--max-skipped-share=0.7")
    assert open_source(f"prepared:{out}", "validation")[0].captions == ("c",)
    assert len(broken(out)) == 2
    assert run(f"--source=parquet:{tmp_path / '1.parquet'}", f"--out={tmp_path / 'none'}") == 2


def save_to_disk(folder, table, batch=2):
    folder.mkdir(parents=True)
    half = table.num_rows // 2
    names = []
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        names.append(f"data-{number:05d}-of-00002.arrow")
        sink = str(folder / names[-1])
        with pa.OSFile(sink, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part, max_chunksize=batch)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))


def test_huggingface_on_disk(tmp_path):
    for split in ("train", "validation"):
        save_to_disk(tmp_path / "in" / split, parquet_table(7))
    (tmp_path / "in/dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    out = prepare(tmp_path, f"huggingface:{tmp_path / 'in'}", "--shard-records=3")
    train = open_source(f"prepared:{out}", "train")
    assert len(train) == len(open_source(f"prepared:{out}", "validation")) == 7
    assert [train[i].image for i in range(7)] == [picture(i) for i in range(7)]
    assert train[6].captions == ("one 6", "two 6") and train.class_names[train[1].label] == "dog"


def test_images_beside_a_huggingface_set(tmp_path):
    (tmp_path / "0.jpg").write_bytes(picture())
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": None, "path": "0.jpg"}], kind)
    pq.write_table(pa.table({"image": images, "text": ["a"]}), tmp_path / "x.parquet")
    out = prepare(tmp_path, f"parquet:{tmp_path / 'x.parquet'}")
    assert open_source(f"prepared:{out}", "train")[0].image == picture()


def test_classes_by_number_take_names_of_a_file(tmp_path):
    pictures(tmp_path, 2)
    (tmp_path / "t.csv").write_text("file,label\n0.jpg,2\n1.jpg,0\n")
    (tmp_path / "classes.json").write_text('["ant", "bee", "red_cat"]')
    source = f"csv:{tmp_path / 't.csv'}"
    out = prepare(tmp_path, source)
    assert open_source(f"prepared:{out}", "train").class_names == ("0", "1", "2")
    # The shards stay as they are.
    assert run(f"--source={source}", f"--out={out}", f"--classes={tmp_path}/classes.json") == 0
    train = open_source(f"prepared:{out}", "train")
    assert (train[0].captions, train[0].label) == (("red cat",), 2)


def test_resize(tmp_path):
    folder = tmp_path / "in/a"
    folder.mkdir(parents=True)
    (folder / "large.jpg").write_bytes(picture(1, (400, 200)))
    (folder / "small.jpg").write_bytes(picture(2, (50, 40)))
    Image.new("RGBA", (200, 100), (255, 0, 0, 9)).save(folder / "transparent.png")
    Image.new("CMYK", (200, 100), (9, 0, 200, 0)).save(folder / "cmyk.jpg")
    Image.fromarray(np.full((100, 120), 40000, np.uint16)).save(folder / "deep.png")
    drawing = Image.new("RGB", (100, 100))  # black, and black is transparent
    drawing.paste((0, 99, 0), (0, 0, 100, 50))
    drawing.save(folder / "key.png", transparency=(0, 0, 0))
    drawing.convert("L").save(folder / "grey_key.png", transparency=0)
    deep_key = Image.fromarray(np.repeat([[40000], [0]], 50, axis=0).repeat(100, 1).astype("u2"))
    deep_key.save(folder / "deep_key.png", transparency=0)
    out = prepare(tmp_path, f"folder:{tmp_path / 'in'}", "--resize=64")
    train = open_source(f"prepared:{out}", "train")
    images = {Path(train.name_of(i)).stem: train[i].image for i in range(len(train))}
    opened = {name: Image.open(io.BytesIO(data)) for name, data in images.items()}
    properties = {name: (image.format, image.mode, image.size) for name, image in opened.items()}
    assert properties == {
        "large": ("JPEG", "RGB", (128, 64)),
        "small": ("JPEG", "RGB", (50, 40)),
        "transparent": ("PNG", "RGBA", (128, 64)),
        "cmyk": ("JPEG", "RGB", (128, 64)),
        "deep": ("JPEG", "L", (77, 64)),
        "key": ("PNG", "RGBA", (64, 64)),
        "grey_key": ("PNG", "LA", (64, 64)),
        "deep_key": ("PNG", "LA", (64, 64)),
    }
    for name, color in (("key", (0, 99, 0)), ("grey_key", (58,) * 3), ("deep_key", (156,) * 3)):
        flat = np.asarray(flatten(decode(images[name]), "white"))
        assert (flat[:28] == color).all() and (flat[36:] == 255).all()
    assert images["small"] == (folder / "small.jpg").read_bytes()
    assert "7 images were made smaller" in (out / "README.md").read_text()


def test_what_is_prepared_trains(tmp_path, tiny, pairs, monkeypatch, on_one_device):
    on_one_device(monkeypatch)
    out = prepare(tmp_path, f"jsonl:{pairs}")
    workdir = tmp_path / "run"
    spec = f"--config.data.train=prepared:{out}"
    assert door.main(["mlip", f"--config={tiny}", f"--workdir={workdir}", spec]) == 0
    results = json.loads((workdir / "results.json").read_text())
    assert "retrieval/out/text_to_image_recall@1" in results


def test_the_same_bytes_whatever_the_workers_and_the_folder(tmp_path):
    pictures(tmp_path / "in/a", 9)
    common = [f"--source=folder:{tmp_path / 'in'}", "--shard-records=2"]
    assert door.main(["mlip", "prepare", *common, f"--out={tmp_path / 'x'}", "--workers=2"]) == 0
    assert run(*common, f"--out={tmp_path / 'y'}") == 0
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    sums = [line.split("  ") for line in (tmp_path / "x/SHA256SUMS").read_text().splitlines()]
    files = contents(tmp_path / "x")
    assert {name for _, name in sums} == files.keys() - {"SHA256SUMS"}
    assert all(hashlib.sha256(files[name]).hexdigest() == sum_ for sum_, name in sums)


def start(*arguments):
    command = [sys.executable, "-W", "ignore", "-m", "mlip_jax", "prepare", *arguments]
    # Ctrl-C is ignored by what a shell started in the background, and by what that starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path, how):
    pictures(tmp_path / "in/a", 400, ".png")
    common = [f"--source=folder:{tmp_path / 'in'}", "--shard-records=4"]
    out = tmp_path / "out"
    job = start(*common, f"--out={out}", "--workers=2")
    try:
        while not list((out / ".prepare").glob("train-*.json")):
            assert job.poll() is None
            time.sleep(0.005)
        os.kill(job.pid, how)
        assert job.wait(60) in (-9, 130)
    finally:
        job.kill()
    if how == signal.SIGINT:
        assert not (out / "index.json").exists()
    former = {path.name: path.stat().st_mtime_ns for path in (out / ".prepare").glob("train*.json")}
    assert former
    times = {name: (out / name).stat().st_mtime_ns for name in contents(out) if "/" not in name}
    assert run(*common, f"--out={out}") == 0
    assert run(*common, f"--out={tmp_path / 'whole'}") == 0
    assert contents(out) == contents(tmp_path / "whole")
    for name in former:
        shard = f"{Path(name).stem}.array_record"
        assert (out / shard).stat().st_mtime_ns == times[shard]


def test_a_damaged_shard_is_named_and_made_again(tmp_path, capsys):
    pictures(tmp_path / "in/a", 6)
    source = f"folder:{tmp_path / 'in'}"
    out = prepare(tmp_path, source, "--shard-records=2")
    before = contents(out)
    capsys.readouterr()
    shard = out / "train-00001.array_record"
    shard.write_bytes(before[shard.name][:-1000])
    assert door.main(["mlip", f"--config={ROOT}/configs/clip.py:data=prepared:{out}"]) == 2
    assert f"{out} is damaged: train-00001.array_record has" in capsys.readouterr().err

    flipped = bytearray(before[shard.name])
    flipped[200] ^= 255
    shard.write_bytes(flipped)
    source_now = open_prepared(out, Opening(Wanted("train"), 0.0))
    with pytest.raises(OSError, match="train-00001.array_record is damaged at record 0"):
        source_now[2]
    assert source_now.name_of(2) == f"{shard}[0]"
    assert source_now[4].captions == ("a",)

    assert run("--check", f"--out={out}") == 1
    assert "train-00001.array_record is damaged\n5 of 6 files" in capsys.readouterr().out
    prepare(tmp_path, source, "--shard-records=2")
    assert contents(out) == before
    assert run("--check", f"--out={out}") == 0
    shard.unlink()
    assert run("--check", f"--out={out}") == 1


def test_a_source_that_has_changed_is_noticed(tmp_path, capsys):
    pictures(tmp_path, 4)
    table = tmp_path / "t.csv"
    table.write_text("file,caption\n0.jpg,a\n1.jpg,b\n")
    out = prepare(tmp_path, f"csv:{table}")
    table.write_text("file,caption\n0.jpg,a\n1.jpg,c\n")
    assert run(f"--source=csv:{table}", f"--out={out}") == 2
    assert "the source's files have changed" in capsys.readouterr().err


def test_shards_of_files_that_have_changed_are_made_again(tmp_path):
    pictures(tmp_path / "in/a", 4)
    (tmp_path / "in/a/x.jpg").write_bytes(b"no image")
    common = (f"--source=folder:{tmp_path / 'in'}", "--shard-records=2")
    out = tmp_path / "out"
    assert run(*common, f"--out={out}") == 2  # its shards are kept
    (tmp_path / "in/a/x.jpg").unlink()
    (tmp_path / "in/a/3.jpg").rename(tmp_path / "in/a/00.jpg")
    assert run(*common, f"--out={out}") == 0
    assert run(*common, f"--out={tmp_path / 'new'}") == 0
    assert contents(out) == contents(tmp_path / "new")


def one_caption_a_row(folder):
    """Rows of three images in three files, one of which is a copy, as rows go in data."""
    pictures(folder, 3)
    (folder / "copy.jpg").write_bytes((folder / "0.jpg").read_bytes())
    files = ("0.jpg", "1.jpg", "copy.jpg", "2.jpg", "1.jpg", "0.jpg")
    return [(file, f"caption {number}") for number, file in enumerate(files)]


def input_of(kind, folder, rows):
    if kind == "jsonl":
        lines = [json.dumps({"image": file, "caption": text}) for file, text in rows]
        (folder / "rows.jsonl").write_text("\n".join(lines))
        return f"jsonl:{folder / 'rows.jsonl'}"
    if kind == "csv":
        lines = ["image,caption", *(",".join(row) for row in rows)]
        (folder / "rows.csv").write_text("\n".join(lines))
        return f"csv:{folder / 'rows.csv'}"
    images = [(folder / file).read_bytes() for file, _ in rows]
    if kind == "parquet":
        table = pa.table({"image": images, "caption": [text for _, text in rows]})
        for part in range(2):  # an image's rows in two files
            pq.write_table(table[3 * part : 3 * part + 3], folder / f"{part}.parquet")
        return f"parquet:{folder}"
    members = [
        member
        for number, (image, (_, text)) in enumerate(zip(images, rows, strict=True))
        for member in ((f"{number}.jpg", image), (f"{number}.txt", text.encode()))
    ]
    mode = {"mode": "w:gz"} if kind == "packed" else {}
    with tarfile.open(
        folder / f"rows.tar{'.gz' if mode else ''}", **(mode or {"mode": "w"})
    ) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return f"webdataset:{file.name}"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "webdataset", "packed"])
def test_records_of_equal_images_are_one(tmp_path, kind, capsys):
    source = input_of(kind, tmp_path, one_caption_a_row(tmp_path))
    out = prepare(tmp_path, source, "--shard-records=2", "--licence=CC0")
    after = open_source(f"prepared:{out}", "train")
    # A table has put the rows of one file together before.
    first = (
        ("caption 0", "caption 5", "caption 2")
        if kind == "csv"
        else ("caption 0", "caption 2", "caption 5")
    )
    assert [after[i].captions for i in range(len(after))] == [
        first,
        ("caption 1", "caption 4"),
        ("caption 3",),
    ]
    note = "2 records are of 1 image" if kind == "csv" else "5 records are of 2 images"
    assert f"{note}: records of equal images are one" in capsys.readouterr().out
    again = contents(out)
    assert run(f"--source={source}", f"--out={out}", "--shard-records=2", "--licence=CC0") == 0
    assert contents(out) == again


def test_equal_images_of_two_splits_or_two_classes_are_two_records(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture())
    rows = [
        {"image": "a.jpg", "caption": "one", "label": "x"},
        {"image": "a.jpg", "caption": "two", "label": "y"},
        {"image": "a.jpg", "caption": "three", "label": "x", "split": "val"},
        {"image": "a.jpg", "label": "x"},  # an example of its class, no caption
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = prepare(tmp_path, f"jsonl:{tmp_path / 'rows.jsonl'}")
    assert len(open_source(f"prepared:{out}", "train")) == 3
    assert open_source(f"prepared:{out}", "validation")[0].captions == ("three",)


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_separators_of_unicode_end_no_row(tmp_path, kind):
    pictures(tmp_path, 1)
    between = "\t" if kind == "tsv" else ","
    (tmp_path / f"rows.{kind}").write_text(
        f"image{between}caption\n0.jpg{between}a\u2028b\x0cc\x85d\n"
    )
    spec = f"csv:{tmp_path}/rows.{kind}"
    expected = ("a b c d",)
    assert open_source(spec, "train")[0].captions == expected
    assert open_source(f"prepared:{prepare(tmp_path, spec)}", "train")[0].captions == expected
