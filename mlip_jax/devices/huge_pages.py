"""Huge pages for the arrays of CPU devices.

XLA asks for a step's temporary memory anew each step. In pages of 4 KiB the kernel spends up to a
fourth of the step on handing it out (docs/performance.md); in huge pages next to nothing. glibc
asks for them where its environment says so before the program starts.
"""

from __future__ import annotations

import glob
import os
import sys
from pathlib import Path

from mlip_jax.core.stopping import held

VARIABLE = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/kfd")
_OLDEST = (2, 35)  # the first glibc with the setting


def restart_with_huge_pages() -> None:
    """Starts this program again, in this very process, with huge pages where they help.

    Does nothing where the setting is made already, whatever it is; where the kernel gives huge
    pages to everyone or to nobody; and where there is an accelerator.
    """
    tunables = os.environ.get(VARIABLE, "")
    if SETTING in tunables or not _help():
        return
    os.environ[VARIABLE] = ":".join(filter(None, (tunables, f"{SETTING}=1")))
    with held():
        os.execv(sys.executable, sys.orig_argv)


def asked_for() -> bool:
    """Whether this program was started with huge pages."""
    return f"{SETTING}=1" in os.environ.get(VARIABLE, "")


def _help() -> bool:
    if sys.platform != "linux" or _glibc() < _OLDEST:
        return False
    try:
        on_request = "[madvise]" in _MODE.read_text(encoding="ascii")
    except OSError:
        return False
    if os.environ.get("JAX_PLATFORMS", "").lower() == "cpu":
        return on_request
    return on_request and not any(map(glob.glob, _ACCELERATORS))


def _glibc() -> tuple[int, ...]:
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return tuple(map(int, version.split("."))) if name == "glibc" else (0,)
    except ValueError:  # another C library
        return (0,)
