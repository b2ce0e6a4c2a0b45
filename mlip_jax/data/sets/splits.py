"""Which split of a dataset is opened: by what it is for, or by its name after "#"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.texts import brief
from mlip_jax.data.sets.records import MissingSplit

ALL = "all"  # every split together
_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_YEAR = re.compile(r"(19|20)\d\d$")  # "val2017"


class Wanted(NamedTuple):
    """The split that is asked for."""

    role: str  # "train", "validation" or "evaluation"
    name: str = ""  # as the user pinned it; "": by its role


class Choice(NamedTuple):
    """The split that is opened."""

    name: str  # of it
    parts: tuple[str, ...]  # the dataset's own splits that it is made of


@dataclass(frozen=True)
class Scheme:
    """How a kind of dataset names its splits."""

    roles: Mapping[str, tuple[tuple[str, ...], ...]]  # what stands for a role, the best first
    names: Mapping[str, str]  # other names of a split
    by_role: bool = True  # an unpinned split is called "train" or "validation", whatever it is

    def choose(self, place: object, wanted: Wanted, present: Iterable[str]) -> Choice:
        """The split to open among those present.

        Args:
          place: the dataset, for the error.
          wanted: what is asked for.
          present: the names of the splits that the dataset has.

        Raises:
          MissingSplit: when it has no such split; it names those that it has.
        """
        present = tuple(present)
        if wanted.name:
            return self._pinned(place, wanted.name, present)
        for candidate in self.roles[wanted.role]:
            if candidate[0] in present:
                parts = tuple(part for part in candidate if part in present)
                by_role = "train" if parts == ("train",) else "validation"
                return Choice(by_role if self.by_role else "+".join(parts), parts)
        if not present:
            raise MissingSplit(f"{place} is empty")
        best = self.roles[wanted.role][0][0] if self.roles[wanted.role] else wanted.role
        hint = "; name one of them after #" if wanted.role == "evaluation" else ""
        raise MissingSplit(f"{place} has no {best} split, only {', '.join(present)}{hint}")

    def _pinned(self, place: object, name: str, present: tuple[str, ...]) -> Choice:
        if name == ALL:
            return Choice(ALL, present)
        resolved = name if name in present else self.names.get(name.lower(), canonical(name))
        if resolved in present:
            return Choice(resolved, (resolved,))
        aliases = (alias for alias, split in self.names.items() if split in present)
        raise MissingSplit(
            f"{place} has no split {name!r}, only {', '.join((*present, ALL))}"
            f"{suggestion(name, (*present, ALL, *aliases))}"
        )


STANDARD = Scheme(
    roles={
        "train": (("train",),),
        "validation": (("validation",), ("test",)),
        "evaluation": (("validation",), ("test",), ("train",)),
    },
    names=_NAMES,
)


def canonical(name: str) -> str | None:
    """train, validation or test for one of their names ("val", "Dev", "val2017"); else None."""
    return _NAMES.get(_YEAR.sub("", name.strip().lower()))


def split_of(place: str, value: Any) -> str:
    """The split that an entry of a file names: "train" where it names none.

    Raises:
      UserError: "PLACE: what is wrong" for another name.
    """
    if value is None or value == "":
        return "train"
    split = canonical(value) if isinstance(value, str) else None
    if split is None:
        raise UserError(
            f"{place}: unknown split {brief(value)}: train, validation or test"
            f"{suggestion(value, _NAMES)}"
        )
    return split
