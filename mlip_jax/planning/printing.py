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
from mlip_jax.planning.machines import GIB

_MIB = 2**20


def print_estimate(console: Console, found: Estimate) -> None:
    """Whether it fits, memory by kind, FLOPs, collectives, and the time that follows."""
    chip = found.machine.chip
    axes = ", ".join(f"{axis} {size}" for axis, size in found.mesh.shape.items())
    console.print(
        f"{found.machine.name}: {found.mesh.size} devices as {axes}; global batch "
        f"{found.batch_size:,}, {found.parameters:,} parameters, compute in {found.dtype}"
    )
    console.print(f"fits: {_verdict(found)}")
    if not found.fits:
        return
    _print_memory(console, found)
    console.print(
        f"FLOPs a step: {found.model_flops:.4g} of the model's matrix products (three times the "
        f"forward pass); {found.flops:.4g} a device as compiled, the body of a loop once"
    )
    _print_collectives(console, found)
    if chip:
        _print_time(console, found)


def print_largest(console: Console, found: Estimate | None) -> None:
    """What a search for the largest batch came to."""
    if found is None:
        console.print("largest global batch that fits: none; shard the parameters (fsdp)")
        return
    rows = found.batch_size // parallel.batch_shards(found.mesh)
    console.print(
        f"largest global batch that fits: {found.batch_size:,} ({rows:,} rows a device, "
        f"{found.memory.total / GIB:.2f} GiB)"
    )


def print_try(console: Console, found: Estimate) -> None:
    """One step of the search."""
    console.print(f"  batch {found.batch_size:,}: {'fits' if found.fits else 'does not fit'}")


def _verdict(found: Estimate) -> str:
    chip = found.machine.chip
    if not found.fits:
        return f"no. {found.refusal}"
    used = f"{found.memory.total / GIB:.2f} GiB a device"
    if chip is None:
        return f"{used}; CPUs have no memory of their own to fit in"
    return f"yes, {used} of {chip.memory / GIB:.0f} GiB"


def _print_memory(console: Console, found: Estimate) -> None:
    memory = found.memory
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


def _print_collectives(console: Console, found: Estimate) -> None:
    groups = defaultdict(list)
    for collective in found.program.collectives:
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


def _print_time(console: Console, found: Estimate) -> None:
    program, chip = found.program, found.machine.chip
    compute, collectives = found.compute_seconds, found.collective_seconds
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
        f"{_pairs(found, hidden)} to {_pairs(found, exposed)} pairs a second, "
        f"{100 * found.utilisation(exposed):.1f} to {100 * found.utilisation(hidden):.1f} % of "
        f"{chip.peak / 1e12:.0f} TFLOP/s a chip"
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.2f} ms"


def _pairs(found: Estimate, seconds: float) -> str:
    return f"{found.batch_size / seconds:,.0f}" if seconds else str(math.inf)
