"""The command line: a verb, a config with its overrides, and a workdir."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mlip_jax import config as schema
from mlip_jax.config import UserError, suggestion
from mlip_jax.recipes.config_files import load_config
from mlip_jax.validation import validate

_text = functools.partial(flags.DEFINE_string, default="", help="")
_texts = functools.partial(flags.DEFINE_multi_string, default=[], help="")
_count = functools.partial(flags.DEFINE_integer, default=None, help="", lower_bound=1)
_switch = functools.partial(flags.DEFINE_boolean, default=False, help="")
_OF_SEVERAL = ("train", "evaluate", "report", "search")  # verbs of several processes
# The flags that some verbs alone take: the kind of the value, and the verbs.
_OF_VERBS = {
    "suite": (_text, ("evaluate",)),
    "compare": (_texts, ("evaluate", "benchmark")),
    "rates": (_text, ("evaluate",)),
    "out": (_text, ("export", "prepare")),
    "format": (_text, ("export",)),
    "topology": (_text, ("plan",)),
    "mesh": (_text, ("plan",)),
    "largest-batch": (_switch, ("plan",)),
    "against": (_text, ("benchmark",)),
    "only": (_text, ("benchmark",)),
    "input": (_text, ("benchmark",)),
    "steps": (_count, ("benchmark",)),
    "warmup": (_count, ("benchmark",)),
    "source": (_text, ("prepare",)),
    "columns": (_text, ("prepare",)),
    "split": (_text, ("prepare",)),
    "classes": (_text, ("prepare",)),
    "resize": (_text, ("prepare",)),
    "shard-records": (_text, ("prepare",)),
    "workers": (_text, ("prepare",)),
    "max-skipped-share": (_text, ("prepare", "search")),
    "licence": (_text, ("prepare",)),
    "attribution": (_text, ("prepare",)),
    "check": (_switch, ("prepare",)),
    "coordinator": (_text, _OF_SEVERAL),
    "processes": (_text, _OF_SEVERAL),
    "process-id": (_text, _OF_SEVERAL),
    "images": (_text, ("search",)),
    "index": (_text, ("search",)),
    "text": (_text, ("search",)),
    "image": (_text, ("search",)),
    "top": (_count, ("search",)),
    "serve": (_text, ("search",)),
}
_PORT = 8765  # of --serve without a value
_FLAGS = ("config", "workdir", *_OF_VERBS, "help")
_OF_ANY_MODEL = ("evaluate", "export", "search")  # verbs that need no run, but a model
_MODEL_FILES = ("mlip_config.json", "open_clip_config.json")
_FLAG = re.compile(r"--?(?P<name>[A-Za-z][^=]*)")
_OVERRIDE = re.compile(r"--?(?:no)?config\.(?P<key>[^=]+)")


@dataclass(frozen=True)
class Command:
    """What the command line asks for."""

    verb: str
    config: ConfigDict | None  # validated and locked; None for prepare, and when runs are compared
    workdir: Path | None  # None: the same
    options: Mapping[str, Any] = field(default_factory=dict)  # of the verb's function
    environment: Mapping[str, str] = field(default_factory=dict)  # variables that flags stand for
    compare: tuple[str, ...] = ()  # evaluate: workdirs, or patterns of them, to lay side by side


def parse(arguments: Sequence[str], verbs: Iterable[str]) -> Command | None:
    """Reads [VERB] [--config=FILE[:args]] [--workdir=DIR] [--config.KEY=VALUE ...].

    `_OF_VERBS` has the flags that a verb takes besides; prepare takes no config.

    Touches no global flags, so one process may parse as often as it likes.

    Args:
      arguments: the command line after the program's name.
      verbs: the valid verbs; the first is the default.

    Returns:
      The command, or None when help is asked for.

    Raises:
      UserError: for whatever cannot be understood, naming what it may have meant.
    """
    arguments = [f"--serve={_PORT}" if one == "--serve" else one for one in arguments]
    verbs = tuple(verbs)
    verb = arguments.pop(0) if arguments and not arguments[0].startswith("-") else verbs[0]
    if verb == "help" or "-h" in arguments:
        return None
    if verb not in verbs:
        raise UserError(
            f"unknown verb {verb!r}: expected one of {', '.join(verbs)}{suggestion(verb, verbs)}"
        )
    values = flags.FlagValues()
    for name in ("config", "workdir"):
        _text(name, flag_values=values)
    for name, (define, _) in _OF_VERBS.items():
        define(name, flag_values=values)
    _switch("help", flag_values=values)
    rest = _read(values, arguments, known_only=True)
    if values.help:
        return None
    for argument in rest:
        flag = _FLAG.match(argument)
        if flag and not _OVERRIDE.match(argument):
            name = flag["name"]
            raise UserError(f"unknown flag --{name}{suggestion(name, _FLAGS)}")
    for name, (_, own) in _OF_VERBS.items():
        if values[name].value and verb not in own:
            raise UserError(f"--{name} goes with the verb {' or '.join(own)}, not with {verb}")
    if verb == "plan" and not values.topology:
        raise UserError("plan needs a machine: add --topology=v5e:16x16, or --topology=cpu:8")
    if values.compare and verb == "evaluate":
        return _comparison(verb, values, rest)
    if verb == "prepare":
        return _preparation(values, rest)
    config = _find_config(verb, verbs[0], values.config, values.workdir)
    _override(config, rest)
    validate(config)
    workdir = Path(values.workdir or Path("runs") / config.name)
    options = _options(verb, values)
    if verb == "benchmark":
        options["title"] = values.config or str(workdir)
        options["compare"] = [_another(text, rest) for text in values.compare]
    environment = {
        variable: options.pop(flag.replace("-", "_"))
        for flag, variable in schema.PROCESS_VARIABLES.items()
        if values[flag].value
    }
    return Command(verb, config, workdir, options, environment)


def _options(verb: str, values: flags.FlagValues) -> dict[str, Any]:
    """What the verb's own flags say, as its function takes it."""
    return {
        name.replace("-", "_"): values[name].value
        for name, (_, own) in _OF_VERBS.items()
        if verb in own and values[name].value
    }


def _preparation(values: flags.FlagValues, rest: list[str]) -> Command:
    for name in ("config", "workdir"):
        if values[name].value:
            raise UserError(f"prepare takes no --{name}: it reads --source and writes --out")
    if rest:
        raise UserError(f"prepare takes no {rest[0]!r}: a verb comes first, flags after it")
    if not values.out:
        raise UserError("prepare needs a folder to write to: add --out=DIR")
    return Command("prepare", None, None, _options("prepare", values))


def _comparison(verb: str, values: flags.FlagValues, rest: list[str]) -> Command:
    for name in ("config", "suite", "rates"):
        if values[name].value:
            raise UserError(f"--compare lays results side by side and takes no --{name}")
    if rest:
        raise UserError(f"--compare takes no {rest[0]!r}: separate the workdirs by commas")
    workdir = Path(values.workdir) if values.workdir else None
    workdirs = tuple(one for text in values.compare for one in text.split(",") if one)
    return Command(verb, None, workdir, compare=workdirs)


def _another(text: str, rest: list[str]) -> tuple[str, ConfigDict]:
    """A config to time beside the first: "FILE --config.KEY=VALUE ..."; `rest` holds too."""
    file, *overrides = shlex.split(text) or [""]
    config = load_config(file)
    _override(config, [*rest, *overrides])
    validate(config)
    return text, config


def _read(values: flags.FlagValues, arguments: list[str], known_only: bool = False) -> list[str]:
    """Parses the arguments into `values`; returns those that are none of its flags."""
    values.set_gnu_getopt(True)  # flags may follow other arguments
    try:
        return values(["mlip", *arguments], known_only=known_only)[1:]
    except flags.Error as error:
        raise UserError(str(error)) from error


def _find_config(verb: str, default: str, file: str | None, workdir: str | None) -> ConfigDict:
    if file:
        return load_config(file)
    if verb == default:
        raise UserError(
            "no config: say which experiment to run, such as --config=mlip (--help shows more)"
        )
    if not workdir:
        raise UserError(f"{verb} needs a run to look at: add --workdir=DIR (or --config=FILE)")
    path = Path(workdir) / "config.json"
    if _holds_model(Path(workdir)):
        if verb not in _OF_ANY_MODEL:
            raise UserError(
                f"{verb} needs the workdir of a run, and {workdir} holds a model alone; "
                f"{', '.join(_OF_ANY_MODEL)} take that"
            )
        # Light as it is, this module cannot import what reads other libraries' folders.
        folders = importlib.import_module("mlip_jax.interop.model_folders")
        return folders.settings(Path(workdir))[0]
    try:
        return schema.from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{workdir} is no workdir of a run: it has no config.json; check --workdir"
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _holds_model(folder: Path) -> bool:
    """Whether it is no workdir, but an exported model or another library's."""
    if any((folder / name).is_file() for name in _MODEL_FILES):
        return True
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "model_type" in values


def _override(config: ConfigDict, arguments: list[str]) -> None:
    """Applies --config.KEY=VALUE in place; the config's own values give the types."""
    known = schema.flatten(config.to_dict())
    arguments = [_as_tuple(argument, known) for argument in arguments]
    keys = [flag["key"] for flag in map(_OVERRIDE.match, arguments) if flag]
    for key in keys:
        if key not in known:
            raise UserError(_unknown_key(key, list(known)))
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        extra = _read(values, arguments)
    except UserError as error:
        # absl: "flag --config.KEY=VALUE: reason"
        told = re.match(r"flag --config\.(?P<key>[^=]+)=(?P<value>.*?): ", str(error))
        if not told:
            raise
        raise UserError(_wrong_type(told["key"], told["value"], known)) from error
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}: a verb comes first, flags after it")
    for key, value in schema.flatten(config.to_dict()).items():
        # A tuple's flag takes any elements; the default's elements say which are meant.
        if key in keys and isinstance(value, tuple) and known[key]:
            kind = type(known[key][0])
            kinds = (int, float) if kind is float else (kind,)
            if not all(type(element) in kinds for element in value):
                raise UserError(_wrong_type(key, str(value), known))


def _as_tuple(argument: str, known: Mapping[str, object]) -> str:
    """Lets a tuple of texts be written as "a,b": a shell takes badly to ("a", "b")."""
    flag, equals, value = argument.partition("=")
    match = _OVERRIDE.fullmatch(flag)
    default = known.get(match["key"]) if match else None
    texts = isinstance(default, tuple) and all(isinstance(item, str) for item in default)
    if not (equals and texts) or value.lstrip().startswith(("(", "[")):
        return argument
    return f"{flag}={tuple(filter(None, value.split(',')))!r}"


def _unknown_key(key: str, known: list[str]) -> str:
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"config.{key} is a section: override one of its keys, such as config.{inside[0]}"
    whole = [name for name in known if name.endswith(f".{key}")]  # right, but for its sections
    near = f"; did you mean {whole[0]!r}?" if whole else suggestion(key, known)
    return f"unknown config key config.{key}{near}"


def _wrong_type(key: str, value: str, known: dict[str, object]) -> str:
    default = known[key]
    kind = type(default).__name__
    if isinstance(default, tuple) and default:
        kind = f"tuple of {type(default[0]).__name__}"
    return f"config.{key}={value!r}: expected a value of type {kind}"
