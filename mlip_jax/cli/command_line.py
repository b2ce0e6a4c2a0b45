"""The command line: a subcommand, a config with its overrides, and a workdir."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from mlip_jax.cli import flags as table
from mlip_jax.cli import pages, subcommands
from mlip_jax.core import places, schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import check_name, read_json
from mlip_jax.core.key_names import find_key
from mlip_jax.core.trained import read_config
from mlip_jax.core.validation import validate
from mlip_jax.recipes.config_files import import_file, load_config
from mlip_jax.recipes.lengths import forget, settle

_OF_ANY_MODEL = ("evaluate", "export", "search")  # subcommands that need no run, but a model
_MODEL_FILES = ("mlip_config.json", "open_clip_config.json")
_FLAG = re.compile(r"--?(?P<name>[A-Za-z][^=]*)")
_OVERRIDE = re.compile(r"--?(?:no)?config\.(?P<key>[^=]+)")


@dataclass(frozen=True)
class Command:
    """What the command line asks for."""

    subcommand: str
    config: ConfigDict | None  # validated and locked; None where the subcommand takes none
    workdir: Path | None
    options: Mapping[str, Any] = field(default_factory=dict)  # of the subcommand's function
    environment: Mapping[str, str] = field(default_factory=dict)  # variables that flags stand for


def parse(arguments: Sequence[str]) -> Command | str:
    """Reads [SUBCOMMAND] [--config=FILE[:args]] [--workdir=DIR] [--config.KEY=VALUE ...] [flags].

    `mlip_jax.cli.flags` has the flags of each subcommand; prepare takes no config.

    Touches no global flags, so one process may parse as often as it likes.

    Args:
      arguments: the command line after the program's name.

    Returns:
      The command; or the page to print, when help or the version is asked for.

    Raises:
      UserError: for whatever cannot be understood, naming what it may have meant.
    """
    arguments = list(arguments)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    named = bool(arguments) and not arguments[0].startswith("-")
    subcommand = arguments.pop(0) if named else subcommands.DEFAULT
    subcommands.check(subcommand)
    values = table.define()
    remaining = _read(values, table.complete(arguments), known_only=True)
    if table.read(subcommand, values, "version"):
        return pages.version()
    if table.read(subcommand, values, "help"):
        # `mlip --help SUBCOMMAND` is about that subcommand too.
        topics = (
            [subcommand] if named else [one for one in remaining if one in subcommands.SUBCOMMANDS]
        )
        return pages.page(topics[0]) if topics else pages.overview()
    for argument in remaining:
        flag = _FLAG.match(argument)
        if flag and not _OVERRIDE.match(argument):
            raise table.unknown(subcommand, flag["name"])
    options = table.options(subcommand, values)
    for file in options.pop("import", ()):
        import_file(file)
    if subcommand == "evaluate" and "compare" in options:
        return _comparison(options, remaining)
    if subcommand == "prepare" and "teacher" in options:
        return _keeping(options, remaining)
    if not table.has_config(subcommand):
        for name in ("config", "views"):
            if name in options:
                raise UserError(f"{subcommand} takes --{name} with --teacher alone")
        for name in ("keep", "near-duplicates"):
            if name.replace("-", "_") in options and "score" not in options:
                raise UserError(f"{subcommand} takes --{name} with --score=FOLDER alone")
        if remaining:
            raise UserError(
                f"{subcommand} takes no {remaining[0]!r}: it takes flags alone, and no config"
            )
        return Command(subcommand, None, None, options)
    file, folder = options.pop("config", None), options.pop("workdir", None)
    source = options.pop("from", None)
    place = places.local(folder) if folder else None
    start = places.local(source) if source else None
    if start:
        _check_branch(source, start, place)
    config = _find_config(subcommand, subcommands.DEFAULT, file, start or place)
    if source:
        config.start_from = source
        forget(config)
    _override(config, remaining)
    validate(config)
    workdir = place or Path("runs") / config.name
    check_name(workdir, "--workdir")
    if subcommand == "benchmark":
        options["title"] = file or places.shown(workdir)
        options["compare"] = [_another(text, remaining) for text in options.get("compare", ())]
    environment = {
        flag.variable: str(options.pop(flag.keyword))
        for flag in table.FLAGS
        if flag.variable and flag.keyword in options
    }
    return Command(subcommand, config, workdir, options, environment)


def _keeping(options: dict[str, Any], remaining: list[str]) -> Command:
    """Prepare, of what a teacher says, for the runs of a config."""
    for flag in table.FLAGS:
        if flag.keyword in options and flag.name not in ("config", "out", "teacher", "views"):
            raise UserError(f"prepare --teacher looks at a finished dataset: no --{flag.name}")
    file = options.pop("config", None)
    if not file:
        raise UserError(
            "prepare --teacher needs the config of the runs that will learn from it, by whose "
            "augmentation it is shown images: add --config=NAME"
        )
    config = load_config(file)
    _override(config, remaining)
    validate(config)
    return Command("prepare", config, None, options)


def _comparison(options: Mapping[str, Any], remaining: list[str]) -> Command:
    for flag in table.FLAGS:
        if flag.keyword in options and flag.name not in ("compare", "workdir"):
            raise UserError(f"--compare shows results side by side and takes no --{flag.name}")
    if remaining:
        raise UserError(f"--compare takes no {remaining[0]!r}: separate the workdirs by commas")
    workdir = places.local(options["workdir"]) if "workdir" in options else None
    workdirs = tuple(one for text in options["compare"] for one in text.split(",") if one)
    return Command("evaluate", None, workdir, {"compare": workdirs})


def _another(text: str, shared: list[str]) -> tuple[str, ConfigDict]:
    """A config to time beside the first: "FILE --config.KEY=VALUE ...", after `shared`."""
    try:
        file, *overrides = shlex.split(text) or [""]
    except ValueError as error:  # a quote that does not end
        raise UserError(f"--compare={text}: {error}") from None
    config = load_config(file)
    _override(config, [*shared, *overrides])
    validate(config)
    return text, config


def _read(values: flags.FlagValues, arguments: list[str], known_only: bool = False) -> list[str]:
    """Parses the arguments into `values`; returns those that are none of its flags."""
    values.set_gnu_getopt(True)  # flags may follow other arguments
    try:
        return values(["mlip", *arguments], known_only=known_only)[1:]
    except (flags.Error, ValueError) as error:  # the latter for --noconfig.KEY=VALUE
        raise UserError(str(error)) from error


def _find_config(
    subcommand: str, default: str, file: str | None, workdir: Path | None
) -> ConfigDict:
    if file:
        return load_config(file)
    if subcommand == default and not (workdir and (workdir / "config.json").is_file()):
        raise UserError(
            "no config: say which experiment to run, such as --config=mlip, or --workdir=DIR alone "
            "with the folder of a run to go on with (--help shows more)"
        )
    if workdir is None:
        raise UserError(
            f"{subcommand} needs a run to look at: add --workdir=DIR (or --config=FILE)"
        )
    path = workdir / "config.json"
    check_name(workdir, "--workdir")
    if _holds_model(workdir):
        if subcommand not in _OF_ANY_MODEL:
            raise UserError(
                f"{subcommand} needs the workdir of a run, and {workdir} holds a model alone; "
                f"{', '.join(_OF_ANY_MODEL)} take that"
            )
        # Light as it is, this module cannot import what reads other libraries' folders.
        folders = importlib.import_module("mlip_jax.interop.model_folders")
        return folders.settings(workdir)[0]
    if not path.exists():
        raise UserError(f"{workdir} is no workdir of a run: it has no config.json; check --workdir")
    return read_config(path.parent)


def _check_branch(source: str, start: Path, workdir: Path | None) -> None:
    if not (start / "config.json").is_file():
        raise UserError(f"--from={source} is no workdir of a run: it has no config.json")
    if not workdir:
        raise UserError(f"--from={source} starts a run of its own: add --workdir=DIR for it")
    if workdir.resolve() == start.resolve():
        raise UserError(
            f"--from and --workdir are both {source}: a branch needs a folder of its own; to make "
            f"the run itself longer, leave out --from"
        )


def _holds_model(folder: Path) -> bool:
    """Whether it is no workdir, but an exported model or another library's."""
    if any((folder / name).is_file() for name in _MODEL_FILES):
        return True
    try:
        return "model_type" in read_json(folder / "config.json")
    except UserError:
        return False


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
        match = re.match(r"flag --config\.(?P<key>[^=]+)=(?P<value>.*?): ", str(error))
        if not match:
            raise
        raise UserError(_wrong_type(match["key"], match["value"], known)) from error
    if extra:
        raise UserError(
            f"unexpected argument {extra[0]!r}: the subcommand comes first, flags after it"
        )
    settle(config, keys)


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
    found = find_key(key, known)
    near = f"; did you mean {found!r}?" if found else ""
    return f"unknown config key config.{key}{near}"


def _wrong_type(key: str, value: str, known: dict[str, object]) -> str:
    default = known[key]
    kind = type(default).__name__
    if isinstance(default, tuple) and default:
        kind = f"tuple of {type(default[0]).__name__}"
    return f"config.{key}={value!r}: expected a value of type {kind}"
