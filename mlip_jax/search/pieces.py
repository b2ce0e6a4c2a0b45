"""Embedding images, piece by piece: a finished piece outlives whatever ends the program."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from mlip_jax.core.cores import cores
from mlip_jax.core.files import whole_file, write_atomically
from mlip_jax.core.progress import track
from mlip_jax.inference import Model
from mlip_jax.search.collection import Collection, Item, reason
from mlip_jax.search.index import item

PIECE = 1024  # images; a kill costs no more

Piece = tuple[list[Item], Float32[np.ndarray, "images width"]]
Unreadable = list[tuple[str, str]]  # path and reason


class Pieces:
    """The pieces that lie in a folder, and a name for the next."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._next = 0

    def finished(self) -> Iterator[tuple[list[Item], Path]]:
        """Those that are whole: their images, listed last, and the file of embeddings."""
        for listed in sorted(self._folder.glob("*.jsonl")):
            with contextlib.suppress(OSError, ValueError, EOFError):
                self._next = max(self._next, int(listed.stem) + 1)
                items = [item(line) for line in listed.read_bytes().splitlines()]
                path = listed.with_suffix(".npy")
                embeddings = np.load(path, mmap_mode="r")
                if embeddings.ndim == 2 and len(items) == len(embeddings):
                    yield items, path

    def save(self, items: list[Item], embeddings: Float32[np.ndarray, "images width"]) -> Path:
        """Writes one; gives the file of embeddings."""
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{self._next:06}.npy"
        self._next += 1
        with whole_file(path) as draft, draft.open("wb") as file:
            np.save(file, embeddings)
        lines = "".join(json.dumps(entry._asdict()) + "\n" for entry in items)
        write_atomically(path.with_suffix(".jsonl"), lines)
        return path


def embedded(
    collection: Collection, model: Model, todo: Sequence[Item], unreadable: Unreadable
) -> Iterator[Piece]:
    """Embeds images; a batch is decoded while the one before it is embedded.

    Args:
      collection: whose images they are.
      model: what embeds them.
      todo: the images.
      unreadable: takes those that cannot be read.

    Yields:
      Pieces of some `PIECE` images that can be.
    """
    size = model.config.evaluation.batch_size
    part: list[Item] = []
    rows: list[np.ndarray] = []
    bar = iter(track(range(len(todo)), "indexing images"))
    for batch, pixels in _decoded(collection, model, todo, size):
        images = []
        for entry, image in zip(batch, pixels, strict=True):
            next(bar)
            if isinstance(image, OSError):
                unreadable.append((entry.path, reason(image)))
            else:
                part.append(entry)
                images.append(image)
        if images:
            rows.append(model.encode_image_pixels(np.stack(images)))
        if len(part) >= PIECE:
            yield part, np.concatenate(rows)
            part, rows = [], []
    next(bar, None)
    if part:
        yield part, np.concatenate(rows)


def _decoded(
    collection: Collection, model: Model, todo: Sequence[Item], size: int
) -> Iterator[tuple[Sequence[Item], list[UInt8[np.ndarray, "size size 3"] | OSError]]]:
    def decoded(entry: Item) -> np.ndarray | OSError:
        try:
            return model.preprocess(collection.read(entry.path))
        except OSError as error:
            return error

    with ThreadPoolExecutor(cores()) as pool:
        ahead: list[tuple[Sequence[Item], list[Future[np.ndarray | OSError]]]] = []
        try:
            for start in range(0, len(todo), size):
                batch = todo[start : start + size]
                ahead.append((batch, [pool.submit(decoded, entry) for entry in batch]))
                if len(ahead) > 1:
                    batch, futures = ahead.pop(0)
                    yield batch, [future.result() for future in futures]
            for batch, futures in ahead:
                yield batch, [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)
