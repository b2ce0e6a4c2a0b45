"""Whatever stands in a file, a reader gives the right result or one line that says what is wrong.

Entries that are good stand among such as are odd. A strict reader opens the file with every good
entry, or raises one UserError; the preparation keeps every good entry and names each other one.
By `-m slow`, every reader meets 20,000 files.
"""

import csv
import io
import json
import pickle
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from fuzzing import EXAMPLES, IMAGE, WORDS, gives, meet, said, watched

from mlip_jax.core.errors import UserError
from mlip_jax.data.prepare.arrow import Parquet
from mlip_jax.data.prepare.opened_sets import CocoCaptions
from mlip_jax.data.prepare.readers import Broken
from mlip_jax.data.prepare.tables import JsonLines, Table
from mlip_jax.data.prepare.webdataset import WebDataset
from mlip_jax.data.regions.base import open_regions
from mlip_jax.data.regions.refer import open_refer
from mlip_jax.data.sets import shards
from mlip_jax.data.sets.opening import open_source

folder = watched  # a fixture

KEYS = ("caption", "captions", "label", "labels", "tags", "split", "file", "box", "expression")


def row(number):
    return {"file": f"{number}.png", "caption": f"caption {number}"}


def jsonl_lines(odd, good=row):
    """Lines of (text, number), the number of a good row or None."""
    lines = []
    for _ in range(odd.randint(1, 5)):
        if odd.once_in(2):
            number = odd.randrange(4)
            lines.append((json.dumps(good(number)), number))
        else:
            text = "" if odd.once_in(8) else odd.changed(good(9), 2, KEYS)
            lines.append((text, None))
    return lines


def write(path, lines):
    text = "\n".join(text for text, _ in lines)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def opens(spec, good=()):
    """That a dataset holds the good captions and can be read, or says in one line why not."""
    source = gives(open_source, spec, "train", max_skipped_share=1.0)
    if source is None:
        return
    assert all(map(said, source.notes))
    captions = list(source.captions())
    assert set(good) <= set(captions)
    for text in (*captions, *source.class_names, source.name):
        text.encode("utf-8")
    for index in range(len(source)):
        assert said(source.name_of(index))
        try:
            record = source[index]
        except OSError as error:
            said(error.strerror or error)
        else:
            assert isinstance(record.image, bytes) and record.captions and said(record.name)


def prepares(reader, good=(), count=None):
    """That every good entry comes out right, and each other one right or broken, once."""
    refs = list(reader.refs())
    assert count is None or len(refs) == count
    assert {split for split, _ in refs} <= {"train", "validation", "test"}
    results = list(reader.read([ref for _, ref in refs]))
    assert len(results) == len(refs)
    kept = []
    for result in results:
        if isinstance(result, Broken):
            said(result.reason.replace("\n", " "))
            continue
        kept += [" ".join(caption.split()) for caption in result.example.captions]
        _, line = shards.pack(result.example, b"")
        assert shards.parse_texts(line).captions == result.example.captions
    assert set(good) <= set(kept)


@EXAMPLES
def test_jsonl(folder, examples):
    path = folder / "t.jsonl"

    def check(lines):
        write(path, lines)
        good = [f"caption {number}" for _, number in lines if number is not None]
        opens(f"jsonl:{path}", good)
        prepares(JsonLines(str(path), {}, ""), good, sum(1 for text, _ in lines if text.strip()))

    meet("jsonl", jsonl_lines, check, examples)


@EXAMPLES
def test_regions(folder, examples):
    path = folder / "t.jsonl"

    def make(odd):
        return jsonl_lines(odd, lambda number: {**row(number), "box": [0, 0, 1, 1]})

    def check(lines):
        write(path, lines)
        regions = gives(open_regions, path, max_skipped_share=1.0)
        if regions is not None:
            expressions = [query.expression for query in regions._queries]
            for _, number in lines:
                assert number is None or f"caption {number}" in expressions
            assert all(said(regions.name_of(index)) for index in range(len(regions)))

    meet("regions", make, check, examples)


@EXAMPLES
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables(folder, suffix, examples):
    path = folder / f"t{suffix}"
    comma = "\t" if suffix == ".tsv" else ","
    pieces = ('"', '""', comma, "a", "b c", "5.png", "6.jpg", "\r", " ", '5"', "é", *WORDS)

    def good(odd, names_first):
        number = odd.randrange(4)
        caption = f"caption {number}"
        if odd.once_in(2):
            caption = f'so "{number}",{comma}\nlike that'
        fields = [f"{number}.png", caption]
        file = io.StringIO()
        csv.writer(file, delimiter=comma, lineterminator="").writerow(
            fields[:: 1 if names_first else -1]
        )
        return file.getvalue(), " ".join(caption.split())

    def make(odd):
        names_first = odd.once_in(2)
        rows = [(comma.join(["file", "caption"][:: 1 if names_first else -1]), None)]
        for _ in range(odd.randint(1, 6)):
            if odd.once_in(2):
                rows.append(good(odd, names_first))
            else:
                rows.append(("".join(odd.choices(pieces, k=odd.randrange(8))), None))
        return rows

    def check(rows):
        write(path, rows)
        captions = [caption for _, caption in rows if caption is not None]
        opens(f"csv:{path}", captions)
        prepares(Table(str(path), {}, ""), captions)

    meet(suffix, make, check, examples)


@EXAMPLES
def test_karpathy(folder, examples):
    file = folder / "dataset_a.json"
    images = [
        {"filename": f"{n}.png", "split": "train", "sentences": [{"raw": f"caption {n}"}]}
        for n in range(3)
    ]
    words = ("filepath", "sentences", "raw", "restval", "test", "val")

    def check(text):
        file.write_text(text)
        opens(f"karpathy:{file}")

    meet("karpathy", lambda odd: odd.changed({"images": images}, 2, words), check, examples)


COCO = {
    "images": [{"id": n, "file_name": f"{n}.png"} for n in range(3)],
    "annotations": [{"image_id": n, "caption": f"caption {n}", "category_id": 1} for n in range(3)],
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
}


@EXAMPLES
def test_coco(folder, examples):
    (folder / "train2017").mkdir()
    (folder / "annotations").mkdir()
    captions = folder / "annotations/captions_train2017.json"

    def check(text):
        captions.write_text(text)
        opens(f"coco:{folder}")
        opens(f"objects:{captions}")
        gives(lambda: prepares(CocoCaptions(str(captions), {}, "")))

    meet("coco", lambda odd: odd.changed(COCO, 2, ("dog", 1, 2)), check, examples)


@EXAMPLES
def test_referring_expressions(folder, examples):
    boxes = [{"id": n, "image_id": n, "bbox": [0, 0, 1, 1]} for n in range(3)]
    sentences = [{"sent": "the dog", "sent_id": 0}]
    refs = [{"ann_id": n, "image_id": n, "split": "val", "sentences": sentences} for n in range(3)]
    instances = json.dumps({**COCO, "annotations": boxes})
    whole = pickle.dumps(refs)

    def make(odd):
        if odd.once_in(2):
            return instances, odd.damaged(whole)
        if odd.once_in(2):
            return odd.changed(json.loads(instances), 2), whole
        try:
            return instances, pickle.dumps(json.loads(odd.changed(refs, 2, ("val", "testA"))))
        except (ValueError, RecursionError):
            return instances, b""

    def check(texts):
        (folder / "instances.json").write_text(texts[0])
        (folder / "refs(unc).p").write_bytes(texts[1])
        regions = gives(open_refer, folder, max_skipped_share=1.0)
        if regions is not None:
            assert all(said(regions.name_of(index)) for index in range(len(regions)))

    meet("referring expressions", make, check, examples)


@EXAMPLES
def test_class_names(folder, examples):
    (folder / "dog").mkdir()
    (folder / "dog/1.png").write_bytes(IMAGE)

    def make(odd):
        return odd.changed(odd.choice(({"dog": "a dog", "cat": "a cat"}, ["dog", "cat"])), 2)

    def check(text):
        (folder / "classes.json").write_text(text)
        opens(f"folder:{folder}")

    meet("class names", make, check, examples)


TEXT = (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))
WHOLE = (pa.int64(), pa.timestamp("ms"), pa.date64(), pa.time64("ns"), pa.duration("us"))


def column(odd, rows):
    """An array of a Parquet file, of one of many types."""

    def array(draw, kind):
        return pa.array([None if odd.once_in(5) else draw() for _ in range(rows)], kind)

    def text():
        return odd.text().encode("utf-8", "replace").decode()

    kind = odd.randrange(6)
    if kind < 2:
        return array(text, odd.choice(TEXT))
    if kind == 2:
        return array(lambda: odd.randbytes(odd.randrange(9)), odd.choice((pa.binary(),)))
    if kind == 3:
        return array(lambda: odd.randint(-(2**62), 2**62), odd.choice(WHOLE))
    if kind == 4:
        return array(lambda: odd.choice((0.5, float("nan"), 1e308)), pa.float64())
    return array(lambda: [text() for _ in range(odd.randrange(3))], pa.list_(pa.string()))


def columns(odd):
    rows = odd.randint(1, 3)
    if odd.once_in(2):
        images = pa.array([odd.choice((IMAGE, None)) for _ in range(rows)], pa.binary())
    else:
        values = [
            {"bytes": odd.choice((IMAGE, None)), "path": odd.choice(("a.png", "", "\0", None))}
            for _ in range(rows)
        ]
        images = pa.array(values, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    drawn = {"image": images}
    drawn |= {name: column(odd, rows) for name in ("caption", "label", "tags") if odd.once_in(2)}
    if odd.once_in(3):
        words = ("train", "val", "holdout", "testing", "eval", "", None)
        drawn["split"] = pa.array([odd.choice(words) for _ in range(rows)], pa.string())
    elif odd.once_in(3):
        drawn["split"] = column(odd, rows)
    return drawn


@EXAMPLES
def test_parquet(folder, examples):
    path = folder / "t.parquet"

    def check(arrays):
        pq.write_table(pa.table(arrays), path)
        reader = gives(Parquet, str(path), {}, "")
        if reader is None:
            return
        rows = len(arrays["image"])
        refs = list(reader.refs())
        assert len(refs) == rows
        texts = arrays.get("split")
        if texts is not None and pa.types.is_string(texts.type):
            for (split, ref), word in zip(refs, texts.to_pylist(), strict=True):
                known = {None: "train", "": "train", "train": "train", "val": "validation"}
                word = word and word.strip().lower()
                assert isinstance(ref, Broken) or split == known.get(word, word)
        prepares(reader, [], rows)

    meet("parquet", columns, check, examples)


@EXAMPLES
def test_damaged_parquet(folder, examples):
    path = folder / "t.parquet"
    table = pa.table({"image": [IMAGE] * 3, "caption": [f"caption {n}" for n in range(3)]})
    pq.write_table(table, path)
    whole = path.read_bytes()

    def check(data):
        path.write_bytes(data)

        def read():
            reader = Parquet(str(path), {}, "")
            prepares(reader)

        gives(read)

    meet("damaged parquet", lambda odd: odd.damaged(whole), check, examples)


@EXAMPLES
def test_tars(folder, examples):
    path = folder / "t.tar"

    def make(odd):
        file = io.BytesIO()
        good = []
        with tarfile.open(fileobj=file, mode="w", format=odd.choice((0, 1, 2))) as tar:
            for number in range(odd.randint(1, 4)):
                texts = {"png": IMAGE, "txt": f"caption {number}".encode()}
                if odd.once_in(2):
                    good.append(f"caption {number}")
                else:
                    texts["json"] = odd.changed(row(number), 2, KEYS).encode("utf-8", "replace")
                    texts["txt"] = odd.text().encode("utf-8", "surrogatepass")
                for suffix, content in texts.items():
                    name = f"{number}.{suffix}"
                    if suffix != "png" and number not in good and odd.once_in(9):
                        name = odd.text().replace("\0", "") or name
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    try:
                        tar.addfile(member, io.BytesIO(content))
                    except (ValueError, UnicodeError):  # a name that the format does not hold
                        continue
        data = file.getvalue()
        return (odd.damaged(data), None) if odd.once_in(3) else (data, len(good))

    def check(example):
        data, _ = example
        path.write_bytes(data)
        gives(lambda: prepares(WebDataset(str(path), {}, "")))

    meet("tars", make, check, examples)


@pytest.fixture
def prepared(folder):
    """A prepared dataset of three records, and its index."""
    out = folder / "out"
    out.mkdir()
    writer = ArrayRecordWriter(str(out / "train-00000.array_record"), "group_size:1")
    with (out / "train-00000.texts.jsonl").open("wb") as texts:
        for number in range(3):
            example = shards.Example(
                f"{number}.png", captions=(f"caption {number}",), labels=("0",)
            )
            packed, line = shards.pack(example, IMAGE)
            writer.write(packed)
            texts.write(line)
    writer.close()
    files = [out / f"train-00000{suffix}" for suffix in (".array_record", ".texts.jsonl")]
    facts = {"formats": {"PNG": 3}}
    sizes = tuple(file.stat().st_size for file in files)
    shard = shards.Shard("train-00000", "train", 3, sizes, ("a", "b"), "c", facts)
    whole = shards.Index({"source": "x"}, (shard,), ("0", "1"), ("dog", "cat"))
    return out, json.loads(whole.to_json()), files


@EXAMPLES
def test_prepared_indexes(prepared, examples):
    out, index, _ = prepared
    names = {path.name for path in out.iterdir()} | {"index.json"}

    def check(text):
        (out / "index.json").write_text(text)
        try:
            source = open_source(f"prepared:{out}", "train")
        except UserError as error:
            said(error)
        else:
            assert len(source) == 3
            assert [source[i].captions for i in range(3)] == [(f"caption {i}",) for i in range(3)]
            for text in (*source.class_names, source.attribution):
                text.encode("utf-8")
        assert {path.name for path in out.iterdir()} == names

    meet("indexes", lambda odd: odd.changed(index, 1, ("test", "../victim")), check, examples)


@EXAMPLES
def test_texts_of_prepared_sets(prepared, examples):
    out, index, (_, texts) = prepared
    good = {"name": "a", "captions": ["b"], "tags": ["c"], "labels": ["0"], "difficult": []}

    def check(text):
        texts.write_text(text + "\n")
        entry = {**index["shards"][0], "sizes": [index["shards"][0]["sizes"][0], len(text) + 1]}
        (out / "index.json").write_text(json.dumps({**index, "shards": [entry]}))
        captions = gives(lambda: list(open_source(f"prepared:{out}", "train").captions()))
        for caption in captions or ():
            caption.encode("utf-8")

    meet("texts", lambda odd: odd.changed(good, 2, ("1", "7")), check, examples)


@EXAMPLES
def test_damaged_shards(prepared, examples):
    out, index, (records, _) = prepared
    whole = records.read_bytes()

    def check(data):
        records.write_bytes(data)
        entry = {**index["shards"][0], "sizes": [len(data), index["shards"][0]["sizes"][1]]}
        (out / "index.json").write_text(json.dumps({**index, "shards": [entry]}))

        def read():
            source = open_source(f"prepared:{out}", "train")
            for number in range(len(source)):
                try:
                    record = source[number]
                except OSError as error:
                    said(error)
                else:
                    assert len(record.image) <= len(data)

        gives(read)

    meet("shards", lambda odd: odd.damaged(whole), check, examples)


def test_half_a_character_in_an_index_is_no_more_than_a_question_mark(prepared):
    out, index, _ = prepared
    half = {"attribution": "by \ud83d", "class_names": ["dog", "\udce9"], "notes": ["\ud83d"]}
    (out / "index.json").write_text(json.dumps({**index, **half}))
    source = open_source(f"prepared:{out}", "train")
    assert source.attribution == "by ?" and tuple(source.class_names) == ("dog", "?")
