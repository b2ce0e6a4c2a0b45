"""Which tar shards a pattern names, here or in a bucket, and how many samples each has."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from mlip_jax.core import places
from mlip_jax.core.cache import cache_folder
from mlip_jax.core.cores import cores
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.files import NotJson, decode_json, exclusively, read_json, write_atomically
from mlip_jax.core.stopping import owns_process
from mlip_jax.data.prepare.containers import SUFFIXES
from mlip_jax.data.prepare.in_bucket import matching
from mlip_jax.data.prepare.webdataset import find_files
from mlip_jax.data.sets.stored import Shards, Version, mark_of
from mlip_jax.data.tars import index as tar_index
from mlip_jax.data.tars.index import Findings, TarIndex

_SIZES = "sizes.json"  # webdataset's own: {"00000.tar": samples}
_STATS = "_stats.json"  # img2dataset's, one beside each shard: {"successes": samples}
_FOUND = "found.json"  # what was found in shards that no such file tells of
_WRITTEN_EVERY = 200  # shards
_AT_ONCE = 16  # requests
_THREADS = 4  # that look through shards of a bucket
_FEW = 8  # shards that one process looks through


class Shard(NamedTuple):
    """A tar file."""

    name: str  # its path; in a bucket, below it
    size: int  # bytes
    mark: str  # what tells it from another of its name

    @property
    def version(self) -> Version:
        """As the cache of shards wants it."""
        return Version(self.size, self.mark)


class Shelf:
    """Where tar files and their indexes are: on the disk, or in a bucket with some of them here.

    It is cheap to pickle.
    """

    def __init__(self, where: str, cache_dir: str) -> None:
        """Opens nothing yet.

        Args:
          where: a path, a URL or a pattern of them, as the user has written it.
          cache_dir: see `cache_folder`.

        Raises:
          UserError: for a URL that cannot be read.
        """
        digest = hashlib.sha256(where.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self._folder = cache_folder(cache_dir) / "tars" / digest
        self.bucket = ""
        self._shards: Shards | None = None
        if places.is_url(where):
            scheme, _, place = where.partition("://")
            self.bucket = f"{scheme}://{place.partition('/')[0]}"
            self._shards = Shards(self.bucket, cache_dir)

    def shown(self, shard: Shard) -> str:
        """A shard's name for the user."""
        return self._shown(shard.name)

    def _shown(self, name: str) -> str:
        return f"{self.bucket}/{name}" if self.bucket else name

    def find(self, shard: Shard) -> Path | None:
        """Where a shard is on this machine; None: it is in the bucket alone."""
        if self._shards is None:
            return Path(shard.name)
        return self._shards.find(shard.name, shard.version)

    def bring(self, shard: Shard, *, ahead: bool = False) -> Path:
        """Brings a shard to this machine, unless it is there; see `Shards.bring`."""
        if self._shards is None:
            return Path(shard.name)
        return self._shards.bring(shard.name, shard.version, ahead=ahead)

    def release(self, shard: Shard) -> None:
        """Says that a shard is not needed for long."""
        if self._shards is not None:
            self._shards.release(shard.name, shard.version)

    def part(self, shard: Shard, start: int, end: int) -> bytes:
        """Bytes of a shard in the bucket."""
        assert self._shards is not None
        return self._shards.part(shard.name, shard.version, start, end)

    def kept_index(self, shard: Shard) -> TarIndex | None:
        """A shard's index, if this machine has it."""
        return tar_index.load(self._index_file(shard), shard.mark)

    def index(self, shard: Shard) -> TarIndex:
        """A shard's index, made where there is none.

        Raises:
          UserError: when the shard is packed.
          RunError: when the shard or the index cannot be had.
        """
        found = self.kept_index(shard)
        if found is None:
            found = self._build(shard)
            with _keeping(self._folder):
                tar_index.save(found, self._index_file(shard), shard.mark)
        return found

    def _build(self, shard: Shard) -> TarIndex:
        def build(path: Path) -> TarIndex:
            return tar_index.build(path, self.shown(shard))

        if self._shards is None:
            return build(Path(shard.name))
        return self._shards.opened(shard.name, shard.version, build)

    def look_through(self, shard: Shard) -> Findings:
        """What is in a shard, of which an index is kept."""
        found = self.index(shard).findings
        self.release(shard)
        return found

    def _index_file(self, shard: Shard) -> Path:
        digest = hashlib.sha256(shard.name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        # Of tens of thousands of shards, some hundred are in a folder.
        return self._folder / digest[:2] / f"{digest}.npz"

    def matching(self, where: str) -> list[Shard]:
        """The tar files that a pattern names, in its order.

        Raises:
          UserError: when there is none.
        """
        if self._shards is None:
            shards, here = [], os.getcwd()
            for path in find_files(where, *SUFFIXES):
                status = os.stat(path)
                mark = f"{status.st_size} {status.st_mtime_ns}"
                shards.append(Shard(os.path.join(here, path), status.st_size, mark))
            return shards
        objects = matching(self._shards.bucket, where.removeprefix(f"{self.bucket}/"), SUFFIXES)
        return [Shard(name, int(v[2]), mark_of(v)) for name, v in objects.items()]

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None where there is none."""
        if self._shards is not None:
            return self._shards.bucket.read(name)
        with contextlib.suppress(FileNotFoundError):
            return Path(name).read_bytes()
        return None

    def findings(self, shards: Sequence[Shard], say: Callable[[str], None]) -> list[Findings]:
        """How many samples each shard has.

        By sizes.json beside the shards, or img2dataset's statistics of each; else they are counted,
        which reads every shard, once.

        Raises:
          UserError: for a file beside the shards that is damaged, or a shard that is packed.
          RunError: when a shard cannot be had.
        """
        found = {name: Findings(samples) for name, samples in self._told(shards).items()}
        lacking = [shard for shard in shards if shard.name not in found]
        if lacking:
            found |= self._counted(lacking, say)
        return [found[shard.name] for shard in shards]

    def _told(self, shards: Sequence[Shard]) -> dict[str, int]:
        """The samples of the shards that files beside them tell of."""
        told: dict[str, int] = {}
        folders = dict.fromkeys(shard.name.rpartition("/")[0] for shard in shards)
        by_folder = {folder: self._sizes(folder) for folder in folders}
        for shard in shards:
            folder, _, name = shard.name.rpartition("/")
            if name in by_folder[folder]:
                told[shard.name] = by_folder[folder][name]
        rest = [shard for shard in shards if shard.name not in told]
        if not rest or self._statistics(rest[0]) is None:
            return told
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            counts = pool.map(self._statistics, rest)
            pairs = zip(rest, counts, strict=True)
            return told | {shard.name: count for shard, count in pairs if count is not None}

    def _sizes(self, folder: str) -> dict[str, int]:
        name = f"{folder}/{_SIZES}" if folder else _SIZES
        content = self.read(name)
        if content is None:
            return {}
        with _damaged(self._shown(name)):
            sizes = decode_json(content)
            if not all(map(_is_count, sizes.values())):
                raise NotJson("expected a number of samples for each shard")
            return sizes

    def _statistics(self, shard: Shard) -> int | None:
        name = f"{shard.name.removesuffix('.tar')}{_STATS}"
        content = self.read(name)
        if content is None:
            return None
        with _damaged(self._shown(name)):
            count = decode_json(content).get("successes")
            if not _is_count(count):
                raise NotJson('expected "successes", a number of samples')
            return int(count)

    def _counted(self, shards: Sequence[Shard], say: Callable[[str], None]) -> dict[str, Findings]:
        """What is in these shards, as it was found before, or is found now."""
        with _keeping(self._folder), self._alone():
            kept = read_json(self._folder / _FOUND, missing={})
            found: dict[str, Findings] = {}
            for shard in shards:
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    mark, samples, broken, first = kept[shard.name]
                    if mark == shard.mark:
                        found[shard.name] = Findings(int(samples), int(broken), first)
            lacking = [shard for shard in shards if shard.name not in found]
            if not lacking:
                return found
            if len(lacking) > _FEW:
                say(
                    f"looking through {len(lacking):,} of {len(shards):,} tar files, once, for "
                    f"their samples; a {_SIZES} beside them would tell"
                )
            with _whole(), self._pool(len(lacking)) as pool:
                results = pool.map(self.look_through, lacking)
                for number, (shard, result) in enumerate(zip(lacking, results, strict=True), 1):
                    found[shard.name] = result
                    entry = (shard.mark, result.samples, result.broken, list(result.first))
                    kept[shard.name] = entry
                    if number % _WRITTEN_EVERY == 0 or number == len(lacking):
                        write_atomically(self._folder / _FOUND, json.dumps(kept))
            return found

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process of a machine looks, and the others see what it has found."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with exclusively(self._folder / ".lock"):
            yield

    def _pool(self, number: int) -> Executor:
        # A program that is not ours may begin anew in each process that it starts.
        if number <= _FEW or cores() == 1 or not owns_process():
            return ThreadPoolExecutor(_THREADS if self.bucket else 1)
        return ProcessPoolExecutor(min(cores(), number), get_context("forkserver"))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise RunError(
            "a process that looks through tar files was killed, perhaps because memory ran out: "
            "run the same command again, which keeps what was found"
        ) from None


@contextlib.contextmanager
def _damaged(name: str) -> Iterator[None]:
    try:
        yield
    except (NotJson, AttributeError) as error:
        raise UserError(f"{name} is damaged: {error}; mend or remove it") from None


@contextlib.contextmanager
def _keeping(folder: Path) -> Iterator[None]:
    """Gives an error of the disk one line."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot keep the indexes of tar files in {folder}: {error.strerror or error}"
        ) from error


def notes(shards: Iterable[Findings], max_skipped_share: float) -> tuple[str, ...]:
    """A sentence about what is broken in shards, or none.

    Raises:
      UserError: when more than `max_skipped_share` of all samples is.
    """
    first: list[tuple[str, str]] = []
    broken = total = 0
    for found in shards:
        broken += found.broken
        total += found.broken + found.samples
        first += found.first
    if not broken:
        return ()
    named = "; ".join(f"{place} ({reason})" for place, reason in first[:3])
    more = "; ..." if broken > 3 else ""
    note = f"{broken:,} of {total:,} samples are broken and left out: {named}{more}"
    if broken > max_skipped_share * total:
        raise UserError(f"{note}; more than max_skipped_share={max_skipped_share:g} allows")
    return (note,)
