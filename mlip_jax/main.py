"""The front door: flags -> config -> a subcommand, whose module is imported only when asked for.

Light and guarded, because the processes that load data import the main program again.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mlip_jax.cli import command_line
from mlip_jax.cli.subcommands import SUBCOMMANDS
from mlip_jax.core import places, versions
from mlip_jax.core.errors import STOPPED, RunError, Unreachable, UserError
from mlip_jax.devices.huge_pages import restart_with_huge_pages


def main(argv: Sequence[str]) -> int:
    """Does what the command line asks; returns the exit code.

    Args:
      argv: the program's name and its arguments.
    """
    try:
        with places.named_in_errors(), versions.named_in_errors():
            return _act(command_line.parse(argv[1:]))
    except UserError as error:
        return _fail(2, str(error))
    except Unreachable as error:
        return _fail(STOPPED, str(error))
    except RunError as error:
        return _fail(1, str(error))
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    except MemoryError:
        return _fail(1, "out of memory: lower config.batch_size or the size of the model")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _fail(1, f"no space left on the disk: {error.filename or 'a file'} was not written")


def run() -> NoReturn:
    """The console script `mlip`."""
    restart_with_huge_pages()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be Unicode
    sys.exit(main(sys.argv))


def _act(command: command_line.Command | str) -> int:
    if isinstance(command, str):
        print(command, end="")
        return 0
    os.environ.update(command.environment)
    subcommand = SUBCOMMANDS[command.subcommand]
    act = getattr(importlib.import_module(subcommand.module), subcommand.function)
    return act(command.config, command.workdir, **command.options)


def _fail(code: int, message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    run()
