"""Training on shards in buckets that come when they are needed, against servers on the loopback."""

import errno
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import buckets
import numpy as np
import pytest
from preparing import picture, run, tar
from streaming import assert_equal, batches

from mlip_jax import main as door
from mlip_jax.core import object_store, schema
from mlip_jax.core.buckets import Mirror
from mlip_jax.core.errors import RunError, Unreachable, UserError
from mlip_jax.data.batches.training import train_batches
from mlip_jax.data.sets import cache_room
from mlip_jax.data.sets.opening import open_evaluation, open_source, open_training
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.training import evaluation

SHARDS, SAMPLES = 8, 12
SIZES = json.dumps({f"{number:03d}.tar": SAMPLES for number in range(SHARDS)}).encode()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tars") / "set"
    for number in range(SHARDS):
        members = []
        for key in range(number * SAMPLES, (number + 1) * SAMPLES):
            members += [(f"{key:04d}.jpg", picture(key)), (f"{key:04d}.txt", b"caption %d" % key)]
        tar(folder / f"{number:03d}.tar", members)
    tar(folder / "val-0.tar", [("a.jpg", picture(999)), ("a.txt", b"held out")])
    return folder


@pytest.fixture(scope="module")
def prepared(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "set"
    flags = (f"--out={folder}", f"--shard-records={SAMPLES}")
    assert run(f"--source=webdataset:{shards}", *flags) == 0
    return folder


def settings(spec, window=2, batch_size=8):
    config = schema.default()
    config.batch_size = batch_size
    config.model.image.image_size = 16
    config.data.update({"train": spec, "workers": 0, "window": window})
    return config


def in_cache(cache: Path) -> int:
    files = (path for path in (cache / "datasets").rglob("*.*") if path.suffix != ".claim")
    return sum(path.stat().st_size for path in files if path.is_file())


def test_tar_shards_in_a_bucket_give_the_batches_of_the_same_on_the_disk(upload, shards):
    url = upload(shards)
    for pattern in ("{000..007}.tar", "0*.tar", ""):
        there = open_source(f"webdataset:{url}/{pattern}".rstrip("/"), "train")
        assert len(there) == SHARDS * SAMPLES and there.name == "set"
    here = open_source(f"webdataset:{shards}", "train")
    copy = pickle.loads(pickle.dumps(there))  # as worker processes have it
    for place in (0, 50, 95):
        assert copy[place].image == here[place].image
        assert copy.name_of(place) == here.name_of(place).replace(str(shards), url)
    assert len(open_evaluation(f"webdataset:{url}")) == 1
    assert_equal(
        batches(settings(f"webdataset:{url}"), 20, start=3),
        batches(settings(f"webdataset:{shards}"), 20, start=3),
    )


@pytest.mark.parametrize("kind", ["webdataset", "prepared"])
def test_a_set_larger_than_the_cache_trains(upload, shards, prepared, kind, tmp_path, monkeypatch):
    folder = shards if kind == "webdataset" else prepared
    url = upload(folder)
    pattern = "0*.tar" if kind == "webdataset" else "train*record"
    size = sum(path.stat().st_size for path in folder.glob(pattern))
    monkeypatch.setenv("MLIP_JAX_CACHE_GIB", str(0.6 * size / 2**30))
    expected = batches(settings(f"{kind}:{folder}", batch_size=4), 30)
    largest = 0
    config = settings(f"{kind}:{url}", batch_size=4)
    stream = train_batches(config, open_training(config.data), load_tokenizer("clip"), start_step=0)
    for number, one in enumerate(expected):
        if number == 20:  # room for one shard, with two in the window
            monkeypatch.setenv("MLIP_JAX_CACHE_GIB", str(0.2 * size / 2**30))
        other = next(stream)
        if number < 20:
            largest = max(largest, in_cache(tmp_path / "cache"))
        np.testing.assert_array_equal(one["image"], other["image"])
    stream.close()
    assert 0 < largest <= 0.6 * size
    monkeypatch.setenv("MLIP_JAX_CACHE_GIB", str(0.01 * size / 2**30))
    with pytest.raises(RunError, match=r"needs 0\.00 GiB more in .* set MLIP_JAX_CACHE_GIB higher"):
        batches(settings(f"{kind}:{url}"), 30, start=40)


def open_files(process):
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


@pytest.mark.slow
@pytest.mark.parametrize("object_server", ["gs"], indirect=True)  # one is enough for the order
def test_many_small_shards_give_every_sample_once_an_epoch_whatever_the_workers(
    upload, tmp_path, monkeypatch
):
    folder, shards, samples = tmp_path / "tars" / "set", 200, 20
    for number in range(shards):
        members = []
        for key in range(number * samples, (number + 1) * samples):
            members += [(f"{key}.png", picture(key, (8, 8), "PNG")), (f"{key}.txt", b"text")]
        tar(folder / f"{number:03d}.tar", members)
    size = sum(path.stat().st_size for path in folder.iterdir())
    sizes = json.dumps({path.name: samples for path in folder.iterdir()})
    (folder / "sizes.json").write_text(sizes)
    steps = shards * samples // 32
    config = settings(f"webdataset:{folder}", window=3, batch_size=32)
    expected = [batch["record"] for batch in batches(config, steps)]
    assert len(set(np.concatenate(expected).tolist())) == shards * samples
    monkeypatch.setenv("MLIP_JAX_CACHE_GIB", str(0.5 * size / 2**30))
    for workers in (0, 8):
        config = settings(f"webdataset:{upload(folder)}", window=3, batch_size=32)
        config.data.workers = workers
        tokenizer, source = load_tokenizer("clip"), open_training(config.data)
        stream = train_batches(config, source, tokenizer, start_step=0)
        for step, records in enumerate(expected):
            np.testing.assert_array_equal(next(stream)["record"], records)
            if step == 20:
                workers_now = [one.pid for one in multiprocessing.active_children()]
                early = [open_files(process) for process in (os.getpid(), *workers_now)]
        late = [open_files(process) for process in (os.getpid(), *workers_now)]
        assert len(workers_now) >= workers
        # Some 130 shards later: they are connections, not a file a shard.
        assert max(late) < 300 and max(np.subtract(late, early)) < 60, (early, late)
        stream.close()
    assert in_cache(tmp_path / "cache") <= 0.5 * size + 10**6


def test_processes_share_what_is_here_and_a_killed_one_leaves_nothing(upload, shards, tmp_path):
    url = upload(shards)
    program = (
        "from mlip_jax.data.sets.opening import open_source;"
        f"s = open_source('webdataset:{url}', 'train');"
        "print(sum(len(s[i].image) for i in range(96)))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    here = open_source(f"webdataset:{shards}", "train")
    total = str(sum(len(here[place].image) for place in range(96)))
    assert [process.communicate(timeout=200)[0].decode().strip() for process in processes] == [
        total
    ] * 2
    brought = list((tmp_path / "cache").rglob("*-0*.tar"))
    assert len(brought) == SHARDS, "each once"
    claim = brought[0].with_name("0000-gone.tar.claim")
    os.truncate(os.open(claim, os.O_CREAT | os.O_RDWR), 10**9)  # of a process that was killed
    used = cache_room._used(tmp_path / "cache" / "datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLIP_JAX_CACHE_GIB", str((used - 10**9 + 100) / 2**30))
        cache_room.make_room(tmp_path / "cache" / "datasets", 50, url, "")
    assert not claim.exists()


def test_an_object_that_changes_or_goes_during_the_run_ends_it_in_one_line(upload, shards):
    url = upload(shards)
    there = Mirror(url, shards)
    there.write("sizes.json", SIZES)
    source = open_source(f"webdataset:{url}", "train")
    content = there.read("003.tar")
    there.write("003.tar", content[:-512] + bytes(511) + b"1")
    with pytest.raises(RunError, match=rf"{url}/003\.tar is another one: it was changed since"):
        source[3 * SAMPLES]
    there.write("004.tar", content[:-1024])
    with pytest.raises(RunError, match=r"004\.tar has [\d,]+ bytes, not [\d,]+: it was changed"):
        source[4 * SAMPLES]
    there.delete("005.tar")
    with pytest.raises(RunError, match=r"005\.tar is not there any more"):
        source[5 * SAMPLES]
    there.write("003.tar", content)
    assert open_source(f"webdataset:{url}/003.tar", "train")[0].captions == ("caption 36",)


@pytest.fixture
def read_by_ranges(upload, shards, tmp_path):
    """A dataset whose indexes are kept on this machine, and none of its shards; and its bucket."""
    url = upload(shards)
    open_source(f"webdataset:{url}", "train")
    for path in (tmp_path / "cache").rglob("*.tar"):
        path.unlink()
    source = open_source(f"webdataset:{url}", "train")
    assert source[0].captions == ("caption 0",)
    assert not list((tmp_path / "cache").rglob("*.tar"))
    return source, Mirror(url, shards)


def test_a_shard_that_is_written_anew_while_samples_are_read_by_ranges_gives_no_mixed_bytes(
    read_by_ranges, shards
):
    source, there = read_by_ranges
    other = (shards / "004.tar").read_bytes()  # of the same length, with samples at the same places
    assert len(other) == len(there.read("003.tar"))
    there.write("003.tar", other)
    with pytest.raises(
        RunError, match=rf"{there.url}/003\.tar is another one: it was changed since"
    ):
        source[3 * SAMPLES + 5]
    there.write("004.tar", other[:1024])
    with pytest.raises(RunError, match=r"004\.tar ends before byte [\d,]+, up to which a sample"):
        source[4 * SAMPLES + 5]
    there.delete("005.tar")
    with pytest.raises(RunError, match=r"005\.tar is not there any more"):
        source[5 * SAMPLES]


@pytest.mark.parametrize("object_server", ["gs"], indirect=True)
def test_more_samples_than_a_shard_has_are_images_that_cannot_be_read(upload, shards):
    url = upload(shards)
    sizes = json.loads(SIZES) | {"003.tar": SAMPLES + 2}
    Mirror(url, shards).write("sizes.json", json.dumps(sizes).encode())
    source = open_source(f"webdataset:{url}", "train")
    assert len(source) == SHARDS * SAMPLES + 2
    with pytest.raises(OSError, match=rf"{url}/003\.tar has 12 samples alone"):
        source[4 * SAMPLES + 1]
    assert source.name_of(4 * SAMPLES + 1) == f"{url}/003.tar[13]"


@pytest.mark.parametrize("object_server", ["gs"], indirect=True)
def test_a_full_disk_is_told_in_one_line(upload, shards, monkeypatch):
    url = upload(shards)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(object_store.Bucket, "download", full)
    with pytest.raises(
        RunError, match=rf"cannot keep {url}/\d+\.tar in .*: No space left on device"
    ):
        open_source(f"webdataset:{url}", "train")


def mlip(*arguments):
    return door.main(["mlip", *arguments])


def test_a_server_that_refuses_names_the_variable(faults, upload, shards, object_server):
    url = upload(shards)
    faults.answer = lambda _: 403
    variable = {"gs": "GOOGLE_APPLICATION_CREDENTIALS", "s3": "AWS_ACCESS_KEY_ID"}
    for kind in ("webdataset", "prepared"):
        with pytest.raises((RunError, UserError)) as error:
            open_source(f"{kind}:{url}", "train")
        line = str(error.value)
        assert line.startswith(f"{object_server[0]}://{buckets.BUCKET}") and "\n" not in line
        assert "refuses" in line and variable[object_server[0]] in line


def test_a_bucket_that_may_be_read_alone_takes_no_prepared_dataset(faults, bucket, shards, capfd):
    faults.refused = ("PUT", "POST")
    assert mlip("prepare", f"--source=webdataset:{shards}", f"--out={bucket}/out", "--workers=1")
    errors = capfd.readouterr().err
    assert errors.count("error: ") == 1 and "Traceback" not in errors, errors
    assert f"error: {bucket}/out refuses" in errors


@pytest.mark.parametrize("object_server", ["s3"], indirect=True)
def test_missing_credentials_name_the_variable(bucket, shards, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(shards / "none"))
    with pytest.raises((RunError, UserError), match=r"refuses .*: set AWS_ACCESS_KEY_ID"):
        open_source(f"webdataset:{bucket}/set", "train")


def test_what_is_not_there_is_told_in_one_line(upload, shards):
    url = upload(shards)
    scheme = url.partition("://")[0]
    for pattern, words in (
        (f"{url}/{{006..009}}.tar", rf"no such file: {url}/008\.tar"),
        (f"{url}/none", rf"there is no tar file in: {url}/none"),
        (f"{url}/9*.tar", rf"no such file: {url}/9\*\.tar"),
        (f"{url[:-3]}*/000.tar", "only the last name may be a pattern"),
        (f"{scheme}://no-such-bucket/a.tar", "there is no bucket"),
    ):
        with pytest.raises(UserError, match=words):
            open_source(f"webdataset:{pattern}", "train")


def test_a_server_that_fails_now_and_then_or_is_slow_changes_no_batch(faults, upload, shards):
    faults.answer = lambda request: 503 if request % 10 == 0 else 0
    expected = batches(settings(f"webdataset:{shards}"), 12)
    url = upload(shards)
    assert_equal(batches(settings(f"webdataset:{url}"), 12), expected)

    def slow(request):
        time.sleep(0.2)
        return 0

    faults.answer = slow
    assert_equal(batches(settings(f"webdataset:{url}"), 4, start=8), expected[8:])


def test_a_server_that_is_away_for_a_while_is_waited_for_and_one_that_stays_away_not(
    faults, upload, shards, monkeypatch, capfd
):
    url = upload(shards)
    config = settings(f"webdataset:{url}")
    source = open_training(config.data)
    stream = train_batches(config, source, load_tokenizer("clip"), start_step=0)
    first = np.array(next(stream)["image"])
    back = time.monotonic() + 3
    faults.answer = lambda _: None if time.monotonic() < back else 0
    images = [first, *(np.array(next(stream)["image"]) for _ in range(11))]
    expected = [batch["image"] for batch in batches(settings(f"webdataset:{shards}"), 12)]
    np.testing.assert_array_equal(images, expected)
    stream.close()
    monkeypatch.setattr(object_store, "PATIENCE", 1.0)
    faults.answer = lambda _: None
    with pytest.raises(Unreachable, match="the server of .* does not answer") as error:
        for shard in range(SHARDS):
            source._reading.shelf.part(source._shards[shard], 0, 100)
    assert error.value.code == 75


def metrics(folder):
    """The lines of metrics.jsonl without what depends on the clock."""
    clock = ("time", "images_per_second", "data_wait", "bucket_bytes_per_second")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


@pytest.mark.parametrize("object_server", ["gs"], indirect=True)  # one is enough for the loop
def test_a_run_whose_data_stays_away_saves_everything_ends_with_75_and_goes_on(
    faults, upload, shards, tiny, on_one_device, monkeypatch, tmp_path, capfd
):
    on_one_device(monkeypatch)
    monkeypatch.setattr(evaluation, "write_report", lambda *_: "none")
    url = upload(shards)

    def train(where, workdir):
        data = (f"--config.data.train=webdataset:{where}", "--config.data.window=1")
        return door.main(["mlip", f"--config={tiny}", f"--workdir={workdir}", *data])

    assert train(shards, tmp_path / "here") == 0
    Mirror(url, shards).write("sizes.json", SIZES)
    there = tmp_path / "there"

    def answer(request):
        return None if len(list((tmp_path / "cache").rglob("*-0*.tar"))) > 3 else 0

    faults.answer = answer
    with monkeypatch.context() as patch:
        patch.setattr(object_store, "PATIENCE", 0.5)
        capfd.readouterr()
        assert train(url, there) == 75
    output = capfd.readouterr().err
    assert output.count("error:") == 1 and "Traceback" not in output, output
    assert "does not answer" in output and "everything is saved at step " in output
    faults.answer = lambda _: 0
    assert train(url, there) == 0
    output = capfd.readouterr().err
    assert "going on from step" in output and "MB/s from buckets" in output
    assert metrics(tmp_path / "here") == metrics(there)
