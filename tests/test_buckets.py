"""Runs in a bucket, against servers on the loopback: killed, resumed, looked at from elsewhere."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import buckets
import jax
import numpy as np
import pytest
from devices import with_devices

import mlip_jax
from mlip_jax import main as door
from mlip_jax.core import object_store, places
from mlip_jax.core.errors import Unreachable
from mlip_jax.storage.checkpoint import Checkpoints
from mlip_jax.storage.saved import restore_fields
from mlip_jax.training import evaluation

ROOT = Path(__file__).parents[1]

# A run that is killed when all files of the checkpoint of step 4 are there, but not its seal.
KILLED = """
import os, signal, sys
from mlip_jax import main
from mlip_jax.core import places

publish = places.publish

def until_the_seal(path, target=None, **options):
    if target is not None and target.parts[-2:] == ("4", "files.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    publish(path, target, **options)

places.publish = until_the_seal
sys.exit(main.main(["mlip", *sys.argv[1:]]))
"""


@pytest.fixture
def url(bucket, monkeypatch, on_one_device):
    on_one_device(monkeypatch)
    return bucket


def mlip(*arguments):
    return door.main(["mlip", *map(str, arguments)])


@pytest.fixture
def saved(url):
    """Checkpoints of steps 1 and 2 in the bucket; the array is the step's number."""
    with Checkpoints(url, keep_last=2) as checkpoints:
        for step in 1, 2:
            checkpoints.save(step, {"array": jax.numpy.full(100, step)}, {})
        checkpoints.wait()
    places.release()
    return url


def newest(url):
    """What goes on from the newest good checkpoint, and its step."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"array": jax.ShapeDtypeStruct((100,), np.int32, sharding=device)}
    with Checkpoints(url, keep_last=2) as checkpoints:
        restored, extras = checkpoints.restore(wanted)
    return int(restored["array"][0]), extras["step"]


def assert_same_state(one, other):
    for field in ("step", "params", "optimizer", "ema"):
        a, b = (restore_fields(folder, [field])[0] for folder in (one, other))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), field


def metrics(folder):
    """The lines of metrics.jsonl without what depends on the clock."""
    clock = ("time", "images_per_second", "data_wait")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def test_killed_in_a_save_it_goes_on_to_the_same_bits_on_another_machine(
    url, tiny, trained, capfd, monkeypatch
):
    process = subprocess.run(
        [sys.executable, "-c", KILLED, f"--config={tiny}", f"--workdir={url}"],
        cwd=ROOT,
        env=with_devices(1),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    folder = places.local(url) / "checkpoints"
    assert places.names(folder) == ["2", "4"]
    assert "state" in places.names(folder / "4") and "files.json" not in places.names(folder / "4")
    assert mlip_jax.load(url).step == 2
    places.release()

    # On another machine, in effect: nothing of the run is on this disk.
    monkeypatch.setattr(evaluation, "write_report", lambda *_: "none")
    capfd.readouterr()
    assert mlip(f"--config={tiny}", f"--workdir={url}") == 0
    output = capfd.readouterr().err
    assert f"{url} holds this run: going on from step 2" in output, output
    assert f"results: {url}/results.json" in output
    places.release()

    assert_same_state(trained, url)
    workdir = places.local(url)
    assert places.names(workdir / "checkpoints") == places.names(trained / "checkpoints")
    assert metrics(trained) == metrics(workdir)
    assert json.loads((workdir / "results.json").read_text()) == json.loads(
        (trained / "results.json").read_text()
    )
    (events,) = {name.split(".")[0] for name in places.names(workdir / "tensorboard")}
    assert events == "events"

    assert mlip("evaluate", f"--workdir={url}", "--config.evaluation.batch_size=4") == 0
    assert f"results: {url}/results.json" in capfd.readouterr().out


@pytest.mark.parametrize("object_server", ["s3"], indirect=True)  # one is enough for the loop
def test_a_run_is_made_longer_there_and_a_branch_starts_from_it(
    url, tiny, capfd, caplog, monkeypatch
):
    monkeypatch.setattr(evaluation, "write_report", lambda *_: "none")
    short = ("--config.data.validation=", "--config.checkpoint.every_samples=0")
    wsd = ("--config.optimizer.schedule=wsd", "--config.optimizer.cooldown_samples=16")
    assert mlip(f"--config={tiny}", f"--workdir={url}", *wsd, *short) == 0
    places.release()
    capfd.readouterr()
    assert mlip(f"--workdir={url}", "--config.samples=80") == 0
    output = capfd.readouterr().err
    assert f"{url} goes on from step 5 with samples: 64 -> 80" in output, output
    assert "Metadata file" not in caplog.text
    places.release()
    assert places.names(places.local(url) / "checkpoints") == ["10", "7", "8", "replaced-8"]
    assert mlip_jax.load(url).step == 10

    branch = f"{url}-branch"
    assert mlip(f"--from={url}", f"--workdir={branch}", "--config.samples=16") == 0
    line = f"starts from {url} at step 10: weights and optimizer"
    assert line in capfd.readouterr().err
    places.release()
    folder = places.local(branch)
    assert json.loads((folder / "start.json").read_text())[0] == line
    assert restore_fields(branch, ["step"])[1]["step"] == 2
    assert mlip(f"--from={url}/", f"--workdir={url}") == 2
    assert "a branch needs a folder of its own" in capfd.readouterr().err

    assert mlip("evaluate", f"--compare=first={url},{branch}") == 0
    output = capfd.readouterr().out
    above = url.rpartition("/")[0]
    assert f"first: {url} (" in output and f"{branch.rpartition('/')[2]}: {branch} (" in output
    assert f"comparison: {above}/comparison.json" in output


@pytest.mark.parametrize("object_server", ["s3"], indirect=True)  # one is enough for the loop
def test_a_run_whose_server_stays_away_ends_with_75_and_goes_on_when_it_is_back(
    url, object_server, tiny, trained, capfd, monkeypatch
):
    monkeypatch.setattr(evaluation, "write_report", lambda *_: "none")
    faults = buckets.Faults(*object_server)
    publish = places.publish

    def until_the_first_seal(path, target=None, **options):
        publish(path, target, **options)
        if target is not None and target.name == "files.json":
            faults.answer = lambda _: 503

    with contextlib.closing(faults), monkeypatch.context() as patch:
        for name, value in faults.variables.items():
            patch.setenv(name, value)
        patch.setattr(object_store, "PATIENCE", 0.5)
        patch.setattr(places, "publish", until_the_first_seal)
        assert mlip(f"--config={tiny}", f"--workdir={url}") == 75
        output = capfd.readouterr().err
        assert output.count("error:") == 1 and "Traceback" not in output, output
        assert f"error: the server of {url} does not answer" in output
        places.release()
    assert places.names(places.local(url) / "checkpoints")[0] == "2"
    places.release()
    assert mlip(f"--config={tiny}", f"--workdir={url}") == 0
    assert "going on from step 2" in capfd.readouterr().err
    assert_same_state(trained, url)
    assert metrics(trained) == metrics(places.local(url))


def test_a_checkpoint_that_was_damaged_in_the_bucket_is_set_aside_there(saved, capfd):
    folder = places.local(saved)
    bucket = places.mirror_of(folder)
    name = "checkpoints/2/state/manifest.ocdbt"
    bucket.write(name, b"?" + bucket.read(name)[1:])
    assert restore_fields(saved, ["array"])[1]["step"] == 1
    assert "checkpoints/2 is damaged" in capfd.readouterr().err
    places.release()
    assert newest(saved) == (1, 1)
    places.release()
    assert places.names(places.local(saved) / "checkpoints") == ["1", "damaged-2"]


def test_a_save_that_the_bucket_refuses_leaves_the_former_good(saved, monkeypatch):
    publish = places.publish
    checkpoints = Checkpoints(saved, keep_last=2)

    def away(path, target=None, **options):
        if target is not None and target.name == "files.json":
            raise Unreachable("the server does not answer")
        publish(path, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(places, "publish", away)
        checkpoints.save(3, {"array": jax.numpy.full(100, 3)}, {})
        with pytest.raises(Unreachable, match="the server does not answer"):
            checkpoints.wait()
        with contextlib.suppress(Unreachable):
            checkpoints.close()
    places.release()
    assert restore_fields(saved, ["array"])[1]["step"] == 2
    assert newest(saved) == (2, 2)
    assert places.names(places.local(saved) / "checkpoints") == ["1", "2"]


# Two processes, each with a folder of its own, go on from what is there and save an array in parts
# and one that both hold.
PARTS = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from mlip_jax.core import places
from mlip_jax.devices import cluster, processes
from mlip_jax.storage.checkpoint import Checkpoints

cluster.start()
url, first = sys.argv[1], int(sys.argv[2])
mesh = jax.make_mesh((2,), ("fsdp",))
whole = np.arange(4096, dtype=np.float32).reshape(64, 64)

def placed(array, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

def state(step):
    of_all = placed(whole * step, PartitionSpec())
    return {"parts": placed(whole * step, PartitionSpec("fsdp")), "same": of_all}

def check(checkpoints, step):
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(1)
    )
    restored, extras = checkpoints.restore(wanted)
    assert extras["step"] == step
    for leaf in jax.tree.leaves(restored):
        for shard in leaf.addressable_shards:
            assert np.array_equal(shard.data, whole[shard.index] * step)

with processes.together():
    with Checkpoints(url, keep_last=2) as checkpoints:
        if first > 1:
            check(checkpoints, first - 1)
        for step in range(first, first + 3):
            checkpoints.save(step, state(step), {})
        checkpoints.wait()
    places.release()
    with Checkpoints(url, keep_last=2) as checkpoints:
        check(checkpoints, first + 2)
"""


def run_parts(url, first, folder):
    address = f"127.0.0.1:{buckets.free_port()}"
    with contextlib.ExitStack() as stack:
        processes = []
        for index in range(2):
            flags = {"COORDINATOR": address, "PROCESSES": "2", "PROCESS_ID": str(index)}
            variables = {f"MLIP_{name}": value for name, value in flags.items()}
            command = [sys.executable, "-c", PARTS, url, str(first)]
            log = stack.enter_context((folder / f"{index}.log").open("w"))
            process = subprocess.Popen(
                command, cwd=ROOT, env=with_devices(1) | variables, stderr=log
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        codes = [process.wait(timeout=400) for process in processes]
    assert codes == [0, 0], "\n".join(path.read_text() for path in folder.glob("*.log"))


def test_two_processes_bring_their_parts_and_one_commit_and_one_process_goes_on(url, tmp_path):
    run_parts(url, 1, tmp_path)
    assert places.names(places.local(url) / "checkpoints") == ["2", "3"]
    whole = np.arange(4096, dtype=np.float32).reshape(64, 64)
    fields, extras = restore_fields(url, ["parts", "same"])
    assert extras["step"] == 3
    assert np.array_equal(fields["parts"], whole * 3)
    assert np.array_equal(fields["same"], whole * 3)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=device)
    with Checkpoints(url, keep_last=2) as checkpoints:
        restored, _ = checkpoints.restore({"parts": like, "same": like})
        assert np.array_equal(restored["parts"], whole * 3)
        checkpoints.save(4, jax.tree.map(lambda _: jax.numpy.asarray(whole * 4), restored), {})
        checkpoints.wait()
    places.release()
    run_parts(url, 5, tmp_path)
    assert places.names(places.local(url) / "checkpoints") == ["6", "7"]
