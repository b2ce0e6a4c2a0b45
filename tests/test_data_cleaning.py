"""Every cleaning reaches the records of datasets, and the vocabulary that is trained on them."""

import csv
import json
import zipfile

import pytest
from PIL import Image
from tokenizers import Tokenizer as Encoder

from mlip_jax.core.errors import UserError
from mlip_jax.core.schema import CLEANINGS
from mlip_jax.data.regions.base import open_regions
from mlip_jax.data.regions.refer import open_refer
from mlip_jax.data.sets.opening import open_source
from mlip_jax.data.text.captions import usable
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.data.text.wordpiece import END, PAD, START, UNKNOWN

CAPTION = "A man's  best_friend, &amp; a Cat"
CLEANED = {
    "none": "A man's best_friend, &amp; a Cat",
    "clip_lite": "a mans best_friend &amp a cat",
    "whitespace": "A man's best_friend, & a Cat",
    "canonicalize": "a mans best friend a cat",
    "siglip": "a mans bestfriend amp a cat",
    "ftfy_whitespace": "A man's best_friend, & a Cat",
    "ftfy_lower": "a man's best_friend, & a cat",
    "ftfy_canonicalize": "a mans best friend a cat",
}
# Of which nothing is left.
EMPTIED = {
    "clip_lite": " .(?) ~",
    "whitespace": "&nbsp; &amp;nbsp;",
    "canonicalize": "_ &quot;!&quot; - ",
    "siglip": "?! _ -",
    "ftfy_whitespace": "&nbsp; \ufeff",
    "ftfy_lower": "\x7f &amp;nbsp;",
    "ftfy_canonicalize": "_ \u201c!\u201d - ",
}


def test_all_cleanings_are_tested():
    assert set(CLEANED) == set(CLEANINGS) == {"none", *EMPTIED}


@pytest.mark.parametrize("cleaning", CLEANINGS)
def test_captions_are_cleaned_once_and_kept_once(cleaning):
    cleaned = CLEANED[cleaning]
    assert usable([CAPTION, f" {CAPTION}\n", cleaned], cleaning) == (cleaned,)
    assert usable(["", " \t", EMPTIED.get(cleaning, "")], cleaning) == ()
    assert usable(None, cleaning) == ()


def test_only_its_own_cleaning_empties_a_caption():
    for cleaning, caption in EMPTIED.items():
        assert usable([caption]) == (" ".join(caption.split()),), cleaning


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9)).save(path)


def jsonl(folder, captions):
    rows = ({"file": f"{i}.png", "caption": caption} for i, caption in enumerate(captions))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "jsonl:a.jsonl"


def labels(folder, captions):
    rows = ({"file": f"{i}.png", "label": caption} for i, caption in enumerate(captions))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "jsonl:a.jsonl"


def table(folder, captions):
    with (folder / "a.csv").open("w", newline="") as file:
        rows = ((f"{i}.png", caption) for i, caption in enumerate(captions))
        csv.writer(file).writerows([("file", "caption"), *rows])
    return "csv:a.csv"


def coco(folder, captions):
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(len(captions))]
    annotations = [{"image_id": i, "caption": caption} for i, caption in enumerate(captions)]
    (folder / "annotations").mkdir()
    (folder / "train2017").mkdir()
    for image in images:
        picture(folder / "train2017" / image["file_name"])
    content = {"images": images, "annotations": annotations}
    (folder / "annotations/captions_train2017.json").write_text(json.dumps(content))
    return "coco:."


def karpathy(folder, captions):
    images = [
        {"filename": f"{i}.png", "split": "train", "sentences": [{"raw": caption}]}
        for i, caption in enumerate(captions)
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return "karpathy:dataset_coco.json"


def class_folders(folder, captions):
    for i in range(len(captions)):
        picture(folder / f"classes/{i}/1.png")
    names = {str(i): caption for i, caption in enumerate(captions)}
    (folder / "classes/classes.json").write_text(json.dumps(names))
    return "folder:classes"


def archive(folder, captions):
    names = {str(i): caption for i, caption in enumerate(captions)}
    with zipfile.ZipFile(folder / "a.zip", "w") as packed:
        for name in names:
            packed.write(folder / "0.png", f"{name}/1.png")
        packed.writestr("classes.json", json.dumps(names))
    return "zip:a.zip"


DATASETS = [jsonl, labels, table, coco, karpathy, class_folders, archive]


@pytest.mark.parametrize("cleaning", EMPTIED)
@pytest.mark.parametrize("dataset", DATASETS, ids=lambda write: write.__name__)
def test_datasets_leave_out_and_count_what_is_emptied(tmp_path, monkeypatch, dataset, cleaning):
    monkeypatch.chdir(tmp_path)
    for index in range(2):
        picture(tmp_path / f"{index}.png")
    spec = dataset(tmp_path, [CAPTION, EMPTIED[cleaning]])
    source = open_source(spec, "train", cleaning=cleaning, max_skipped_share=0.5)
    cleaned = CLEANED[cleaning]
    assert [source[i].captions for i in range(len(source))] == [(cleaned,)]
    assert list(source.captions()) == [cleaned]
    (note,) = source.notes
    assert note.startswith("1 of 2 ")
    assert f"have no caption (of 1, nothing is left after the cleaning {cleaning!r})" in note
    with pytest.raises(UserError, match="1 of 2 .* more than max_skipped_share=0.01 allows"):
        open_source(spec, "train", cleaning=cleaning)
    assert len(open_source(spec, "train")) == 2


def regions(folder, captions, **how):
    rows = [{"file": "0.png", "caption": caption, "box": [0, 0, 4, 4]} for caption in captions]
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_regions(folder / "r.jsonl", "train", **how)


def refer(folder, captions, **how):
    sentences = [{"sent": caption} for caption in captions]
    refs = [{"ann_id": 1, "split": "val", "sentences": sentences}]
    (folder / "refs.json").write_text(json.dumps(refs))
    content = {
        "images": [{"id": 1, "file_name": "0.png"}],
        "annotations": [{"id": 1, "image_id": 1, "bbox": [0, 0, 4, 4]}],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return open_refer(folder, "val", **how)


@pytest.mark.parametrize("cleaning", EMPTIED)
@pytest.mark.parametrize("opened", [regions, refer], ids=lambda opener: opener.__name__)
def test_regions_leave_out_and_count_what_is_emptied(tmp_path, opened, cleaning):
    picture(tmp_path / "0.png")
    captions = [CAPTION, EMPTIED[cleaning]]
    region_set = opened(tmp_path, captions, cleaning=cleaning, max_skipped_share=0.5)
    assert [region_set[i].expression for i in range(len(region_set))] == [CLEANED[cleaning]]
    assert "1 of 2 queries have no caption (of 1, nothing is left" in region_set.notes[0]
    assert len(opened(tmp_path, captions)) == 2


def pieces(tokenizer):
    special = {PAD, UNKNOWN, START, END, "[MASK]"}
    vocabulary = Encoder.from_str(tokenizer.encoder_json()).get_vocab().keys() - special
    return {piece.removeprefix("##") for piece in vocabulary}


# What is in the captions below, and cannot be in a piece of a vocabulary after the cleaning.
REMOVED = {
    "clip_lite": ",'!?;",
    "whitespace": ";tp",  # "&gt;" is ">", "&amp;" is "&"
    "canonicalize": ",'!?;_&-tp",
    "siglip": ",'!?;_&-",
    "ftfy_whitespace": ";tp",
    "ftfy_lower": ";tp",
    "ftfy_canonicalize": ",'!?;_&-tp",
}
CAPTIONS = ["A dog's big_ball, no?", "1 &gt; 0", "caf\u00e9-bar &amp; ice!"] * 3


@pytest.mark.parametrize("cleaning", CLEANINGS)
def test_a_vocabulary_is_that_of_cleaned_captions(cleaning):
    tokenizer = load_tokenizer("wordpiece", cleaning=cleaning, captions=lambda: iter(CAPTIONS))
    cleaned = [text for caption in CAPTIONS for text in usable([caption], cleaning)]
    plain = load_tokenizer("wordpiece", captions=lambda: iter(cleaned))
    assert tokenizer.encoder_json() == plain.encoder_json()
    unknown = Encoder.from_str(tokenizer.encoder_json()).token_to_id(UNKNOWN)
    assert unknown not in tokenizer.encode([*CAPTIONS, *cleaned], 64)


@pytest.mark.parametrize("cleaning", EMPTIED)
def test_a_vocabulary_has_nothing_that_its_cleaning_removes(cleaning):
    plain, cleaned = (
        pieces(load_tokenizer("wordpiece", cleaning=name, captions=lambda: iter(CAPTIONS)))
        for name in ("none", cleaning)
    )
    assert set(REMOVED[cleaning]) <= set("".join(plain))
    assert not set(REMOVED[cleaning]) & set("".join(cleaned))
