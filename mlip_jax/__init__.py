"""Data-efficient language-image pretraining in JAX: MLIP, CLIP-Lite, CLIP, SigLIP and FILIP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlip_jax.core.versions import __version__
from mlip_jax.training.callbacks import Callback

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from ml_collections import ConfigDict

    from mlip_jax.data.images.preprocessing import Preprocessing
    from mlip_jax.data.sets.records import Source
    from mlip_jax.data.text.tokenizer import Tokenizer
    from mlip_jax.inference import Model
    from mlip_jax.training.loop import Trained

__all__ = ["Callback", "__version__", "config", "load", "train"]

# What the functions need is imported when they are called: programs that only read the version or
# the data start without JAX.


def config(name: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config of an experiment, checked.

    Args:
      name: a packaged config, such as "mlip", or the path of a config file; its arguments may
        follow after a colon, as in "mlip:size=B/16,data=jsonl:pairs.jsonl".
      overrides: other values by dotted key, such as {"optimizer.learning_rate": 1e-3}.

    Raises:
      UserError: for a file or key that is not there, or a value that cannot be.
    """
    from mlip_jax.core.validation import validate
    from mlip_jax.recipes.config_files import load_config, with_overrides

    loaded = with_overrides(load_config(name), overrides or {})
    validate(loaded)
    return loaded


def train(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    source: Source | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """Trains a model as the subcommand train does, or goes on with the run in `workdir`.

    A script that trains with worker processes (config.data.workers is not 0) must guard its main
    part by `if __name__ == "__main__":`, since these processes import it.

    Args:
      config: from `config`.
      workdir: the run's folder, a path or a URL (gs://, s3://); `load` opens it at any time.
      source: the training set in place of what config.data.train names; any object with the methods
        of `mlip_jax.data.sets.records.Source`. With worker processes it must be picklable. Without
        config.data.validation there is no validation set then.
      callbacks: told of metrics, evaluations and checkpoints as the run goes.

    Returns:
      Where the run stands, and the figures of its last evaluation.

    Raises:
      UserError: for a config, a dataset or a workdir that cannot be used.
      RunError: when the loss is no longer finite, the disk is full, or a callback raises.
    """
    from mlip_jax.core import places, versions

    with places.named_in_errors(), versions.named_in_errors():
        from mlip_jax.core.validation import validate
        from mlip_jax.training import loop

        validate(config)
        return loop.train(config, workdir, source=source, callbacks=callbacks)


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    config: ConfigDict | None = None,
    overrides: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    preprocessing: Preprocessing | None = None,
) -> Model:
    """A trained model, ready to embed images and texts; see `mlip_jax.inference.load`.

    Args:
      path: a workdir, an exported model, or a folder of open_clip's or of Hugging Face's CLIP or
        SigLIP; a path or a URL (gs://, s3://).
      step: another checkpoint of a workdir than its newest.
      config: in place of the folder's.
      overrides: values by dotted key on top of the config.
      image_size: pixels along a side of the images, in place of the model's own.
      tokenizer: in place of the folder's.
      preprocessing: in place of the folder's.

    Raises:
      UserError: if the path holds no model, a damaged one, or one that is not computed here.
    """
    from mlip_jax.core import places, versions

    with places.named_in_errors(), versions.named_in_errors():
        from mlip_jax import inference

        return inference.load(
            path,
            step=step,
            config=config,
            overrides=overrides,
            image_size=image_size,
            tokenizer=tokenizer,
            preprocessing=preprocessing,
        )
