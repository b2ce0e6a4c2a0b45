"""All shards of an input, by several processes; those that are there already are kept."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from multiprocessing import forkserver
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.texts import brief
from mlip_jax.data.prepare.make import Made, Maker, Piece, make_in_worker, start_worker
from mlip_jax.data.prepare.readers import Reader
from mlip_jax.data.sets.shards import is_split

_AHEAD = 2  # shards a worker that wait for it
_LOOK = 0.2  # seconds between two looks at how far the workers are
_LINE = 30.0  # seconds between two lines where there is no terminal


def pieces(reader: Reader, records: int) -> Iterator[Piece]:
    """The input in pieces of so many records of one split, in its order."""
    waiting: dict[str, list[Any]] = {}
    numbers: dict[str, int] = {}

    def piece(split: str) -> Piece:
        number = numbers.get(split, 0)
        numbers[split] = number + 1
        refs = waiting.pop(split)
        digest = hashlib.sha256(repr(refs).encode("utf-8", "backslashreplace")).hexdigest()
        return Piece(f"{split}-{number:05d}", split, refs, digest)

    for split, ref in reader.refs():
        if not is_split(split):
            raise UserError(
                f"the split {brief(split)} can be no part of a file's name: give another by "
                "--split=NAME"
            )
        refs = waiting.setdefault(split, [])
        refs.append(ref)
        if len(refs) == records:
            yield piece(split)
    yield from map(piece, sorted(waiting))


def make_all(
    reader: Reader,
    maker: Maker,
    *,
    records: int,
    workers: int,
    done: Mapping[str, Made],
    console: Console,
) -> list[Made]:
    """Makes every shard that is not `done`, or is done from something else.

    Args:
      reader: the input.
      maker: of a shard.
      records: of a shard, at most.
      workers: processes; 1: this one.
      done: what there is, by name.
      console: where progress goes.

    Returns:
      All shards in order.

    Raises:
      RunError: when a worker process is killed.
      OSError: when a shard cannot be written.
    """
    made: dict[str, Made] = {}
    order: list[str] = []
    with _Bar(reader, console) as bar, _pool(maker, workers, bar) as submit:
        pending: dict[Future[Made], str] = {}

        def collect(most: int) -> None:
            while len(pending) > most:
                finished, _ = wait(pending, timeout=_LOOK, return_when=FIRST_COMPLETED)
                for future in finished:
                    result = made[pending.pop(future)] = future.result()
                    maker.hand_over(result)
                    bar.broken += len(result.broken)
                bar.show()

        for piece in pieces(reader, records):
            order.append(piece.name)
            former = done.get(piece.name)
            if former is not None and former.shard.made_of == piece.digest:
                made[piece.name] = former
                bar.kept += len(piece.refs)
                bar.broken += len(former.broken)
                continue
            pending[submit(piece)] = piece.name
            collect(_AHEAD * workers)
        collect(0)
    return [made[name] for name in order]


@contextlib.contextmanager
def _pool(maker: Maker, workers: int, bar: _Bar) -> Iterator[Callable[[Piece], Future[Made]]]:
    """How a piece is handed out."""
    if workers == 1:
        maker.tell(bar.add)

        def submit(piece: Piece) -> Future[Made]:
            future: Future[Made] = Future()
            future.set_result(maker.make(piece))
            return future

        yield submit
        return
    # Not forked: a thread draws the bar, and in a fork its locks may never open. They are forked
    # from a process that has nothing but the imports, which take each a third of a second, and
    # which starts while the first records are looked for.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlip_jax.data.prepare"])
    forkserver.ensure_running()
    count, stop = context.Value("q", 0), context.Event()
    bar.count = lambda: count.value
    pool = ProcessPoolExecutor(workers, context, start_worker, (maker, count, stop))
    try:
        yield lambda piece: pool.submit(make_in_worker, piece)
    except BrokenProcessPool:
        raise RunError(
            "a worker process was killed, perhaps because memory ran out: run the same command "
            "again, which keeps the finished shards; fewer --workers need less memory"
        ) from None
    except BaseException:
        stop.set()  # nobody waits for shards that are begun
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class _Bar:
    """How far it is: a bar on a terminal, else a line now and then."""

    def __init__(self, reader: Reader, console: Console) -> None:
        self._reader = reader
        self._console = console
        self.kept = self.broken = self._new = 0
        self.count: Callable[[], int] = lambda: self._new  # records that were made in this run
        self._started = self._printed = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("preparing"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> _Bar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, records: int) -> None:
        """Counts records that this process has made."""
        self._new += records
        self.show()

    def show(self) -> None:
        """Draws how far it is now."""
        now, new = time.monotonic(), self.count()
        total, count = self._reader.total(), self.kept + new
        rate = new / max(now - self._started, 1e-9)
        of = f" of {max(total, count):,}" if total else ""
        broken = f", {self.broken:,} broken" if self.broken else ""
        # rich's own estimate begins anew with each new total.
        left = max(total - count, 0) / rate if total and rate else 0
        time_left = f", {timedelta(seconds=round(left))} left" if left else ""
        words = f"{count:,}{of} records{broken}, {rate:,.0f} a second{time_left}"
        if self._bar:
            self._bar.update(self._task, completed=count, total=total, description=words)
        elif now - self._printed > _LINE:
            self._printed = now
            self._console.print(f"preparing: {words}")
