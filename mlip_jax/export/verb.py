"""The export subcommand: a model from a folder of any kind to a folder that others read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax.core import places
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import whole_folder
from mlip_jax.core.registry import EXPORT_FORMATS
from mlip_jax.evaluations.results import FILE_NAME
from mlip_jax.export import card
from mlip_jax.inference import Model, load

# Writes a model into an empty folder and returns notes for the user.
WriteModel = Callable[[Path, Model], Sequence[str]]


def export(config: ConfigDict, workdir: str | Path, out: str, format: str = "mlip") -> int:
    """Writes a model for others: weights or programs, what goes with them, and a model card.

    The folder appears when it is whole; what stands there already is never written over.

    Args:
      config: the model's, with the overrides of the command line, such as another merging rate.
      workdir: any folder that `mlip_jax.load` takes.
      out: the folder to write.
      format: one of `registry.EXPORT_FORMATS`.

    Returns:
      0.

    Raises:
      UserError: for an unknown format, a folder that exists, or a model that the format has no
        place for: the message says which part of it.
      RunError: when what was written does not give what the model gives.
    """
    if format not in EXPORT_FORMATS:
        raise UserError(f"--format={format} is no format: {EXPORT_FORMATS.expected(format)}")
    target = places.local(out).expanduser()
    if places.names(target) or target.exists() and not places.is_url(out):
        raise UserError(f"--out={out} exists already and is not written over: give another name")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    folder = places.local(workdir)
    model = load(folder, config=config)
    with whole_folder(target) as draft:
        notes = EXPORT_FORMATS[format](draft, model)
        card.write(draft, model, folder, format, notes)
        figures = folder / FILE_NAME
        if format == "mlip" and figures.is_file():
            shutil.copyfile(figures, draft / FILE_NAME)
        for file in draft.iterdir():
            # safetensors makes files that their owner alone may read.
            shutil.copymode(draft / card.FILE_NAME, file)
    for note in notes:
        console.print(f"note: {note}")
    size = sum(file.stat().st_size for file in target.iterdir())
    console.print(f"{format} model: {places.shown(target)} ({size / 2**20:,.1f} MiB)")
    return 0
