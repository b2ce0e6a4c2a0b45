"""One walk of a model over the records of a dataset: images decoded by threads, embedded in parts.

`prepare --teacher` and `prepare --score` are such walks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import TypeVar

import numpy as np
from jaxtyping import Float, UInt8

from mlip_jax.inference import Model

_PIXELS = 2**26  # bytes of views that are in memory at a time, about
Item = TypeVar("Item")
Shown = tuple[Sequence[UInt8[np.ndarray, "size size 3"]], Sequence[str]]


def look(
    model: Model,
    items: Iterable[Item],
    show: Callable[[Item], Shown],
    pool: Executor,
    views: int = 1,
) -> Iterator[
    tuple[Sequence[Shown], Float[np.ndarray, "images width"], Float[np.ndarray, "texts width"]]
]:
    """Shows records to a model, some at a time: always the same ones together.

    Args:
      model: what embeds them.
      items: one a record.
      show: an item -> what the model sees of it, images as its preprocessing gives them, and what
        it reads. Run in threads.
      pool: the threads.
      views: images of a record, at most.

    Yields:
      What was shown, and the embeddings of all its images and of all its texts, in order.
    """
    size = model.preprocess.image_size
    at_once = max(1, _PIXELS // (3 * views * size**2))
    items = iter(items)
    while part := list(itertools.islice(items, at_once)):
        shown = list(pool.map(show, part))
        pixels = np.empty((sum(len(images) for images, _ in shown), size, size, 3), np.uint8)
        for row, image in enumerate(image for images, _ in shown for image in images):
            pixels[row] = image
        texts = [text for _, texts in shown for text in texts]
        yield shown, model.encode_image_pixels(pixels), model.encode_text(texts)
