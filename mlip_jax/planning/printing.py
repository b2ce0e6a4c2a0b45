"""A plan as people read it."""

from __future__ import annotations

import math
from collections import defaultdict

from rich import box
from rich.console import Console
from rich.table import Table

from mlip_jax.devices import parallel
from mlip_jax.planning.estimates import Estimate
from mlip_jax.planning.hlo import COLLECTIVES
from mlip_jax.planning.machines import Chip
from mlip_jax.training.step_cost import GIB, Memory

_MIB = 2**20


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
    console.print(
        f"FLOPs a step: {estimate.model_flops:.4g} of the model's matrix products (three times the "
        f"forward pass); {estimate.flops:.4g} a device as compiled, the body of a loop once"
    )
    _print_collectives(console, estimate)
    if chip:
        _print_time(console, estimate, chip)


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
    if estimate.memory is None:
        return f"no. {estimate.refusal}"
    used = f"{estimate.memory.total / GIB:.2f} GiB a device"
    if chip is None:
        return f"{used}; CPUs have no memory of their own to fit in"
    return f"yes, {used} of {chip.memory / GIB:.0f} GiB"


def _print_memory(console: Console, memory: Memory) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("Memory a device, by the compiler")
    table.add_column("MiB", justify="right")
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
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("Collective", "Devices", "A step", "MiB of arrays", "MiB sent a device"):
        table.add_column(column, justify="left" if column == "Collective" else "right")
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


def _print_time(console: Console, estimate: Estimate, chip: Chip) -> None:
    program = estimate.program
    compute, collectives = estimate.compute_seconds, estimate.collective_seconds
    console.print(
        f"cycles a step, the compiler's estimate: {program.cycles:,}; "
        f"{program.unestimated:,} of {program.work:,} instructions have none"
    )
    if program.unknown_loops:
        console.print(f"  {program.unknown_loops} loops of unknown length count once")
    console.print(
        f"estimated time: arithmetic {_milliseconds(compute)} at {chip.clock / 1e9:.2f} GHz; "
        f"collectives at least {_milliseconds(collectives)} at "
        f"{chip.interconnect / 1e9:.0f} GB/s"
    )
    hidden, exposed = max(compute, collectives), compute + collectives
    console.print(
        f"estimated step: {_milliseconds(hidden)} if the arithmetic hides the collectives, "
        f"{_milliseconds(exposed)} if it hides none; "
        f"{_pairs(estimate, hidden)} to {_pairs(estimate, exposed)} pairs a second, "
        f"{100 * estimate.utilisation(exposed):.1f} to {100 * estimate.utilisation(hidden):.1f} % "
        f"of {chip.peak / 1e12:.0f} TFLOP/s a chip"
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.2f} ms"


def _pairs(estimate: Estimate, seconds: float) -> str:
    return f"{estimate.batch_size / seconds:,.0f}" if seconds else str(math.inf)
