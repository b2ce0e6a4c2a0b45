"""TPU slices as their compiler sees them, so that programs can be compiled where there is none."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from mlip_jax.core.errors import UserError
from mlip_jax.training.step_cost import GIB


@dataclass(frozen=True)
class Chip:
    """A TPU chip, which is one device. No figure here was measured.

    The first four are Google's, from cloud.google.com/tpu/docs (v4, v5e, v5p, v6e): peak compute,
    HBM capacity and bandwidth, and interconnect bandwidth a chip. The FLOPs a cycle follow from the
    number and the width of its matrix units; what the TPU compiler estimates for a product of
    4096 x 4096 matrices comes to 87 to 97 % of them.

    Attributes:
      peak: bfloat16 FLOP/s.
      memory: bytes of HBM.
      bandwidth: bytes a second between HBM and the cores.
      interconnect: bytes a second that the chip can send, over all its links together.
      flops_a_cycle: of all its matrix units.
      accelerator: the prefix of the accelerator's type.
      cores: what the number in the accelerator's type counts, a chip.
      slices: the topologies that are offered.
    """

    peak: float
    memory: int
    bandwidth: float
    interconnect: float
    flops_a_cycle: int
    accelerator: str
    cores: int
    slices: tuple[str, ...]

    @property
    def clock(self) -> float:
        """Cycles a second: the published peak over the FLOPs a cycle."""
        return self.peak / self.flops_a_cycle


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    *("4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
)
_UNIT = 2 * 128 * 128  # FLOPs a cycle of a matrix unit, 128 wide; those of v6e are 256 wide

CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1200e9, 300e9, 8 * _UNIT, "v4", 2, _CUBIC),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, 4 * _UNIT, "v5litepod", 1, _FLAT),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, 8 * _UNIT, "v5p", 2, (*_CUBIC, "16x16x16")),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 400e9, 16 * _UNIT, "v6e", 1, _FLAT),
}


def devices(topology: str, chip: Chip, shape: str) -> tuple[jax.Device, ...]:
    """Devices to compile for; they run nothing.

    Raises:
      UserError: without libtpu, or when it does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology} needs the TPU compiler (libtpu), which is not installed: "
            "pip install 'mlip_jax[tpu]' (700 MB), or plan for CPUs by --topology=cpu:8"
        )
    chips = math.prod(map(int, shape.split("x")))
    # Without these libtpu asks a metadata server which machine this is, and waits.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{chip.accelerator}-{chips * chip.cores}",
        "TPU_WORKER_ID": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Nothing here touches a TPU: one that is in use may stay so.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    # The device that shapes are computed on must not be a TPU, where there is one.
    jax.config.update("jax_platforms", "cpu")
    options: dict[str, object] = {}
    if chip is CHIPS["v4"]:
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device, as in JAX
    if chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu does not know --topology={topology}: {error}") from error
    return tuple(devices)
