"""The little that evaluations see of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, UInt8


class Encoder(Protocol):
    """A model as two functions into one space; both give L2-normalised rows."""

    preprocess: Callable[[Any], UInt8[np.ndarray, "size size 3"]]

    def encode_image_pixels(
        self, images: UInt8[np.ndarray, "images size size 3"]
    ) -> Float[np.ndarray, "images width"]:
        """Embeds images that `preprocess` has brought to size."""

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
        """Embeds texts."""
