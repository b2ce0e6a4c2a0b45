"""What a run says where it would be silent, and where its threads stand when it hangs."""

import re
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import jax
import pytest

from mlip_jax.core import waiting
from mlip_jax.training.profile import Profile


def spoken(monkeypatch, quiet, later, seconds):
    monkeypatch.setattr(waiting, "QUIET", quiet)
    monkeypatch.setattr(waiting, "_LATER", later)
    lines = []
    with waiting.announced("compiling the step", lines.append):
        end = time.monotonic() + 30
        while len(lines) < seconds and time.monotonic() < end:
            time.sleep(0.01)
    return lines


def test_what_takes_long_is_said_and_how_long_it_takes(monkeypatch):
    lines = spoken(monkeypatch, 0.0, (0.01, 0.02), 3)
    assert lines[0] == "compiling the step ..."
    assert all(re.fullmatch(r"compiling the step \.\.\. \d+ s", line) for line in lines[1:])


def test_what_is_quick_is_not_announced(monkeypatch):
    assert spoken(monkeypatch, 60.0, (), 0) == []


def test_an_error_ends_the_announcement(monkeypatch):
    monkeypatch.setattr(waiting, "QUIET", 60.0)
    with pytest.raises(ValueError, match="inside"), waiting.announced("reading", print):
        raise ValueError("inside")


def stacks(body):
    """What a program that watches itself prints to standard error."""
    code = textwrap.dedent(
        """
        import os, signal, time
        from mlip_jax.training.watch import Watchdog
        def stands_here(done):
            while not done():
                time.sleep(0.01)
        """
    ) + textwrap.dedent(body)
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


def test_sigusr1_prints_where_every_thread_stands_and_the_run_goes_on():
    done = stacks(
        """
        with Watchdog().watching():
            os.kill(os.getpid(), signal.SIGUSR1)
            stands_here(lambda: True)
            print("goes on")
        """
    )
    assert "goes on" in done.stdout and "Current thread" in done.stderr


def test_a_hang_is_reported_and_a_rest_is_none():
    done = stacks(
        """
        with Watchdog(0.2).watching() as watchdog:
            watchdog.alive()
            watchdog.rest()
            time.sleep(1)
            os.write(2, b"rested\\n")
            watchdog.alive()
            end = time.monotonic() + 2
            stands_here(lambda: time.monotonic() > end)
        os.write(2, b"left\\n")
        time.sleep(1)
        """
    )
    before, _, after = done.stderr.partition("rested")
    assert "Thread" not in before
    hang, _, left = after.partition("left")
    assert "stands_here" in hang and "Timeout" in hang and "Thread" not in left


def test_a_trace_of_some_steps_is_written(tmp_path):
    lines = []
    run = SimpleNamespace(folder=tmp_path, steps=20, console=SimpleNamespace(print=lines.append))
    profile = Profile(2)
    profile.on_start(run, 5)
    for step in range(6, 12):
        jax.block_until_ready(jax.numpy.ones(8) + step)
        profile.on_step(step)
        tracing = [8, 9]  # it starts after the step 8 and ends after two more
        assert profile._tracing == (step in tracing)
    profile.on_end(11)
    (trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 0
    assert lines == [
        f"profile: {tmp_path}/profile (tensorboard --logdir={tmp_path}/profile, or xprof "
        f"--logdir={tmp_path}/profile)"
    ]


def test_a_trace_of_a_short_run_ends_with_it(tmp_path):
    lines = []
    run = SimpleNamespace(folder=tmp_path, steps=2, console=SimpleNamespace(print=lines.append))
    profile = Profile(100)
    profile.on_start(run, 0)
    profile.on_step(1)
    assert profile._tracing and not lines
    profile.on_end(1)
    assert not profile._tracing and len(lines) == 1
