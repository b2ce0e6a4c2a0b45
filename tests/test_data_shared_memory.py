"""Shared memory that a worker lends and has back."""

import gc
import pickle
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import pytest

from mlip_jax.data.batches.shared_memory import Lender, Receiver

SHAPE = (2, 3, 5, 3)


def sent(lender, value):
    memory, lent = lender.empty(SHAPE)
    memory[:] = value
    return pickle.loads(pickle.dumps(lent))


def test_memory_is_used_again_when_nobody_looks_at_it():
    lender, receiver = Lender(8), Receiver()
    first = sent(lender, 1)
    images = receiver.images(first)
    view = images[1, :, ::2]
    other = sent(lender, 2)  # while the first is looked at
    assert other.name != first.name and (images == 1).all()
    del images
    assert sent(lender, 3).name not in (first.name, other.name) and (view == 1).all()
    del view
    again = sent(lender, 4)
    assert again.name == first.name
    assert (receiver.images(again) == 4).all() and (receiver.images(other) == 2).all()


def test_what_is_lent_is_limited():
    lender, receiver = Lender(2), Receiver()
    images = [receiver.images(sent(lender, value)) for value in (1, 2)]
    memory, lent = lender.empty(SHAPE)
    assert (memory.shape, memory.dtype) == (SHAPE, np.uint8) and lent is memory
    images.pop(0)
    assert (receiver.images(sent(lender, 3)) == 3).all() and (images[0] == 2).all()


def test_nothing_is_left_behind():
    """Names go when the receiver has seen them, and the others with the lender."""
    lender, receiver = Lender(2), Receiver()
    seen, unseen = sent(lender, 1), sent(lender, 2)
    images = receiver.images(seen)
    with pytest.raises(FileNotFoundError):
        SharedMemory(seen.name)
    del lender, receiver
    gc.collect()
    with pytest.raises(FileNotFoundError):
        SharedMemory(unseen.name)
    assert (images == 1).all()


def test_each_process_has_memory_of_its_own():
    lender = Lender(1)
    lender.empty(SHAPE)
    assert (Receiver().images(sent(pickle.loads(pickle.dumps(lender)), 5)) == 5).all()
