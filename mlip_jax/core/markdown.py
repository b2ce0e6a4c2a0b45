"""Names and texts of others inside Markdown: shown as they are, and taken for no markup."""

from __future__ import annotations

import re

_MARKS = re.compile(r"([\\`*<>\[\]|&])")


def plain(text: str) -> str:
    """A text on one line, in which nothing is Markdown or HTML; for tables too."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """A text on one line as code, whatever it holds."""
    line = " ".join(text.split())
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{line}{space}{fence}"
