"""A folder with a model in it, opened."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mlip_jax.core import places, schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.validation import validate, validate_model
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.text.tokenizer import Tokenizer
from mlip_jax.devices import parallel
from mlip_jax.inference.model import Model
from mlip_jax.interop import model_folders, positions
from mlip_jax.models import building
from mlip_jax.storage.compiled import keep_compiled


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
    """Loads a trained model. Any number of threads may do so at once.

    Compiled code is kept on the disk, beside the data cache, unless JAX has been told of another
    place (JAX_COMPILATION_CACHE_DIR).

    Args:
      path: a folder, or its URL: a workdir, whose newest good checkpoint is taken; an exported
        model; or a folder of open_clip's (open_clip_config.json and safetensors) or of Hugging
        Face's CLIP or SigLIP (config.json and safetensors). Pickles are never read.
      step: another checkpoint of a workdir.
      config: a config in place of the folder's, such as one with another merging rate.
      overrides: values by dotted key on top of the config, such as
        {"model.image.merging.rate": 0.5}.
      image_size: pixels along a side of the images, in place of the model's own: position
        embeddings are resampled.
      tokenizer: in place of the folder's.
      preprocessing: in place of the folder's.

    Returns:
      The model, on one device. Averaged parameters are taken where training kept them. What the
      folder does not say, such as how images are prepared, is not guessed: methods that need it
      raise UserError.

    Raises:
      UserError: if the path holds no model, a damaged one, or one that is not computed here.
    """
    keep_compiled()
    folder = places.local(path).expanduser()
    kind = model_folders.kind(folder)
    saved_model = model_folders.read(folder, step)
    asked = schema.from_json(schema.to_json(saved_model.config if config is None else config))
    overrides = dict(overrides or {})
    if image_size is not None:
        overrides["model.image.image_size"] = image_size
    for key, value in overrides.items():
        schema.set_key(asked, key, value)
    validate_model(asked)
    variables = dict(saved_model.variables)
    model_folders.check_finite(variables, folder)
    tokenizer = tokenizer or saved_model.tokenizer
    if config is not None or overrides:
        validate(asked)
    # Of a run that is in an early stage, too.
    if building.image_encoder(asked).patch_tokens:
        variables["params"] = positions.fit(variables["params"], building.grid(asked))
    if config is not None or overrides or kind != "workdir":
        _check_parameters(asked, variables["params"], tokenizer, folder)
    prepared = _sized(preprocessing or saved_model.preprocessing, asked.model.image.image_size)
    model = Model(asked, variables, tokenizer, prepared)
    model.step, model.about = saved_model.step, saved_model.about
    return model


def _sized(preprocessing: Preprocessing, image_size: int) -> Preprocessing:
    """The same for images of another size."""
    if preprocessing.image_size == image_size:
        return preprocessing
    short = round(preprocessing.short_side * image_size / preprocessing.image_size)
    return dataclasses.replace(preprocessing, image_size=image_size, short_side=short)


def _check_parameters(config: ConfigDict, params: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Raises UserError when a checkpoint lacks what the config's model needs."""
    saved = {
        parallel.path_name(path): list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    layers = config.model.image.depth + config.model.text.depth
    if layers > len(saved):  # thousands would take minutes to look through
        raise UserError(
            f"the checkpoint in {folder} is of another model: it has {len(saved)} tensors, and "
            f"this config's model has {layers} layers"
        )
    needed = building.parameter_shapes(config, tokenizer)
    for path, leaf in jax.tree_util.tree_leaves_with_path(needed):
        name = parallel.path_name(path)
        if saved.get(name) != list(leaf.shape):
            there = f"is {saved[name]}" if name in saved else "does not exist"
            raise UserError(
                f"the checkpoint in {folder} is of another model: tensor {name} {there} there and "
                f"is {list(leaf.shape)} in this config's model"
            )
