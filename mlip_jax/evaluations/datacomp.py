"""DataComp's evaluation, by its own program, on a model of this package.

    python -m mlip_jax.evaluations.datacomp CHECKOUT --use_model "mlip_jax FOLDER" ...

CHECKOUT is a copy of github.com/mlfoundations/datacomp; the rest of the command line is that of its
evaluate.py.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from mlip_jax.core.errors import UserError
from mlip_jax.evaluations import as_torch


def main(arguments: Sequence[str]) -> None:
    """Runs DataComp's evaluate.py, to which open_clip's models of the name "mlip_jax" are ours.

    Args:
      arguments: the folder of DataComp's checkout, and those of its evaluate.py.

    Raises:
      UserError: for a folder that holds no evaluate.py, without open_clip, or if the model cannot
        be used.
    """
    folder = Path(arguments[0] if arguments else "")
    script = folder / "evaluate.py"
    if not arguments or not script.is_file():
        raise UserError(
            f"{folder}: no evaluate.py there: the first argument is a checkout of "
            "github.com/mlfoundations/datacomp"
        )
    if importlib.util.find_spec("open_clip") is None:
        raise UserError(
            "open_clip is not installed: pip install 'mlip_jax[clip-benchmark]', and what DataComp "
            "needs beside it"
        )
    sys.argv = [str(script), *arguments[1:]]
    sys.path.insert(0, str(folder))
    with as_torch.known_to_open_clip():
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    sys.exit(as_torch.run(main))
