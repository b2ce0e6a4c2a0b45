"""Making an index, or bringing it up to date: what is known is kept, the rest is embedded."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from mlip_jax.core import places
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.files import whole_file, write_atomically
from mlip_jax.inference import Model
from mlip_jax.search import neighbours
from mlip_jax.search.collection import Collection, Item
from mlip_jax.search.files import (
    PIECES,
    check_folder,
    clean,
    locked,
    nothing_left,
    printable,
)
from mlip_jax.search.index import FILE_NAME, About, Index, check_model, write_about
from mlip_jax.search.pieces import Pieces, Unreadable, embedded

_ROWS = 1 << 16  # copied at a time


@dataclass
class Outcome:
    """What was done: how many images are new, changed, as they were, or gone."""

    new: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    unreadable: Unreadable = field(default_factory=list)


@dataclass
class _Known:
    """Where the embeddings lie that need not be computed."""

    files: list[Path] = field(default_factory=list)
    rows: dict[Item, tuple[int, int]] = field(default_factory=dict)  # number of the file, and row

    def add(self, items: Iterable[Item], embeddings: Path) -> None:
        self.files.append(embeddings)
        for row, item in enumerate(items):
            self.rows[item] = (len(self.files) - 1, row)


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
    with contextlib.ExitStack() as stack:
        stack.enter_context(nothing_left(folder))
        check_folder(folder)
        stack.enter_context(locked(folder))
        clean(folder)
        old = Index(folder) if (folder / FILE_NAME).exists() else None
        if old:
            check_model(old.about, folder, about.digest, about.model_name())
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
    if old:
        known.add(old.items(), old.file("embeddings", "npy"))
    before = {item.path for item in known.rows}
    outcome.unchanged = sum(item in known.rows for item in items)
    outcome.removed = len(before - {item.path for item in items})
    # Paths and stamps say which image it is below one folder only.
    owner = hashlib.sha256(f"{about.digest} {about.images}".encode(errors="surrogateescape"))
    pieces = Pieces(folder / f"{PIECES}{owner.hexdigest()[:16]}")
    for piece in pieces.finished():
        known.add(*piece)
    todo = [item for item in items if item not in known.rows]
    for part, embeddings in embedded(collection, model, todo, outcome.unreadable):
        known.add(part, pieces.save(part, embeddings))
    readable = [item for item in items if item in known.rows]
    outcome.new = sum(item.path not in before for item in readable)
    outcome.changed = len(readable) - outcome.new - outcome.unchanged
    # The old index where it holds all that is wanted, and nothing else.
    same = old if old and outcome.unchanged == old.about.count == len(readable) else None
    generation = (old.about.generation + (same is None)) if old else 0
    listed = folder / f"unreadable-{generation}.jsonl"
    lines = [json.dumps({"path": path, "error": why}) for path, why in outcome.unreadable]
    write_atomically(listed, "".join(f"{line}\n" for line in lines))
    _check_share(outcome, share, len(items), listed)
    about = dataclasses.replace(
        same.about if same else about,
        count=len(readable),
        unreadable=len(outcome.unreadable),
        generation=generation,
        neighbours=len(readable) > neighbours.EXACT,
    )
    if same is None:
        _write(folder, known, readable, about)
    write_about(folder, about)
    clean(folder)
    for left_over in folder.glob(f"{PIECES}*"):
        places.remove(left_over)
    return outcome


def _check_share(outcome: Outcome, share: float, total: int, listed: Path) -> None:
    """Raises RunError where too many images are unreadable, or all."""
    count = len(outcome.unreadable)
    if count <= share * total and count < total:
        return
    path, reason = outcome.unreadable[0]
    raise RunError(
        f"{count:,} of {total:,} images cannot be read, and --max-skipped-share={share:g} allows "
        f"no more; the first is {printable(path)}: {reason} (all are listed in {listed})"
        if count < total
        else f"none of {total:,} images can be read; the first is {printable(path)}: {reason} "
        f"(all are listed in {listed})"
    )


def _write(folder: Path, known: _Known, readable: Sequence[Item], about: About) -> None:
    """The files of an index; nothing names them yet."""
    generation = about.generation
    with whole_file(folder / f"embeddings-{generation}.npy") as draft:
        _copy(draft, known, readable)
    offsets = np.zeros(len(readable) + 1, np.int64)
    with (
        whole_file(folder / f"images-{generation}.jsonl") as draft,
        draft.open("w", encoding="ascii") as file,
    ):
        for row, item in enumerate(readable):
            # ASCII: names of files need not be valid Unicode.
            offsets[row + 1] = offsets[row] + file.write(json.dumps(item._asdict()) + "\n")
    with whole_file(folder / f"offsets-{generation}.npy") as draft, draft.open("wb") as file:
        np.save(file, offsets)
    if about.neighbours:
        with whole_file(folder / f"neighbours-{generation}.usearch") as draft:
            embeddings = np.load(folder / f"embeddings-{generation}.npy", mmap_mode="r")
            neighbours.write(embeddings, draft)


def _copy(draft: Path, known: _Known, readable: Sequence[Item]) -> None:
    places = np.array([known.rows[item] for item in readable], np.int64)
    width = np.load(known.files[0], mmap_mode="r").shape[1]
    embeddings = open_memmap(draft, "w+", np.float32, (len(readable), width))
    for start in range(0, len(readable), _ROWS):
        numbers, rows = places[start : start + _ROWS].T
        block = embeddings[start : start + _ROWS]
        for number in np.unique(numbers):
            in_file = numbers == number
            # Opened anew each time: there may be more pieces than files that a process may open.
            block[in_file] = np.load(known.files[number], mmap_mode="r")[rows[in_file]]
    embeddings.flush()
