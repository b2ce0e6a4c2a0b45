"""Real processes that are stopped, or lose what feeds them, in every phase of a run.

What holds up a phase would take minutes, and lets no handler of Python run in its thread.
"""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from devices import with_devices

ROOT = Path(__file__).parents[1]
PROGRAM = """
import hashlib, sys
from mlip_jax import main

def hold(*_, **__):
    print("held", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

if __name__ == "__main__":
    from mlip_jax.training import evaluation, loop, start
    {patch}
    main.run()
"""
# What is held up, and how far the run is then.
PHASES = {
    "compilation": ("start.compile_lowered = hold", ""),
    "evaluation": ("evaluation.evaluate = hold", "saved at step 4"),
    "report": ("evaluation.write_report = hold", "everything is saved"),
}
pytestmark = pytest.mark.slow


class Process:
    """A run of the config `tiny`."""

    def __init__(self, tiny, folder, patch="pass", flags=(), seconds=60, alone=False):
        self.run, self.log = folder / "run", folder / "log"
        program = folder / "program.py"
        program.write_text(PROGRAM.format(patch=patch))
        environment = {
            **with_devices(1),
            "PYTHONPATH": str(ROOT),
            "MLIP_INPUT_SECONDS": str(seconds),
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",
        }
        program = ["-m", "mlip_jax"] if alone else [program]
        command = [sys.executable, *program, f"--config={tiny}", f"--workdir={self.run}", *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def held(self):
        assert self.process.stdout.readline() == "held\n", self.output()

    def steps(self, count):
        while self.output().count("\nstep ") < count:
            assert self.process.poll() is None, self.output()
            time.sleep(0.05)

    def output(self):
        return self.log.read_text("utf-8", "replace")

    def workers(self):
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    def ends(self):
        """Its exit code and the line that it ends with, if it is an error."""
        start = time.monotonic()
        with self.process:
            code = self.process.wait(120)
        print(f"{time.monotonic() - start:.1f} s until it ends with {code}")
        output = self.output()
        assert "Traceback" not in output, output
        errors = re.findall("^error: .*", output, re.MULTILINE)
        assert len(errors) == (code in (1, 2)), output
        return code, "".join(errors)


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_is_answered_in_every_phase(tiny, tmp_path, phase):
    patch, saved = PHASES[phase]
    run = Process(tiny, tmp_path, patch)
    run.held()
    run.process.terminate()
    assert run.ends() == (75, "")
    assert saved in run.output() and re.search("SIGTERM: |by a signal", run.output())


def test_a_signal_in_the_first_second(tiny, tmp_path):
    codes = {}
    for moment in (0.1, 0.2, 0.3, 0.5, 1.0):
        run = Process(tiny, tmp_path, alone=True)
        time.sleep(moment)
        run.process.terminate()
        codes[moment], _ = run.ends()
    print(codes)
    # On a busy machine Python itself may take longer to begin.
    assert set(codes.values()) <= {75, -signal.SIGTERM} and codes[1.0] == 75, codes


LONG = ["--config.samples=80000", "--config.evaluation.every_samples=0", "--config.log_every=1"]
WORKER = [*LONG, "--config.data.workers=1", "--config.data.decode=exact"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_is_said_and_costs_no_step(tiny, tmp_path, number):
    run = Process(tiny, tmp_path, flags=WORKER, seconds=20)
    run.steps(3)
    workers = run.workers()
    assert workers
    for worker in workers:
        worker.send_signal(number)
    code, error = run.ends()
    assert code == 1
    reason = {signal.SIGKILL: "has ended", signal.SIGSTOP: "no batch came within 20 s"}[number]
    assert re.search(f"{reason}.*everything is saved at step .* the same command goes on", error)
    assert not any(map(psutil.pid_exists, (worker.pid for worker in workers)))


def test_a_signal_while_a_worker_is_stopped(tiny, tmp_path):
    run = Process(tiny, tmp_path, flags=WORKER, seconds=600)
    run.steps(3)
    for worker in run.workers():
        worker.send_signal(signal.SIGSTOP)
    time.sleep(1)
    run.process.terminate()
    assert run.ends()[0] == 75
    assert "everything is saved at step" in run.output()


@pytest.fixture
def small_disk(tmp_path):
    """A command's beginning, after which a small disk lies in a folder, and that folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=4m disk {disk} && exec "$@"'
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    return words, disk


def test_a_full_disk_is_one_line(tiny, tmp_path, small_disk):
    """At the first checkpoint, or where metrics.jsonl is written, whichever comes first."""
    words, disk = small_disk
    first = f"""
import os, runpy, sys
left = int(sys.argv.pop(1))
with open("{disk}/filler", "wb") as filler:
    size = os.statvfs("{disk}")
    filler.write(bytes(size.f_bavail * size.f_frsize - left))
sys.argv[0] = "mlip"
import mlip_jax.main
mlip_jax.main.run()
"""
    for left in (0, 40 * 2**10, 300 * 2**10, 1500 * 2**10):
        command = [*words, sys.executable, "-c", first, str(left)]
        command += [f"--config={tiny}", f"--workdir={disk}/run", *LONG]
        done = subprocess.run(
            command,
            env={
                **with_devices(1),
                "PYTHONPATH": str(ROOT),
                "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        output = done.stderr
        print(left, output[-300:])
        assert done.returncode == 1, output
        assert "Traceback" not in output and "Exception" not in output, output
        assert output.count("error: ") == 1 and "No space left" in output or "no space" in output
