"""The kinds of folders that hold a model, and what the foreign ones hold."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from mlip_jax.core import schema
from mlip_jax.core.errors import UserError, first_line
from mlip_jax.core.files import read_json
from mlip_jax.core.trained import read_config
from mlip_jax.core.validation import validate
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.text.tokenizer import Tokenizer
from mlip_jax.interop import artefact, hugging_face, open_clip
from mlip_jax.interop.artefact import Artefact
from mlip_jax.interop.foreign import Foreign
from mlip_jax.storage.checkpoint import restore_fields, served

_KINDS = (
    "the workdir of a run, an exported model, or a folder of open_clip's or of Hugging Face's CLIP "
    "or SigLIP"
)


def kind(folder: Path) -> str:
    """What a folder holds: "workdir", "exported", "open_clip" or "hugging_face".

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
    return "hugging_face" if is_theirs else "workdir"


def describe(folder: Path) -> Foreign:
    """What a folder of kind "open_clip" or "hugging_face" holds.

    Raises:
      UserError: when it cannot be read, or is of a model that is not computed here.
    """
    reader = open_clip if kind(folder) == "open_clip" else hugging_face
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
