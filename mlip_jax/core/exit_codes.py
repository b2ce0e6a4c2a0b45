"""How a program ends: its exit code, and for what can be mended one line on standard error."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from mlip_jax.core import versions
from mlip_jax.core.errors import RunError, UserError

_LONGEST = 300  # characters of a path in a message
# What the system says of a file that is open: it names none.
_OF_DISKS = (errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)


def of(act: Callable[[], int]) -> int:
    """Does something; returns its exit code, or that of the error that it ends with."""
    try:
        with versions.named_in_errors():
            return act()
    except UserError as error:
        return _fail(2, str(error))
    except RunError as error:
        return _fail(error.code, str(error))
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    except MemoryError:
        return _fail(1, "out of memory: lower config.batch_size or the size of the model")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            file = error.filename or "a file"
            return _fail(1, f"no space left on the disk: {file} was not written")
        if error.filename is None and error.errno not in _OF_DISKS:
            raise
        file = str(error.filename or "a file")[:_LONGEST]
        return _fail(1, f"cannot use {file}: {error.strerror}")


def _fail(code: int, message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return code
