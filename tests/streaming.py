"""Batches of training, taken from the start or later, and compared."""

import time

import numpy as np

from mlip_jax.data.batches.training import train_batches
from mlip_jax.data.sets.opening import open_training
from mlip_jax.data.text.tokenizer import load_tokenizer


def batches(config, count, start=0, rows=None, pause=0.0):
    source = open_training(config.data)
    stream = train_batches(config, source, load_tokenizer("clip"), start_step=start, rows=rows)
    taken = []
    for _ in range(count):
        taken.append({k: np.array(v) for k, v in next(stream).items()})
        time.sleep(pause)
    stream.close()
    return taken


def assert_equal(ones, others):
    for one, other in zip(ones, others, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
