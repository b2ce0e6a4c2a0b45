"""The devices of the tests' processes: the flags that XLA gets before JAX starts."""

import os
import subprocess
import sys


def understood(*flags: str) -> list[str]:
    """Those of XLA's flags that the installed version knows; it aborts a process for any other.

    They come and go with versions, and no list of them can be had: a process each tries.
    """
    trials = [
        subprocess.Popen(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for flag in flags
    ]
    return [flag for flag, trial in zip(flags, trials, strict=True) if trial.wait() == 0]


def with_devices(devices: int) -> dict[str, str]:
    """This process's environment, with that many virtual devices; all else compiles the same."""
    # The last flag of a name counts.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags}
