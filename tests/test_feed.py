"""Batches on their way into the loop: late, lost, or with an error; and signals before a run."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlip_jax.core import stopping
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.data.batches.feed import Feed, InputLost, input_seconds

ROOT = Path(__file__).parents[1]


def never():
    return False


def test_batches_come_in_order_one_when_it_is_asked_for_and_are_closed():
    made, closed = [], []

    def batches():
        try:
            for number in range(9):
                made.append(number)
                yield number
        finally:
            closed.append(True)

    with Feed(batches(), 60, 1) as feed:
        assert not made
        assert [feed.next(never) for _ in range(3)] == [0, 1, 2]
        assert made == [0, 1, 2] and not closed
    assert closed == [True]


def stalled(release):
    yield 0
    release.wait(60)


@pytest.fixture
def release():
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("mlip_jax.data.batches.feed._FAREWELL", 0.1)
    monkeypatch.setattr("mlip_jax.core.stopping._leaves", False)


def test_a_batch_that_does_not_come_is_said(release):
    with Feed(stalled(release), 0.3, 60) as feed:
        assert feed.next(never) == 0
        with pytest.raises(InputLost, match=r"no batch came within 0.3 s \(MLIP_INPUT_SECONDS\)"):
            feed.next(never)


def test_a_signal_that_outlasts_a_look_at_the_clock_does_not_stop_it(release):
    """A wait that it interrupts when its time has run out must not begin anew without an end."""
    came = []

    def outlast(number, frame):
        del number, frame
        assert not came, "it waits for ever"
        came.append(True)
        time.sleep(0.4)  # longer than a look

    before = signal.signal(signal.SIGALRM, outlast)
    try:
        with Feed(stalled(release), 0.5, 60) as feed:
            assert feed.next(never) == 0
            signal.setitimer(signal.ITIMER_REAL, 0.1, 20)
            with pytest.raises(InputLost, match="no batch came"):
                feed.next(never)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came


def test_a_run_that_is_asked_to_stop_does_not_wait_for_a_batch(release):
    with Feed(stalled(release), 60, 0.1) as feed:
        assert feed.next(lambda: True) == 0
        with pytest.raises(InputLost, match="did not come before the end"):
            feed.next(lambda: True)


def test_batches_that_cannot_be_closed_do_not_hold_up_the_end(release):
    def batches():
        try:
            yield from range(9)
        finally:
            release.wait(60)

    with Feed(batches(), 60, 1) as feed:
        assert feed.next(never) == 0
    assert not release.is_set() and stopping._leaves


def failing(error):
    yield 0
    raise error


def test_a_worker_that_is_killed_is_one_line():
    error = RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search")
    with Feed(failing(error), 60, 1) as feed:
        feed.next(never)
        with pytest.raises(InputLost, match=r"has ended \(Worker .* -9.*lower config.data.workers"):
            feed.next(never)
    assert issubclass(InputLost, RunError)


@pytest.mark.parametrize("error", [UserError("too many"), RuntimeError("a bug"), OSError(5, "x")])
def test_other_errors_stay_what_they_are(error):
    with Feed(failing(error), 60, 1) as feed:
        feed.next(never)
        with pytest.raises(type(error)) as raised:
            feed.next(never)
    assert raised.value is error


def test_the_bound_is_a_number_of_seconds():
    assert input_seconds({}) == 600 and input_seconds({"MLIP_INPUT_SECONDS": "7"}) == 7
    for text in ("0", "x", "-1", "1.5"):
        with pytest.raises(UserError, match="MLIP_INPUT_SECONDS=.*expected a whole number"):
            input_seconds({"MLIP_INPUT_SECONDS": text})


def program(code):
    """A program that prints a line when it is ready for a signal."""
    words = [sys.executable, "-c", code]
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


SLOW_IMPORT = """
import hashlib, sys
from mlip_jax import main

class Slow:
    def find_spec(self, name, *_):
        if name == "absl":
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # no handler runs in the main thread

sys.meta_path.insert(0, Slow())
sys.argv[1:] = ["train", "--config=mlip"]
main.run()
"""


def test_a_signal_during_imports_asks_to_be_started_again():
    process = program(SLOW_IMPORT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert "SIGTERM: stopping; no step was done since the start" in process.communicate()[1]


HELD = """
import os, signal, sys
from mlip_jax.core import stopping
from mlip_jax import main

def execv(*_):  # the program starts again in the same process
    os.kill(os.getpid(), signal.SIGTERM)
    print("ready", flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stopping._early = None
    sys.argv[1:] = ["train"]
    main.restart_with_huge_pages = lambda: sys.stdin.read()
    main.run()

with stopping.held():
    execv()
"""


def test_a_signal_while_the_program_starts_again_is_kept():
    process = program(HELD)
    assert process.wait(60) == 75
    process.communicate()


INTERRUPTED = """
import hashlib, signal, time
from mlip_jax.core import stopping
from mlip_jax.training.signals import Stop

signal.signal(signal.SIGINT, signal.default_int_handler)
stopping.listen_early()
with Stop().listening() as stop:
    print("ready", flush=True)
    while not stop.asked:
        time.sleep(0.01)
    print("asked", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_the_second_interrupt_is_not_lost_in_a_library():
    process = program(INTERRUPTED)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.communicate()[1].endswith("error: interrupted\n")
