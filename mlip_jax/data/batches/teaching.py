"""What teachers see of a training example, beside what the run's own model sees of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mlip_jax.data.sets.kept import Kept
from mlip_jax.data.sets.records import Record
from mlip_jax.data.text.tokenizer import Tokenizer

IMAGE, TOKEN_IDS = "image", "token_ids"  # of a batch: the model's own
TEXT_FEATURES = "text_features"  # what a frozen text encoder says of "token_ids"


@dataclass(frozen=True)
class TeacherInputs:
    """The same views and captions in other sizes and by other tokenizers, by the batch's keys.

    Attributes:
      sizes: of a square image of the same augmented view.
      tokenizers: of the same captions, with the number of tokens.
      kept: what teachers have said of the view and of the caption before, by the beginning of two
        keys, KEY_image and KEY_text: float16 [batch, width]. Views are those of `data.sets.kept`.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    tokenizers: Mapping[str, tuple[Tokenizer, int]] = field(default_factory=dict)
    kept: Mapping[str, Kept] = field(default_factory=dict)

    def largest(self, own: int) -> int:
        """The largest side of an image, the model's own and that of kept views included."""
        return max((own, *self.sizes.values(), *(each.image_size for each in self.kept.values())))

    def said(self, record: Record, view: int, caption: str, flipped: bool) -> dict[str, np.ndarray]:
        """What is kept of a view and of a caption of a record, before sides change places."""
        if not self.kept:
            return {}
        assert record.origin is not None  # of a prepared dataset, as all of which is kept are
        place, count = record.captions.index(caption), len(record.captions)
        return {
            f"{key}_{side}": embedding
            for key, kept in self.kept.items()
            for side, embedding in (
                ("image", kept.image(record.origin, view)),
                ("text", kept.text(record.origin, place, flipped, count)),
            )
        }

    def token_ids(self, captions: list[str]) -> dict[str, np.ndarray]:
        """The captions by every tokenizer."""
        return {
            key: tokenizer.encode(captions, length)
            for key, (tokenizer, length) in self.tokenizers.items()
        }


NO_INPUTS = TeacherInputs()
