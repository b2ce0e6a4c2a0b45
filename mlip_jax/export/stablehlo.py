"""StableHLO by `jax.export`: programs that need JAX alone, on CPUs, NVIDIA's GPUs and TPUs."""

from __future__ import annotations

from pathlib import Path

import jax
from jax import export

from mlip_jax.export import programs
from mlip_jax.inference import Model

_PLATFORMS = ("cpu", "cuda", "tpu")


def write(folder: Path, model: Model) -> list[str]:
    """Writes both encoders with their weights, for any batch, and runs what was written.

    `jax.export.deserialize(bytes).call(array)` runs them.

    Args:
      folder: empty.
      model: loaded.

    Returns:
      How far the programs' embeddings are from the model's.

    Raises:
      UserError: for a model that scores pairs.
      RunError: when a program does not give what the model gives.
    """
    files, agreement = {}, {}
    for name, program in model.programs().items():
        (batch,) = export.symbolic_shape("batch")
        shape = jax.ShapeDtypeStruct((batch, *program.shape), program.dtype)
        exported = export.export(jax.jit(program.function), platforms=_PLATFORMS)(shape)
        file = folder / f"{name}.stablehlo"
        file.write_bytes(exported.serialize())
        files[name] = file.name
        again = export.deserialize(bytearray(file.read_bytes()))
        agreement[name] = programs.check(model, name, again.call)
    return [
        *programs.finish(folder, model, files, agreement),
        f"written by jax {jax.__version__}: run it with this version or one that is up to six "
        "months newer (JAX's promise); the formats mlip, hf_clip and open_clip are weights, which "
        "every version reads",
    ]
