"""Data-efficient language-image pretraining in JAX: MLIP, CLIP-Lite, CLIP, SigLIP and FILIP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from ml_collections import ConfigDict

    from mlip_jax.data.images.preprocessing import Preprocessing
    from mlip_jax.data.text.tokenizer import Tokenizer
    from mlip_jax.inference import Model

__version__ = "0.1.0"


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
        SigLIP.
      step: another checkpoint of a workdir than its newest.
      config: in place of the folder's.
      overrides: values by dotted key on top of the config.
      image_size: pixels along a side of the images, in place of the model's own.
      tokenizer: in place of the folder's.
      preprocessing: in place of the folder's.

    Raises:
      UserError: if the path holds no model, a damaged one, or one that is not computed here.
    """
    # Here and not above: programs that only read the version or the data start without JAX.
    from mlip_jax import versions

    with versions.named_in_errors():
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
