"""The front door: flags -> config -> a verb, whose room is imported only when it is asked for.

Light and guarded, because the processes that load data import the main program again.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mlip_jax import versions
from mlip_jax.cli import command_line
from mlip_jax.cli.usage import HELP
from mlip_jax.config import RunError, UserError
from mlip_jax.devices.huge_pages import restart_with_huge_pages

VERBS = {  # verb: the module and its function of (config, workdir) -> exit code
    "train": ("mlip_jax.training.verb", "train"),
    "evaluate": ("mlip_jax.evaluations", "evaluate_workdir"),
    "report": ("mlip_jax.reports", "report_workdir"),
    "prepare": ("mlip_jax.data.prepare", "prepare"),
    "export": ("mlip_jax.export", "export"),
    "search": ("mlip_jax.search", "search"),
    "plan": ("mlip_jax.planning", "plan"),
    "benchmark": ("mlip_jax.benchmark", "benchmark"),
}


def main(argv: Sequence[str]) -> int:
    """Does what the command line asks; returns the exit code.

    Args:
      argv: the program's name and its arguments.
    """
    try:
        with versions.named_in_errors():
            return _act(command_line.parse(argv[1:], VERBS))
    except UserError as error:
        return _fail(2, str(error))
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
    sys.exit(main(sys.argv))


def _act(command: command_line.Command | None) -> int:
    if command is None:
        print(HELP, end="")
        return 0
    if command.compare:
        compare = importlib.import_module("mlip_jax.evaluations.compare")
        return compare.compare_workdirs(command.compare, command.workdir)
    os.environ.update(command.environment)
    module, function = VERBS[command.verb]
    act = getattr(importlib.import_module(module), function)
    return act(command.config, command.workdir, **command.options)


def _fail(code: int, message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    run()
