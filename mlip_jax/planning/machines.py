"""The machines that a plan can be made for: TPU slices, GPUs, and virtual CPU devices."""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass

import jax

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.planning import gpus, tpus
from mlip_jax.planning.gpus import CARDS, Card
from mlip_jax.planning.tpus import CHIPS, Chip

_MOST_CPUS = 1024  # virtual devices: XLA takes a minute for as many, and refuses some thousands


@dataclass(frozen=True)
class Machine:
    """Devices to compile for.

    Attributes:
      name: such as "v5e:2x4", "h100:8" or "cpu:8".
      devices: programs can be compiled for them; those of a TPU or GPU run none.
      chip: None for CPUs.
      host: GPUs of a host; 0 for others.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | Card | None
    host: int = 0

    @property
    def platform(self) -> str:
        """ "tpu", "gpu" or "cpu"."""
        if self.chip is None:
            return "cpu"
        return "gpu" if isinstance(self.chip, Card) else "tpu"

    def bandwidth(self, group: int) -> float:
        """Bytes a second that a device sends in a collective of a group of devices; NaN on CPUs."""
        if self.chip is None:
            return math.nan
        if isinstance(self.chip, Card) and group > self.host:
            return self.chip.network
        return self.chip.interconnect


def find(topology: str) -> Machine:
    """The machine that --topology names.

    Args:
      topology: a slice such as "v5e:16x16"; GPUs such as "h100:8" or, of several hosts, "h100:4x8";
        or "cpu:N" for N virtual devices.

    Raises:
      UserError: for an unknown name, for a machine whose compiler is not installed, or for more CPU
        devices than there are when it is too late to have more.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d{0,3}", shape) and int(shape) <= _MOST_CPUS:
        return Machine(topology, _cpu_devices(int(shape)), None)
    if kind in CARDS and (size := gpus.shape(shape)):
        card = CARDS[kind]
        return Machine(topology, gpus.devices(topology, card, *size), card, host=size[1])
    if kind in CHIPS and shape in CHIPS[kind].slices:
        chip = CHIPS[kind]
        return Machine(topology, tpus.devices(topology, chip, shape), chip)
    raise UserError(f"--topology={topology!r} is not known: {_expected(kind, topology)}")


def _expected(kind: str, topology: str) -> str:
    slices = {f"{name}:{shape}" for name, chip in CHIPS.items() for shape in chip.slices}
    hosts = {f"{name}:{count}" for name in CARDS for count in range(1, 9)}
    if kind in CHIPS:
        listed = f"{kind}:{', '.join(CHIPS[kind].slices)}"
    elif kind in CARDS:
        listed = f"{kind}:GPUS, 1 to 8 of a host, or {kind}:HOSTSxGPUS"
    else:
        listed = "; ".join(f"{name}:{', '.join(chip.slices)}" for name, chip in CHIPS.items())
        listed += f"; {', '.join(CARDS)}:GPUS or :HOSTSxGPUS; cpu:N, N at most {_MOST_CPUS:,}"
    return f"expected {listed}{suggestion(topology, sorted(slices | hosts))}"


def _cpu_devices(count: int) -> tuple[jax.Device, ...]:
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX has started: what there is must do
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--topology=cpu:{count}: JAX has started with {len(devices)} devices; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return tuple(devices[:count])
