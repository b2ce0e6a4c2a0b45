"""How many cores there are to share work among."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mlip_jax.evaluations import counting

ROOT = Path(__file__).parents[1]
COUNT = "from mlip_jax.core.cores import cores; print(cores())"


def count(before="", **environment):
    command = [sys.executable, "-c", f"import os, builtins, io\n{before}\n{COUNT}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


def test_affinity_and_limits_of_batch_systems_count():
    free = sorted(os.sched_getaffinity(0))
    assert 1 <= count() <= len(free)
    assert count(f"os.sched_setaffinity(0, [{free[-1]}])") == 1
    assert count(LOKY_MAX_CPU_COUNT="1") == 1


def test_the_quota_of_a_container_counts(tmp_path):
    """A machine of many cores whose container may use two and a half, by cgroup v2's file."""
    quota = tmp_path / "cpu.max"
    quota.write_text("250000 100000\n")
    faked = (
        "os.cpu_count = lambda: 64\n"
        "os.sched_getaffinity = lambda process: set(range(64))\n"
        "exists, opened, name = os.path.exists, builtins.open, '/sys/fs/cgroup/cpu.max'\n"
        "os.path.exists = lambda path: path == name or exists(path)\n"
        f"other = {str(quota)!r}\n"
        "builtins.open = lambda f, *more, **o: opened(other if f == name else f, *more, **o)\n"
    )
    assert count(faked) == 3
    quota.write_text("max 100000\n")
    assert count(faked) == 64


def test_nobody_counts_otherwise():
    for path in (ROOT / "mlip_jax").rglob("*.py"):
        if path.name != "cores.py":
            assert not re.search(r"cpu_count|sched_getaffinity|n_jobs=-", path.read_text()), path


def test_ranking_uses_as_many_threads(monkeypatch):
    pool_sizes = []

    def pool(threads):
        pool_sizes.append(threads)
        return ThreadPoolExecutor(threads)

    monkeypatch.setattr(counting, "cores", lambda: 3)
    monkeypatch.setattr(counting, "ThreadPoolExecutor", pool)
    grid = 2**20 * np.eye(4, dtype=np.int32)
    side = counting.Side(grid, (np.full(4, 2.0**40),))
    ((left,), (right,)) = counting.count_reaching(side, side)
    assert pool_sizes == [3] and left.tolist() == right.tolist() == [1] * 4
