"""The front door: flags -> config -> a subcommand, whose module is imported only when asked for.

Light and guarded, because the processes that load data import the main program again.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mlip_jax.cli.subcommands import DEFAULT
from mlip_jax.core import exit_codes, stopping
from mlip_jax.core.waiting import announced
from mlip_jax.devices.huge_pages import restart_with_huge_pages


def main(argv: Sequence[str]) -> int:
    """Does what the command line asks; returns the exit code.

    Args:
      argv: the program's name and its arguments.
    """
    return exit_codes.of(lambda: _act(argv[1:]))


def run() -> NoReturn:
    """The console script `mlip`."""
    words = [word for word in sys.argv[1:2] if not word.startswith("-")]
    if words in ([], [DEFAULT]):
        stopping.listen_early()
    stopping.let_come()
    restart_with_huge_pages()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be Unicode
    stopping.end(main(sys.argv))


def _act(arguments: Sequence[str]) -> int:
    # Here: signals are listened to before these are imported.
    from mlip_jax.cli import command_line
    from mlip_jax.cli.subcommands import SUBCOMMANDS
    from mlip_jax.core import places

    with places.named_in_errors():
        command = command_line.parse(arguments)
        if isinstance(command, str):
            print(command, end="")
            return 0
        os.environ.update(command.environment)
        subcommand = SUBCOMMANDS[command.subcommand]
        with announced("loading JAX and the program"):
            act = getattr(importlib.import_module(subcommand.module), subcommand.function)
        return act(command.config, command.workdir, **command.options)


if __name__ == "__main__":
    run()
