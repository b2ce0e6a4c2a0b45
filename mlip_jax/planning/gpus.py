"""NVIDIA's GPUs as XLA's compiler sees them, so that programs can be compiled where there is none.

It needs the two wheels of the extra plan-gpu, no GPU, no driver and no other package of NVIDIA's.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from jax.experimental import topologies

from mlip_jax.core.errors import UserError
from mlip_jax.core.versions import installed

FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_FRACTION = 0.75  # of a GPU's memory, JAX's default


@dataclass(frozen=True)
class Card:
    """A GPU. No figure here was measured.

    The rates are those of NVIDIA's data sheets (SXM modules, without sparsity). The others are the
    public properties by which XLA's own target configs describe the card to its compiler.

    Attributes:
      peak: bfloat16 FLOP/s.
      tf32: FLOP/s of float32 products as XLA multiplies them by default, in TF32.
      float32: FLOP/s of float32 products at the highest precision.
      memory: bytes, as CUDA reports them.
      bandwidth: bytes a second between the memory and the cores.
      interconnect: bytes a second that a GPU sends to others of its host, by NVLink.
      network: the same to other hosts: one adapter a GPU, of 200 Gbit/s (A100) or 400.
      multiprocessors: cores, in XLA's words.
      lanes: float32 units of a multiprocessor.
      clock: GHz.
      cache: bytes of the L2 cache.
      shared: bytes of shared memory, of a multiprocessor.
      capability: major compute capability; 9 is described with its accelerated features.
      name: CUDA's.
    """

    peak: float
    tf32: float
    float32: float
    memory: int
    bandwidth: float
    interconnect: float
    network: float
    multiprocessors: int
    lanes: int
    clock: float
    cache: int
    shared: int
    capability: int
    name: str

    @property
    def pool(self) -> int:
        """The bytes that JAX takes for its programs: 3/4, or the share that FRACTION names."""
        try:
            fraction = float(os.environ.get(FRACTION, _FRACTION))
        except ValueError:
            raise UserError(f"{FRACTION}={os.environ[FRACTION]!r} is no number") from None
        return int(fraction * self.memory)

    def target(self) -> str:
        """A GpuTargetConfigProto in text form, of the fields that jaxlib 0.10 to 0.12 know."""
        features = "feature_extension: ACCELERATED_FEATURES" if self.capability >= 9 else ""
        return f"""
            gpu_device_info {{
              name: "{self.name}"
              cuda_compute_capability {{ major: {self.capability} {features} }}
              core_count: {self.multiprocessors}
              fpus_per_core: {self.lanes}
              clock_rate_ghz: {self.clock}
              device_memory_size: {self.memory}
              memory_bandwidth: {int(self.bandwidth)}
              l2_cache_size: {self.cache}
              shared_memory_per_core: {self.shared}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared - 1024}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              thread_dim_limit_x: 1024
              thread_dim_limit_y: 1024
              thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              dnn_version: "9.10.0"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.name}"
        """


_A100 = Card(
    peak=312e12,
    tf32=156e12,
    float32=19.5e12,
    memory=85_100_068_864,
    bandwidth=2.039e12,
    interconnect=300e9,
    network=25e9,
    multiprocessors=108,
    lanes=64,
    clock=1.41,
    cache=40 * 2**20,
    shared=164 * 2**10,
    capability=8,
    name="NVIDIA A100-SXM4-80GB",
)
_H100 = Card(
    peak=989e12,
    tf32=494e12,
    float32=67e12,
    memory=84_942_979_072,
    bandwidth=3.352e12,
    interconnect=450e9,
    network=50e9,
    multiprocessors=132,
    lanes=128,
    clock=1.98,
    cache=50 * 2**20,
    shared=228 * 2**10,
    capability=9,
    name="NVIDIA H100 80GB HBM3",
)
CARDS = {
    "a100": _A100,
    "h100": _H100,
    "h200": replace(
        _H100, memory=151_397_597_184, bandwidth=4.8e12, name="NVIDIA H200 141GB HBM3e"
    ),
}


def shape(text: str) -> tuple[int, int] | None:
    """Hosts and GPUs of a host in "8" or "4x8"; None for another text."""
    match = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([1-8])", text)
    return (int(match[1] or 1), int(match[2])) if match else None


def devices(topology: str, card: Card, hosts: int, gpus: int) -> tuple[jax.Device, ...]:
    """Devices to compile for; they run nothing.

    Raises:
      UserError: without the extra plan-gpu, or when the installed compiler refuses the card.
    """
    if not _has_compiler():
        raise UserError(
            f"--topology={topology} needs XLA's compiler for GPUs, which is not installed: "
            "pip install 'mlip_jax[plan-gpu]' (180 MB)"
        )
    # The device that shapes are computed on must not be a GPU, where there is one.
    jax.config.update("jax_platforms", "cpu")
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology=f"1x{hosts}x{gpus}", target_config=card.target()
        )
    except (RuntimeError, ValueError) as error:
        version = installed().get("jaxlib", "")
        raise UserError(
            f"jaxlib {version} cannot compile for --topology={topology}: {error}; versions 0.10 to "
            "0.12 can"
        ) from error
    return tuple(described.devices)


def _has_compiler() -> bool:
    """Whether one of JAX's plugins for CUDA is installed."""
    plugins = importlib.util.find_spec("jax_plugins")
    places = plugins.submodule_search_locations if plugins else None
    return any(list(Path(place).glob("xla_cuda*")) for place in places or ())
