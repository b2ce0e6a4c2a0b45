"""Batches of images that worker processes hand over in shared memory, which they use again.

Fresh shared memory is zeroed, page by page, as it is first written to. So the receiver, when nobody
holds a batch any more, gives its memory back to the worker that lent it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory

import numpy as np
from jaxtyping import UInt8

_FREE, _LENT = 0, 1  # the byte behind the images


@dataclass(frozen=True)
class Lent:
    """What is sent in the place of images: where they lie."""

    name: str
    shape: tuple[int, ...]


class Lender:
    """In a worker process: memory to write images to, for another process to read."""

    def __init__(self, limit: int) -> None:
        """Lends up to `limit` pieces of shared memory at a time, all of one size; 0: none."""
        self._limit = limit
        self._memories: list[SharedMemory] = []
        # Of what the receiver has seen the names are gone by then.
        weakref.finalize(self, _unlink, self._memories)

    def __reduce__(self) -> tuple[type[Lender], tuple[int]]:
        return Lender, (self._limit,)  # each process has memory of its own

    def empty(
        self, shape: tuple[int, ...]
    ) -> tuple[UInt8[np.ndarray, "..."], Lent | UInt8[np.ndarray, "..."]]:
        """Memory for images, and what to send in its place once they are written.

        Where all pieces are lent it is fresh memory that nobody shares, and itself to be sent.
        """
        size = math.prod(shape)
        free = (memory for memory in self._memories if _contents(memory)[size] == _FREE)
        memory = next(free, None)
        if memory is None and len(self._memories) == self._limit:
            images = np.empty(shape, np.uint8)
            return images, images
        if memory is None:
            memory = SharedMemory(create=True, size=size + 1)
            self._memories.append(memory)
        contents = _contents(memory)
        contents[size] = _LENT
        return np.ndarray(shape, np.uint8, contents), Lent(memory.name, shape)


def _contents(memory: SharedMemory) -> memoryview:
    assert memory.buf is not None  # nothing closes it here
    return memory.buf


def _unlink(memories: Sequence[SharedMemory]) -> None:
    for memory in memories:
        try:
            memory.unlink()
        except FileNotFoundError:
            continue


class Receiver:
    """In the process that workers work for: what they lent, as arrays."""

    def __init__(self) -> None:
        self._memories: dict[str, SharedMemory] = {}

    def images(self, lent: Lent) -> UInt8[np.ndarray, "..."]:
        """The images; when nothing refers to them any more, the worker has its memory back."""
        memory = self._memories.get(lent.name)
        if memory is None:
            memory = self._memories[lent.name] = SharedMemory(lent.name)
            # Without its name it ends with the processes that know it, however they end.
            memory.unlink()
        # NumPy keeps the memory mapped by no more than a reference to `memory`'s map, which
        # `memory` closes when it goes: it must outlive the array, and does by the finalizer.
        images = np.ndarray(lent.shape, np.uint8, _contents(memory))
        weakref.finalize(images, _give_back, memory, images.size).atexit = False
        return images


def _give_back(memory: SharedMemory, size: int) -> None:
    _contents(memory)[size] = _FREE
