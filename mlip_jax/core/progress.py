"""The bar of what takes long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich import progress
from rich.console import Console

Item = TypeVar("Item")


def track(
    items: Iterable[Item], words: str, total: int | None = None, *, shown: bool = True
) -> Iterable[Item]:
    """Gives the items and draws how far it is, where somebody is looking at the terminal.

    Args:
      items: what is to be done.
      words: what that is.
      total: how many there are, where `items` cannot say.
      shown: whether to draw at all.
    """
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    return progress.track(items, words, total, console=console, transient=True, disable=hidden)
