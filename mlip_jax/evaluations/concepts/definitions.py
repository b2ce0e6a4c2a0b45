"""What a concept such as gender is: words of two sides, and texts that differ in them alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.files import read_json
from mlip_jax.core.texts import is_whole

_WORD = re.compile(r"[\w']+")  # "man's" is no "man": it tells of a thing, not of a person
_MOST_QUERIES = 8
_MOST_COMPONENTS = 10
_NEEDED = ("name", "sides", "pairs", "templates", "components")
_OPTIONAL = ("words", "queries")


@dataclass(frozen=True)
class Concept:
    """A concept with two sides."""

    name: str
    sides: tuple[str, str]  # what figures call them
    pairs: tuple[tuple[str, str], ...]  # words that define it, a side each
    words: tuple[tuple[str, str], ...]  # more that tell an image's side, but do not define it
    templates: tuple[str, ...]  # with {} where the word goes
    queries: tuple[str, ...]  # texts of the table of cosines
    components: int  # of its subspace

    def texts(self) -> tuple[list[str], list[str]]:
        """The definitional texts of both sides, in one order."""
        first, second = (
            [
                template.replace("{}", pair[side])
                for pair in self.pairs
                for template in self.templates
            ]
            for side in (0, 1)
        )
        return first, second

    def side(self, captions: Sequence[str]) -> int:
        """0 or 1 when the captions hold words of that side alone, else -1."""
        words = {word for caption in captions for word in _words(caption)}
        has_words_of_side = [
            bool(words & {pair[side] for pair in (*self.pairs, *self.words)}) for side in (0, 1)
        ]
        return -1 if has_words_of_side[0] == has_words_of_side[1] else has_words_of_side.index(True)

    def neutral(self, captions: Sequence[str]) -> str:
        """The first caption, the same whichever side its words are of."""
        numbers = {
            word: f"<{number}>"
            for number, pair in reversed(list(enumerate((*self.pairs, *self.words))))
            for word in pair
        }
        return " ".join(numbers.get(word, word) for word in _words(captions[0]))


def read_concept(spec: str) -> tuple[Concept, str]:
    """A concept and the dataset that a spec names with it, "" where it names none.

    Args:
      spec: NAME of concepts.json or PATH.json, then perhaps "@" and a dataset: "gender@coco".

    Raises:
      UserError: for an unknown name, or a file that defines no concept; names file and key.
    """
    path, json_and_at, place = spec.partition(".json@")
    if json_and_at or spec.endswith(".json"):
        file = Path(f"{path}.json" if json_and_at else spec).expanduser()
        return _concept(read_json(file), str(file)), place
    name, _, place = spec.partition("@")
    built_in = resources.files(__package__) / "concepts.json"
    by_name = {
        values["name"]: values for values in json.loads(built_in.read_text(encoding="utf-8"))
    }
    if name not in by_name:
        raise UserError(
            f"config.evaluation.concepts={spec!r}: {name!r} is neither one of {', '.join(by_name)} "
            f"nor a file that ends in .json{suggestion(name, by_name)}"
        )
    return _concept(by_name[name], "concepts.json"), place


def figure_name(query: str) -> str:
    """What figures call a query: "a police officer" -> "police_officer"."""
    return re.sub(r"\W+", "_", re.sub(r"^(an?|the) ", "", query.lower())).strip("_")


def _words(caption: str) -> list[str]:
    return _WORD.findall(caption.lower())


def _concept(values: dict[str, Any], file: str) -> Concept:
    """Checks what a file holds."""

    def refuse(key: str, expected: str) -> UserError:
        return UserError(f"{file}: {key!r}: expected {expected}, not {values.get(key)!r}")

    for key in values:
        if key not in _NEEDED + _OPTIONAL:
            raise UserError(f"{file}: unknown key {key!r}{suggestion(key, _NEEDED + _OPTIONAL)}")
    for key in _NEEDED:
        if key not in values:
            raise UserError(f"{file}: the key {key!r} is missing")
    values = {"words": [], "queries": [], **values}
    if not isinstance(values["name"], str) or not re.fullmatch(r"[\w-]+", values["name"]):
        raise refuse("name", "a word")
    sides = values["sides"]
    if not _is_pair(sides) or not all(map(figure_name, sides)):
        raise refuse("sides", "two different words")
    for key in ("pairs", "words"):
        pairs = values[key]
        if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
            raise refuse(key, "a list of pairs of different words")
        for word in (word for pair in pairs for word in pair):
            if _words(word) != [word]:
                raise UserError(f"{file}: {key!r}: {word!r} is not one word in lower case")
    templates, queries = values["templates"], values["queries"]
    if not _are_texts(templates) or not templates or not all("{}" in text for text in templates):
        raise refuse("templates", "texts with {} where the word goes")
    names = set(map(figure_name, queries)) if _are_texts(queries) else {""}
    if "" in names or len(names) < len(queries) or len(queries) > _MOST_QUERIES:
        raise refuse("queries", f"up to {_MOST_QUERIES} different texts")
    texts = len(values["pairs"]) * len(templates)
    if not texts:
        raise refuse("pairs", "at least one pair")
    most = min(_MOST_COMPONENTS, texts)
    components = values["components"]
    if type(components) is not int or not 1 <= components <= most:
        raise refuse("components", f"a whole number from 1 to {most} ({texts} pairs of texts)")
    concept = Concept(
        values["name"],
        tuple(sides),
        tuple(map(tuple, values["pairs"])),
        tuple(map(tuple, values["words"])),
        tuple(templates),
        tuple(queries),
        components,
    )
    first, second = ({pair[side] for pair in concept.pairs + concept.words} for side in (0, 1))
    if first & second:
        raise UserError(f"{file}: {sorted(first & second)[0]!r} stands on both sides of the pairs")
    return concept


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(text, str) and text and is_whole(text) for text in values
    )


def _is_pair(values: Any) -> bool:
    return _are_texts(values) and len(values) == 2 and values[0] != values[1]
