"""Pairs that a model scores: what is kept, near-duplicates, stopping, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from preparing import broken, contents, index, picture, prepare, records, run
from test_teachers import teacher  # noqa: F401  (a fixture)

import mlip_jax
from mlip_jax.core import places
from mlip_jax.core.buckets import Mirror
from mlip_jax.data.prepare import scored
from mlip_jax.data.sets import cache_room
from mlip_jax.data.sets.opening import open_source
from mlip_jax.training import scoring

CAPTIONS = ("a red cat", "two dogs", "the sea at night")


@pytest.fixture
def source(tmp_path):
    """Twelve images of several sizes, most with three captions, two of them for validation."""
    rows = []
    for number in range(12):
        data = picture(number, (40 + 7 * number, 30), "PNG")
        (tmp_path / f"{number}.png").write_bytes(data)
        split = "train" if number < 10 else "validation"
        captions = [f"{text} {number}" for text in CAPTIONS[: 1 + number % 3]]
        rows.append({"file": f"{number}.png", "captions": captions, "split": split})
    return write(tmp_path, rows)


def write(folder, rows):
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return f"jsonl:{file}"


def read(source):
    lines = Path(source.partition(":")[2]).read_text().splitlines()
    return [json.loads(line) for line in lines]


def cosines(model, by_name):
    """By caption, what the model says of each pair of prepared records."""
    return {
        text: float(np.sum(model.encode_image(record.image) * model.encode_text(text)))
        for record in by_name.values()
        for text in record.captions
    }


def kept_scores(out, split="train"):
    lines = (out / f"{split}-00000.texts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {t: s for row in rows for t, s in zip(row["captions"], row["scores"], strict=True)}


def test_the_best_share_of_the_pairs_is_kept(source, tmp_path, teacher):  # noqa: F811
    every = records(prepare(tmp_path / "every", source))
    expected = cosines(mlip_jax.load(teacher), every)
    best = sorted(expected, key=expected.get, reverse=True)[: round(0.3 * len(expected))]
    out = prepare(tmp_path, source, f"--score={teacher}", "--keep=0.3")
    assert kept_scores(out) == pytest.approx({text: expected[text] for text in best}, abs=2e-5)
    kept = records(out)
    assert {text for record in kept.values() for text in record.captions} == set(best)
    for name, record in kept.items():  # in the order of the source
        assert [t for t in every[name].captions if t in best] == list(record.captions)
    assert len(records(out, "validation")) == 2 and len(kept_scores(out, "validation")) == 5
    # The scores of all pairs are there, and the card tells.
    arrays = np.load(out / "scores.npz")
    assert arrays["train.scores"] == pytest.approx(list(expected.values()), abs=2e-5)
    assert arrays["train.kept"].sum() == len(best)
    card = (out / "README.md").read_text()
    assert f"of the pairs in train the best {len(best)} are kept, " in card
    assert "scores of the 19 pairs in train: 10 %" in card
    assert "  scores.npz\n" in (out / "SHA256SUMS").read_text()
    assert index(out)["job"]["keep"] == 0.3


def test_of_near_duplicates_the_best_is_kept(source, tmp_path, teacher):  # noqa: F811
    # Images 10 and 11 are 0 and 1 once more, in other bytes.
    rows = read(source)[:10]
    for number in range(2):
        Image.open(tmp_path / f"{number}.png").save(tmp_path / f"{number}-again.png", optimize=True)
        rows.append({"file": f"{number}-again.png", "captions": [f"again {number}"]})
    source = write(tmp_path, rows)
    plain = prepare(tmp_path / "plain", source, f"--score={teacher}")
    scores = kept_scores(plain)
    assert len(scores) == 21  # nothing is left out unless it is asked for
    out = prepare(tmp_path, source, f"--score={teacher}", "--near-duplicates=1")
    kept = records(out)
    for number in range(2):
        pair = f"{number}.png", f"{number}-again.png"
        every = records(plain)
        top = {name: max(scores[text] for text in every[name].captions) for name in pair}
        (left,) = set(pair) & kept.keys()
        assert left == max(pair, key=lambda name: top[name])
    assert len(kept) == 10
    assert "that are left out: 2" in (out / "README.md").read_text()


def test_near_duplicates_do_not_depend_on_blocks(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 3)).astype(np.float16)
    unit = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    kept = []
    for row in range(len(rows)):  # one after the other, by hand
        if not any(unit[row] @ unit[other] >= 0.9 for other in kept):
            kept.append(row)
    assert 5 < len(kept) < 40
    for block in (1, 7, 60):
        monkeypatch.setattr(scoring, "_IMAGES", 4)
        distinct = scoring._Distinct(0.9, tmp_path / f"{block}.f16")
        parts = [distinct.repeats(rows[start : start + block]) for start in range(0, 60, block)]
        assert np.flatnonzero(~np.concatenate(parts)).tolist() == kept


def test_a_stopped_one_goes_on_and_ends_with_the_same_bytes(
    source,
    tmp_path,
    teacher,  # noqa: F811
    monkeypatch,
):
    flags = (f"--score={teacher}", "--keep=0.5", "--near-duplicates=0.99", "--shard-records=4")
    whole = prepare(tmp_path / "whole", source, *flags)
    score, scored_pieces = scoring.Scorer._score, []

    def stop(self, reader, piece, pool):
        if scored_pieces:
            raise KeyboardInterrupt
        scored_pieces.append(piece.name)
        return score(self, reader, piece, pool)

    out = tmp_path / "out"
    arguments = (f"--source={source}", f"--out={out}", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(scoring.Scorer, "_score", stop)
        assert run(*arguments) != 0
    assert not (out / "index.json").exists()
    (images,) = out.rglob("train-00000.npy")
    images.write_bytes(images.read_bytes()[:-2])  # made again, with its scores

    def noted(self, reader, piece, pool):
        scored_pieces.append(piece.name)
        return score(self, reader, piece, pool)

    monkeypatch.setattr(scoring.Scorer, "_score", noted)
    assert run(*arguments) == 0
    assert sorted(scored_pieces) == [
        "train-00000",
        "train-00000",
        "train-00001",
        "train-00002",
        "validation-00000",
    ]
    assert contents(out) == contents(whole)
    # A finished one is not scored again, and a damaged shard is made again.
    (out / "train-00000.array_record").write_bytes(b"")
    assert run(*arguments) == 0 and len(scored_pieces) == 5
    assert contents(out) == contents(whole)


def test_the_source_the_model_and_the_scores_may_lie_in_a_bucket(
    source,
    tmp_path,
    teacher,  # noqa: F811
    bucket,
    monkeypatch,
):
    flags = ("--keep=0.5", "--near-duplicates=0.99", "--shard-records=4")
    here = prepare(tmp_path / "here", source, f"--score={teacher}", *flags)
    for name, folder in (("model", teacher), ("source", tmp_path)):
        Mirror(f"{bucket}/{name}", folder).publish(folder)
    arguments = (f"--source=jsonl:{bucket}/source/pairs.jsonl", f"--score={bucket}/model", *flags)
    score, pieces = scoring.Scorer._score, []

    def stop(self, reader, piece, pool):
        if piece.name in pieces:
            raise KeyboardInterrupt
        pieces.append(piece.name)
        return score(self, reader, piece, pool)

    monkeypatch.setattr(scoring.Scorer, "_score", stop)
    pieces.append("train-00001")
    assert run(*arguments, f"--out={bucket}/out") != 0
    places.release()  # as on another machine
    pieces.remove("train-00001")
    assert run(*arguments, f"--out={bucket}/out") == 0
    assert sorted(pieces) == sorted({*pieces}) and len(pieces) == 4
    places.release()
    mirrored = places.local(f"{bucket}/out")
    places.fetch(mirrored / "scores.npz")
    there, kept = (np.load(folder / "scores.npz") for folder in (mirrored, here))
    for name in set(kept) - {"digest"}:  # the source has another name
        np.testing.assert_array_equal(there[name], kept[name])
    copied = open_source(f"prepared:{bucket}/out", "train")
    assert [copied[place].captions for place in range(len(copied))] == [
        record.captions for record in records(here).values()
    ]
    cache_room.let_go()


def test_records_that_cannot_be_scored(source, tmp_path, teacher):  # noqa: F811
    rows = read(source)
    (tmp_path / "bad.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    rows.insert(3, {"file": "bad.png", "caption": "cut short"})
    out = prepare(tmp_path, write(tmp_path, rows), f"--score={teacher}", "--max-skipped-share=0.2")
    (gone,) = broken(out)
    assert gone["record"].endswith("bad.png") and len(records(out)) == 10
    assert "which are not scored: 1" in (out / "README.md").read_text()


def test_what_is_refused(source, tmp_path, teacher, capfd):  # noqa: F811
    out = prepare(tmp_path, source, f"--score={teacher}", "--keep=0.5")
    labelled = tmp_path / "labelled.csv"
    labelled.write_text("file,label\n0.png,x\n")
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (["--keep=0", f"--score={teacher}"], r"--keep=0.*share in \(0, 1\]"),
        (["--keep=1.1", f"--score={teacher}"], r"--keep=1.1.*share in \(0, 1\]"),
        (["--near-duplicates=0", f"--score={teacher}"], r"share in \(0, 1\]"),
        (["--keep=0.5"], "takes --keep with --score=FOLDER alone"),
        ([f"--score={tmp_path / 'empty'}"], "--score: .* holds no"),
        ([f"--score={teacher}", "--keep=0.4"], r"prepared differently \(keep: 0.5 -> 0.4\)"),
        ([], "prepared differently .*score: [0-9a-f]+ -> None"),
        ([f"--score={teacher}", f"--source=csv:{labelled}", "--out=new"], "has no captions"),
    ]:
        arguments = [a.replace("--out=new", f"--out={tmp_path / 'new'}") for a in arguments]
        assert run(f"--source={source}", f"--out={out}", *arguments) == 2, arguments
        error = " ".join(capfd.readouterr().err.split())
        assert re.search(message, error) and "Traceback" not in error, error


def test_damaged_scores_are_none(tmp_path):
    choice = scored.Choice(
        np.array([2, 0], np.int32), np.zeros(2, np.float32), np.ones(2, bool), np.zeros(2, bool)
    )
    scored.write_choices(tmp_path, "digest", {"train": choice})
    assert scored.read_choices(tmp_path, "digest")["train"].begins.tolist() == [0, 2]
    assert scored.read_choices(tmp_path, "other") is None
    file = tmp_path / "scores.npz"
    data = file.read_bytes()
    for damaged in (b"", data[:-40], data[:200] + b"xxxx" + data[204:]):
        file.write_bytes(damaged)
        assert scored.read_choices(tmp_path, "digest") is None
