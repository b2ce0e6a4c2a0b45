"""What goes wrong while Orbax writes: the reason in one line, and quiet about its consequences."""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Any

_LEAVES_LATE_WRITES_ALONE = "leaves_late_writes_alone"
_LOOP_CLOSED = "Event loop is closed"
_CANNOT_WRITE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENOENT, errno.ENOTDIR, errno.ESTALE),  # the folder is gone
}


def cannot_write(error: BaseException | None) -> str:
    """Why the file system refused, from an error or what caused it; nothing for other errors."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            return os.strerror(error.errno)
        for code in _CANNOT_WRITE:  # TensorStore's errors carry the system's words only
            if os.strerror(code) in str(error):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return ""


def leave_late_writes_alone() -> None:
    """Keeps quiet about writes that end after the save they belong to has failed.

    When one write of a save fails, Orbax closes the event loop that waits for all of them; the
    others then find it closed and complain from threads of their own, past the line that says why.
    """
    former = sys.unraisablehook
    if getattr(former, _LEAVES_LATE_WRITES_ALONE, False):
        return

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == _LOOP_CLOSED):
            former(unraisable)

    setattr(hook, _LEAVES_LATE_WRITES_ALONE, True)
    sys.unraisablehook = hook
    # Each write of a save is a task, whose error is told again where nobody has asked for it.
    for name in ("asyncio", "absl"):
        logging.getLogger(name).addFilter(_is_no_late_write)


def _is_no_late_write(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    return not (cannot_write(error) or str(error) == _LOOP_CLOSED)


def is_no_matter_of_course(record: logging.LogRecord) -> bool:
    """Keeps Orbax from warning that each process writes apart, or that its own file is not kept."""
    text = str(record.msg)
    usual = ("Global object size logging", "Metadata file does not exist")
    return not text.startswith(usual) and "Skipping merge" not in text
