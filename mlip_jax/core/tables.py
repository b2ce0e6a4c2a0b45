"""Tables for the terminal, of one style: in a narrow one, words go on in the next line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table


def make_table(headings: Sequence[str], words: int = 1, **options: Any) -> Table:
    """A table without rows. No heading and no cell is ever cut off.

    Args:
      headings: of the columns.
      words: how many of the first columns hold words; the others hold numbers, to the right.
      **options: of `rich.table.Table`.
    """
    table = Table(box=box.SIMPLE_HEAD, **options)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < words else "right", overflow="fold")
    return table
