"""A plan as people read it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from rich.console import Console

from mlip_jax.core.stages import Stage
from mlip_jax.core.tables import make_table
from mlip_jax.devices import parallel
from mlip_jax.planning import kernels
from mlip_jax.planning.estimates import Estimate
from mlip_jax.planning.gpus import Card
from mlip_jax.planning.hlo import COLLECTIVES
from mlip_jax.planning.tpus import Chip
from mlip_jax.training.step_cost import GIB, Memory

_MIB = 2**20
_PRODUCTS = {"f32": "f32, as TF32", "bf16": "bf16"}


def print_estimate(console: Console, estimate: Estimate) -> None:
    """Whether it fits, memory by kind, FLOPs, collectives, and the time that follows."""
    chip = estimate.machine.chip
    axes = ", ".join(f"{axis} {size}" for axis, size in estimate.mesh.shape.items())
    console.print(
        f"{estimate.machine.name}: {estimate.mesh.size} devices as {axes}; global batch "
        f"{estimate.batch_size:,}, {estimate.parameters:,} parameters, compute in {estimate.dtype}"
    )
    console.print(f"fits: {_verdict(estimate)}")
    if estimate.memory is None:
        return
    _print_memory(console, estimate.memory)
    flops = (
        f"FLOPs a step: {estimate.model_flops:.4g} of the model's matrix products (three times the "
        "forward pass)"
    )
    if isinstance(chip, Card):
        console.print(flops)
        _print_kernels(console, estimate)
    else:
        console.print(
            f"{flops}; {estimate.flops:.4g} a device as compiled, the body of a loop once"
        )
    _print_collectives(console, estimate)
    if isinstance(chip, Chip):
        _print_cycles(console, estimate, chip)
    if chip:
        _print_step(console, estimate, chip)


def print_stages(console: Console, stages: Sequence[Stage], estimates: Sequence[Estimate]) -> None:
    """What each stage of a run costs, and the whole run beside one of its last stage alone."""
    costs = [
        stage.steps * estimate.model_flops
        for stage, estimate in zip(stages, estimates, strict=True)
    ]
    table = make_table(("Stage", "Steps", "GiB a device", "FLOPs a pair", "Share of the FLOPs"))
    for stage, estimate, cost in zip(stages, estimates, costs, strict=True):
        memory = f"{estimate.memory.total / GIB:.2f}" if estimate.memory else "does not fit"
        table.add_row(
            str(stage.number),
            f"{stage.steps:,}",
            memory,
            f"{estimate.model_flops / estimate.batch_size:.4g}",
            f"{100 * cost / sum(costs):.1f} %",
        )
    console.print(table)
    pairs = sum(stage.steps * stage.config.batch_size for stage in stages)
    alone = pairs * estimates[-1].model_flops / estimates[-1].batch_size
    console.print(
        f"the whole run: {sum(costs):.4g} FLOPs of the model's matrix products, "
        f"{100 * sum(costs) / alone:.1f} % of what the last stage's steps would take for as many "
        "pairs"
    )
    if all(estimate.machine.chip and estimate.fits for estimate in estimates):
        seconds = sum(
            stage.steps * (estimate.compute_seconds + estimate.collective_seconds)
            for stage, estimate in zip(stages, estimates, strict=True)
        )
        console.print(f"  its steps, if nothing is hidden: {seconds / 3600:,.2f} hours")


def print_largest(console: Console, estimate: Estimate | None) -> None:
    """What a search for the largest batch came to."""
    if estimate is None:
        console.print("largest global batch that fits: none; shard the parameters (fsdp)")
        return
    assert estimate.memory is not None  # it fits
    rows = estimate.batch_size // parallel.batch_shards(estimate.mesh)
    console.print(
        f"largest global batch that fits: {estimate.batch_size:,} ({rows:,} rows a device, "
        f"{estimate.memory.total / GIB:.2f} GiB)"
    )


def print_try(console: Console, estimate: Estimate) -> None:
    """One step of the search."""
    console.print(f"  batch {estimate.batch_size:,}: {'fits' if estimate.fits else 'does not fit'}")


def _verdict(estimate: Estimate) -> str:
    chip = estimate.machine.chip
    if not estimate.fits:
        return f"no. {estimate.refusal}"
    assert estimate.memory is not None  # it fits
    used = f"{estimate.memory.total / GIB:.2f} GiB a device"
    if chip is None:
        return f"{used}; CPUs have no memory of their own to fit in"
    if isinstance(chip, Card):
        return f"yes, {used} of {chip.pool / GIB:.2f} that JAX takes of {chip.memory / GIB:.2f}"
    return f"yes, {used} of {chip.memory / GIB:.0f} GiB"


def _print_memory(console: Console, memory: Memory) -> None:
    table = make_table(("Memory a device, by the compiler", "MiB"))
    for name, size in (
        ("arguments: state and batch", memory.arguments),
        ("outputs: state and metrics", memory.outputs),
        ("aliased: outputs in the place of arguments", -memory.aliased),
        ("temporary", memory.temporary),
        ("code", memory.code),
        ("in all", memory.total),
    ):
        table.add_row(name, f"{size / _MIB:,.1f}")
    console.print(table)


def _print_collectives(console: Console, estimate: Estimate) -> None:
    groups = defaultdict(list)
    for collective in estimate.program.collectives:
        groups[collective.kind, collective.devices].append(collective)
    if not groups:
        console.print("collectives: none")
        return
    table = make_table(("Collective", "Devices", "A step", "MiB of arrays", "MiB sent a device"))
    for kind, devices in sorted(groups, key=lambda key: (COLLECTIVES.index(key[0]), key[1])):
        group = groups[kind, devices]
        payload = sum(collective.payload * collective.times for collective in group)
        table.add_row(
            kind,
            f"{devices:,}",
            f"{sum(collective.times for collective in group):,}",
            f"{payload / _MIB:,.2f}",
            f"{sum(collective.sent for collective in group) / _MIB:,.2f}",
        )
    console.print(table)


def _print_kernels(console: Console, estimate: Estimate) -> None:
    """Of a GPU's program: its products by type, its traffic, and calls to libraries."""
    table = make_table(("Products a device, as compiled", "Kernels", "FLOPs a step"))
    for dtype, flops in sorted(kernels.products(estimate.kernels).items()):
        count = sum(kernel.times for kernel in estimate.kernels if dtype in kernel.products)
        table.add_row(_PRODUCTS.get(dtype, dtype), f"{count:,}", f"{flops:.4g}")
    console.print(table)
    attention = [kernel for kernel in estimate.kernels if kernel.is_attention]
    fused = f"{sum(kernel.times for kernel in attention):,} fused kernels" if attention else "plain"
    console.print(f"attention: {fused}")
    uncounted = {kernel.target for kernel in estimate.kernels if kernel.uncounted}
    if uncounted:
        console.print(f"calls whose FLOPs are not known: {', '.join(sorted(uncounted))}")
    traffic = sum(kernel.times * kernel.traffic for kernel in estimate.kernels)
    console.print(
        f"kernels a step: {sum(kernel.times for kernel in estimate.kernels):,}, which read and "
        f"write {traffic / GIB:,.2f} GiB if nothing stays in the cache"
    )


def _print_cycles(console: Console, estimate: Estimate, chip: Chip) -> None:
    program = estimate.program
    console.print(
        f"cycles a step, the compiler's estimate: {program.cycles:,}; "
        f"{program.unestimated:,} of {program.work:,} instructions have none"
    )
    if program.unknown_loops:
        console.print(f"  {program.unknown_loops} loops of unknown length count once")
    for name in sorted({call.name for call in program.calls}):
        calls = [call for call in program.calls if call.name == name]
        traffic = sum(call.times * call.traffic for call in calls)
        console.print(
            f"  {sum(call.times for call in calls):,} x {name}: no estimate; at least "
            f"{_milliseconds(traffic / chip.bandwidth)} for {traffic / GIB:,.2f} GiB at "
            f"{chip.bandwidth / 1e9:,.0f} GB/s"
        )


def _print_step(console: Console, estimate: Estimate, chip: Chip | Card) -> None:
    compute, collectives = estimate.compute_seconds, estimate.collective_seconds
    sends = f"collectives at least {_milliseconds(collectives)} at {_rates(estimate)}"
    if isinstance(chip, Card):
        console.print(
            f"bounds: kernels at least {_milliseconds(compute)}, each at the card's peak or at "
            f"{chip.bandwidth / 1e12:.2f} TB/s, whichever takes longer; {sends}"
        )
    else:
        console.print(
            f"estimated time: arithmetic {_milliseconds(compute)} at {chip.clock / 1e9:.2f} GHz; "
            f"{sends}"
        )
    hidden, exposed = max(compute, collectives), compute + collectives
    word = "bound of a step" if isinstance(chip, Card) else "estimated step"
    console.print(
        f"{word}: {_milliseconds(hidden)} if the arithmetic hides the collectives, "
        f"{_milliseconds(exposed)} if it hides none; "
        f"{_pairs(estimate, hidden)} to {_pairs(estimate, exposed)} pairs a second, "
        f"{100 * estimate.utilisation(exposed):.1f} to {100 * estimate.utilisation(hidden):.1f} % "
        f"of {chip.peak / 1e12:.0f} TFLOP/s a chip"
    )


def _rates(estimate: Estimate) -> str:
    """The bandwidths at which collectives send."""
    groups = {collective.devices for collective in estimate.program.collectives} or {1}
    rates = sorted({estimate.machine.bandwidth(group) for group in groups})
    return " and ".join(f"{rate / 1e9:.0f} GB/s" for rate in rates)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.2f} ms"


def _pairs(estimate: Estimate, seconds: float) -> str:
    return f"{estimate.batch_size / seconds:,.0f}" if seconds else str(math.inf)
