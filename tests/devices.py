"""The devices of the tests' processes: the flags that XLA gets before JAX starts."""

import os
import subprocess
import sys


def understood(*flags: str) -> list[str]:
    """Those of XLA's flags that the installed version knows; it aborts a process for any other.

    They come and go with versions, and no list of them can be had: a process tries all of them, and
    if it ends, a process each.
    """
    if _starts_with(" ".join(flags)).wait() == 0:
        return list(flags)
    trials = [_starts_with(flag) for flag in flags]
    return [flag for flag, trial in zip(flags, trials, strict=True) if trial.wait() == 0]


def _starts_with(flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def with_devices(devices: int) -> dict[str, str]:
    """This process's environment, with that many virtual devices; all else compiles the same."""
    # The last flag of a name counts.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags}
