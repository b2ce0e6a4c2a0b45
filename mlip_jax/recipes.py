"""The training recipes that the files in `configs/` start from."""

from __future__ import annotations

from ml_collections import ConfigDict

from mlip_jax import config as schema
from mlip_jax.models import presets


def recipe(size: str, data: str) -> ConfigDict:
    """A CLIP config of that size on that data; what the quick start and the large runs share.

    Args:
      size: one of `presets.SIZES`.
      data: a set as `config.data.train` takes it.

    Raises:
      UserError: for an unknown size.
    """
    config = schema.default()
    presets.apply(config, size)
    config.data.train = data
    if size == presets.QUICK:
        _quick(config)
    else:
        _large(config)
    if data == "emoji":
        _drawings(config)
    return config


def _quick(config: ConfigDict) -> None:
    """Minutes on two CPU cores."""
    config.batch_size = 128
    config.samples = 320_000
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_samples = 10_000
    config.optimizer.ema = 0.99
    config.data.augment.crop = (0.6, 1.0)
    config.data.augment.flip = True
    config.data.augment.color = 0.25
    config.checkpoint.every_samples = 32_000
    config.evaluation.every_samples = 64_000
    config.log_every = 20


def _large(config: ConfigDict) -> None:
    """CLIP's recipe on 15 million pairs, as the public baselines train it (a choice)."""
    config.batch_size = 4096
    config.samples = 32 * 15_000_000
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_samples = 2500 * 4096
    config.optimizer.weight_decay = 0.5
    config.data.augment.crop = (0.5, 1.0)
    config.checkpoint.every_samples = 4096 * 1000
    config.evaluation.every_samples = 15_000_000
    config.evaluation.templates = "clip_80"
    config.log_every = 50


def _drawings(config: ConfigDict) -> None:
    """The embedded set: short names; margins, line width and colour are matters of style."""
    augment, caption = config.data.augment, config.data.caption
    augment.flip = False
    augment.trim = 1.0
    augment.crop = (0.75, 1.0)
    augment.affine = 0.3
    augment.color = 0.6
    augment.morphology = 0.4
    augment.grayscale = 0.05
    augment.blur = 0.05
    caption.first = 0.9
    caption.tags = 0.1
    config.model.text.context_length = 16
