"""A model as this package keeps it outside of a run: safetensors, its config, its tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_json
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.text.tokenizer import OWN_FILE, Tokenizer
from mlip_jax.interop import foreign, tensors

CONFIG = "mlip_config.json"
WEIGHTS = "model.safetensors"
_FORMAT = 1
_COLLECTIONS = {"params", "batch_stats"}


class Artefact(NamedTuple):
    """All that a model's embeddings depend on."""

    config: ConfigDict
    variables: Mapping[str, Any]  # "params" and "batch_stats"
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    step: int | None  # of the checkpoint that it was; None when it was none
    about: Mapping[str, Any]  # what else is known of it, for its card: plain values


def write(folder: Path, artefact: Artefact) -> None:
    """Writes a model into a folder, which must be there.

    Its files are `CONFIG` (the format's number, the run's config, the preprocessing, the
    checkpoint's step, what else is known), `WEIGHTS` (tensors by path: "params/...",
    "batch_stats/...") and the tokenizer.
    """
    values = {
        "format": _FORMAT,
        "config": artefact.config.to_dict(),
        "preprocessing": foreign.preprocessing_values(artefact.preprocessing),
        "step": artefact.step,
        "about": dict(artefact.about),
    }
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    text = foreign.tokenizer_json(artefact.tokenizer)
    (folder / OWN_FILE).write_text(text, encoding="utf-8")
    flat = traverse_util.flatten_dict(jax.device_get(dict(artefact.variables)), sep="/")
    save_file(
        {key: np.asarray(leaf, order="C") for key, leaf in flat.items()},
        folder / WEIGHTS,
        {"format": "mlip_jax"},
    )


def read_settings(folder: Path) -> tuple[ConfigDict, Preprocessing, dict[str, Any]]:
    """The config, the preprocessing and all of `CONFIG`, without the weights.

    Raises:
      UserError: for a file that is missing, damaged, or of a later version of this package.
    """
    file = folder / CONFIG
    values = read_json(file, advice="export the model again")
    if values.get("format") != _FORMAT:
        raise UserError(
            f"{file}: format {values.get('format')!r} is not known here, {_FORMAT} is: use a later "
            "version of mlip_jax"
        )
    try:
        config = schema.from_values(values["config"])
        return config, foreign.preprocessing_of(values["preprocessing"]), values
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: damaged: {error!r}; export the model again") from None


def read(folder: Path) -> Artefact:
    """The inverse of `write`.

    Raises:
      UserError: for a file that is missing, damaged, or of a later version of this package.
    """
    config, preprocessing, values = read_settings(folder)
    file = folder / OWN_FILE
    try:
        tokenizer = foreign.tokenizer_of(file.read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers library raises Exception itself
        raise UserError(f"{file}: damaged: {error!r}; export the model again") from None
    flat = tensors.read(folder / WEIGHTS, lambda _: False)
    # A tensor that is named as the folder of others is no tensor of ours.
    sections = {name[: match.start()] for name in flat for match in re.finditer("/", name)}
    is_tree = flat.keys().isdisjoint(sections)
    variables = traverse_util.unflatten_dict(flat, sep="/") if is_tree else {}
    if not isinstance(variables.get("params"), dict):
        raise UserError(f"{folder / WEIGHTS}: holds no params; export the model again")
    if unknown := sorted(variables.keys() - _COLLECTIONS):
        raise UserError(
            f"{folder / WEIGHTS}: holds {unknown[0]!r}, which is no part of a model; export the "
            "model again"
        )
    step, about = values.get("step"), values.get("about") or {}
    if type(step) not in (int, type(None)) or not isinstance(about, dict):
        raise UserError(f"{folder / CONFIG}: damaged: step or about; export the model again")
    return Artefact(config, variables, tokenizer, preprocessing, step, about)
