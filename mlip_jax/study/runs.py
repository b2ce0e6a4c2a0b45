"""The runs of a study: each a process of its own, some at a time, each on its share of the cores.

A run that is complete is not run again; one that was stopped or killed is resumed, as the same
command of train does. What is known of the runs is in one file, the log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from mlip_jax.core.cores import numbered, starting_on
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_json, write_atomically
from mlip_jax.core.stopping import STOPPED
from mlip_jax.study.table import Planned

LOG = "runs.json"
PROGRAM = (sys.executable, "-m", "mlip_jax", "train")
_PAUSE = 0.2  # seconds between two looks at the processes


@dataclass(frozen=True)
class Logged:
    """A run, as far as it has come.

    Attributes:
      command: what was run.
      seed: of the config.
      starts: how many processes it took.
      seconds: of all of them together, on the clock.
      cpu_seconds: of all of them, in user mode and in the system, on all cores.
      code: of the last one; 0: the run is complete.
    """

    command: str
    seed: int
    starts: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    code: int | None = None


def read_log(folder: Path) -> dict[str, Logged]:
    """The log of a study by `Planned.key`; empty where there is none.

    Raises:
      UserError: when it is damaged.
    """
    path = folder / LOG
    try:
        return {key: Logged(**values) for key, values in read_json(path, missing={}).items()}
    except TypeError:
        raise UserError(f"{path} is no log of a study: remove it, or name another --out") from None


def write_log(folder: Path, log: Mapping[str, Logged]) -> None:
    """Keeps the log."""
    values = {key: asdict(logged) for key, logged in log.items()}
    write_atomically(folder / LOG, json.dumps(values, indent=2) + "\n")


def run_all(
    runs: Sequence[Planned], folder: Path, parallel: int, tell: Callable[[str], None]
) -> bool:
    """Runs what is not complete, in order, `parallel` at a time.

    Args:
      runs: of the table.
      folder: the study's; each run's output is kept beside its workdir as seedN.log.
      parallel: how many at a time; each has its share of the cores that this process may use.
      tell: called with a line at the start and the end of a run.

    Returns:
      Whether it was told to stop by SIGTERM or SIGINT; the runs have saved then.

    Raises:
      UserError: for a run that is in the log with another command.
    """
    log = read_log(folder)
    for run in runs:
        if run.key in log and log[run.key].command != run.command:
            raise UserError(
                f"{run.workdir} was run by another command: {log[run.key].command}; give the row "
                f"of {run.command} another name, or remove the folder and its entry in {LOG}"
            )
    waiting = [run for run in runs if log.get(run.key, Logged("", 0)).code != 0]
    for run in runs:
        if run not in waiting:
            tell(f"complete: {run.key}")
    free = _shares(parallel)
    going: dict[int, tuple[Planned, frozenset[int], float]] = {}
    asked = False
    with _stopping() as stop:
        while going or (waiting and not stop):
            if stop and not asked:
                asked = True
                for process in going:
                    os.kill(process, signal.SIGTERM)
            while waiting and free and not stop:
                run, cores = waiting.pop(0), free.pop(0)
                tell(f"started: {run.key}: {run.command}")
                going[_start(run, cores)] = run, cores, time.monotonic()
            done = _ended(going)
            if done is None:
                time.sleep(_PAUSE)
                continue
            process, code, cpu_seconds = done
            run, cores, start = going.pop(process)
            free.append(cores)
            before = log.get(run.key, Logged(run.command, run.seed))
            log[run.key] = Logged(
                run.command,
                run.seed,
                before.starts + 1,
                before.seconds + time.monotonic() - start,
                before.cpu_seconds + cpu_seconds,
                code,
            )
            write_log(folder, log)
            words = {0: "complete", STOPPED: "stopped"}.get(code, f"failed ({code})")
            tell(f"{words}: {run.key}")
        return bool(stop)


def _shares(parallel: int) -> list[frozenset[int]]:
    """The cores of each of the runs at a time; with more runs than cores they share them."""
    cores = numbered()
    if cores and parallel > len(cores):
        return [frozenset({cores[number % len(cores)]}) for number in range(parallel)]
    return [frozenset(cores[number::parallel]) for number in range(parallel)]


def _start(run: Planned, cores: frozenset[int]) -> int:
    run.workdir.parent.mkdir(parents=True, exist_ok=True)
    with starting_on(cores), open(run.workdir.with_suffix(".log"), "ab") as output:
        process = subprocess.Popen(
            [*PROGRAM, *run.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it once, through this process
        )
    process.returncode = 0  # it is waited for by `_ended`, which learns its CPU time, too
    return process.pid


def _ended(going: Mapping[int, object]) -> tuple[int, int, float] | None:
    """A process that has ended, its exit code and its CPU seconds; None while all go on."""
    for process in going:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            return process, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    return None


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """Gives a list that has the signal in it once this process is told to stop."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
