"""What teachers see of a training example, beside what the run's own model sees of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mlip_jax.data.text.tokenizer import Tokenizer

IMAGE, TOKEN_IDS = "image", "token_ids"  # of a batch: the model's own


@dataclass(frozen=True)
class TeacherInputs:
    """The same views and captions in other sizes and by other tokenizers, by the batch's keys.

    Attributes:
      sizes: of a square image of the same augmented view.
      tokenizers: of the same captions, with the number of tokens.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    tokenizers: Mapping[str, tuple[Tokenizer, int]] = field(default_factory=dict)

    def largest(self, own: int) -> int:
        """The largest side of an image, the model's own included."""
        return max((own, *self.sizes.values()))

    def token_ids(self, captions: list[str]) -> dict[str, np.ndarray]:
        """The captions by every tokenizer."""
        return {
            key: tokenizer.encode(captions, length)
            for key, (tokenizer, length) in self.tokenizers.items()
        }


NO_INPUTS = TeacherInputs()
