"""A run's training step, compiled for a machine that need not be there, and what it would cost."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.devices import parallel
from mlip_jax.models import building
from mlip_jax.planning import gpus, hlo, kernels
from mlip_jax.planning.gpus import Card
from mlip_jax.planning.kernels import Kernel
from mlip_jax.planning.machines import Machine
from mlip_jax.planning.tpus import Chip
from mlip_jax.training import attention_choice
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training.state import abstract_state
from mlip_jax.training.step import compile_lowered, lower_step, make_train_step
from mlip_jax.training.step_cost import GIB, Memory, network_of, step_flops, teachers_of

_CACHE = "jax_enable_compilation_cache"  # JAX's name of the setting


@dataclass(frozen=True)
class Estimate:
    """What a training step costs on a machine. Every time in it is an estimate.

    Attributes:
      machine: what it was compiled for.
      mesh: the devices' axes.
      batch_size: global.
      dtype: what the model computes in.
      parameters: of the model.
      model_flops: of a step on the global batch; see `flops.step_flops`.
      refusal: why the compiler found no room for the program; "" when it did.
      memory: of a device; None when the program was refused.
      flops: of a device's program as compiled, by XLA, which counts a loop's body once.
      program: cycles and collectives; nothing when the program was refused.
      kernels: of a GPU's program.
    """

    machine: Machine
    mesh: Mesh
    batch_size: int
    dtype: str
    parameters: int
    model_flops: float
    refusal: str = ""
    memory: Memory | None = None
    flops: float = math.nan
    program: hlo.Program = field(default_factory=hlo.Program)
    kernels: tuple[Kernel, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether there is room for the program in a device's memory; on CPUs there always is."""
        return self.memory is not None and not self.refusal

    @property
    def compute_seconds(self) -> float:
        """A step without collectives; NaN on CPUs.

        Of a TPU, the estimated cycles at its clock, and the least that kernels without an estimate
        take; of a GPU, the least that its kernels take.
        """
        chip = self.machine.chip
        if isinstance(chip, Card):
            return sum(kernel.seconds(chip) for kernel in self.kernels)
        return self.program.cycles / chip.clock + self.unestimated_seconds if chip else math.nan

    @property
    def unestimated_seconds(self) -> float:
        """The least that Pallas's kernels take on a TPU: their bytes at its memory's bandwidth."""
        chip = self.machine.chip
        if not isinstance(chip, Chip):
            return 0.0
        return sum(call.times * call.traffic for call in self.program.calls) / chip.bandwidth

    @property
    def collective_seconds(self) -> float:
        """The least that the collectives take, at the published bandwidth; NaN on CPUs."""
        if self.machine.chip is None:
            return math.nan
        return sum(
            collective.sent / self.machine.bandwidth(collective.devices)
            for collective in self.program.collectives
        )

    def utilisation(self, seconds: float) -> float:
        """The model's FLOPs over what the chips could do in that time at their peak."""
        chip = self.machine.chip
        return self.model_flops / (seconds * chip.peak * self.mesh.size) if chip else math.nan


def estimate(config: ConfigDict, machine: Machine) -> Estimate:
    """Compiles the step of a config, sharded over config.mesh, and reads the compiler's figures.

    Args:
      config: validated. Its compute dtype "auto" is that of the machine, not of this host.
      machine: from `machines.find`.

    Raises:
      UserError: when the mesh does not fit the machine or does not divide the batch, or for a form
        of attention that the machine does not have.
    """
    config = copy.deepcopy(config)
    config.compute_dtype = _compute_dtype(config, machine)
    mesh = parallel.make_mesh(config.mesh, config.batch_size, machine.devices)
    network = network_of(config)
    teachers = teachers_of(config, network)
    network = teachers.pupil(network)
    optimizer = optimizers.make(config)
    abstract = abstract_state(network, optimizer, config, mesh)
    form = attention_choice.named(config, machine.platform)
    forms = dict.fromkeys(attention_choice.shapes(config, mesh), form)
    trained = building.with_attention(network, forms)
    step = make_train_step(trained, optimizer, config, Preprocessing.of(config), mesh, teachers)
    more = teachers.shapes(config.batch_size, mesh)
    known = {
        "machine": machine,
        "mesh": mesh,
        "batch_size": config.batch_size,
        "dtype": config.compute_dtype,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract.params)),
        "model_flops": step_flops(network, abstract.evaluated, config, teachers),
    }
    try:
        with _compiled_anew(machine):
            compiled = compile_lowered(lower_step(step, abstract, config, mesh, more), mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Estimate(**known, refusal=_refusal(str(error)))
    text = compiled.as_text()
    assert text is not None  # the same
    memory = Memory.of(compiled)
    return Estimate(
        **known,
        memory=memory,
        refusal=_beyond_the_pool(memory, machine),
        flops=float((compiled.cost_analysis() or {}).get("flops", math.nan)),
        program=hlo.read(text, mesh.size),
        kernels=tuple(kernels.read(text)) if machine.platform == "gpu" else (),
    )


def largest_batch(
    config: ConfigDict,
    machine: Machine,
    first: Estimate | None = None,
    on_try: Callable[[Estimate], None] = lambda _: None,
) -> Estimate | None:
    """The largest global batch that fits, by bisection over multiples of what must divide it.

    A program is taken to need more memory the larger its batch; each try compiles one.

    Args:
      config: its batch size is where the search starts.
      machine: with chips; CPUs have no memory of their own.
      first: the estimate of the config itself, if there is one.
      on_try: called with the estimate of every try.

    Returns:
      The estimate at that batch size; None when not even the smallest fits.
    """
    first = first or estimate(config, machine)
    on_try(first)
    unit = parallel.batch_shards(first.mesh, config.accumulation)

    def attempt(multiple: int) -> Estimate:
        other = copy.deepcopy(config)
        other.batch_size = multiple * unit
        # A schedule needs a step; how many there are changes no shape.
        other.samples = max(other.samples, other.batch_size)
        attempted = estimate(other, machine)
        on_try(attempted)
        return attempted

    at = first.batch_size // unit
    best, fitting, refused = (first, at, None) if first.fits else (None, 0, at)
    while refused is None:
        attempted = attempt(2 * fitting)
        if attempted.fits:
            best, fitting = attempted, 2 * fitting
        else:
            refused = 2 * fitting
    while refused - fitting > 1:
        middle = (fitting + refused) // 2
        attempted = attempt(middle)
        if attempted.fits:
            best, fitting = attempted, middle
        else:
            refused = middle
    return best


@contextlib.contextmanager
def _compiled_anew(machine: Machine) -> Iterator[None]:
    """Keeps JAX's cache on disk out: no host without a TPU or GPU can read its programs back."""
    enabled = getattr(jax.config, _CACHE)
    if machine.chip:
        jax.config.update(_CACHE, False)
        compilation_cache.reset_cache()  # JAX asks the setting once
    try:
        yield
    finally:
        if machine.chip:
            jax.config.update(_CACHE, enabled)
            compilation_cache.reset_cache()


def _compute_dtype(config: ConfigDict, machine: Machine) -> str:
    if config.compute_dtype != "auto":
        return config.compute_dtype
    return "bfloat16" if machine.chip else "float32"


def _beyond_the_pool(memory: Memory, machine: Machine) -> str:
    """Why a GPU has no room: its compiler takes whatever a program needs, and only warns."""
    card = machine.chip
    if not isinstance(card, Card) or memory.total <= card.pool:
        return ""
    share = card.pool / card.memory
    return (
        f"It needs {memory.total / GIB:.2f} GiB a device, and JAX takes {card.pool / GIB:.2f} of "
        f"the {card.memory / GIB:.2f} GiB of this GPU ({share:.0%}; {gpus.FRACTION}); "
        "--largest-batch finds what fits"
    )


def _refusal(message: str) -> str:
    """The compiler's sentence with what it needs and has, out of pages about the largest arrays."""
    sentence = message[max(message.find("Ran out of memory"), 0) :].splitlines()[0]
    return re.sub(r"(?<=\d)([KMGT])\b", r" \1iB", sentence)
