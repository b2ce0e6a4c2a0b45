"""The kinds of folders that hold a model, and what the foreign ones hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mlip_jax.core import schema
from mlip_jax.core.errors import UserError, first_line
from mlip_jax.core.files import read_json
from mlip_jax.core.trained import read_config
from mlip_jax.core.validation import validate
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.text.tokenizer import Tokenizer
from mlip_jax.devices import parallel
from mlip_jax.interop import artefact, hugging_face, open_clip, timm
from mlip_jax.interop.artefact import Artefact
from mlip_jax.interop.foreign import Foreign
from mlip_jax.storage.saved import restore_fields, served

_KINDS = (
    "the workdir of a run, an exported model, or a folder of open_clip's or of Hugging Face's CLIP "
    "or SigLIP"
)


def kind(folder: Path) -> str:
    """What a folder holds: "workdir", "exported", "open_clip", "hugging_face" or "timm".

    The last is an image encoder alone, which only `image_tower` and `read_image_tower` take.

    Where open_clip's files lie beside Hugging Face's of the same model, those are taken whose
    weights are there.

    Raises:
      UserError: when it is none of them.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give {_KINDS}")
    if (folder / artefact.CONFIG).is_file():
        return "exported"
    has_open_clip = (folder / open_clip.CONFIG).is_file()
    config = folder / "config.json"
    if not config.is_file():
        if has_open_clip:
            return "open_clip"
        raise UserError(f"{folder} holds no config.json: it is not {_KINDS}")
    try:
        values = read_json(config)
    except UserError:  # what reads workdirs tells of it
        values = {}
    is_theirs = "model_type" in values
    if has_open_clip:
        own_weights = (folder / open_clip.WEIGHTS[0]).is_file()
        is_supported = is_theirs and values["model_type"] in hugging_face.MODEL_TYPES
        return "open_clip" if own_weights or not is_supported else "hugging_face"
    if "architecture" in values and not is_theirs:
        return "timm"
    return "hugging_face" if is_theirs else "workdir"


def describe(folder: Path) -> Foreign:
    """What a folder of kind "open_clip" or "hugging_face" holds.

    Raises:
      UserError: when it cannot be read, or is of a model that is not computed here.
    """
    folder_kind = kind(folder)
    if folder_kind == "timm":
        raise UserError(
            f"{folder} holds an image encoder of timm's alone: a run can start from it, as by "
            f"--config=configs/clip.py:image={folder}"
        )
    reader = open_clip if folder_kind == "open_clip" else hugging_face
    return reader.describe(folder)


def settings(folder: Path) -> tuple[ConfigDict, Preprocessing]:
    """The config and the preprocessing of the model in a folder of any kind, without its weights.

    Raises:
      UserError: when it holds none, a damaged one, or one that is not computed here.
    """
    folder_kind = kind(folder)
    if folder_kind == "exported":
        return artefact.read_settings(folder)[:2]
    if folder_kind != "workdir":
        foreign = describe(folder)
        return foreign.config, foreign.preprocessing
    config = read_config(folder)
    return config, Preprocessing.of(config)


def read(folder: Path, step: int | None = None) -> Artefact:
    """The model that a folder of any kind holds.

    Args:
      folder: see `kind`.
      step: of a workdir's checkpoint; None: its newest good one.

    Raises:
      UserError: when it holds none, a damaged one, or one that is not computed here.
    """
    folder_kind = kind(folder)
    if folder_kind == "workdir":
        return _of_workdir(folder, step)
    if step is not None:
        raise UserError(f"{folder} is no workdir: it has one model, and no step {step}")
    if folder_kind == "exported":
        return artefact.read(folder)
    foreign = describe(folder)
    validate(foreign.config)
    variables = {"params": foreign.params()}
    about = {"lost": list(foreign.lost)} if foreign.lost else {}
    return Artefact(
        foreign.config, variables, foreign.tokenizer, foreign.preprocessing, None, about
    )


def image_tower(folder: Path) -> tuple[ConfigDict, Preprocessing]:
    """The image encoder in a folder, as config.model.image, and how its images are prepared.

    Args:
      folder: as `read` takes it, or one of timm's ViTs.

    Raises:
      UserError: as `settings`, and for a ViT that is not computed here.
    """
    if kind(folder) == "timm":
        return timm.describe(folder)
    config, preprocessing = settings(folder)
    return config.model.image, preprocessing


def read_image_tower(folder: Path, wanted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The weights of the image encoder in a folder, as the variables of a model.

    Args:
      folder: see `image_tower`.
      wanted: the encoder's parameters, or anything with their structure and shapes.

    Raises:
      UserError: for weights that are missing, damaged or of another model.
    """
    if kind(folder) == "timm":
        return {"params": {"image_encoder": timm.read(folder, wanted)}}
    variables = read(folder).variables
    return {
        collection: {"image_encoder": part["image_encoder"]}
        for collection, part in variables.items()
        if "image_encoder" in part
    }


def check_finite(variables: Mapping[str, Any], folder: Path | str) -> None:
    """Raises UserError for weights that hold NaN or infinity: nothing that they give is a number.

    Their least and their largest tell: whole arrays of answers would take a fourth of the memory.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.asarray(leaf)
        if array.size and not all(np.isfinite(float(each)) for each in (array.min(), array.max())):
            raise UserError(
                f"the weights in {folder} are damaged: tensor {parallel.path_name(path)} holds NaN "
                "or infinity; take another checkpoint, or get the file again"
            )


def _of_workdir(folder: Path, step: int | None) -> Artefact:
    fields, extras = restore_fields(folder, ("step", "params", "batch_stats", "ema", "slow"), step)
    try:
        return Artefact(
            schema.from_json(extras["config"]),
            served(fields),
            Tokenizer.from_json(extras["tokenizer"]),
            Preprocessing.from_dict(extras["preprocessing"]),
            int(fields["step"]),
            {"attribution": str(extras.get("attribution", ""))},
        )
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises Exception itself
        raise UserError(
            f"the checkpoint in {folder} is damaged ({first_line(error)}): take another one"
        ) from error
