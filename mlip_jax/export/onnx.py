"""ONNX by jax2onnx, which the extra [onnx] installs."""

from __future__ import annotations

import functools
import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from mlip_jax.core.errors import RunError, UserError
from mlip_jax.export import programs
from mlip_jax.inference import Model

if TYPE_CHECKING:
    import onnxruntime

_NEEDED = ("jax2onnx", "onnxruntime")


def write(folder: Path, model: Model) -> list[str]:
    """Writes both encoders with their weights, for any batch, and runs them by onnxruntime.

    Args:
      folder: empty.
      model: loaded.

    Returns:
      How far the programs' embeddings are from the model's.

    Raises:
      UserError: without the extra, or for a model that scores pairs or has an operation that
        jax2onnx does not know.
      RunError: when a program does not give what the model gives.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format=onnx needs {' and '.join(missing)}: pip install 'mlip_jax[onnx]'"
        )
    import jax2onnx
    import onnxruntime

    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of shapes that nobody asked
    files, agreement = {}, {}
    for name, program in model.programs().items():
        file = folder / f"{name}.onnx"
        entry = SimpleNamespace(shape=("batch", *program.shape), dtype=np.dtype(program.dtype))
        try:
            jax2onnx.to_onnx(
                program.function,
                [entry],
                model_name=name,
                return_mode="file",
                output_path=str(file),
            )
        except Exception as error:  # whatever it stumbles over
            raise UserError(
                f"jax2onnx cannot write the program {name}: {error}; --format=stablehlo can"
            ) from error
        files[name] = file.name
        try:
            session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise RunError(f"onnxruntime does not take the program {name}: {error}") from error
        agreement[name] = programs.check(model, name, functools.partial(_run, session))
    return programs.finish(folder, model, files, agreement)


def _run(session: onnxruntime.InferenceSession, rows: np.ndarray) -> np.ndarray:
    return session.run(None, {session.get_inputs()[0].name: rows})[0]
