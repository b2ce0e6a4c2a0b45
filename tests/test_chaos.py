"""One training run under 200 faults: it ends with the bits of one that was left alone.

MLIP_CHAOS_FAULTS and MLIP_CHAOS_SEED in the environment choose others.
"""

import json
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest
from devices import with_devices

from mlip_jax.core import schema
from mlip_jax.devices import cluster
from mlip_jax.storage.saved import restore_fields

ROOT = Path(__file__).parents[1]
FAULTS = int(os.environ.get("MLIP_CHAOS_FAULTS", "200"))
SEED = int(os.environ.get("MLIP_CHAOS_SEED", "21"))
STATE = ("step", "params", "optimizer", "ema")
KILLED = -signal.SIGKILL
INPUT_SECONDS = 15  # where a worker is hit; else as usual
LIMITS = (30_000, 100_000, 200_000)  # bytes of a file, where a disk is full; a log has less


class Starter:
    """A process whose children are the starts."""

    def __init__(self, environment):
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/chaos_run.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._lines.get()

    def _read(self):
        for line in self._process.stdout:
            self._lines.put(line.strip())

    def start(self, **how):
        self._process.stdin.write(json.dumps(how) + "\n")
        self._process.stdin.flush()
        return int(self._lines.get())

    def code(self, wait=True):
        """The exit code; None while it runs."""
        try:
            return int(self._lines.get(timeout=600 if wait else 0.01))
        except queue.Empty:
            assert not wait, "it does not end"
            return None

    def close(self):
        self._process.stdin.close()
        self._process.wait(60)
        self._reader.join()
        self._process.stdout.close()


class Chaos:
    """A run, and what is done to it."""

    def __init__(self, config, run, seed, count=1):
        self.config, self.run, self.rng = config, run, random.Random(seed)
        environment = {
            **with_devices(1),
            "PYTHONPATH": str(ROOT),
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",  # no start anew for huge pages
            cluster.HEARTBEAT_SECONDS: "8",
        }
        self.starters = [Starter(environment) for _ in range(count)]
        self.pids, self.codes = [], []
        self.told = []  # the faults, in words
        self.damaged = set()  # names of files since the last start
        self.unmended = set()  # and since the first, but for those that were removed
        self.steps_lost = set()  # whose line of metrics.jsonl was hit

    def close(self):
        for starter in self.starters:
            starter.close()

    def log(self, process=0):
        return self.run.with_name(f"{self.run.name}.{process}.log")

    def output(self, process=0):
        return self.log(process).read_text("utf-8", "replace")

    def tell(self, words):
        self.told.append(words)
        print(f"{time.strftime('%X')} {len(self.told)}: {words}, step {self.step()}", flush=True)

    # What a start does.

    def start(self, workers=0, limit=None, flags=()):
        """Starts the run's processes; of several, each is told of the others."""
        arguments = [f"--config={self.config}", f"--workdir={self.run}", *flags]
        arguments.append(f"--config.data.workers={workers}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.pids = []
        for number, starter in enumerate(self.starters):
            together = {
                cluster.COORDINATOR: address,
                cluster.PROCESSES: str(len(self.starters)),
                cluster.PROCESS_ID: str(number),
            }
            self.pids.append(
                starter.start(
                    arguments=arguments,
                    log=str(self.log(number)),
                    environment={
                        "MLIP_INPUT_SECONDS": str(INPUT_SECONDS if workers else 600),
                        **(together if len(self.starters) > 1 else {}),
                    },
                    limit=limit,
                )
            )
        self.codes = [None] * len(self.starters)
        self._first = self.step()
        self.damaged.clear()

    def runs(self):
        for number, starter in enumerate(self.starters):
            if self.codes[number] is None:
                self.codes[number] = starter.code(wait=False)
        return None in self.codes

    def step(self):
        """The last step of which metrics.jsonl tells."""
        file = self.run / "metrics.jsonl"
        lines = file.read_bytes().splitlines() if file.is_file() else []
        for line in reversed(lines):
            found = re.match(rb'\{"step": (\d+), ', line)
            if found:
                return int(found[1])
        return 0

    def steps_on(self, most=5):
        """Waits until some steps are done, or it has ended."""
        before, more = self.step(), self.rng.randint(0, most)
        while self.runs() and self.step() < before + more:
            time.sleep(0.02)

    def send(self, number, process=0):
        if self.codes[process] is None:
            os.kill(self.pids[process], number)

    def ends(self, *codes):
        """With one of these codes, and with no word too much; mends what the line asks for."""
        for number, starter in enumerate(self.starters):
            if self.codes[number] is None:
                self.codes[number] = starter.code()
        for number, code in enumerate(self.codes):
            output = self.output(number)
            assert code in codes, f"{self.told[-9:]}: {code}\n{output[-4000:]}"
            assert "Traceback" not in output, f"{self.told[-9:]}\n{output[-4000:]}"
            if code != KILLED:
                errors = re.findall("^error: .*", output, re.MULTILINE)
                assert len(errors) == (code in (1, 2, 130)), (
                    f"{self.told[-9:]}: {code}\n{output[-4000:]}"
                )
        return self.codes[0]

    def mend(self):
        """Does what the line says of a damaged file: removes it.

        It may have been damaged before a start that was killed too early to notice.
        """
        (error,) = re.findall("^error: .*", self.output(), re.MULTILINE)
        named = [name for name in self.unmended if str(self.run / name) in error]
        if "another config" in error:
            named = ["config.json"]
        assert named and set(named) <= self.unmended, error
        for name in named:
            (self.run / name).unlink()
        self.unmended.difference_update(named)

    # The faults while it runs.

    def pause(self):
        self.tell("SIGSTOP and SIGCONT")
        victim = self.rng.randrange(len(self.pids))
        self.send(signal.SIGSTOP, victim)
        time.sleep(self.rng.random() * 0.5)
        self.send(signal.SIGCONT, victim)

    def litter(self):
        self.tell("litter")
        name = self.rng.choice((".results.md.4194304", ".config.json.4194305", "checkpoints/x.tmp"))
        path = self.run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")

    # The faults that end a start.

    def kill(self):
        victim = self.rng.randrange(len(self.pids))
        self.tell(f"SIGKILL of process {victim}")
        self.send(signal.SIGKILL, victim)
        self.ends(KILLED, *((1,) if len(self.pids) > 1 else ()))

    def stop(self):
        number = self.rng.choice((signal.SIGTERM, signal.SIGINT))
        victim = self.rng.randrange(len(self.pids)) if number == signal.SIGTERM else 0
        self.tell(number.name)
        self.send(number, victim)
        # A Ctrl-C that comes before the run listens ends the program as any other.
        early = number == signal.SIGINT and self.step() == self._first
        self.ends(75, *((130,) if early else ()))

    def workers(self):
        children = psutil.Process(self.pids[0]).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    def hit_worker(self):
        number = self.rng.choice((signal.SIGKILL, signal.SIGSTOP))
        workers = self.workers() if self.codes[0] is None else []
        self.tell(f"{number.name} of a worker")
        if not workers:
            self.send(signal.SIGTERM)
            self.ends(75)
            return
        self.rng.choice(workers).send_signal(number)
        stops = self.rng.random() < 0.5
        if stops:
            time.sleep(self.rng.random())
            self.send(signal.SIGTERM)
        self.ends(*((75, 1) if stops else (1,)))
        if self.codes[0] == 1:
            wanted = f"no batch came within {INPUT_SECONDS} s|a worker process .* has ended"
            assert re.search(f"error: ({wanted}).*same command goes on", self.output())
        for worker in workers:
            assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE

    # The faults between two starts.

    def files(self):
        """What may be hit: of the checkpoints only one, of two at least."""
        files = [path for path in self.run.rglob("*") if path.is_file() and path.stat().st_size]
        steps = [p for p in (self.run / "checkpoints").glob("*") if p.name.isdecimal()]
        hit = any(name.startswith("checkpoints") for name in self.damaged)
        allowed = (
            max(steps, key=lambda path: int(path.name)) if len(steps) > 1 and not hit else None
        )
        return [
            file
            for file in files
            if "checkpoints" not in file.parts or (allowed and allowed in file.parents)
        ]

    def damage(self):
        """A bit of a file flips, or its end is lost."""
        file = self.rng.choice(self.files() or [None])
        if file is None:
            return
        content = bytearray(file.read_bytes())
        place = self.rng.randrange(len(content))
        name = file.relative_to(self.run).as_posix()
        if name == "metrics.jsonl":
            line = content[content.rfind(b"\n", 0, place) + 1 :].split(b"\n")[0]
            self.steps_lost.add(json.loads(line)["step"] if line.startswith(b"{") else None)
        if self.rng.random() < 0.3:
            self.tell(f"{name} is cut")
            if name == "metrics.jsonl":
                place = content.rfind(b"\n", 0, place) + 1  # whole lines are counted as lost
                rest = content[place:].splitlines()
                self.steps_lost.update(json.loads(line)["step"] for line in rest)
            del content[place:]
        else:
            self.tell(f"a bit of {name} flips")
            content[place] ^= 1 << self.rng.randrange(8)
        file.write_bytes(content)
        self.damaged.add(name)
        self.unmended.add(name)

    def odd_folder(self):
        """A folder stands where a file should be; the program says so, and it is taken away."""
        name = self.run / self.rng.choice((".lock", "metrics.jsonl", "environment.json"))
        self.tell(f"a folder in place of {name.name}")
        aside = name.with_name(f"{name.name}.aside")
        there = name.exists()
        if there:
            name.rename(aside)
        name.mkdir(parents=True)
        self.start()
        self.ends(1, 2)
        assert str(name) in self.output()
        name.rmdir()
        if there:
            aside.rename(name)

    def full_disk(self):
        """No file may become larger: the run ends with a line, or goes on where none is."""
        limit = self.rng.choice(LIMITS)
        self.tell(f"no file above {limit} bytes")
        self.start(limit=limit)
        self.steps_on(12)
        self.send(signal.SIGTERM)
        if self.ends(75, 1, 2) == 2:
            self.mend()

    def one_start(self):
        """A start with its faults: before, while it runs, and at its end."""
        for _ in range(self.rng.randint(0, 2)):
            self.rng.choice((self.damage, self.damage, self.litter))()
        end = self.rng.choice(self.ENDS)
        self.start(workers=int(end == "hit_worker"))
        self.steps_on()
        while self.runs() and self.rng.random() < 0.5:
            self.rng.choice((self.pause, self.pause, self.litter))()
            self.steps_on(3)
        if self.runs():
            getattr(self, end)()
        elif self.ends(0, 2, *((1,) if end == "hit_worker" else ())) == 2:
            self.mend()

    ENDS = ("kill", "kill", "stop", "stop", "hit_worker")

    def faults(self, count):
        others = (self.odd_folder, self.full_disk)
        while len(self.told) < count:
            if self.rng.random() < 0.15:
                self.rng.choice(others)()
            else:
                self.one_start()

    def finish(self):
        self.start()
        if self.ends(0, 2) == 2:
            self.mend()
            self.finish()


@pytest.fixture
def chaos(tiny, tmp_path):
    """Makes a run of the config `tiny` with so many steps, and processes."""
    made = []

    def make(name, steps, **options):
        config = schema.from_json(tiny.with_suffix(".json").read_text())
        config.update_from_flattened_dict(
            {
                "samples": steps * config.batch_size,
                "log_every": 1,
                "checkpoint.every_samples": 5 * config.batch_size,
                "evaluation.every_samples": 0,
                "mesh.data": options.get("count", 1),
            }
        )
        file = tmp_path / "chaos.py"
        values = schema.to_json(config)
        file.write_text(
            "from mlip_jax.core.schema import from_json\n\n"
            f"def get_config(arg=None):\n    return from_json({values!r})\n"
        )
        made.append(Chaos(file, tmp_path / name, SEED, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def figures(run):
    """The figures of each step, without what depends on the clock."""
    clock = ("time", "images_per_second", "data_wait", "slow_steps", "slowest_step")
    steps = {}
    for text in (run / "metrics.jsonl").read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        steps.setdefault(line.get("step"), {}).update(
            (key, value) for key, value in line.items() if key not in clock
        )
    return steps


def assert_same(quiet, chaos):
    for field in STATE:
        one, other = (restore_fields(each.run, [field])[0] for each in (quiet, chaos))
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), field
    one, other = figures(quiet.run), figures(chaos.run)
    for step, values in one.items():
        if step not in chaos.steps_lost:
            assert other.get(step) == values, step
    assert not list(chaos.run.glob(".*.[0-9]*")), "litter"


@pytest.mark.slow
def test_a_run_under_faults_ends_with_the_bits_of_one_that_was_left_alone(chaos):
    steps = 40 + 5 * FAULTS
    quiet, hit = chaos("quiet", steps), chaos("hit", steps)
    hit.faults(FAULTS)
    hit.finish()
    quiet.start(flags=["--config.checkpoint.every_samples=0"])
    assert quiet.ends(0) == 0
    assert_same(quiet, hit)
    print(*sorted(hit.told), sep="\n")


@pytest.mark.slow
def test_processes_under_faults_end_with_the_bits_of_those_that_were_left_alone(chaos):
    quiet, hit = chaos("quiet", 120, count=2), chaos("hit", 120, count=2)
    hit.ENDS = ("kill", "kill", "stop")
    while len(hit.told) < min(FAULTS, 20):
        hit.start()
        hit.steps_on()
        if hit.rng.random() < 0.5:
            hit.pause()
        if hit.runs():
            getattr(hit, hit.rng.choice(hit.ENDS))()
    hit.finish()
    quiet.start(flags=["--config.checkpoint.every_samples=0"])
    assert quiet.ends(0) == 0
    assert_same(quiet, hit)
