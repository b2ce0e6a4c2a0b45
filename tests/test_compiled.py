"""Compiled programs on the disk: found again, harmless when damaged, and giving the same bits."""

import json
import subprocess
import sys

import pytest
from devices import with_devices

# A run, and how many of its programs came from the disk.
RUN = """
import sys
import jax
from mlip_jax import main
from mlip_jax.training import evaluation
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
evaluation.write_report = lambda *_: "none"
code = main.main(sys.argv)
print(hits.count("/jax/compilation_cache/cache_hits"))
sys.exit(code)
"""


@pytest.fixture
def run(tiny, tmp_path):
    """Trains two steps in a folder of that name; returns how many programs came from the disk."""

    def act(name, devices=1):
        environment = with_devices(devices) | {"MLIP_JAX_CACHE": str(tmp_path / "cache")}
        del environment["JAX_COMPILATION_CACHE_DIR"]
        words = [f"--config={tiny}", f"--workdir={tmp_path / name}", "--config.samples=16"]
        command = [sys.executable, "-c", RUN, *words, "--config.evaluation.every_samples=0"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    return act


def test_a_second_run_compiles_nothing_and_trains_to_the_same_bits(run, tmp_path):
    assert run("one") == 0
    (folder,) = (tmp_path / "cache" / "compiled").iterdir()
    programs = sorted(folder.iterdir())
    assert any("train_step" in program.name for program in programs)
    damaged = next(program for program in programs if "embed" in program.name)
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert run("two") == len(programs) - 1
    assert sorted(folder.iterdir()) == programs
    one, two = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "two"))
    assert _losses(one) == _losses(two)


def test_programs_of_several_cpu_devices_are_compiled_each_time(run, tmp_path):
    run("one", devices=2)
    cached_programs = (tmp_path / "cache").glob("compiled/*/*train_step*")
    assert not list(cached_programs)


def _losses(lines):
    return [json.loads(line).get("loss") for line in lines.splitlines()]
