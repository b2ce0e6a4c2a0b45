"""Making an index, or bringing it up to date: what is known is kept, the rest is embedded."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from numpy.lib.format import open_memmap

from mlip_jax.config import RunError, UserError
from mlip_jax.inference import Model
from mlip_jax.progress import track
from mlip_jax.search import neighbours
from mlip_jax.search.collection import Collection, Item
from mlip_jax.search.index import FILE_NAME, About, Index, check_model, item, write_about
from mlip_jax.storage.workdir import write_atomically

PIECE = 4096  # images; what a kill costs at most
_ROWS = 1 << 16  # copied at a time
_LOCK, _PIECES, _DRAFT = ".lock", "pieces-", "draft-"
_KINDS = ("embeddings-*.npy", "images-*.jsonl", "offsets-*.npy", "neighbours-*.usearch")
_OWN = (*_KINDS, "unreadable-*.jsonl", f"{_DRAFT}*", f"{_PIECES}*", FILE_NAME, ".*")


@dataclass
class Outcome:
    """What was done: how many images are new, changed, as they were, or gone."""

    new: int = 0
    changed: int = 0
    kept: int = 0
    removed: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # path and reason


@dataclass
class _Known:
    """Where the embeddings lie that need not be computed."""

    arrays: list[np.ndarray] = field(default_factory=list)
    rows: dict[Item, tuple[int, int]] = field(default_factory=dict)  # array and row

    def add(self, items: Iterable[Item], embeddings: np.ndarray) -> None:
        self.arrays.append(embeddings)
        for row, found in enumerate(items):
            self.rows[found] = (len(self.arrays) - 1, row)


def build(
    folder: Path, collection: Collection, model: Model, about: About, share: float
) -> Outcome:
    """Makes the folder's index that of the collection as it is now.

    Finished pieces are kept under their final name: after a kill the same call goes on.

    Args:
      folder: of the index; made where it is not there.
      collection: what is indexed.
      model: what embeds it.
      about: the model and the collection; the counts are filled in.
      share: of unreadable images that is no error.

    Raises:
      UserError: for a folder of other things or of another index, or where another process
        indexes there, or no image is found.
      RunError: when more than `share` of the images are unreadable. What is embedded is kept.
    """
    _check_folder(folder)
    with _locked(folder):
        _clean(folder)
        old = Index(folder) if (folder / FILE_NAME).exists() else None
        if old:
            check_model(old.about, folder, about.digest, about.told())
            if old.about.images != about.images:
                raise UserError(
                    f"the index in {folder} is of {old.about.images}, not of {about.images}: "
                    "give another --index=DIR"
                )
        items = collection.items()
        if not items:
            raise UserError(f"there are no images in {about.images}")
        if len(items) > neighbours.EXACT:
            neighbours.check_installed()
        return _update(folder, collection, model, about, share, old, items)


def _update(
    folder: Path,
    collection: Collection,
    model: Model,
    about: About,
    share: float,
    old: Index | None,
    items: list[Item],
) -> Outcome:
    known, outcome = _Known(), Outcome()
    before: set[str] = set()
    if old:
        known.add(old.items(), old.embeddings)
        before = {found.path for found in known.rows}
    outcome.kept = sum(found in known.rows for found in items)
    outcome.removed = len(before - {found.path for found in items})
    pieces = folder / f"{_PIECES}{about.digest[:16]}"
    names = _take_up(pieces, known)
    todo = [found for found in items if found not in known.rows]
    for part, embeddings in _embedded(collection, model, todo, outcome):
        known.add(part, _save_piece(pieces, next(names), part, embeddings))
    readable = [found for found in items if found in known.rows]
    fresh = sum(found.path not in before for found in readable)
    outcome.new, outcome.changed = fresh, len(readable) - fresh - outcome.kept
    if len(outcome.unreadable) > share * len(items):
        path, reason = outcome.unreadable[0]
        raise RunError(
            f"{len(outcome.unreadable):,} of {len(items):,} images cannot be read, more than "
            f"--max-skipped-share={share:g} allows; the first is {printable(path)}: {reason}"
        )
    if not readable:
        raise RunError(f"none of the images in {about.images} can be read")
    if not old or outcome.new or outcome.changed or outcome.removed or _lost(old, readable):
        _write(folder, known, readable, old, about, outcome)
    elif old.about.unreadable or outcome.unreadable:
        _write_unreadable(old, outcome)
    for left_over in folder.glob(f"{_PIECES}*"):
        shutil.rmtree(left_over)
    return outcome


def _lost(old: Index, readable: Sequence[Item]) -> bool:
    """Whether an image that could be read before cannot any more."""
    return old.about.count != len(readable)


def _embedded(
    collection: Collection, model: Model, todo: Sequence[Item], outcome: Outcome
) -> Iterator[tuple[list[Item], Float32[np.ndarray, "images width"]]]:
    """Pieces of what can be read; a batch is decoded while the one before it is embedded."""
    size = model.config.evaluation.batch_size
    part: list[Item] = []
    rows: list[np.ndarray] = []
    done = iter(track(range(len(todo)), "indexing images"))
    for batch, pixels in _decoded(collection, model, todo, size):
        images = []
        for found, image in zip(batch, pixels, strict=True):
            next(done)
            if isinstance(image, OSError):
                outcome.unreadable.append((found.path, image.strerror or str(image)))
            else:
                part.append(found)
                images.append(image)
        if images:
            rows.append(model.encode_image_pixels(np.stack(images)))
        if len(part) >= PIECE:
            yield part, np.concatenate(rows)
            part, rows = [], []
    next(done, None)
    if part:
        yield part, np.concatenate(rows)


def _decoded(
    collection: Collection, model: Model, todo: Sequence[Item], size: int
) -> Iterator[tuple[Sequence[Item], list[UInt8[np.ndarray, "size size 3"] | OSError]]]:
    def decoded(found: Item) -> np.ndarray | OSError:
        try:
            return model.preprocess(collection.read(found.path))
        except OSError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead: list[tuple[Sequence[Item], list[Future]]] = []
        try:
            for start in range(0, len(todo), size):
                batch = todo[start : start + size]
                ahead.append((batch, [pool.submit(decoded, found) for found in batch]))
                if len(ahead) > 1:
                    batch, futures = ahead.pop(0)
                    yield batch, [future.result() for future in futures]
            for batch, futures in ahead:
                yield batch, [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _save_piece(
    pieces: Path, name: str, part: list[Item], embeddings: Float32[np.ndarray, "images width"]
) -> Float32[np.ndarray, "images width"]:
    """Writes a piece; its list of images comes last and makes it whole. Gives it memory-mapped."""
    pieces.mkdir(exist_ok=True)
    with _new(pieces / f"{name}.npy") as draft, draft.open("wb") as file:
        np.save(file, embeddings)
    lines = (json.dumps(found._asdict()) for found in part)
    write_atomically(pieces / f"{name}.jsonl", "\n".join(lines) + "\n")
    return np.load(pieces / f"{name}.npy", mmap_mode="r")


def _take_up(pieces: Path, known: _Known) -> Iterator[str]:
    """Adds the pieces that were finished; gives names for more."""
    taken = -1
    for listed in sorted(pieces.glob("*.jsonl")):
        with contextlib.suppress(OSError, ValueError, EOFError):
            taken = max(taken, int(listed.stem))
            items = [item(line) for line in listed.read_bytes().splitlines()]
            embeddings = np.load(listed.with_suffix(".npy"), mmap_mode="r")
            if embeddings.ndim == 2 and len(items) == len(embeddings):
                known.add(items, embeddings)
    return (f"{number:06}" for number in range(taken + 1, 10**6))


def _write(
    folder: Path,
    known: _Known,
    readable: Sequence[Item],
    old: Index | None,
    about: About,
    outcome: Outcome,
) -> None:
    """The files of the next generation, then index.json, and away with the former's."""
    generation = old.about.generation + 1 if old else 0
    many = len(readable) > neighbours.EXACT
    about = About(
        about.images,
        about.model,
        about.step,
        about.digest,
        len(readable),
        len(outcome.unreadable),
        generation,
        many,
    )
    with _new(folder / f"embeddings-{generation}.npy") as draft:
        _copy(draft, known, readable)
    offsets = np.zeros(len(readable) + 1, np.int64)
    with (
        _new(folder / f"images-{generation}.jsonl") as draft,
        draft.open("w", encoding="ascii") as file,
    ):
        for row, found in enumerate(readable):
            # ASCII: names of files need not be valid Unicode.
            offsets[row + 1] = offsets[row] + file.write(json.dumps(found._asdict()) + "\n")
    with _new(folder / f"offsets-{generation}.npy") as draft, draft.open("wb") as file:
        np.save(file, offsets)
    if many:
        with _new(folder / f"neighbours-{generation}.usearch") as draft:
            embeddings = np.load(folder / f"embeddings-{generation}.npy", mmap_mode="r")
            neighbours.write(embeddings, draft)
    _list_unreadable(folder / f"unreadable-{generation}.jsonl", outcome)
    write_about(folder, about)
    _clean(folder)


def _write_unreadable(old: Index, outcome: Outcome) -> None:
    _list_unreadable(old.file("unreadable", "jsonl"), outcome)
    values = {**vars(old.about), "unreadable": len(outcome.unreadable)}
    write_about(old.folder, About(**values))


def _list_unreadable(path: Path, outcome: Outcome) -> None:
    lines = [json.dumps({"path": path, "error": why}) + "\n" for path, why in outcome.unreadable]
    write_atomically(path, "".join(lines))


def _copy(draft: Path, known: _Known, readable: Sequence[Item]) -> None:
    places = np.array([known.rows[found] for found in readable], np.int64)
    width = known.arrays[0].shape[1]
    whole = open_memmap(draft, "w+", np.float32, (len(readable), width))
    for start in range(0, len(readable), _ROWS):
        arrays, rows = places[start : start + _ROWS].T
        block = whole[start : start + _ROWS]
        for number in np.unique(arrays):
            here = arrays == number
            block[here] = known.arrays[number][rows[here]]
    whole.flush()


@contextlib.contextmanager
def _new(path: Path) -> Iterator[Path]:
    """A draft that takes its name when it is whole and on the disk."""
    draft = path.with_name(f"{_DRAFT}{path.name}")
    yield draft
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(path)


def _check_folder(folder: Path) -> None:
    """Raises UserError for a folder that cannot be made, or that holds what is no index's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strange = [
            entry.name
            for entry in folder.iterdir()
            if not any(entry.match(pattern) for pattern in _OWN)
        ]
    except OSError as error:
        raise UserError(f"cannot use {folder} as --index: {error.strerror}") from error
    if strange:
        raise UserError(
            f"{folder} holds other things, such as {printable(strange[0])}: give an index a "
            "folder of its own with --index=DIR"
        )


def _clean(folder: Path) -> None:
    """Takes away drafts, and the files that index.json does not name."""
    for draft in (*folder.glob(f"{_DRAFT}*"), *folder.glob(f"{_PIECES}*/{_DRAFT}*")):
        draft.unlink()
    if not (folder / FILE_NAME).exists():
        return
    generation = Index(folder).about.generation
    for kind in (*_KINDS, "unreadable-*.jsonl"):
        for file in folder.glob(kind):
            if file.stem.rpartition("-")[2] != str(generation):
                file.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        file = (folder / _LOCK).open("a")
    except OSError as error:
        raise UserError(f"cannot use {folder} as --index: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process indexes in {folder}: wait for it, or give another --index"
            ) from error
        yield


def printable(path: str) -> str:
    """A path that a terminal takes: names of files need not be valid Unicode."""
    return os.fsencode(path).decode(errors="replace")
