"""The order of a dataset's classes, which is that of its labels."""

from __future__ import annotations

from collections.abc import Iterable


def in_order(names: Iterable[str]) -> list[str]:
    """Class names in the order of their labels: sorted, or by value where all are whole numbers.

    Folders "0", "1", ..., "10" are those of a list of names by their numbers, as ImageNet-V2's are
    of ImageNet's. As texts, "10" would come before "2", and every figure of them would be wrong.
    """
    distinct = set(names)
    if all(name.isascii() and name.isdigit() for name in distinct):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)
