"""Compiled programs, kept on the disk: a run that goes on, or the same model, need not wait again.

JAX's own cache, in a folder of ours. A program is found again by its text, the compiler's version
and its options; it is the same code, and gives the same bits.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import jax

from mlip_jax.core.cache import cache_folder


def keep_compiled(cache_dir: str = "") -> None:
    """Keeps what is compiled from now on, unless JAX has been told of another place.

    Not for programs that send messages between CPUs: out of the cache they have lost the order of
    these (jaxlib 0.10).

    Args:
      cache_dir: the folder of the data cache, see `mlip_jax.core.cache`; it holds "compiled".
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache_folder(cache_dir) / "compiled" / _host()
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _host() -> str:
    """A name for this kind of CPU: code for one with other instructions may not run."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    digest = hashlib.sha256(flags.encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"
