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
    mount = f'mount -t tmpfs -o size=64m disk {disk} && exec "$@"'
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    return words, disk


def on_a_small_disk(small_disk, program, *arguments):
    """Runs a program where that disk lies; returns its exit code, its output and its errors."""
    words, _ = small_disk
    environment = with_devices(1) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*words, sys.executable, "-c", program, *map(str, arguments)],
        env=environment | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    errors = done.stderr
    assert "Traceback" not in errors and "Exception" not in errors, errors
    return done.returncode, done.stdout, errors


FILL = """
import os
def fill(left):
    with open("{disk}/filler", "wb") as filler:
        size = os.statvfs("{disk}")
        filler.write(bytes(size.f_bavail * size.f_frsize - left))
"""


def test_a_full_disk_is_one_line(tiny, small_disk):
    """At the first checkpoint, or where metrics.jsonl is written, whichever comes first."""
    disk = small_disk[1]
    program = f"""{FILL.format(disk=disk)}
import sys
fill(int(sys.argv.pop(1)))
import mlip_jax.main
mlip_jax.main.run()
"""
    run = [f"--config={tiny}", f"--workdir={disk}/run", *LONG]
    for left in (0, 40 * 2**10, 300 * 2**10, 1500 * 2**10):
        code, _, errors = on_a_small_disk(small_disk, program, left, *run)
        print(left, errors[-300:])
        assert code == 1, errors
        (line,) = re.findall("^error: .*", errors, re.MULTILINE)
        assert re.search("no space left", line, re.IGNORECASE) and f"{disk}/run" in line


def test_a_disk_that_fills_up_in_a_save_costs_no_earlier_one(tiny, tmp_path, small_disk):
    """Once there is room the same command goes on, to the bits of a run with room enough."""
    disk = small_disk[1]
    program = f"""{FILL.format(disk=disk)}
import hashlib, pathlib, sys
import jax
from mlip_jax import main
from mlip_jax.storage import checkpoint
from mlip_jax.storage.saved import restore_fields

run, room = sys.argv[1:3], int(sys.argv[3])
save = checkpoint.Checkpoints.save
def save_where_it_is_full(self, step, *rest):
    if step == 4 and room:
        fill(room)
    save(self, step, *rest)
checkpoint.Checkpoints.save = save_where_it_is_full

def saved():
    folders = pathlib.Path(run[1].partition("=")[2], "checkpoints").iterdir()
    return sorted(int(folder.name) for folder in folders if (folder / "files.json").exists())

if room:
    print(main.main(["mlip", *run]), saved())
    os.remove("{disk}/filler")
    room = 0
print(main.main(["mlip", *run]), saved()[-1])
fields, _ = restore_fields(run[1].partition("=")[2], ["params", "optimizer", "ema"])
leaves = jax.tree.leaves(fields)
print(hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest())
"""
    config = [f"--config={tiny}"]
    code, output, errors = on_a_small_disk(
        small_disk, program, *config, f"--workdir={tmp_path}/quiet", 0
    )
    assert code == 0, errors
    end, bits = output.splitlines()[-2:]
    assert end == "0 8"
    for room in (4096, 20 * 2**10):
        code, output, errors = on_a_small_disk(
            small_disk, program, *config, f"--workdir={disk}/run", room
        )
        print(room, output, errors[-2000:])
        assert code == 0, errors
        assert output.splitlines()[-3:] == ["1 [2]", end, bits]
        (line,) = re.findall("^error: .*", errors, re.MULTILINE)
        assert re.search("no space left", line, re.IGNORECASE) and f"{disk}/run" in line
