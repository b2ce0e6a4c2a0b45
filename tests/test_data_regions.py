"""Datasets of regions: boxes where the files say, and a line for every mistake in them."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from mlip_jax.core.errors import UserError
from mlip_jax.data.regions import compositions, opening
from mlip_jax.data.regions.opening import open_region_set
from mlip_jax.data.sets.records import MissingSplit, Record


def write_image(path, size=(40, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "white").save(path)


ROWS = [
    {"image": "a.png", "caption": "a  red ball", "box": [10, 5, 20, 10], "split": "validation"},
    {"file": "b.png", "caption": "a box", "box": [0, 0, 40.8, 20], "split": "val"},
    {"path": "a.png", "caption": "A dog.", "box": [0, 0, 4, 2], "split": "validation"},
    {"path": "a.png", "caption": "a cat", "box": [0, 0, 4, 2]},
]


def write_rows(folder, rows=ROWS, images=("a.png", "b.png")):
    for name in images:
        write_image(folder / name)
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return f"regions:{folder / 'r.jsonl'}"


def test_rows_become_queries_image_by_image(tmp_path):
    regions = open_region_set(write_rows(tmp_path))
    queries = [regions[index] for index in range(len(regions))]
    assert [region.expression for region in queries] == ["a red ball", "A dog.", "a box"]
    assert [region.name for region in queries] == [str(tmp_path / f"{n}.png") for n in "aab"]
    assert [regions.name_of(index) for index in range(3)] == [region.name for region in queries]
    assert queries[0].image == (tmp_path / "a.png").read_bytes()
    assert queries[0].box == (0.25, 0.25, 0.75, 0.75)
    assert queries[2].box == (0, 0, 1, 1)  # less than a pixel too wide
    assert "r.jsonl" in regions.about and regions.notes == ()


def test_a_split_is_pinned(tmp_path):
    spec = write_rows(tmp_path)
    assert [len(open_region_set(f"{spec}#{split}")) for split in ("train", "all")] == [1, 4]
    with pytest.raises(MissingSplit, match="no split 'test', only validation, train, all"):
        open_region_set(f"{spec}#test")
    (cleaned,) = open_region_set(f"{spec}#train", cleaning="clip_lite")
    assert cleaned.expression == "a cat"


def test_expressions_are_cleaned_and_empty_ones_left_out(tmp_path):
    rows = [*ROWS[:3], ROWS[0] | {"caption": " ?! "}]
    spec = write_rows(tmp_path, rows)
    assert len(open_region_set(spec)) == 4
    with pytest.raises(UserError, match=r"1 of 4 queries have no caption .*r.jsonl:4"):
        open_region_set(spec, cleaning="clip_lite")
    regions = open_region_set(spec, cleaning="clip_lite", max_skipped_share=0.5)
    assert [regions[index].expression for index in range(3)] == ["a red ball", "a dog", "a box"]
    assert "nothing is left after the cleaning" in regions.notes[0]


BAD_ROWS = [
    ({"box": [1, 2, 0, 4]}, r"r.jsonl:1: the box \[1, 2, 0, 4\] has no area"),
    ({"box": [1, 2, 3]}, r"r.jsonl:1: a box must be \[left, top, width, height\]"),
    ({"box": [1, 2, 3, float("nan")]}, "r.jsonl:1: a box must be"),
    ({"box": None}, "r.jsonl:1: a box must be .*, not None"),
    ({"caption": 3}, 'r.jsonl:1: needs "caption", a text'),
    ({"image": ""}, 'r.jsonl:1: needs "file"'),
    ({"image": "c.png"}, "r.jsonl:1: there is no image .*c.png"),
    ({"split": "trian"}, "r.jsonl:1: unknown split 'trian'.*did you mean 'train'"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_a_bad_row_is_named_by_its_line(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        open_region_set(write_rows(tmp_path, [ROWS[0] | change]))


def test_what_is_no_file_of_rows_is_said(tmp_path):
    file = tmp_path / "r.jsonl"
    with pytest.raises(UserError, match="cannot read .*r.jsonl: No such file"):
        open_region_set(f"regions:{file}")
    for content, message in ((b"{", "r.jsonl:1: not JSON"), (b"[]", "1: expected a JSON object")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_region_set(f"regions:{file}")
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        open_region_set(f"regions:{file}")


def test_a_box_that_reaches_out_is_found_with_the_image(tmp_path):
    regions = open_region_set(write_rows(tmp_path, [ROWS[0] | {"box": [30, 0, 12, 4]}]))
    with pytest.raises(UserError, match=r"r.jsonl:1: the box .* reaches out of .*a.png, .*40 x 20"):
        regions[0]
    (tmp_path / "a.png").write_bytes(b"torn")
    with pytest.raises(OSError):
        regions[0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("composition", "unknown dataset of regions 'composition'.*did you mean 'compositions'"),
        ("refcocos:/x", "did you mean 'refcoco:'"),
        ("regions:", "expected compositions, refcoco:FOLDER or regions:FILE"),
        ("compositions#test", "compositions#test: expected train or validation"),
    ],
)
def test_what_is_no_set_is_said(spec, message):
    with pytest.raises(UserError, match=message):
        open_region_set(spec)


def refer(folder, refs="refs(unc).p", **changes):
    """A dataset in REFER's layout, its pickle as Python 2 wrote it."""
    content = [
        {
            "ref_id": 1,
            "ann_id": 11,
            "image_id": 1,
            "split": "val",
            "sentences": [{"sent": "left man"}, {"sent": "he on the left"}],
        },
        {"ann_id": 12, "image_id": 2, "split": "testA", "sentences": [{"sent": "cup"}]},
        {"ann_id": 13, "image_id": 1, "split": "train", "sentences": [{"sent": "wall"}]},
    ]
    instances = {
        "info": {"year": 2014},
        "images": [
            {"id": 1, "file_name": "one.png", "width": 40, "height": 20},
            {"id": 2, "file_name": "two.png"},
        ],
        "annotations": [
            {"id": 11, "image_id": 1, "bbox": [0, 0, 10, 20], "segmentation": [[0, 0, 1, 1]]},
            {"id": 12, "image_id": 2, "bbox": [4, 5, 6, 5], "segmentation": {"counts": [1]}},
            {"id": 13, "image_id": 1, "bbox": [0, 0, 40, 20]},
        ],
    }
    for key, value in changes.items():
        part, index, name = key.split("__")
        (content if part == "refs" else instances[part])[int(index)][name] = value
    folder.mkdir(parents=True, exist_ok=True)
    if refs.endswith(".p"):
        (folder / refs).write_bytes(python_2_pickle(content))
    else:
        (folder / refs).write_text(json.dumps(content))
    (folder / "instances.json").write_text(json.dumps(instances))
    return f"refcoco:{folder}"


def python_2_pickle(value):
    """Protocol 0 with texts as Python 2 wrote them, as byte strings."""
    if isinstance(value, list):
        items = b"".join(python_2_pickle(item)[:-1] + b"a" for item in value)
        return b"(l" + items + b"."
    if isinstance(value, dict):
        pairs = [python_2_pickle(part)[:-1] for pair in value.items() for part in pair]
        joined = b"".join(key + item + b"s" for key, item in zip(*[iter(pairs)] * 2, strict=True))
        return b"(d" + joined + b"."
    return (b"S" + repr(value).encode() if isinstance(value, str) else b"I%d" % value) + b"\n."


@pytest.mark.parametrize("refs", ["refs(unc).p", "refs(umd).p", "refs(google).p", "refs.json"])
def test_refer_gives_a_query_a_sentence(tmp_path, refs):
    spec = refer(tmp_path / "refcoco", refs)
    for name in ("one.png", "two.png"):
        write_image(tmp_path / "refcoco" / "images" / name)
    regions = open_region_set(spec)
    assert [regions[index].expression for index in (0, 1)] == ["left man", "he on the left"]
    assert len(regions) == 2 and regions[0].box == regions[1].box == (0, 0, 0.25, 1)
    assert refs in regions.about and "val" in regions.about
    (cup,) = open_region_set(f"{spec}#testA")
    assert cup.expression == "cup" and cup.box == (0.1, 0.25, 0.25, 0.5)
    assert len(open_region_set(f"{spec}#all")) == 4
    with pytest.raises(MissingSplit, match="no split 'testB', only val, testA, train, all"):
        open_region_set(f"{spec}#testB")


@pytest.mark.parametrize(
    "where", ["refcoco/train2014", "images/mscoco/images/train2014", "train2014"]
)
def test_images_are_found_beside(tmp_path, where):
    spec = refer(tmp_path / "refcoco")
    write_image(tmp_path / where / "one.png")
    assert open_region_set(spec)[0].name == str(tmp_path / where / "one.png")


class Trap:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_executes_nothing(tmp_path, capsys):
    spec = refer(tmp_path)
    file = tmp_path / "refs(unc).p"
    for content, message in (
        (pickle.dumps([Trap()]), "it asks for builtins.print"),
        (pickle.dumps([np.float32(1)]), "it asks for numpy"),
        (b"torn", "not a pickle of expressions"),
        (pickle.dumps({"a": 1}), "expected a list"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"refs\(unc\).p: .*{message}"):
            open_region_set(spec)
    assert capsys.readouterr().out == ""


BAD_REFER = [
    ({"refs__0__ann_id": 99}, r"refs\[0\] is of the annotation 99, which is not among"),
    ({"refs__0__sentences": "left"}, r"refs\[0\] needs"),
    ({"refs__0__sentences": []}, "the split val holds no sentences"),
    ({"annotations__0__bbox": [0, 0, 10, 0]}, r"annotations\[0\]: the box .* has no area"),
    ({"annotations__0__image_id": 7}, r"annotations\[0\] is of the image 7, which is not among"),
    ({"annotations__1__id": None}, r'annotations\[1\] needs "id"'),
    ({"images__1__file_name": ""}, r'images\[1\] needs "id" and "file_name"'),
    ({"images__0__file_name": "three.png"}, "cannot find the image three.png: looked in"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_REFER)
def test_what_is_wrong_in_refer_is_said(tmp_path, changes, message):
    spec = refer(tmp_path / "refcoco", **changes)
    write_image(tmp_path / "refcoco" / "images" / "one.png")
    with pytest.raises(UserError, match=message):
        open_region_set(spec)


def test_what_refer_lacks_is_said(tmp_path):
    spec = refer(tmp_path / "refcoco")
    with pytest.raises(UserError, match="cannot find the image one.png"):
        open_region_set(spec)
    (tmp_path / "refcoco" / "instances.json").unlink()
    with pytest.raises(UserError, match="has no instances.json"):
        open_region_set(spec)
    (tmp_path / "refcoco" / "refs(unc).p").unlink()
    with pytest.raises(UserError, match=r"expected refs\(unc\).p, .*lichengunc/refer"):
        open_region_set(spec)
    with pytest.raises(UserError, match="expected refs"):
        open_region_set(f"refcoco:{tmp_path / 'absent'}")


class Drawings:
    """Rectangles of one colour each on white, two of the same concept among them."""

    split = "validation"
    codes = ("a", "b", "c", "a", "d", "e", "f")

    def __len__(self):
        return len(self.codes)

    def name_of(self, index):
        return f"style/{self.codes[index]}"

    def __getitem__(self, index):
        picture = np.full((30, 30, 3), 255, np.uint8)
        picture[5:25, 10 - index : 20 + index] = (30 * index, 200, 100)
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "PNG")
        return Record(out.getvalue(), (f"shape {index}",), (), -1, self.name_of(index))


def test_a_composition_shows_each_drawing_in_its_box():
    composed = compositions.Compositions(Drawings(), canvases=6)
    assert len(composed) == 2 * (2 + 3 + 4)
    regions = [composed[index] for index in range(len(composed))]
    side = compositions.SIDE
    for name in dict.fromkeys(region.name for region in regions):
        canvas_regions = [region for region in regions if region.name == name]
        canvas = np.asarray(Image.open(io.BytesIO(canvas_regions[0].image))).astype(int)
        assert canvas.shape == (side, side, 3)
        covered = np.zeros((side, side), int)
        for region in canvas_regions:
            left, top, right, bottom = (round(edge * side) for edge in region.box)
            assert 0.4 <= max(right - left, bottom - top) / side <= 0.51
            color = (30 * int(region.expression.split()[1]), 200, 100)
            assert np.abs(canvas[top:bottom, left:right] - color).max() <= 1
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1
        np.testing.assert_array_equal(canvas[covered == 0], 255)
    # Of the concept with two drawings, one is shown.
    first = {region.expression for region in regions[:6]}
    assert len(first) == 6 and len(first & {"shape 0", "shape 3"}) == 1


def test_compositions_are_the_same_each_time_and_in_any_order():
    one, other = (compositions.Compositions(Drawings(), canvases=4) for _ in range(2))
    backwards = [other[index] for index in reversed(range(len(other)))]
    assert [one[index] for index in range(len(one))] == backwards[::-1]


def test_compositions_are_made_of_the_embedded_set(monkeypatch):
    opened = []

    def open_source(*spec, **how):
        opened.append((*spec, how))
        return Drawings()

    monkeypatch.setattr(compositions, "open_source", open_source)
    for spec in ("compositions", "compositions#train"):
        assert len(opening.open_region_set(spec, cache_dir="c", cleaning="clip_lite")) == 900
    how = {"cache_dir": "c", "cleaning": "clip_lite"}
    assert opened == [("emoji", "validation", how), ("emoji", "train", how)]
