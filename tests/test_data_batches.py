"""The training stream: deterministic, resumable, the same on any number of processes."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from mlip_jax.core import schema as config_lib
from mlip_jax.core.errors import UserError
from mlip_jax.data.batches import training, workers
from mlip_jax.data.batches.order import order
from mlip_jax.data.batches.training import SkipCounter, evaluation_batches, train_batches
from mlip_jax.data.batches.workers import worker_count
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.sets.opening import open_source
from mlip_jax.data.text.tokenizer import load_tokenizer

COUNT = 30
BAD = (4, 5, 20)  # truncated, missing, no image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    rows = []
    for index in range(COUNT):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize((40, 32)).save(folder / f"{index}.png")
        rows.append({"file": f"{index}.png", "captions": [f"left {index}", f"number {index}"]})
    (folder / "good.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for index, row in enumerate(rows):
        if index in BAD:
            row["file"] = f"bad{index}.png"
    (folder / "bad.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "bad4.png").write_bytes((folder / "4.png").read_bytes()[:60])
    (folder / "bad20.png").write_bytes(b"<html>404</html>")
    return folder


@pytest.fixture
def source(folder):
    return open_source(f"jsonl:{folder / 'good.jsonl'}", "train")


@pytest.fixture
def bad_source(folder):
    return open_source(f"jsonl:{folder / 'bad.jsonl'}", "train")


def settings(**changes):
    config = config_lib.default()
    config.batch_size, config.data.workers = 8, 0
    config.model.image.image_size, config.model.text.context_length = 16, 12
    config.data.augment.update(flip=True, affine=0.5, color=0.5)
    config.update_from_flattened_dict(changes)
    return config


def batches(config, source, count, *, start_step=0, **processes):
    stream = train_batches(
        config, source, load_tokenizer("clip"), start_step=start_step, **processes
    )
    copies = [
        {key: np.array(value) for key, value in batch.items()}
        for batch in itertools.islice(stream, count)
    ]
    stream.close()
    return copies


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_shapes(source):
    (batch,) = batches(settings(), source, 1)
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        "image": (np.uint8, (8, 16, 16, 3)),
        "token_ids": (np.int32, (8, 12)),
        "record": (np.int32, (8,)),
        "skipped": (np.int32, (8,)),
    }


def test_stream_is_a_function_of_seed_and_position(source):
    all_batches = batches(settings(), source, 10)
    assert_same(all_batches, batches(settings(), source, 10))
    assert_same(all_batches[6:], batches(settings(), source, 4, start_step=6))
    halves = [
        batches(settings(), source, 10, rows=range(4 * index, 4 * index + 4)) for index in (0, 1)
    ]
    joined = [
        {key: np.concatenate([first[key], second[key]]) for key in first}
        for first, second in zip(*halves, strict=True)
    ]
    assert_same(all_batches, joined)
    other = batches(settings(seed=1), source, 1)
    assert (other[0]["image"] != all_batches[0]["image"]).any()


@pytest.mark.parametrize("position", [2**31 - 1, 2**31, 2**33, 34_000_000_000])
def test_the_stream_goes_on_past_32_bits(source, position):
    start = position // 8
    later = batches(settings(), source, 2, start_step=start)
    assert_same(later[1:], batches(settings(), source, 1, start_step=start + 1))
    stream = order(source, seed=0)
    epoch = position // len(source) * len(source)
    assert {stream[epoch + index] for index in range(len(source))} == set(range(len(source)))


def test_margins_that_always_go_are_cut_once_to_the_same_pixels(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for index in range(8):
        picture = Image.new("RGB", (48, 40), "white")
        foreground = Image.fromarray(rng.integers(0, 200, (9 + index, 12, 3), np.uint8))
        picture.paste(foreground, (5 + index, 20 - index))
        picture.save(tmp_path / f"{index}.png")
        rows.append({"file": f"{index}.png", "captions": [f"number {index}"]})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(f"jsonl:{tmp_path / 'pairs.jsonl'}", "train")
    never, nearly_always, always = (
        batches(settings(**{"data.augment.trim": chance}), source, 3)
        for chance in (0.0, 1 - 1e-12, 1.0)
    )
    assert_same(nearly_always, always)
    assert (never[0]["image"] != always[0]["image"]).any()


def test_workers_change_nothing(source):
    config = settings(**{"data.workers": 2})
    with_workers = batches(config, source, 5, start_step=3)
    assert_same(with_workers, batches(settings(), source, 5, start_step=3))


@pytest.mark.parametrize("workers", [1, 2])
def test_kept_batches_stay_as_they_are(source, workers):
    """Workers use memory again, and only what nobody looks at any more."""
    config = settings(**{"data.workers": workers, "perspectives.augmented_image.weight": 1.0})
    stream = train_batches(config, source, load_tokenizer("clip"), start_step=0)
    kept_batches = list(itertools.islice(stream, 16))  # more than a worker lends
    views = [next(stream)["image"][2:4, ::2] for _ in range(8)]
    stream.close()
    expected = batches(settings(**{"perspectives.augmented_image.weight": 1.0}), source, 24)
    assert_same(kept_batches, expected[:16])
    for view, batch in zip(views, expected[16:], strict=True):
        np.testing.assert_array_equal(view, batch["image"][2:4, ::2])


def test_epochs(source):
    """Each epoch holds every record once, in another order, seen in another way."""
    config = settings(**{"data.augment.flip": False})
    tokenizer = load_tokenizer("clip")
    loaded = batches(config, source, COUNT * 2 // 8 + 1)
    ids = np.concatenate([batch["token_ids"] for batch in loaded])
    numbers = [int("".join(filter(str.isdigit, tokenizer.decode(row)))) for row in ids]
    first, second = numbers[:COUNT], numbers[COUNT : 2 * COUNT]
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second and first != sorted(first)
    images = np.concatenate([batch["image"] for batch in loaded])
    assert (images[first.index(3)] != images[COUNT + second.index(3)]).any()


def test_mirrored_images_have_mirrored_captions(source):
    config = settings(**{"data.caption.first": 1.0})
    decode = load_tokenizer("clip").decode
    words = [
        decode(row).split()[0] for batch in batches(config, source, 5) for row in batch["token_ids"]
    ]
    assert 10 < words.count("left") < 30 and words.count("left") + words.count("right") == 40
    config.data.augment.flip = False
    (batch,) = batches(config, source, 1)
    assert {decode(row).split()[0] for row in batch["token_ids"]} == {"left"}


SECOND = {
    "perspectives.augmented_image.weight": 1.0,
    "perspectives.other_caption.weight": 0.5,
}


def test_second_views(source):
    """Another view of the same image, another of its captions."""
    decode = load_tokenizer("clip").decode
    loaded = batches(settings(**SECOND), source, 4)
    for batch in loaded:
        assert batch["image_2"].dtype == np.uint8
        assert batch["image_2"].shape == batch["image"].shape
        assert (batch["image_2"] != batch["image"]).any(axis=(1, 2, 3)).all()
        for rows in zip(batch["token_ids"], batch["token_ids_2"], strict=True):
            (first, *number), (second, *same) = (decode(row).split() for row in rows)
            assert number == same
            assert (first == "number") != (second == "number")
    assert_same(loaded, batches(settings(**SECOND, **{"data.workers": 1}), source, 4))


def test_second_views_leave_the_first_of_an_image_alone(source):
    for key, chosen in zip(("image_2", "token_ids_2"), SECOND, strict=True):
        (plain,), (batch,) = (
            batches(settings(**weights), source, 1) for weights in ({}, {chosen: 1.0})
        )
        assert batch.keys() - plain.keys() == {key}
        assert_same([plain], [{name: batch[name] for name in plain}])


def test_both_captions_are_mirrored_with_the_first_image(folder):
    rows = [
        {"file": f"{index}.png", "captions": ["left one", "left two"]} for index in range(COUNT)
    ]
    path = folder / "sides.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    decode, sides = load_tokenizer("clip").decode, []
    for batch in batches(settings(**SECOND), open_source(f"jsonl:{path}", "train"), 4):
        for rows in zip(batch["token_ids"], batch["token_ids_2"], strict=True):
            (side, first), (same, second) = (decode(row).split() for row in rows)
            assert side == same and {first, second} == {"one", "two"}
            sides.append(side)
    assert set(sides) == {"left", "right"}


def test_unreadable_images_are_replaced_and_counted(source, bad_source):
    good, bad = batches(settings(), source, 8), batches(settings(), bad_source, 8)
    counter = SkipCounter(bad_source, 0.1)
    for good_batch, bad_batch in zip(good, bad, strict=True):
        fine = bad_batch["skipped"] == -1
        np.testing.assert_array_equal(good_batch["image"][fine], bad_batch["image"][fine])
        assert (good_batch["image"][~fine] != bad_batch["image"][~fine]).any() or fine.all()
        counter.update(bad_batch["skipped"])
        counter.update(bad_batch["skipped"])  # each counts once
    assert counter.count == len(BAD)
    summary = counter.summary()
    assert summary.startswith("3 of 30 images (10.00%) cannot be read:")
    assert all(f"bad{index}.png" in summary for index in BAD)
    assert SkipCounter(source, 0.0).summary() == ""
    with pytest.raises(UserError, match="^3 of 30 images .*max_skipped_share=0.09 allows$"):
        SkipCounter(bad_source, 0.09).update(np.array([-1, *BAD], np.int32))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable(tmp_path, workers):
    rows = [{"file": f"{index}/gone.png", "caption": "x"} for index in range(12)]
    (tmp_path / "gone.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(f"jsonl:{tmp_path / 'gone.jsonl'}", "train")
    with pytest.raises(UserError, match="none of 12 images in a row of 'gone' .*gone.png"):
        batches(settings(**{"data.workers": workers}), source, 1)


def test_worker_count(monkeypatch):
    assert worker_count(3) == 3 and worker_count(0) == 0
    for cores, expected in ((1, 0), (2, 0), (4, 3), (64, 32)):
        monkeypatch.setattr(workers, "cores", lambda n=cores: n)
        assert worker_count(-1) == expected


def test_workers_fit_the_shared_memory(monkeypatch, source):
    """Each has five batches on their way, and the step one more."""
    monkeypatch.setattr(workers, "cores", lambda: 64)
    monkeypatch.setattr(workers, "_shared_bytes", lambda: 64 * 2**20)
    assert worker_count(-1, 2**20) == 12 and worker_count(-1, 2**23) == 1
    assert worker_count(-1, 2**26) == 0 and worker_count(0, 2**26) == 0
    with pytest.raises(UserError, match="workers=4 needs 168 MiB .* 64 MiB are free.*workers=1$"):
        worker_count(4, 2**23)
    monkeypatch.setattr(workers, "_shared_bytes", lambda: 1000)
    with pytest.raises(UserError, match="--config.data.workers=0$"):
        batches(settings(**{"data.workers": 1}), source, 1)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(8):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        coarse.resize((160, 120), Image.Resampling.BICUBIC).save(tmp_path / f"{index}.jpg")
    rows = [json.dumps({"file": f"{index}.jpg", "caption": "x"}) for index in range(8)]
    (tmp_path / "photos.jsonl").write_text("\n".join(rows))
    return open_source(f"jsonl:{tmp_path / 'photos.jsonl'}", "train")


PHOTOS = {"data.augment.affine": 0.0, "data.augment.color": 0.0, "model.image.image_size": 48}


@pytest.mark.parametrize("kept", [True, False])
def test_fast_decoding_is_close_to_exact(photos, monkeypatch, kept):
    if not kept:
        monkeypatch.setattr(training, "_KEPT_BYTES", 0)
    fast, exact = (
        batches(settings(**PHOTOS, **{"data.decode": how}), photos, 3) for how in ("fast", "exact")
    )
    for one, other in zip(fast, exact, strict=True):
        np.testing.assert_array_equal(one["token_ids"], other["token_ids"])
        error = (one["image"].astype(float) - other["image"]) ** 2
        assert 0 < error.mean((1, 2, 3)).max() < 255**2 / 10**3.5  # PSNR of 35 dB


@pytest.mark.parametrize("how", ["fast", "exact"])
def test_workers_change_nothing_of_photos(photos, how):
    chosen = {**PHOTOS, "data.decode": how, "perspectives.augmented_image.weight": 1.0}
    with_workers = batches(settings(**chosen, **{"data.workers": 2}), photos, 4)
    assert_same(with_workers, batches(settings(**chosen), photos, 4))


TRAIN = """
import signal, sys, time
from test_data_batches import load_tokenizer, open_source, settings, train_batches

if __name__ == "__main__":
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.append(1))
    source = open_source(sys.argv[1], "train")
    stream = train_batches(
        settings(**{"data.workers": 1}), source, load_tokenizer("clip"), start_step=0
    )
    next(stream)
    print("ready", flush=True)
    while not stopped:
        next(stream)
        time.sleep(0.01)
    for _ in range(8):
        next(stream)
    stream.close()
    print("closed")
"""


@pytest.mark.parametrize("killed", [True, False])
def test_workers_end_with_their_parent(folder, tmp_path, killed):
    (tmp_path / "train.py").write_text(TRAIN)
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "train.py"), f"jsonl:{folder / 'good.jsonl'}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    shared = {
        Path(mapped.path.removesuffix(" (deleted)"))
        for of in (psutil.Process(process.pid), *children)
        for mapped in of.memory_maps()
        if mapped.path.startswith("/dev/shm/psm_")
    }
    assert shared or not Path("/dev/shm").is_dir()
    if killed:
        process.kill()
    else:  # the whole group, as a terminal and a scheduler do
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    if not killed:
        assert (process.returncode, out, errors) == (0, "closed\n", "")
    deadline = time.monotonic() + 20
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.1)
    assert not [path for path in shared if path.exists()]


def test_evaluation_batches(bad_source):
    preprocessing = Preprocessing(16)
    loaded = list(evaluation_batches(bad_source, preprocessing, 16))
    assert [batch.images.shape for batch in loaded] == [(16, 16, 16, 3)] * 2
    indices = np.concatenate([batch.indices for batch in loaded])
    readable = np.concatenate([batch.readable for batch in loaded])
    np.testing.assert_array_equal(indices, [*range(COUNT), -1, -1])
    assert set(np.flatnonzero(~readable)) == {*BAD, 30, 31}
    assert [len(batch.unreadable) for batch in loaded] == [2, 1]
    assert "bad20.png" in loaded[1].unreadable[0]
    images = np.concatenate([batch.images for batch in loaded])
    for index in np.flatnonzero(readable):
        np.testing.assert_array_equal(images[index], preprocessing(bad_source[index].image))
    assert loaded[0].captions[:1] == [("left 0", "number 0")] and loaded[0].captions[4] == ()
    assert (loaded[0].labels == -1).all()
