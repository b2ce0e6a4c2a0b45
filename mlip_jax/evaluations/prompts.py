"""Prompt templates and class names of zero-shot classification, as data.

templates.json and class_names.json hold what CLIP's code and CLIP_benchmark publish (both under the
MIT licence): the ImageNet prompts as "clip_80" and "clip_7", the others by their dataset's name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.files import read_json
from mlip_jax.core.texts import is_whole

_DEFAULT = "simple"
# What datasets are called elsewhere -> here.
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
def _built_in(file: str) -> dict[str, list[str]]:
    return json.loads((resources.files(__package__) / file).read_text(encoding="utf-8"))


def check(config: ConfigDict) -> None:
    """Raises UserError for templates or class names that cannot be found."""
    find_templates(config.evaluation.templates)
    class_names = config.evaluation.class_names
    if class_names and class_names not in _built_in("class_names.json"):
        _read_names(class_names)


def several_templates(names: str) -> list[str]:
    """The names of templates, or templates, between |: "plain|clip_80|a drawing of {}"."""
    return [name.strip() for name in names.split("|") if name.strip()] or [names]


def find_templates(name: str, set_name: str = "") -> tuple[str, ...]:
    """The prompt templates of a name, or one template.

    Args:
      name: "plain", "simple", "clip_7", "clip_80", another list of templates.json such as
        "cifar10"; "auto", the list called like the dataset, "simple" where there is none; or a
        template itself such as "a drawing of {}".
      set_name: the dataset that "auto" is about.

    Raises:
      UserError: for a template that has no {} and is no list's name.
    """
    templates_by_name = _built_in("templates.json")
    if name == "auto":
        word = set_name.partition("-")[0].lower()
        word = _ALIASES.get(word, word)
        return tuple(templates_by_name[word if word in templates_by_name else _DEFAULT])
    name = _ALIASES.get(name, name)
    if name not in templates_by_name and "{}" not in name:
        valid = ("auto", *templates_by_name)
        raise UserError(
            f"config.evaluation.templates={name!r} is neither a list (auto, plain, simple, clip_7, "
            "clip_80, or a dataset's such as cifar10) nor a template with {} where the class goes; "
            "several, with | between, go with the subcommand evaluate"
            f"{suggestion(name, valid)}"
        )
    return tuple(templates_by_name.get(name, (name,)))


def find_class_names(choice: str, dataset_names: Sequence[str], set_name: str) -> tuple[str, ...]:
    """What prompts call the classes of a dataset.

    Args:
      choice: config.evaluation.class_names: "" for the dataset's own names, a list of
        class_names.json such as "imagenet1k", or the path of a JSON file: names in the order of
        the dataset's classes, or an object from the dataset's names to others.
      dataset_names: the dataset's class names, in the order of its labels.
      set_name: what an error calls the dataset.

    Raises:
      UserError: for an unknown list or a file that does not fit the dataset.
    """
    if not choice:
        return tuple(dataset_names)
    prompt_names: list[str] | dict[str, str] | None
    prompt_names = _built_in("class_names.json").get(choice)
    if prompt_names is None:
        prompt_names = _read_names(choice)
    if isinstance(prompt_names, dict):
        missing = [name for name in dataset_names if name not in prompt_names]
        if missing:
            raise UserError(
                f"{choice}: the class {missing[0]!r} of the dataset {set_name!r} is missing"
            )
        return tuple(prompt_names[name] for name in dataset_names)
    if len(prompt_names) != len(dataset_names):
        raise UserError(
            f"config.evaluation.class_names={choice!r} has {len(prompt_names)} names, the dataset "
            f"{set_name!r} has {len(dataset_names)} classes"
        )
    return tuple(prompt_names)


def _read_names(file: str) -> list[str] | dict[str, str]:
    path = Path(file).expanduser()
    if not path.is_file():
        valid = _built_in("class_names.json")
        raise UserError(
            f"config.evaluation.class_names={file!r} is neither a file nor one of "
            f"{', '.join(valid)}{suggestion(file, valid)}"
        )
    names = read_json(path, (list, dict))
    values = names.values() if isinstance(names, dict) else names
    if not all(isinstance(name, str) and is_whole(name) for name in values):
        raise UserError(f"{path}: expected a list of class names, or an object of them")
    return names
