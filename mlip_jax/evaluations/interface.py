"""The little that evaluations see of a model, and what each of them gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int, UInt8

from mlip_jax.data.images.preprocessing import Preprocessing


class Encoder(Protocol):
    """A model as functions of images and of texts; embeddings are L2-normalised rows."""

    @property
    def preprocess(self) -> Preprocessing:
        """Brings an image, encoded or not, to the size and the colours that the model takes."""

    def encode_image_pixels(
        self, images: UInt8[np.ndarray, "images size size 3"]
    ) -> Float[np.ndarray, "images width"]:
        """Embeds images that `preprocess` has brought to size."""

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
        """Embeds texts."""

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "texts context"]:
        """Token ids of texts, all that the model sees of them."""

    def image_features(
        self, images: UInt8[np.ndarray, "images size size 3"]
    ) -> Float[np.ndarray, "images feature_width"]:
        """The image encoder's output before any projection, not normalised."""


@dataclass(frozen=True)
class Outcome:
    """What one evaluation found on one dataset; the mappings share their keys."""

    name: str  # of the dataset, as the figures' keys carry it
    figures: Mapping[str, float]  # shares in [0, 1], but for those of `sheets.formatted`
    chance: Mapping[str, float]  # the same figure for a guess that has not seen the images
    examples: Mapping[str, int]  # queries or images behind the figure
    protocols: Mapping[str, str]  # a few words that tell this way of counting from others
    note: str  # sentences: the protocol in full, and what was left out
