"""Checks a new device with this package's own command line, and records what it measures.

    python launch/device_check.py --out=runs/device

trains, stops and resumes the quick configs, compares the final states bit for bit, and times the
large ones: about 8 minutes on one GPU. OUT/device.json has all figures, OUT/logs the output of each
entry. It needs the installed package (pip install -e .) with JAX for the device. Results of an
earlier check in OUT are replaced.

    python launch/device_check.py --out=runs/device --tiny

does the same with tiny models. It shows on any CPU that the script works; its speeds mean nothing.

Each entry runs in child processes, so that a compiler's abort is one failed entry. What could not
be measured is listed as owed, with the reason. The exit code is 1 if an entry failed, else 0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from device_check_children import MINUTES, Children, Failed, Owed, run_child
from device_check_entries import FULL, GROUPS, TINY, Check, Task
from rich import box
from rich.console import Console
from rich.table import Table

from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.files import write_atomically

NOT_REACHED = "not reached"


@dataclass
class Entry:
    """A line of the results.

    Attributes:
      name: what the table calls it.
      state: "done", "failed" or "owed".
      words: the main figures, or why there are none.
      seconds: that it took.
      figures: all that was found.
    """

    name: str
    state: str = "owed"
    words: str = NOT_REACHED
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


def work_on(
    tasks: Sequence[Task], children: Children, wrote: Callable[[Sequence[Entry]], None]
) -> list[Entry]:
    """Works on all entries, one after the other.

    Args:
      tasks: in their order.
      children: with the time that is left.
      wrote: called with all entries, those to come included, after each.
    """
    entries = [Entry(task.name) for task in tasks]
    for task, entry in zip(tasks, entries, strict=True):
        begun = time.monotonic()
        try:
            children.begin(task.name, task.seconds)
            found = task.find()
            entry.state, entry.words, entry.figures = "done", found.words, found.figures
        except Owed as reason:
            entry.words = str(reason)
        except (Failed, UserError, RunError) as reason:
            entry.state, entry.words = "failed", str(reason)
        entry.seconds = time.monotonic() - begun
        wrote(entries)
    return entries


def table_of(entries: Sequence[Entry]) -> Table:
    """The results; what is owed or failed is marked, with its reason."""
    table = Table(box=box.SIMPLE_HEAD, width=80)
    table.add_column("Entry", no_wrap=True)
    table.add_column("Result", ratio=1)
    table.add_column("s", justify="right", no_wrap=True)
    for entry in entries:
        mark = {"done": "", "owed": "owed: ", "failed": "FAILED: "}[entry.state]
        table.add_row(entry.name, f"{mark}{entry.words}", f"{entry.seconds:.0f}")
    return table


def _environment(scratch: Path, tiny: bool) -> dict[str, str]:
    """Variables of the children: what one of them has compiled, the others need not compile."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # Tiny models need no fast programs.
    fast = {"XLA_FLAGS": "--xla_backend_optimization_level=0"} if tiny else {}
    return {**cache, **fast, **os.environ}


def main(argv: Sequence[str]) -> int:
    """Checks the device; returns 1 if an entry failed, else 0."""
    parser = argparse.ArgumentParser(description="Checks a device and records what it measures.")
    parser.add_argument("--out", type=Path, required=True, help="folder of device.json and logs")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="for all entries (default: 8)"
    )
    parser.add_argument("--only", default="", help=f"groups of entries: {','.join(GROUPS)}")
    parser.add_argument("--batch", type=int, help="where the search for the largest begins")
    parser.add_argument("--tiny", action="store_true", help="tiny models, for any CPU")
    options = parser.parse_args(argv)
    only = tuple(filter(None, options.only.split(",")))
    if unknown := set(only) - set(GROUPS):
        parser.error(f"--only: {unknown.pop()!r} is none of {', '.join(GROUPS)}")
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    console = Console(width=80, highlight=False, markup=False)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    file = options.out / "device.json"

    def write(entries: Sequence[Entry]) -> None:
        content = {"started": started, "tiny": options.tiny, "minutes": options.minutes}
        content["entries"] = [asdict(entry) for entry in entries]
        write_atomically(file, json.dumps(content, indent=2) + "\n")
        last = [entry for entry in entries if entry.words != NOT_REACHED][-1]
        console.print(f"{last.name}: {last.state}, {last.seconds:.0f} s")

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        run = partial(run_child, environment=_environment(Path(scratch), options.tiny))
        children = Children(options.out / "logs", 60 * options.minutes, run)
        sizes = TINY if options.tiny else FULL
        check = Check(children, Path(scratch), sizes._replace(batch=options.batch or sizes.batch))
        entries = work_on(check.tasks(only), children, write)
    if options.tiny:
        console.print("tiny models: the speeds below are of no device")
    console.print(table_of(entries))
    console.print(f"written: {file}")
    return int(any(entry.state == "failed" for entry in entries))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
