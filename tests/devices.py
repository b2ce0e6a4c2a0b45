"""Processes that tests start, on devices of their own."""

import os


def with_devices(devices: int) -> dict[str, str]:
    """This process's environment, with that many virtual devices; all else compiles the same."""
    # The last flag of a name counts.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags}
