"""What ends a program with one line, and the nearest valid name that the line may suggest."""

from __future__ import annotations

from collections.abc import Iterable

from mlip_jax.core.stopping import STOPPED
from mlip_jax.core.texts import shown

_MOST_COMPARED = 100  # characters; the time grows with them
_MOST_SAID = 1500
_ENDING = 300  # of them, where a message is cut: there stands what to do


class Told(Exception):
    """One whose message may quote anything: it is told in one printable line, and no essay."""

    def __str__(self) -> str:
        line = shown(" ".join(super().__str__().split()))
        if len(line) > _MOST_SAID:
            return f"{line[: _MOST_SAID - _ENDING]} ... {line[-_ENDING:]}"
        return line


class UserError(Told):
    """A mistake that the user can mend: shown as one line, exit code 2."""


class RunError(Told):
    """A run that cannot go on for a reason outside the config: shown as one line, exit code 1.

    Attributes:
      code: 75 where the run was asked to stop or a server stays away, and a scheduler is to start
        it again.
    """

    code = 1


class Unreachable(RunError):
    """A server stays away; what was saved before is safe: one line, exit code 75."""

    code = STOPPED


def suggestion(word: str, valid: Iterable[str]) -> str:
    """'; did you mean X?' with the nearest valid word, or nothing when none is near."""
    import difflib  # as seldom as slow

    near = difflib.get_close_matches(str(word)[:_MOST_COMPARED], list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def choose(key: str, value: str, valid: Iterable[str]) -> None:
    """Raises UserError unless config.`key`'s `value` is one of `valid`, naming the nearest."""
    valid = tuple(valid)
    if value not in valid:
        raise UserError(
            f"config.{key}={value!r} is not one of {', '.join(valid)}{suggestion(value, valid)}"
        )


def first_line(error: Exception) -> str:
    """What an error of another library says, in one line: its first, or the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
