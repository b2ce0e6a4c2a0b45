"""Prompt templates and class names of zero-shot classification, as data.

templates.json and class_names.json hold what CLIP's code and CLIP_benchmark publish (both under the
MIT licence): the ImageNet prompts as "clip_80" and "clip_7", the others by their data set's name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from ml_collections import ConfigDict

from mlip_jax.errors import UserError, suggestion
from mlip_jax.files import read_json

_DEFAULT = "simple"
# What sets are called elsewhere -> here.
_ALIASES = {
    "imagenet1k": "clip_80",
    "imagenet": "clip_80",
    "imagenet2012": "clip_80",
    "oxford_iiit_pet": "pets",
    "oxford_flowers102": "flowers",
    "stanford_cars": "cars",
    "fashion_mnist": _DEFAULT,
    "voc": "voc2007_multilabel",
}


@functools.cache
def _named(file: str) -> dict[str, list[str]]:
    return json.loads((resources.files(__package__) / file).read_text(encoding="utf-8"))


def check(config: ConfigDict) -> None:
    """Raises UserError for templates or class names that cannot be found."""
    find_templates(config.evaluation.templates)
    named = config.evaluation.class_names
    if named and named not in _named("class_names.json"):
        _read_names(named)


def find_templates(name: str, set_name: str = "") -> tuple[str, ...]:
    """The prompt templates of a name, or one template.

    Args:
      name: "plain", "simple", "clip_7", "clip_80", another list of templates.json such as
        "cifar10"; "auto", the list called like the set, "simple" where there is none; or a
        template itself such as "a drawing of {}".
      set_name: the set that "auto" is about.

    Raises:
      UserError: for a template that has no {} and is no list's name.
    """
    named = _named("templates.json")
    if name == "auto":
        word = set_name.partition("-")[0].lower()
        word = _ALIASES.get(word, word)
        return tuple(named[word if word in named else _DEFAULT])
    name = _ALIASES.get(name, name)
    if name not in named and "{}" not in name:
        valid = ("auto", *named)
        raise UserError(
            f"config.evaluation.templates={name!r} is neither a list (auto, plain, simple, clip_7, "
            "clip_80, or a data set's such as cifar10) nor a template with {} where the class goes"
            f"{suggestion(name, valid)}"
        )
    return tuple(named.get(name, (name,)))


def find_class_names(asked: str, own: Sequence[str], set_name: str) -> tuple[str, ...]:
    """What prompts call the classes of a set.

    Args:
      asked: config.evaluation.class_names: "" for the set's own names, a list of class_names.json
        such as "imagenet1k", or the path of a JSON file: names in the order of the set's classes,
        or an object from the set's names to others.
      own: the set's class names, in the order of its labels.
      set_name: what an error calls the set.

    Raises:
      UserError: for an unknown list or a file that does not fit the set.
    """
    if not asked:
        return tuple(own)
    found = _named("class_names.json").get(asked)
    if found is None:
        found = _read_names(asked)
    if isinstance(found, dict):
        missing = [name for name in own if name not in found]
        if missing:
            raise UserError(f"{asked}: the class {missing[0]!r} of the set {set_name!r} is missing")
        return tuple(found[name] for name in own)
    if len(found) != len(own):
        raise UserError(
            f"config.evaluation.class_names={asked!r} has {len(found)} names, the set {set_name!r} "
            f"has {len(own)} classes"
        )
    return tuple(found)


def _read_names(file: str) -> list[str] | dict[str, str]:
    path = Path(file).expanduser()
    if not path.is_file():
        valid = _named("class_names.json")
        raise UserError(
            f"config.evaluation.class_names={file!r} is neither a file nor one of "
            f"{', '.join(valid)}{suggestion(file, valid)}"
        )
    found = read_json(path, (list, dict))
    values = found.values() if isinstance(found, dict) else found
    if not all(isinstance(name, str) for name in values):
        raise UserError(f"{path}: expected a list of class names, or an object of them")
    return found
