"""timm's ViTs with a class token, such as DINO's: image encoders without texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_json
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.interop import clip_layouts, foreign, layouts, tensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_HEAD_WIDTH = 64  # of all ViTs of the literature but the largest
_HEADS = {1280: 16, 1408: 16, 1664: 16}  # by width
_NOT_COMPUTED = {
    "reg_token": "register tokens",
    "blocks.0.mlp.fc1_g.weight": "gated MLPs",
    "blocks.0.mlp.w12.weight": "gated MLPs",
    "blocks.0.attn.q_norm.weight": "norms of queries and keys",
    "fc_norm.weight": "a mean over the tokens in place of the class token",
    "attn_pool.latent": "attention pooling",
    "dist_token": "a distillation token",
}


def describe(folder: Path) -> tuple[ConfigDict, Preprocessing]:
    """The encoder in a folder, as config.model.image, and how its images are prepared.

    Raises:
      UserError: when it cannot be read, or is of a model that is not computed here.
    """
    file = folder / CONFIG
    values = read_json(file)
    name = str(values.get("architecture", ""))
    has = tensors.shapes(folder / WEIGHTS)
    for tensor, words in _NOT_COMPUTED.items():
        if tensor in has:
            raise UserError(f"{folder}: {name} has {words}, which are not computed here")
    try:
        width, _, patch, _ = has["patch_embed.proj.weight"]
        tokens = has["pos_embed"][1] - 1
        hidden = has["blocks.0.mlp.fc1.weight"][0]
        has["cls_token"]
    except (KeyError, ValueError, IndexError):
        raise UserError(
            f"{folder}: {name} is no ViT with a class token in timm's layout ({WEIGHTS} lacks some "
            "of patch_embed.proj.weight, pos_embed, cls_token, blocks.0.mlp.fc1.weight)"
        ) from None
    grid = math.isqrt(tokens)
    if not tokens or grid * grid != tokens:
        raise UserError(f"{folder}: {name} has {tokens} patches, which fill no square")
    arguments = foreign.section_of(file, {"model_args": {}} | values, "model_args")
    heads = foreign.positive_int(
        file, "model_args", arguments, "num_heads", _HEADS.get(width, max(width // _HEAD_WIDTH, 1))
    )
    image = foreign.base_config(folder).model.image
    image.architecture, image.pooling, image.stem = "vit", "class", "patch"
    image.image_size, image.patch_size = grid * patch, patch
    image.width, image.heads, image.mlp_ratio = width, heads, hidden / width
    image.depth = sum(f"blocks.{block}.norm1.weight" in has for block in range(len(has)))
    image.pre_norm = "norm_pre.weight" in has  # CLIP's
    image.norm_epsilon = 1e-5 if image.pre_norm else 1e-6
    image.activation = "quick_gelu" if "quickgelu" in name else "gelu"
    return image, _preprocessing(file, values, image.image_size)


def _preprocessing(file: Path, values: Mapping[str, Any], size: int) -> Preprocessing:
    settings = values.get("pretrained_cfg") or {}
    if not isinstance(settings, dict):
        raise UserError(f"{file}: pretrained_cfg is {settings!r}, expected an object")
    mean, std = (
        foreign.colours(file, settings, key, absent)
        for key, absent in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225]))
    )
    return foreign.checked(file, Preprocessing(image_size=size, mean=mean, std=std))


def read(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The weights in a folder, as parameters of `vit.ImageEncoder`.

    Args:
      folder: see `describe`.
      wanted: the encoder's parameters, or anything with their structure and shapes; positions are
        those of the file's own image size.

    Raises:
      UserError: for weights that are missing, damaged or of another model.
    """
    image, _ = describe(folder)
    side = image.image_size // image.patch_size
    position = jax.ShapeDtypeStruct((side, side, image.width), np.float32)
    wanted = dict(wanted) | {"position": position}
    layout = clip_layouts.timm_vit(pre_norm="norm_pre" in wanted)
    tree = layouts.read(folder / WEIGHTS, layout, {"image_encoder": wanted}, _without_layer_scales)
    encoder: dict[str, Any] = tree["image_encoder"]
    return encoder


def _without_layer_scales(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The layer that a layer scale follows has it in its weights and its bias."""
    scaled = dict(found)
    for name in found:
        for scale, layer in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
            if name.endswith(f".{scale}"):
                gamma, module = scaled.pop(name), name.removesuffix(scale) + layer
                for part in {f"{module}.weight", f"{module}.bias"} & found.keys():
                    scaled[part] = (found[part].T * gamma).T
    return scaled
