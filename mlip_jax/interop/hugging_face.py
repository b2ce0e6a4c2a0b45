"""CLIP and SigLIP as Hugging Face's transformers saves them: config.json and safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.files import read_json
from mlip_jax.data.images.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from mlip_jax.data.text.tokenizer import Tokenizer, folder_tokenizer
from mlip_jax.interop import clip_layouts
from mlip_jax.interop.foreign import (
    Foreign,
    MissingPreprocessing,
    base_config,
    check_computed,
    checked,
    chosen,
    colours,
    lost,
    number,
    positive_int,
    section_of,
    tokenizer_or_reason,
)


class _Absent(NamedTuple):
    """What transformers 5 takes for a key that is left out."""

    text: Mapping[str, int]
    patch_size: int
    hidden_act: str
    layer_norm_eps: float


_ABSENT = {
    "clip": _Absent(
        text={
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
        },
        patch_size=32,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    ),
    "siglip": _Absent(
        text={
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 64,
        },
        patch_size=16,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    ),
}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
MODEL_TYPES = tuple(_ABSENT)
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_PREPROCESSOR = "preprocessor_config.json"
_LEGACY_END = 2  # `CLIPModel` takes the highest id of a text for its end where this is the end's


def describe(folder: Path) -> Foreign:
    """What a Hugging Face folder of CLIP or SigLIP holds, by its config files.

    Raises:
      UserError: for a config that is missing or damaged, or is of a model that is not computed
        here.
    """
    file = folder / "config.json"
    values = read_json(file, advice="get it again")
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        near = suggestion(str(kind), MODEL_TYPES)
        raise UserError(
            f"{file}: model_type is {kind!r}; read are {' and '.join(MODEL_TYPES)} of Hugging "
            f"Face's{near}"
        )
    text, vision = (_section(file, values, f"{tower}_config") for tower in ("text", "vision"))
    config, absent = base_config(folder), _ABSENT[kind]
    _set_tower(file, config.model.image, "vision_config", vision, _VISION, absent)
    _set_tower(file, config.model.text, "text_config", text, absent.text, absent)
    vocab_size = positive_int(file, "text_config", text, "vocab_size", absent.text["vocab_size"])
    config.model.text.vocab_size = vocab_size
    config.model.text.tokenizer = f"folder:{folder}"
    if kind == "clip":
        start, end = _set_clip(file, config, values, text)
        layout = clip_layouts.hugging_face_clip()
    else:
        start, end = _set_siglip(file, config, text, vision)
        layout = clip_layouts.hugging_face_siglip()
    tokenizer = tokenizer_or_reason(
        lambda: _tokenizer(folder, config.model.text, kind, end), vocab_size, start, end
    )
    config.model.text.cleaning = tokenizer.cleaning
    preprocessing = _preprocessing(folder, config.model.image.image_size, kind)
    return Foreign(folder, config, layout, folder, tokenizer, preprocessing, lost(values))


def _section(file: Path, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    # Old files say some of it twice; what transformers takes is the second.
    again = values.get(f"{key}_dict")
    if key not in values and isinstance(again, dict):
        return again
    return section_of(file, values, key) | (again if isinstance(again, dict) else {})


def _set_tower(
    file: Path,
    tower: Any,
    section: str,
    values: dict[str, Any],
    absent_sizes: Mapping[str, int],
    absent: _Absent,
) -> None:
    def size(key: str) -> int:
        return positive_int(file, section, values, key, absent_sizes[key])

    tower.width, tower.depth = size("hidden_size"), size("num_hidden_layers")
    tower.heads = size("num_attention_heads")
    tower.mlp_ratio = size("intermediate_size") / tower.width
    tower.norm_epsilon = number(file, section, values, "layer_norm_eps", absent.layer_norm_eps)
    tower.activation = chosen(file, section, values, "hidden_act", _ACTIVATIONS, absent.hidden_act)
    if section == "text_config":
        tower.context_length = size("max_position_embeddings")
        return
    tower.image_size = size("image_size")
    tower.patch_size = positive_int(file, section, values, "patch_size", absent.patch_size)
    check_computed(file, section, values, {"num_channels": (3, 3)})


def _set_clip(
    file: Path, config: Any, values: dict[str, Any], text: dict[str, Any]
) -> tuple[int, int]:
    """What `CLIPModel` is beyond its sizes; returns the ids that start and end a text."""
    config.model.image.pre_norm = True
    config.model.embed_dim = positive_int(file, "config", values, "projection_dim", 512)
    end = positive_int(file, "text_config", text, "eos_token_id", 49407)
    config.model.text.pooling = "highest" if end == _LEGACY_END else "last"
    start = text.get("bos_token_id", 49406)
    return start if type(start) is int else -1, end


def _set_siglip(
    file: Path, config: Any, text: dict[str, Any], vision: dict[str, Any]
) -> tuple[int, int]:
    """What `SiglipModel` is beyond its sizes; returns the ids that start and end a text."""
    model = config.model
    check_computed(file, "vision_config", vision, {"vision_use_head": (True, True)})
    model.embed_dim = positive_int(file, "text_config", text, "projection_size", model.text.width)
    if model.embed_dim != model.image.width:
        raise UserError(
            f"{file}: vision_config.hidden_size is {model.image.width}, but texts are projected to "
            f"{model.embed_dim}: SigLIP's must agree"
        )
    set_siglip(config)
    # Its config.json names ids that its tokenizer does not have, and no id is looked for.
    return -1, positive_int(file, "text_config", text, "pad_token_id", 1)


def set_siglip(config: Any) -> None:
    """What SigLIP's models are beyond their sizes, in place."""
    model = config.model
    model.head, model.image.pooling = "linear_bias", "attention"
    model.text.causal, model.text.pooling = False, "final"
    config.perspectives.spatial_global.loss = "sigmoid"
    config.perspectives.spatial_global.init_scale = 10.0
    config.perspectives.spatial_global.init_bias = -10.0


def _tokenizer(folder: Path, text: Any, kind: str, end: int) -> Tokenizer:
    tokenizer = folder_tokenizer(folder, vocab_size=text.vocab_size)
    if tokenizer.eot != end and end != _LEGACY_END and tokenizer.sot >= 0:
        raise UserError(
            f"{folder}: its tokenizer ends texts with the id {tokenizer.eot}, its config.json says "
            f"{end}: get both from one place"
        )
    if kind == "clip" and tokenizer.pads_left:
        raise UserError(
            f"{folder}: its tokenizer has padding_side 'left', and CLIPModel masks padding, which "
            "is computed here behind the text alone: set it to 'right', which embeds texts alike"
        )
    longest = tokenizer.longest
    if kind == "siglip" and longest is not None and longest < text.context_length:
        raise UserError(
            f"{folder}: its tokenizer has model_max_length {longest}, but SigLIP takes texts of "
            f"{text.context_length} tokens, padding included: get both from one place"
        )
    return tokenizer


def _preprocessing(folder: Path, image_size: int, kind: str) -> Preprocessing:
    file = folder / _PREPROCESSOR
    if not file.is_file():
        return MissingPreprocessing(
            image_size,
            reason=f"{folder} has no {_PREPROCESSOR}, which says how images are prepared: add it, "
            "or give load(..., preprocessing=Preprocessing(...))",
        )
    values = read_json(file, advice="get it again")
    steps = ("do_resize", "do_rescale", "do_normalize")
    check_computed(file, "preprocessor", values, dict.fromkeys(steps, (True, True)))
    factor = number(file, "preprocessor", values, "rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise UserError(f"{file}: rescale_factor is {factor}; only 1/255 is supported")
    half = (0.5, 0.5, 0.5)
    mean, std = (CLIP_MEAN, CLIP_STD) if kind == "clip" else (half, half)
    resample = chosen(file, "preprocessor", values, "resample", _RESAMPLE, 3)
    resize, short_side = _resize(file, values, image_size, kind)
    prepared = Preprocessing(
        image_size,
        colours(file, values, "image_mean", mean),
        colours(file, values, "image_std", std),
        "drop" if values.get("do_convert_rgb") is False else "drop_first",
        resample,
        resize,
        short_side,
        "floor",
    )
    return checked(file, prepared)


def _resize(file: Path, values: dict[str, Any], image_size: int, kind: str) -> tuple[str, int]:
    """How an image comes to size: ("shortest" or "squash", the short side or 0)."""
    size = values.get("size")
    size = {"shortest_edge": size} if isinstance(size, int) and kind == "clip" else size
    if size is None:
        size = {"shortest_edge": 224} if kind == "clip" else {"height": 224, "width": 224}
    size = {"height": size, "width": size} if isinstance(size, int) else size
    crop = values.get("crop_size", 224 if kind == "clip" else None)
    crops = values.get("do_center_crop", kind == "clip")
    if isinstance(crop, dict):
        crop = crop.get("height") if crop.get("height") == crop.get("width") else None
    size = size if isinstance(size, dict) else {}
    if set(size) == {"shortest_edge"} and crops and crop == image_size:
        short = positive_int(file, "size", size, "shortest_edge", 0)
        if short >= image_size:
            return "shortest", 0 if short == image_size else short
    if set(size) == {"height", "width"} and not (crops and crop != image_size):
        if size["height"] == size["width"] == image_size:
            return "squash", 0
    raise UserError(
        f"{file}: images become {values.get('size')!r}, cropped to {values.get('crop_size')!r}, "
        f"but the model takes squares of {image_size}"
    )
