"""Locks of places in a bucket: one run at a time, also after one that was killed."""

import multiprocessing
import os
import threading
import time

import pytest

from mlip_jax.core import buckets as mirrors
from mlip_jax.core import locks, places
from mlip_jax.core.errors import RunError
from mlip_jax.core.files import write_atomically


def hold(url, ready, variables):
    os.environ.update(variables)
    with locks.held(places.local(url) / ".lock"):
        ready.set()
        time.sleep(600)


@pytest.fixture
def other(bucket, object_server, tmp_path):
    """A process that holds the lock."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    variables = object_server[1] | {"MLIP_JAX_CACHE": str(tmp_path / "other")}
    process = context.Process(target=hold, args=(bucket, ready, variables))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_one_process_holds_a_lock_and_one_that_was_killed_does_not(bucket, other, capfd):
    lock = places.local(bucket) / ".lock"
    with (
        pytest.raises(locks.InUse, match=f"process {other.pid} on "),
        locks.held(lock),
    ):
        pass
    other.kill()
    other.join()
    with locks.held(lock) as content:
        assert locks.holder(lock) == content
    assert locks.holder(lock) == ""
    assert f"{bucket}: taken over from process {other.pid}" in capfd.readouterr().err


def test_a_lock_of_another_machine_is_taken_over_when_its_lease_ends(bucket, monkeypatch, capfd):
    monkeypatch.setattr(locks, "LEASE", 2.5)  # S3 knows whole seconds
    lock = places.local(bucket) / ".lock"
    there = mirrors.Mirror(bucket, lock.parent)
    ended = threading.Event()

    def live():
        while not ended.wait(0.3):
            there.write(".lock", b'{"host": "elsewhere", "process": 1}')

    there.write(".lock", b'{"host": "elsewhere", "process": 1}')
    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(locks.InUse, match="process 1 on elsewhere"), locks.held(lock):
            pass
    finally:
        ended.set()
        thread.join()
    with locks.held(lock):
        first = there.written(".lock")
        while there.written(".lock") == first:  # written anew as long as it is held
            time.sleep(0.2)
    assert f"{bucket}: taken over from process 1 on elsewhere" in capfd.readouterr().err


def test_a_run_whose_lock_was_taken_writes_no_more(bucket, monkeypatch):
    monkeypatch.setattr(locks, "LEASE", 0.4)
    folder = places.local(bucket)
    there = mirrors.Mirror(bucket, folder)
    with locks.held(folder / ".lock"):
        deadline = time.monotonic() + 20
        while not places.mirror_of(folder).lost:
            assert time.monotonic() < deadline
            there.write(".lock", b'{"host": "elsewhere", "process": 1}')
            time.sleep(0.05)
        with pytest.raises(RunError, match="another run has taken over"):
            write_atomically(folder / "config.json", "{}")
    assert there.read("config.json") is None
    assert there.read(".lock") is not None
