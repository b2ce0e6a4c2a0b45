"""CLIP_benchmark's own command on a model of this package.

    python -m mlip_jax.evaluations.clip_benchmark eval --pretrained FOLDER --dataset cifar10 ...

The rest of the command line is CLIP_benchmark's (github.com/LAION-AI/CLIP_benchmark).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from mlip_jax.core.errors import UserError
from mlip_jax.evaluations import as_torch

# What comes later on the command line counts.
_DEFAULTS = {
    "--model_type": as_torch.NAME,
    "--model": as_torch.NAME,
    "--output": "{pretrained}/clip_benchmark_{dataset}_{language}_{task}.json",
}


def main(arguments: Sequence[str]) -> None:
    """Runs CLIP_benchmark's command, which knows the kind of model "mlip_jax" too.

    Args:
      arguments: of that command. After `eval`, other defaults hold: models of this kind, and
        results in the model's folder.

    Raises:
      UserError: if CLIP_benchmark is not installed, or the model cannot be used.
    """
    if importlib.util.find_spec("clip_benchmark") is None:
        raise UserError(
            "CLIP_benchmark is not installed: pip install 'mlip_jax[clip-benchmark]', which "
            "brings PyTorch"
        )
    from clip_benchmark import cli, models

    models.TYPE2FUNC[as_torch.NAME] = _load
    if as_torch.NAME not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(as_torch.NAME)
    command, others = list(arguments[:1]), arguments[1:]
    if command == ["eval"]:
        for flag, value in _DEFAULTS.items():
            command += [flag, value]
    sys.argv = ["clip_benchmark", *command, *others]
    cli.main()


def _load(
    model_name: str, pretrained: str, cache_dir: str | None, device: str
) -> tuple[as_torch.TorchModel, as_torch.Transform, as_torch.TorchTokenizer]:
    """As CLIP_benchmark's table of kinds wants it; the folder is all that counts."""
    return as_torch.opened(pretrained)


if __name__ == "__main__":
    sys.exit(as_torch.run(main))
