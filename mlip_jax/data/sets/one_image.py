"""Rows of one image are one record: its captions together, and not each in the others' way."""

from __future__ import annotations

import os
from hashlib import blake2b

import numpy as np
from jaxtyping import Int, UInt64


def bits_of(data: bytes) -> int:
    """64 bits that stand for some bytes.

    Of 12 million, two share their bits with a chance of 4 in a million.
    """
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def image_bits(*parts: str) -> int:
    """`bits_of` an image, by what names it, such as its split and its path."""
    text = "\0".join(map(os.path.normpath, parts))
    return bits_of(text.encode("utf-8", "surrogatepass"))


def by_first(
    keys: UInt64[np.ndarray, " rows"],
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " groups"]]:
    """Rows in groups of one key.

    Returns:
      The rows' numbers, groups and rows in the order in which they come; where each group ends.
    """
    if not len(keys):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = first[inverse]
    order = np.argsort(rank, kind="stable")
    return order, np.flatnonzero(np.diff(rank[order], append=-1)) + 1


def merged_note(rows: int, records: int) -> tuple[str, ...]:
    """A sentence for `Source.notes`, or none where every row has an image of its own."""
    if rows == records:
        return ()
    return (f"{rows:,} rows are of {records:,} images: rows of one image are one record",)
