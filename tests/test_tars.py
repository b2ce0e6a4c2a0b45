"""Training on tar shards as they are: webdataset:PATTERN on this machine."""

import gzip
import json
import os
import pickle
import tracemalloc

import numpy as np
import pytest
from preparing import picture, records, run, tar
from streaming import assert_equal, batches

from mlip_jax.core import schema, stopping
from mlip_jax.core.errors import UserError
from mlip_jax.data.batches.order import order
from mlip_jax.data.batches.training import SkipCounter
from mlip_jax.data.sets.opening import (
    open_evaluation,
    open_source,
    open_training,
    open_validation,
)
from mlip_jax.data.sets.records import MissingSplit
from mlip_jax.data.tars import index, listing


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLIP_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def members(first, number):
    return [
        each
        for key in range(first, first + number)
        for each in (
            (f"{key:04d}.jpg", picture(key)),
            (f"{key:04d}.txt", f"caption {key}".encode()),
            (f"{key:04d}.json", b'{"tags": ["tag"]}'),
        )
    ]


@pytest.fixture
def shards(tmp_path):
    """A folder with six shards for training, of 5 to 10 samples each, and one for validation."""
    folder, first = tmp_path / "tars", 0
    for number in range(6):
        tar(folder / f"{number:03d}.tar", members(first, 5 + number))
        first += 5 + number
    tar(folder / "val-0.tar", members(900, 4))
    return folder


def keys(source):
    return {source.name_of(place).rpartition("/")[2] for place in range(len(source))}


def settings(spec, **data):
    config = schema.default()
    config.batch_size = 8
    config.model.image.image_size = 16
    config.data.update({"train": spec, "workers": 0, **data})
    return config


def test_the_samples_are_those_that_prepare_makes(shards, tmp_path):
    assert run(f"--source=webdataset:{shards}", f"--out={tmp_path / 'out'}") == 0
    prepared = records(tmp_path / "out")
    source = open_source(f"webdataset:{shards}", "train")
    assert len(source) == 45 and source.name == "tars" and source.notes == ()
    for place in range(45):
        one = source[place]
        other = prepared[one.name]
        assert (one.image, one.captions, one.tags) == (other.image, other.captions, other.tags)
        assert source.name_of(place) == one.name
    assert pickle.loads(pickle.dumps(source))[7] == source[7]
    assert list(source.captions())[:3] == ["caption 0", "tag", "caption 1"]


@pytest.mark.parametrize("pattern", ["{000..005}.tar", "00?.tar", "{000,001}.tar", "000.tar"])
def test_patterns_name_shards(shards, pattern):
    number = {"{": 45, "0": 45}[pattern[0]]
    number = {"{000,001}.tar": 11, "000.tar": 5}.get(pattern, number)
    assert len(open_source(f"wds:{shards}/{pattern}", "train")) == number


def test_splits_are_told_by_names_and_shares_by_keys(shards):
    spec = f"webdataset:{shards}"
    assert len(open_evaluation(spec)) == 4 and len(open_source(f"{spec}#all", "train")) == 49
    with pytest.raises(MissingSplit, match="has no split 'test', only train, validation, all"):
        open_source(f"{spec}#test", "train")
    most, few = (open_source(f"{spec}#train[{part}]", "train") for part in (":80%", "80%:"))
    names = [
        {share.name_of(i).rpartition("/")[2] for i in range(len(share))} for share in (most, few)
    ]
    assert len(most) + len(few) == 45 and names[0].isdisjoint(names[1])
    config = settings(spec, validation="20%")
    assert len(open_training(config.data)) == len(most)
    assert len(open_validation(config.data)) == len(few)
    moved = shards.rename(shards.with_name("moved"))
    again = open_source(f"webdataset:{moved}/{{000..005}}.tar#train[:80%]", "train")
    assert keys(again) == names[0]


def test_batches_depend_on_seed_and_step_alone_and_hosts_divide_them(shards):
    config = settings(f"webdataset:{shards}", window=2)
    whole = batches(config, 12)
    assert_equal(batches(config, 5, start=7), whole[7:])
    parts = [batches(config, 12, rows=rows) for rows in (range(4), range(4, 8))]
    joined = [
        {key: np.concatenate([one[key], other[key]]) for key in one}
        for one, other in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)
    mixed = batches(settings(f"mix:webdataset:{shards}*3+webdataset:{shards}/val-0.tar#all*1"), 3)
    assert [len(batch["record"]) for batch in mixed] == [8, 8, 8]


@pytest.mark.slow
def test_batches_of_workers_are_those_of_a_thread(shards):
    spec = f"webdataset:{shards}"
    assert_equal(batches(settings(spec, workers=2), 8), batches(settings(spec), 8))


def test_equal_images_are_one_record_of_a_batch(tmp_path):
    twice = [
        (f"{key}.{end}", content)
        for key in "ab"
        for end, content in (("jpg", picture(1)), ("txt", key.encode()))
    ]
    other = [("c.jpg", picture(2)), ("c.txt", b"c")]
    tar(tmp_path / "0.tar", [*twice, *other])
    config = settings(f"webdataset:{tmp_path}/0.tar")
    config.batch_size = 3
    (batch,) = batches(config, 1)
    assert len(set(batch["record"].tolist())) == 2 and (batch["record"] >= 0).all()


def test_the_index_is_kept_and_made_again_for_a_shard_that_changed(shards, cache, monkeypatch):
    spec = f"webdataset:{shards}"
    open_source(spec, "train")
    built = []
    build = index.build
    monkeypatch.setattr(
        index, "build", lambda path, shown: built.append(shown) or build(path, shown)
    )
    assert len(open_source(spec, "train")) == 45 and not built
    tar(shards / "003.tar", members(500, 2))
    source = open_source(spec, "train")
    assert len(source) == 45 - 8 + 2 and [os.path.basename(name) for name in built] == ["003.tar"]
    assert source[18 + 1].captions == ("caption 501",)
    for kept in cache.rglob("*.npz"):
        kept.write_bytes(b"damaged")
    assert open_source(spec, "train")[0].captions == ("caption 0",)


def test_files_beside_the_shards_tell_how_many_samples_they_have(shards, cache):
    sizes = {f"{number:03d}.tar": 5 + number for number in range(5)}
    (shards / "sizes.json").write_text(json.dumps(sizes))
    (shards / "005_stats.json").write_text('{"count": 12, "successes": 10}')
    source = open_source(f"webdataset:{shards}", "train")
    assert len(source) == 45 and not list(cache.rglob("*.npz")), "no shard was read"
    assert source[44].captions == ("caption 44",)
    (shards / "sizes.json").write_text('{"000.tar": -1}')
    with pytest.raises(UserError, match=r"sizes\.json is damaged: expected a number of samples"):
        open_source(f"webdataset:{shards}", "train")


def test_a_shard_shorter_than_promised_is_stood_for_by_others_counted_and_named(shards):
    sizes = {f"{number:03d}.tar": 5 + number for number in range(6)}
    (shards / "sizes.json").write_text(json.dumps(sizes))
    tar(shards / "002.tar", members(11, 3))
    config = settings(f"webdataset:{shards}", max_skipped_share=0.2)
    source = open_training(config.data)
    with pytest.raises(OSError, match=r"002\.tar has 3 samples alone"):
        source[11 + 4]
    skipped = SkipCounter(source, 0.2)
    for batch in batches(config, 6):
        skipped.update(batch["skipped"])
    assert skipped.count == 4
    assert "4 of 45 images (8.89%) cannot be read: " in skipped.summary()
    assert f"{shards}/002.tar[3]" in skipped.summary()


def test_what_is_broken_is_left_out_named_and_bounded(shards):
    whole = (shards / "004.tar").read_bytes()
    (shards / "004.tar").write_bytes(whole[: len(whole) // 2])
    (shards / "005.tar").write_bytes(b"no tar" * 1000)
    spec = f"webdataset:{shards}"
    with pytest.raises(UserError, match=r"2 of \d+ samples are broken .*004\.tar.*max_skipped_sh"):
        open_source(spec, "train")
    source = open_source(spec, "train", max_skipped_share=0.5)
    assert 26 < len(source) < 35 and "004.tar" in source.notes[0] and "005.tar" in source.notes[0]
    assert source[len(source) - 1].image


def test_samples_without_a_caption_cannot_be_read(tmp_path):
    tar(
        tmp_path / "a.tar",
        [
            ("1.jpg", picture(1)),
            ("1.txt", b" "),
            ("2.jpg", picture(2)),
            ("2.cls", b"7"),
            ("3.jpg", picture(3)),
            ("3.cls", b"a cat"),
            ("4.jpg", b""),
            ("4.txt", b"nothing"),
        ],
    )
    source = open_source(f"webdataset:{tmp_path}/a.tar", "train")
    assert source[2].captions == ("a cat",) and list(source.captions()) == ["a cat", "nothing"]
    for place, reason in ((0, "no caption"), (1, "no caption"), (3, "image is empty")):
        with pytest.raises(OSError, match=reason):
            source[place]


def test_what_cannot_be_read_in_any_order_is_refused_in_one_line(shards, tmp_path):
    packed = tar(tmp_path / "packed.tar.gz", members(0, 1))
    packed.write_bytes(gzip.compress(packed.read_bytes()))
    with pytest.raises(UserError, match=r"packed\.tar\.gz is packed by gzip, .*unpack it, or prep"):
        open_source(f"webdataset:{tmp_path}/packed.tar.gz", "train")
    with pytest.raises(UserError, match=r"no such file: .*006\.tar; the path|no such file"):
        open_source(f"webdataset:{shards}/{{000..006}}.tar", "train")
    (tmp_path / "pairs.jsonl").write_text('{"file": "a.jpg", "caption": "a"}\n')
    with pytest.raises(UserError, match="config.data.window=4 mixes shards, and jsonl:.* has none"):
        open_training(settings(f"jsonl:{tmp_path}/pairs.jsonl", window=4).data)


@pytest.mark.slow
def test_many_shards_are_looked_through_by_processes_of_the_command_line(tmp_path, monkeypatch):
    for number in range(10):
        tar(tmp_path / "tars" / f"{number}.tar", members(number, 1 + number))
    monkeypatch.setattr(stopping, "_owned", True)
    monkeypatch.setattr(listing, "cores", lambda: 2)
    assert len(open_source(f"webdataset:{tmp_path / 'tars'}", "train")) == 55


@pytest.mark.slow
def test_forty_thousand_shards_open_and_go_on_in_the_middle_in_little_memory(tmp_path):
    folder, number = tmp_path / "tars", 41_455
    folder.mkdir()
    for shard in range(number):
        (folder / f"{shard:05d}.tar").touch()
    sizes = {f"{shard:05d}.tar": 10_000 for shard in range(number)}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    tracemalloc.start()
    source = open_source(f"webdataset:{folder}/{{00000..41454}}.tar", "train")
    assert len(source) == 414_550_000
    positions = order(source, 0, 16_384)
    step = 63_255  # in the third epoch
    rows = [positions[step * 16_384 + row] for row in range(256)]  # those of one of 64 hosts
    assert len(set(rows)) == 256 and len({index // 10_000 for index in rows}) == 1
    assert tracemalloc.get_traced_memory()[1] < 300e6
    tracemalloc.stop()
