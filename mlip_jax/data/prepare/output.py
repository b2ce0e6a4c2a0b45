"""The folder that a dataset is prepared in: whose it is, and which shards it already holds."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from mlip_jax.core import locks, places
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import open_lock, read_json, remove_drafts, write_atomically
from mlip_jax.data.prepare import card
from mlip_jax.data.prepare.make import (
    DRAFTS,
    LOCK,
    MAIN_BYTE,
    SCORE_DRAFTS,
    WORKERS_BYTE,
    Made,
    check_facts,
    checksum,
)
from mlip_jax.data.sets import shards
from mlip_jax.data.sets.shards import BROKEN, INDEX, SHARD_SUFFIX

_JOB = "job.json"


@contextlib.contextmanager
def reserved(folder: Path, job: Mapping[str, Any]) -> Iterator[None]:
    """Holds the folder for this job; there may be nothing else in it.

    Where the job fails before any shard is made or scored, nothing is left of it.

    Raises:
      UserError: when there is, or another process prepares a dataset there.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = set(places.names(folder)) - {LOCK}
        lock = open_lock(folder / LOCK)
    except OSError as error:
        raise UserError(f"cannot use {folder} as --out: {error.strerror}") from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock)
        try:
            stack.enter_context(locks.leased(folder / LOCK))
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, MAIN_BYTE)
        except (OSError, locks.InUse):
            raise UserError(f"another process prepares a dataset in {folder} already") from None
        # Waits for the workers of one that was killed: what they write is not this one's.
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, WORKERS_BYTE)
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, WORKERS_BYTE)
        for name in (INDEX, BROKEN, DRAFTS):
            places.fetch(folder / name)
        job_file = folder / DRAFTS / _JOB
        if (folder / DRAFTS).is_symlink():
            raise UserError(f"{folder / DRAFTS} is a link: remove it")
        if job_file.is_file() or (folder / INDEX).is_file():
            _same(folder, job, job_file)
        elif present - {DRAFTS}:
            raise UserError(
                f"{folder} is not empty and holds no prepared dataset: give another --out"
            )
        (folder / DRAFTS).mkdir(exist_ok=True)
        write_atomically(job_file, json.dumps(job))
        try:
            yield
        except BaseException:
            has_shards = any(name.endswith(SHARD_SUFFIX) for name in places.names(folder))
            if not has_shards and not places.names(folder / DRAFTS / SCORE_DRAFTS):
                _take_away(folder, new)
            raise


def _take_away(folder: Path, new: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):
        places.remove(folder / DRAFTS)
        (folder / LOCK).unlink()
        for path in new:
            path.rmdir()


def _same(folder: Path, job: Mapping[str, Any], job_file: Path) -> None:
    try:
        former = read_json(job_file)
    except UserError:
        former = dict(shards.read_index(folder).job)
    words = {"files": "the source's files have changed"}
    changed = [
        words.get(key, f"{key}: {former.get(key)} -> {job.get(key)}")
        for key in {**former, **job}
        if former.get(key) != job.get(key)
    ]
    if changed:
        raise UserError(
            f"{folder} holds a dataset that was prepared differently ({'; '.join(changed)}): give "
            "another --out, or the former options to go on"
        )


def done_before(folder: Path, console: Console) -> dict[str, Made]:
    """The shards that are there, whole; drafts of a killed run are removed."""
    remove_drafts(folder)
    remove_drafts(folder / DRAFTS)
    done: dict[str, Made] = {}
    if (folder / INDEX).is_file():
        index = shards.read_index(folder)
        damaged = set(damaged_files(folder, index.shards, console))
        for name in sorted(damaged):
            console.print(f"{folder / name} is damaged: it is made again")
        broken = card.read_broken(folder)
        for shard in index.shards:
            if damaged & {name for name, *_ in shard.files()}:
                continue
            try:
                check_facts(shard)
            except ValueError as error:
                console.print(f"{folder / INDEX}: {error}: it is made again")
                continue
            done[shard.name] = Made(shard, tuple(broken.get(shard.name, ())))
    present = places.sizes(folder)
    for path in sorted((folder / DRAFTS).glob("*.json")):
        if path.name == _JOB:
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            made = Made.from_json(path.read_bytes())
            if all(present.get(name) == size for name, size, _ in made.shard.files()):
                done[made.shard.name] = made
    return done


def remove_others(folder: Path, done: Iterable[Made], made: Iterable[Made]) -> None:
    """Removes shards of an earlier run that are none now, because files of the source are gone."""
    current = {name for each in made for name, *_ in each.shard.files()}
    for name in {name for each in done for name, *_ in each.shard.files()} - current:
        places.remove(folder / name)


def damaged_files(folder: Path, parts: Sequence[shards.Shard], console: Console) -> list[str]:
    """The files that are missing or whose checksum is another one.

    Of files in a bucket the sizes are compared: they are checked by whoever brings them.
    """
    files = [each for shard in parts for each in shard.files()]
    if places.mirror_of(folder):
        present = places.sizes(folder)
        return [name for name, size, _ in files if present.get(name) != size]
    hidden = not console.is_terminal
    damaged = []
    for name, _, expected in track(
        files, "comparing checksums", console=console, transient=True, disable=hidden
    ):
        try:
            if checksum(folder / name) != expected:
                damaged.append(name)
        except OSError:
            damaged.append(name)
    return damaged
