"""Whatever stands in a file, a reader gives the right result or one line that says what is wrong.

Entries that are good stand among such as are odd in one place. A strict reader opens the file with
every good entry, or raises one UserError; the preparation keeps every good entry and names each
other one. By `-m slow`, every reader meets 20,000 files.
"""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlip_jax.core.errors import UserError
from mlip_jax.core.texts import MOST_TEXT
from mlip_jax.data.prepare.arrow import Parquet
from mlip_jax.data.prepare.opened_sets import CocoCaptions
from mlip_jax.data.prepare.readers import Broken
from mlip_jax.data.prepare.tables import JsonLines, Table
from mlip_jax.data.regions.base import open_regions
from mlip_jax.data.sets import shards
from mlip_jax.data.sets.opening import open_source
from mlip_jax.data.sets.records import MissingSplit

EXAMPLES = pytest.mark.parametrize(
    "examples", [100, pytest.param(20_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
IMAGE = b"an image, which no reader looks at"
LONGEST = 2000  # characters of a message


def meet(examples, strategy, check):
    """Calls `check` with so many examples of a strategy, always the same."""
    configured = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    configured(given(strategy)(check))()


def said(error):
    """That a message is one line that can be printed, and not an essay."""
    message = str(error)
    assert message and len(message) < LONGEST and "\n" not in message
    message.encode("utf-8")
    return True


# Texts with what breaks readers: marks, separators, breaks, halves of characters, other alphabets.
WORDS = st.sampled_from(
    ["", " ", "a", "dog", "\0", "\n", "\r\n", "\r", '"', '""', ",", "\t", "\ud83d", "\udce9", "é"]
    + [
        "你好",
        "\u2028",
        "\ufeff",
        "../x",
        "/etc/passwd",
        "0.png",
        "train",
        "holdout",
        "{",
        "\\",
        "'",
    ]
)
TEXTS = st.one_of(
    st.lists(WORDS, max_size=6).map("".join),
    st.sampled_from(["x" * 300, "x" * 5000, "x" * (MOST_TEXT + 1)]),
)
NUMBERS = st.sampled_from(
    [0, -1, 1, 7, 2**31, 2**63, 10**30, 10**400, 0.5, 1e308, float("inf"), float("nan"), -0.0]
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def nest(values):
    return st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3)


DEEP = st.integers(50, 300).map(lambda depth: json.loads("[" * depth + "]" * depth))
ODD = st.one_of(LEAVES, st.recursive(LEAVES, nest, max_leaves=6), DEEP)
# What json.dumps does not write.
RAW_VALUES = st.sampled_from(
    [
        "1" * 5000,
        "[" * 5000,
        "1e400",
        "NaN",
        "-",
        "tru",
        "{",
        '"\\ud83d"',
        '"\\u0000"',
        '{"a":1,"a":2}',
    ]
)


@st.composite
def odd_objects(draw, good):
    """A JSON object like `good`, but for one or two of its keys."""
    values = dict(good)
    for _ in range(draw(st.integers(1, 2))):
        keys = sorted({*values, "caption", "captions", "label", "labels", "tags", "split", "file"})
        key = draw(st.sampled_from(keys))
        if draw(st.booleans()):
            values[key] = draw(ODD)
        else:
            values.pop(key, None)
    text = json.dumps(values)
    if draw(st.integers(0, 3)) == 0:
        text = text[:-1] + f', "more": {draw(RAW_VALUES)}}}'
    if draw(st.integers(0, 5)) == 0:
        text = text[: draw(st.integers(0, len(text)))]
    return text


def row(number):
    return {"file": f"{number}.png", "caption": f"caption {number}"}


def jsonl_lines(good=row):
    """Lines of (text, number), the number of a good row or None."""
    numbers = st.integers(0, 3)
    line = st.one_of(
        numbers.map(lambda n: (json.dumps(good(n)), n)),
        odd_objects(good(9)).map(lambda text: (text, None)),
        st.just(("", None)),
    )
    return st.lists(line, min_size=1, max_size=5)


@pytest.fixture
def folder(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(IMAGE)
    return tmp_path


def write(path, lines):
    text = "\n".join(text for text, _ in lines)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def opens(spec, good):
    """That a dataset holds the good captions and can be read, or says in one line why not."""
    try:
        source = open_source(spec, "train", max_skipped_share=1.0)
    except MissingSplit as error:
        return said(error)
    except UserError as error:
        return said(error)
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
            assert record.captions and said(record.name)
    return True


def prepares(reader, good, count):
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
        kept += result.example.captions
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

    meet(examples, jsonl_lines(), check)


@EXAMPLES
def test_regions(folder, examples):
    path = folder / "t.jsonl"

    def check(lines):
        write(path, lines)
        try:
            regions = open_regions(path, max_skipped_share=1.0)
        except UserError as error:
            said(error)
        else:
            expressions = [query.expression for query in regions._queries]
            for _, number in lines:
                assert number is None or f"caption {number}" in expressions
            assert all(said(regions.name_of(index)) for index in range(len(regions)))

    meet(examples, jsonl_lines(lambda number: {**row(number), "box": [0, 0, 1, 1]}), check)


def table_rows(comma, names_first):
    """Texts of (row, number); a good row may be in quotation marks and of several lines."""

    def good(number, quoted):
        caption = f'so "{number}",{comma}\nlike that' if quoted else f"caption {number}"
        fields = [f"{number}.png", caption]
        file = io.StringIO()
        csv.writer(file, delimiter=comma, lineterminator="").writerow(
            fields[:: 1 if names_first else -1]
        )
        return file.getvalue(), " ".join(caption.split())

    pieces = st.sampled_from(['"', '""', comma, "a", "b c", "5.png", "6.jpg", "\r", " ", '5"', "é"])
    odd = st.lists(pieces, max_size=7).map(lambda texts: ("".join(texts), None))
    return st.lists(st.builds(good, st.integers(0, 3), st.booleans()) | odd, min_size=1, max_size=6)


@EXAMPLES
@pytest.mark.parametrize("names_first", [True, False], ids=["file, caption", "caption, file"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables(folder, suffix, names_first, examples):
    path = folder / f"t{suffix}"
    comma = "\t" if suffix == ".tsv" else ","
    header = comma.join(["file", "caption"][:: 1 if names_first else -1])

    def check(rows):
        write(path, [(header, None), *rows])
        good = [caption for _, caption in rows if caption is not None]
        opens(f"csv:{path}", good)
        reader = Table(str(path), {}, "")
        refs = list(reader.refs())
        kept = set()
        for result in reader.read([ref for _, ref in refs]):
            if not isinstance(result, Broken):
                kept |= {" ".join(caption.split()) for caption in result.example.captions}
        assert set(good) <= kept

    meet(examples, table_rows(comma, names_first), check)


@st.composite
def changed(draw, value, changes):
    """A JSON value with so many places changed, or left out."""
    text = json.dumps(value)
    for _ in range(changes):
        value = json.loads(text)
        node = value
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = draw(st.sampled_from(keys))
            inner = node[key]
            if isinstance(inner, (dict, list)) and inner and draw(st.integers(0, 4)):
                node = inner
            elif draw(st.integers(0, 3)):
                node[key] = draw(ODD)
                break
            else:
                del node[key]
                break
        text = json.dumps(value)
        if not value:
            break
    if draw(st.integers(0, 7)) == 0:
        text = text.replace("1", draw(RAW_VALUES), 1)
    return text


@EXAMPLES
def test_karpathy(folder, examples):
    images = [
        {"filename": f"{n}.png", "split": "train", "sentences": [{"raw": f"caption {n}"}]}
        for n in range(3)
    ]

    def check(text):
        (folder / "dataset_a.json").write_text(text)
        opens(f"karpathy:{folder / 'dataset_a.json'}", [])

    meet(examples, changed({"images": images}, 2), check)


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
        opens(f"coco:{folder}", [])
        opens(f"objects:{captions}", [])
        reader = CocoCaptions(str(captions), {}, "")
        try:
            refs = list(reader.refs())
        except UserError as error:
            said(error)
        else:
            for result in reader.read([ref for _, ref in refs]):
                if not isinstance(result, Broken):
                    shards.pack(result.example, b"")

    meet(examples, changed(COCO, 2), check)


@EXAMPLES
def test_class_names(folder, examples):
    (folder / "dog").mkdir()
    (folder / "dog/1.png").write_bytes(IMAGE)

    def check(text):
        (folder / "classes.json").write_text(text)
        opens(f"folder:{folder}", [])

    names = {"dog": "a dog", "cat": "a cat"}
    meet(examples, changed(names, 2) | changed(["dog", "cat"], 1), check)


def columns(rows):
    """Arrays of a Parquet file, each of one of several types."""

    def of(values, kinds):
        return st.lists(values, min_size=rows, max_size=rows).flatmap(
            lambda drawn: st.sampled_from(kinds).map(lambda kind: pa.array(drawn, kind))
        )

    texts = st.none() | TEXTS.map(lambda text: text.encode("utf-8", "replace").decode())
    bytes_ = st.none() | st.binary(max_size=9) | st.just("dog".encode("utf-16"))
    numbers = st.none() | st.integers(-(2**62), 2**62)
    splits = st.none() | st.sampled_from(["train", "val", "holdout", "testing", "eval", ""])
    whole = [pa.int64(), pa.timestamp("ms"), pa.date64(), pa.time64("ns"), pa.duration("us")]
    one = st.one_of(
        of(texts, [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
        of(bytes_, [pa.binary(), pa.large_binary()]),
        of(numbers, whole),
        of(st.none() | st.floats(), [pa.float64()]),
        of(st.none() | st.lists(texts, max_size=2), [pa.list_(pa.string())]),
    )
    images = st.one_of(
        of(st.sampled_from([IMAGE, None]), [pa.binary()]),
        of(
            st.fixed_dictionaries({"bytes": st.none() | st.just(IMAGE), "path": texts}),
            [pa.struct({"bytes": pa.binary(), "path": pa.string()})],
        ),
    )
    return st.fixed_dictionaries(
        {"image": images},
        optional={
            "caption": one,
            "label": one,
            "tags": one,
            "split": one | of(splits, [pa.string()]),
        },
    )


@EXAMPLES
def test_parquet(folder, examples):
    path = folder / "t.parquet"

    def check(arrays):
        pq.write_table(pa.table(arrays), path)
        try:
            reader = Parquet(str(path), {}, "")
        except UserError as error:
            said(error)
            return
        rows = len(arrays["image"])
        refs = list(reader.refs())
        assert len(refs) == rows
        for (split, ref), word in zip(refs, arrays.get("split", [None] * rows), strict=True):
            assert split in ("train", "validation", "test")
            known = str(word) in ("None", "", "train", "val")
            assert known or isinstance(ref, Broken) or str(word) in ("dev", "test")
        prepares(reader, [], rows)

    meet(examples, st.integers(1, 3).flatmap(columns), check)


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
    return out, json.loads(whole.to_json()), files[1]


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

    meet(examples, changed(index, 1), check)


@EXAMPLES
def test_texts_of_prepared_sets(prepared, examples):
    out, index, texts = prepared
    (out / "index.json").write_text(json.dumps(index))
    good = {"name": "a", "captions": ["b"], "tags": ["c"], "labels": ["0"], "difficult": []}

    def check(text):
        texts.write_text(text + "\n")
        entry = {**index["shards"][0], "sizes": [index["shards"][0]["sizes"][0], len(text) + 1]}
        (out / "index.json").write_text(json.dumps({**index, "shards": [entry]}))
        try:
            captions = list(open_source(f"prepared:{out}", "train").captions())
        except UserError as error:
            said(error)
        else:
            for caption in captions:
                caption.encode("utf-8")

    meet(examples, changed(good, 2), check)
