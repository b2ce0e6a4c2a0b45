"""The parts of a model that a config takes from files of other programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mlip_jax.config import UserError
from mlip_jax.interop import bert, resnet


def read(config: ConfigDict, wanted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The encoders that `config.model.*.pretrained` names; {} where it names none.

    Args:
      config: the run's.
      wanted: the model's variables, or anything with their structure and shapes.

    Returns:
      Variables of float32 numpy arrays: collection -> encoder -> its tree.

    Raises:
      UserError: for a file that cannot be read, or holds another model than the config's.
    """
    image, text = config.model.image.pretrained, config.model.text.pretrained
    if not (image or text):
        return {}
    taken: dict[str, dict[str, Any]] = {"params": {}}
    if text:
        _check_sizes(config, text)
        taken["params"]["text_encoder"] = bert.read(text, wanted["params"]["text_encoder"])
    if image:
        params, stats = resnet.read(
            image, wanted["params"]["image_encoder"], wanted["batch_stats"]["image_encoder"]
        )
        taken["params"]["image_encoder"] = params
        taken["batch_stats"] = {"image_encoder": stats}
    return taken


def adopt_bert(config: ConfigDict, path: str) -> None:
    """Makes the config's text encoder the one in a Hugging Face BERT folder, vocabulary included.

    The joint space becomes at least as wide as the encoder, as a projection block needs it.

    Raises:
      UserError: for a folder that `bert.describe` refuses.
    """
    sizes = bert.describe(path)
    text = config.model.text
    text.architecture, text.pretrained, text.tokenizer = "bert", path, f"wordpiece:{path}"
    for key in _ADOPTED:
        text[key] = sizes[key]
    config.model.embed_dim = max(config.model.embed_dim, sizes["width"])
    text.context_length = min(text.context_length, sizes["positions"])


_ADOPTED = ("width", "depth", "heads", "mlp_ratio", "activation")


def _check_sizes(config: ConfigDict, path: str) -> None:
    """Finds what no tensor's shape would tell, such as another number of heads."""
    if Path(path).is_file():
        return  # there is no config.json to compare with
    for key, value in bert.describe(path).items():
        if key in _ADOPTED and config.model.text[key] != value:
            raise UserError(
                f"config.model.text.{key}={config.model.text[key]}, but the model in {path} has "
                f"{value}: set it so"
            )
