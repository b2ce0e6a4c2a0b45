"""What the user's texts and paths may be, and the lines of a text file: read within bounds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

MOST_LINE = 16 * 2**20  # bytes of a line that is read
MOST_TEXT = 100_000  # characters of a caption, a tag or a class; a long article has as many
_MOST_PATH = 4095  # bytes; Linux opens no longer one
_MOST_SHOWN = 60  # characters of a value in a message
_CHUNK = 2**16


class Line(NamedTuple):
    """A line of a file, with its line break."""

    offset: int  # bytes from the file's beginning
    length: int  # bytes
    content: bytes | None  # None: it is longer than `MOST_LINE`

    @property
    def refusal(self) -> str:
        """Why it is not read."""
        return f"the line has {self.length:,} bytes, at most {MOST_LINE:,} are read"


def lines(file: BinaryIO) -> Iterator[Line]:
    """The lines of a file from where it stands; of one that is too long nothing is kept."""
    offset = file.tell()
    while content := file.readline(MOST_LINE + 1):
        length = len(content)
        if length > MOST_LINE and not content.endswith(b"\n"):
            while rest := file.readline(_CHUNK):
                length += len(rest)
                if rest.endswith(b"\n"):
                    break
        yield Line(offset, length, content if length <= MOST_LINE else None)
        offset += length


def whole(text: str) -> str:
    """A text that UTF-8 can hold: half of a surrogate pair, which is no character, becomes a "?".

    JSON can spell one ("\\ud83d", a symbol that was cut), and Python makes one of each byte of a
    file's name or an argument that is not UTF-8.
    """
    return text if is_whole(text) else text.encode("utf-8", "replace").decode("utf-8")


def is_whole(text: str) -> bool:
    """Whether UTF-8 can hold a text; see `whole`."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def wrong_text(text: str) -> str:
    """Why a text cannot be a caption, a tag or a class; "" when it can."""
    if len(text) <= MOST_TEXT:
        return ""
    return f"has {len(text):,} characters, at most {MOST_TEXT:,} are read"


def wrong_path(path: str) -> str:
    """Why a text cannot be the path of a file, whether there is one or not; "" when it can."""
    if "\0" in path:
        return "holds a NUL character"
    try:
        length = len(path if path.isascii() else os.fsencode(path))
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no character"
    return f"has {length:,} bytes, at most {_MOST_PATH:,} can be opened" * (length > _MOST_PATH)


def shown(text: str) -> str:
    """A text for messages, in one line: what cannot be printed is escaped, as in "\\n"."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def brief(value: Any) -> str:
    """What a value looks like, for messages: its beginning where it is long."""
    text = repr(value[: _MOST_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
