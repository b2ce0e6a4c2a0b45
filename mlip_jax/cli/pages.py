"""The pages that --help and --version print, from the tables of flags and subcommands."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from mlip_jax.cli import flags
from mlip_jax.cli.subcommands import DEFAULT, SUBCOMMANDS
from mlip_jax.core import versions

_WIDTH = 80
_COLUMN = 26  # where the help of a flag begins
_OVERVIEW = ("config", "workdir", *flags.PAGES)  # flags that the overview shows
_EXAMPLES = ("train", "evaluate", "search", "export", "prepare")  # the first of each
_MORE = (
    "`mlip SUBCOMMAND --help` shows the flags of a subcommand and more examples. "
    "`python -m mlip_jax` is the same program as `mlip`."
)
_OVERRIDE = (
    "--config.KEY=VALUE",
    "another value for a key of the config, such as --config.batch_size=64; may be repeated",
)


def overview() -> str:
    """The page of the program as a whole."""
    return _page(
        _usage("mlip", ("[SUBCOMMAND] [flags]", "SUBCOMMAND --help")),
        _paragraphs(("Trains and evaluates language-image models.",)),
        _section("Subcommands", ((name, each.summary) for name, each in SUBCOMMANDS.items()), 13),
        _section("Common flags", _flags(DEFAULT, _OVERVIEW)),
        _examples([SUBCOMMANDS[name].examples[0] for name in _EXAMPLES]),
        _paragraphs((_MORE,)),
    )


def page(name: str) -> str:
    """The page of a subcommand."""
    subcommand = SUBCOMMANDS[name]
    names = [flag.name for flag in flags.taken_by(name)]
    return _page(
        _usage(f"mlip {name}", subcommand.usage),
        _paragraphs(subcommand.description),
        _section("Flags", _flags(name, names)),
        _examples(subcommand.examples),
    )


def version() -> str:
    """The line of --version; JAX is not imported for it."""
    installed = versions.installed()
    jax = installed.get("jax", "(not installed)")
    return f"mlip_jax {versions.__version__}, jax {jax}, Python {installed['python']}\n"


def _page(*parts: str) -> str:
    return "\n\n".join(parts) + "\n"


def _usage(program: str, ways: Sequence[str]) -> str:
    first = f"usage: {program} "
    lines: list[str] = []
    for way in ways:
        start = first if not lines else " " * len("usage: ") + f"{program} "
        lines += textwrap.wrap(
            # A flag's brackets stay on one line.
            way.replace(" ...]", "\0...]"),
            _WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(first),
            break_on_hyphens=False,
            break_long_words=False,
        )
    return "\n".join(lines).replace("\0", " ")


def _paragraphs(texts: Iterable[str]) -> str:
    return "\n\n".join(textwrap.fill(text, _WIDTH, break_on_hyphens=False) for text in texts)


def _section(title: str, rows: Iterable[tuple[str, str]], column: int = _COLUMN) -> str:
    lines = [f"{title}:"]
    for left, right in rows:
        left = f"  {left}"
        if len(left) > column - 2:
            lines.append(left)
            left = ""
        lines += textwrap.wrap(
            right,
            _WIDTH,
            initial_indent=left.ljust(column),
            subsequent_indent=" " * column,
            break_on_hyphens=False,
            break_long_words=False,
        )
    return "\n".join(lines)


def _flags(subcommand: str, names: Iterable[str]) -> Iterable[tuple[str, str]]:
    """The rows of some flags, each as it is written and what it does."""
    by_name = {flag.name: flag for flag in flags.taken_by(subcommand)}
    for name in names:
        flag = by_name[name]
        yield _written(flag, flag.uses[subcommand]), _description(flag, flag.uses[subcommand])
        if name == "config":
            yield _OVERRIDE


def _written(flag: flags.Flag, use: flags.Use) -> str:
    value = f"={use.metavar}" if use.metavar else ""
    written = f"--{flag.name}" + (f"[{value}]" if value and flag.bare else value)
    return f"-h, {written}" if flag.name == "help" else written


def _description(flag: flags.Flag, use: flags.Use) -> str:
    choices = f": {', '.join(use.kind.choices)}" if len(use.kind.choices) > 1 else ""
    default = "" if use.default is None else f" (default: {use.default})"
    return f"{use.help}{choices}{default}"


def _examples(commands: Sequence[str]) -> str:
    return "\n".join(["Examples:", *(textwrap.indent(command, "  ") for command in commands)])
