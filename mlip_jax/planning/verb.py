"""The subcommand: a config and a topology in, a plan on the screen."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax.core import stages
from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.devices.parallel import AXES
from mlip_jax.planning import estimates, machines, printing


def plan(
    config: ConfigDict,
    workdir: str | Path,
    *,
    topology: str,
    mesh: str = "",
    largest_batch: bool = False,
) -> int:
    """Prints what a training step of the config would cost on a machine that need not be there.

    Args:
      config: validated.
      workdir: not used: a plan reads no data and writes nothing.
      topology: such as v5e:16x16, h100:8 or cpu:8; see `machines.find`.
      mesh: AXIS:SIZE,... such as "data:64,fsdp:4"; "": config.mesh.
      largest_batch: also find the largest global batch that fits.

    Returns:
      0 when the step, of every stage, fits the chips' memory, 1 when it does not.

    Raises:
      UserError: for a topology that is unknown or cannot be compiled for, a mesh that does not fit
        it, or a batch that the mesh does not divide.
    """
    del workdir
    config = copy.deepcopy(config)
    if mesh:
        config.mesh = read_mesh(mesh)
    machine = machines.find(topology)
    if largest_batch and machine.chip is None:
        raise UserError(
            f"--largest-batch needs a chip whose memory it must fit, such as --topology=v5e:2x4 or "
            f"h100:8, not {topology}"
        )
    console = Console(highlight=False, markup=False, soft_wrap=True)
    progress = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    run_stages = stages.of(config)
    made = []
    for stage in run_stages:
        if stage.count > 1:
            console.print(str(stage))
        with stages.naming(stage.number, stage.count):
            estimate = estimates.estimate(stage.config, machine)
        printing.print_estimate(console, estimate)
        if largest_batch:
            on_try = functools.partial(printing.print_try, progress)
            largest = estimates.largest_batch(stage.config, machine, estimate, on_try)
            printing.print_largest(console, largest)
        made.append(estimate)
    if len(made) > 1:
        printing.print_stages(console, run_stages, made)
    return 0 if all(estimate.fits for estimate in made) else 1


def read_mesh(text: str) -> ConfigDict:
    """config.mesh of "data:64,fsdp:4". Without data it takes the devices that remain; others are 1.

    Raises:
      UserError: for what is no AXIS:SIZE, or an unknown axis.
    """
    sizes = {"data": -1, "fsdp": 1, "tensor": 1}
    for part in text.split(","):
        axis, _, size = part.partition(":")
        if axis not in AXES:
            raise UserError(
                f"--mesh={text}: {axis!r} is none of the axes {', '.join(AXES)}"
                f"{suggestion(axis, AXES)}"
            )
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise UserError(
                f"--mesh={text}: {part!r} is not AXIS:SIZE, such as data:64,fsdp:4"
            ) from None
    return ConfigDict(sizes)
