"""Texts that a model cannot tell apart."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def equal_ids(tokens: Int[np.ndarray, "texts context"]) -> Int[np.ndarray, " texts"]:
    """Which texts have equal token ids, and are one text to any encoder.

    Args:
      tokens: as `Tokenizer.encode` gives them: lower-cased, cleaned and cut.

    Returns:
      A number a text, from 0 in the order of first appearance; rows that are equal in every id,
      padding included, have the same number.
    """
    groups: dict[bytes, int] = {}
    numbers = (groups.setdefault(row.tobytes(), len(groups)) for row in np.asarray(tokens))
    return np.fromiter(numbers, np.int64, len(tokens))
