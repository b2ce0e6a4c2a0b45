"""The kinds of value that flags take: what each may be, and how its text is read."""

from __future__ import annotations

import abc
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mlip_jax.core.schema import ADDRESS, is_address

ON = "true"  # a switch that is given without a value
_SWITCHED = {ON: True, "t": True, "1": True, "false": False, "f": False, "0": False}


class Kind(abc.ABC):
    """A kind of value: what it may be, and how it is read.

    Attributes:
      choices: all values that there are; (): too many to be named.
      repeated: whether the flag may be given several times; its value is a tuple then.
    """

    choices: Collection[str] = ()
    repeated: bool = False

    @property
    def expected(self) -> str:
        """What a value may be, for errors; "": the flag's metavar says it."""
        return ""

    @abc.abstractmethod
    def read(self, text: str) -> Any:
        """The value that a text gives; ValueError where it gives none."""


@dataclass(frozen=True)
class Text(Kind):
    """A text that is not empty, and that the pattern matches as a whole."""

    expected: str = ""
    pattern: str = ".+"
    repeated: bool = False

    def read(self, text: str) -> str:
        if not re.fullmatch(self.pattern, text, re.DOTALL):
            raise ValueError(text)
        return text


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number from `least` to `most`."""

    least: int
    most: int | None = None

    @property
    def expected(self) -> str:
        if self.most is None:
            return f"a whole number, at least {self.least}"
        return f"a whole number from {self.least} to {self.most}"

    def read(self, text: str) -> int:
        value = int(text)
        if value < self.least or (self.most is not None and value > self.most):
            raise ValueError(text)
        return value


@dataclass(frozen=True)
class Share(Kind):
    """A number from 0 to `most`; without `zero`, one above 0."""

    most: float = 1.0
    zero: bool = True

    @property
    def expected(self) -> str:
        return f"a share in {'[' if self.zero else '('}0, {self.most:g}]"

    def read(self, text: str) -> float:
        value = float(text)
        if not 0 <= value <= self.most or not (value or self.zero):
            raise ValueError(text)
        return value


@dataclass(frozen=True)
class Shares(Kind):
    """Numbers from 0 to `most`, with commas between."""

    most: float = 1.0

    @property
    def expected(self) -> str:
        return f"shares in [0, {self.most:g}] with commas between, such as 0,0.25,0.5"

    def read(self, text: str) -> tuple[float, ...]:
        return tuple(map(Share(self.most).read, text.split(",")))


@dataclass(frozen=True)
class Address(Kind):
    """Where a process listens."""

    expected: str = ADDRESS

    def read(self, text: str) -> str:
        if not is_address(text):
            raise ValueError(text)
        return text


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few words."""

    choices: Collection[str]

    @property
    def expected(self) -> str:
        return listed(tuple(self.choices))

    def read(self, text: str) -> str:
        if text not in self.choices:
            raise ValueError(text)
        return text


@dataclass(frozen=True)
class Registered(Kind):
    """A name in a table to which the config may add: the subcommand looks it up."""

    choices: Collection[str]

    @property
    def expected(self) -> str:
        return listed(tuple(self.choices))

    def read(self, text: str) -> str:
        if not text:
            raise ValueError(text)
        return text


@dataclass(frozen=True)
class Switch(Kind):
    """On or off."""

    expected: str = "true or false"

    def read(self, text: str) -> bool:
        if text.lower() not in _SWITCHED:
            raise ValueError(text)
        return _SWITCHED[text.lower()]


def listed(words: Sequence[str]) -> str:
    """Words as a sentence has them: "a, b or c"."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
