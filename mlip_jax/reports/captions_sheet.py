"""Images beside the captions that the model writes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlip_jax.evaluations.captioning import Captioner
from mlip_jax.evaluations.sets import EmbeddedSet
from mlip_jax.reports.style import thumbnail

SHOWN = 12


@dataclass(frozen=True)
class Captioned:
    """An image, as a data URI, what the model writes of it, and what people wrote; "" without."""

    content: str
    written: str
    reference: str


def make_captions(model: Captioner, embedded: EmbeddedSet) -> tuple[Captioned, ...]:
    """Images at even steps through a dataset, captioned greedily."""
    count = len(embedded)
    rows = np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int).tolist()
    images = [embedded.source[int(embedded.indices[row])].image for row in rows]
    written = model.caption_pixels(np.stack([model.preprocess(image) for image in images]))
    return tuple(
        Captioned(thumbnail(image), text, next(iter(embedded.captions[row]), ""))
        for image, text, row in zip(images, written, rows, strict=True)
    )
