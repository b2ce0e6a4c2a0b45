"""CLIP and SigLIP as open_clip saves them: open_clip_config.json and safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import is_number, read_json
from mlip_jax.data.images.preprocessing import CLIP_MEAN, CLIP_STD, RESIZES, Preprocessing
from mlip_jax.data.text.tokenizer import Tokenizer, folder_tokenizer, load_tokenizer
from mlip_jax.interop import clip_layouts
from mlip_jax.interop.foreign import (
    Computed,
    Foreign,
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
from mlip_jax.interop.hugging_face import set_siglip

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "model.safetensors")
# open_clip's name of how its tokenizers clean texts -> ours.
CLEANINGS = {
    "whitespace": "ftfy_whitespace",
    "lower": "ftfy_lower",
    "canonicalize": "ftfy_canonicalize",
}

# By key: what is computed here, and what a key that is left out means (open_clip 3).
_PLAIN_BLOCK: Computed = {
    "ls_init_value": (None, None),
    "block_type": (None, None),
    "final_ln_after_pool": (False, False),
    **dict.fromkeys(
        ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn"),
        (False, False),
    ),
    "scale_fc": (False, False),
}
_VISION: Computed = {
    **_PLAIN_BLOCK,
    "attentional_pool": (False, False),
    "pos_embed_type": ("learnable", "learnable"),
    "pool_type": ("tok", "tok"),
}
_TEXT: Computed = {
    **_PLAIN_BLOCK,
    "hf_model_name": (None, None),
    "embed_cls": (False, False),
    "proj_type": ("linear", "linear"),
    "tokenizer_mode": (None, None),
}
_TIMM: Computed = {
    "timm_pool": ("map", "avg"),
    "timm_proj": ("none", "linear"),
}
# What says nothing about an embedding: of training, or of what else is returned.
_NEUTRAL = {
    "vision_cfg": {
        "patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads",
        "timm_model_pretrained", "timm_proj_bias", "timm_drop", "timm_drop_path", "image_size",
        "timm_model_name", "layers", "width", "head_width", "mlp_ratio", "patch_size",
        "no_ln_pre", "act_kwargs", "norm_kwargs", *_TIMM,
    },
    "text_cfg": {
        "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "width", "heads",
        "layers", "mlp_ratio", "pad_id", "eos_id", "no_causal_mask", "pool_type", "proj_bias",
        "output_tokens", "act_kwargs", "norm_kwargs", "hf_model_pretrained", "hf_proj_type",
        "hf_pooler_type",
    },
}  # fmt: skip
_MODEL = {
    "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale",
    "init_logit_bias", "nonscalar_logit_scale", "output_dict", "cast_dtype",
}  # fmt: skip
_POOLINGS = {"argmax": "highest", "eos": "last", "first": "first", "last": "final"}

# timm's ViTs with SigLIP's pooling: width, blocks, heads, hidden width of the MLPs; and the names
# of those that timm 1 defines with the tanh approximation of GELU.
_TIMM_NAME = re.compile(r"vit_(?P<size>\w+)_patch(?P<patch>\d+)_siglip_(?P<image_size>\d+)")
_TIMM_SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
_TIMM_TANH = re.compile(
    r"vit_(base_patch32_siglip_256|large_patch16_siglip_512|so400m_patch16_siglip_\d+"
    r"|giantopt_patch16_siglip_\d+)"
)


def describe(folder: Path) -> Foreign:
    """What an open_clip folder holds, by its config.

    Raises:
      UserError: for a config that is missing or damaged, or is of a model that is not computed
        here.
    """
    file = folder / CONFIG
    values = read_json(file, advice="get it again")
    model = section_of(file, values, "model_cfg")
    vision, text = section_of(file, model, "vision_cfg"), section_of(file, model, "text_cfg")
    _refuse_unknown(file, "model_cfg", model, _MODEL)
    config = base_config(folder)
    config.model.embed_dim = positive_int(file, "model_cfg", model, "embed_dim", 0)
    quick = bool(model.get("quick_gelu", False))
    siglip = vision.get("timm_model_name") is not None
    if siglip:
        set_siglip(config)
        _set_timm(file, config.model.image, vision)
        if config.model.embed_dim != config.model.image.width:
            raise UserError(
                f"{file}: model_cfg.embed_dim is {config.model.embed_dim}, but timm_proj 'none' "
                f"leaves {config.model.image.width}"
            )
    else:
        _set_vision(file, config.model.image, vision, quick)
    _set_text(file, config.model.text, text, quick)
    biased = bool(text.get("proj_bias", False))
    config.model.head = "linear_bias" if biased or siglip else "linear"
    bias = model.get("init_logit_bias")
    if bias is not None:
        if not is_number(bias):
            raise UserError(f"{file}: model_cfg.init_logit_bias is {bias!r}; expected a number")
        config.perspectives.spatial_global.loss = "sigmoid"
        config.perspectives.spatial_global.init_bias = float(bias)
    elif siglip:
        raise UserError(f"{file}: model_cfg.init_logit_bias is missing, which SigLIP has")
    layout = clip_layouts.open_clip(
        text_prefix="text." if model.get("custom_text") else "",
        siglip=siglip,
        text_bias=biased,
        image_bias=config.model.head == "linear_bias",
    )
    tokenizer = _tokenizer(folder, config, text)
    config.model.text.cleaning = tokenizer.cleaning
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder)
    size = config.model.image.image_size
    preprocessing = _preprocessing(file, values, size)
    return Foreign(folder, config, layout, weights, tokenizer, preprocessing, lost(values))


def _refuse_unknown(file: Path, section: str, values: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(key for key in values.keys() - known if values[key] not in (None, False))
    if unknown:
        raise UserError(
            f"{file}: {section}.{unknown[0]} is {values[unknown[0]]!r}: such a model is not "
            "known here"
        )


def _set_vision(file: Path, image: Any, vision: dict[str, Any], quick: bool) -> None:
    section = "vision_cfg"
    if isinstance(vision.get("layers"), list):
        raise UserError(
            f"{file}: vision_cfg.layers is a list: CLIP's ResNets are not read, ViTs are"
        )
    check_computed(file, section, vision, _VISION)
    _refuse_unknown(file, section, vision, _NEUTRAL[section] | _VISION.keys())

    image.image_size = positive_int(file, section, vision, "image_size", 224)
    image.patch_size = positive_int(file, section, vision, "patch_size", 16)
    image.width = positive_int(file, section, vision, "width", 768)
    image.depth = positive_int(file, section, vision, "layers", 12)
    image.heads = image.width // positive_int(file, section, vision, "head_width", 64)
    image.mlp_ratio = number(file, section, vision, "mlp_ratio", 4.0)
    image.pre_norm = not vision.get("no_ln_pre", False)
    image.activation = _activation(file, section, vision, quick)
    image.norm_epsilon = _epsilon(file, section, vision)


def _set_timm(file: Path, image: Any, vision: dict[str, Any]) -> None:
    name = vision["timm_model_name"]
    match = _TIMM_NAME.fullmatch(str(name))
    if not match or match["size"] not in _TIMM_SIZES:
        raise UserError(
            f"{file}: vision_cfg.timm_model_name is {name!r}; of timm's models only SigLIP's, such "
            "as vit_base_patch16_siglip_224, are known here"
        )
    check_computed(file, "vision_cfg", vision, _TIMM)
    _refuse_unknown(file, "vision_cfg", vision, _NEUTRAL["vision_cfg"])
    image.width, image.depth, image.heads, hidden = _TIMM_SIZES[match["size"]]
    image.mlp_ratio = hidden / image.width
    image.patch_size = int(match["patch"])
    image.image_size = positive_int(
        file, "vision_cfg", vision, "image_size", int(match["image_size"])
    )
    image.activation = "gelu_tanh" if _TIMM_TANH.fullmatch(name) else "gelu"
    image.norm_epsilon = 1e-6


def _set_text(file: Path, text: Any, values: dict[str, Any], quick: bool) -> None:
    section = "text_cfg"
    check_computed(file, section, values, _TEXT)
    _refuse_unknown(file, section, values, _NEUTRAL[section] | _TEXT.keys())
    text.context_length = positive_int(file, section, values, "context_length", 77)
    text.vocab_size = positive_int(file, section, values, "vocab_size", 49408)
    text.width = positive_int(file, section, values, "width", 512)
    text.heads = positive_int(file, section, values, "heads", 8)
    text.depth = positive_int(file, section, values, "layers", 12)
    text.mlp_ratio = number(file, section, values, "mlp_ratio", 4.0)
    text.causal = not values.get("no_causal_mask", False)
    text.activation = _activation(file, section, values, quick)
    text.norm_epsilon = _epsilon(file, section, values)
    text.pooling = chosen(file, section, values, "pool_type", _POOLINGS, "argmax")


def _activation(file: Path, section: str, values: Mapping[str, Any], quick: bool) -> str:
    arguments = values.get("act_kwargs")
    if quick and not arguments:
        return "quick_gelu"
    if not arguments:
        return "gelu"
    if quick or arguments not in ({"approximate": "tanh"}, {"approximate": "none"}):
        raise UserError(f"{file}: {section}.act_kwargs is {arguments!r}; such is not known here")
    return "gelu_tanh" if arguments["approximate"] == "tanh" else "gelu"


def _epsilon(file: Path, section: str, values: Mapping[str, Any]) -> float:
    arguments = values.get("norm_kwargs") or {}
    if not isinstance(arguments, dict) or arguments.keys() - {"eps"}:
        raise UserError(f"{file}: {section}.norm_kwargs is {arguments!r}; only eps is supported")
    return number(file, f"{section}.norm_kwargs", arguments, "eps", 1e-5)


def _tokenizer(folder: Path, config: Any, text: dict[str, Any]) -> Tokenizer:
    vocab_size, name = config.model.text.vocab_size, text.get("hf_tokenizer_name")
    end = text.get("eos_id", 2) if text.get("pool_type") == "eos" else vocab_size - 1
    if type(end) is not int or not 0 <= end < vocab_size:
        raise UserError(
            f"{folder}: {CONFIG}: text_cfg.eos_id is {end!r}; expected one of {vocab_size} ids"
        )
    if name is None:
        # The folder names it, whose vocabulary is the model's.
        config.model.text.tokenizer = "clip" if vocab_size == 49408 else f"folder:{folder}"

        def read() -> Tokenizer:
            # CLIP's tokens are of lower case anyway; "whitespace" would keep upper case there.
            cleaning = _cleaning(folder, text, "lower", ("lower", "canonicalize"))
            cleaning = CLEANINGS["whitespace"] if cleaning == CLEANINGS["lower"] else cleaning
            clip_tokenizer = load_tokenizer("clip", cleaning=cleaning, written=True)
            if clip_tokenizer.vocab_size == vocab_size:
                return clip_tokenizer
            raise UserError(
                f"{folder}: {CONFIG} names no tokenizer, and CLIP's, which goes with it then, has "
                f"{clip_tokenizer.vocab_size} tokens, the model {vocab_size}"
            )

        return tokenizer_or_reason(read, vocab_size, vocab_size - 2, end)
    config.model.text.tokenizer = f"folder:{folder}"

    def read_folder() -> Tokenizer:
        cleaning = _cleaning(folder, text, "whitespace", tuple(CLEANINGS))
        return folder_tokenizer(folder, cleaning, vocab_size)

    return tokenizer_or_reason(read_folder, vocab_size, -1, end)


def _cleaning(folder: Path, text: dict[str, Any], absent: str, known: tuple[str, ...]) -> str:
    """Our name of the cleaning that text_cfg.tokenizer_kwargs names."""
    arguments = text.get("tokenizer_kwargs") or {}
    is_known = isinstance(arguments, dict) and not arguments.keys() - {"clean"}
    cleaning = arguments.get("clean", absent) if is_known else None
    if cleaning not in known:
        raise UserError(
            f"{folder}: {CONFIG}: text_cfg.tokenizer_kwargs is {arguments!r}; only clean, one "
            f"of {', '.join(known)}, is known here"
        )
    return CLEANINGS[cleaning]


def _preprocessing(file: Path, values: Mapping[str, Any], image_size: int) -> Preprocessing:
    """By preprocess_cfg; a key that is left out means what open_clip takes for it."""
    section = values.get("preprocess_cfg") or {}
    if not isinstance(section, dict):
        raise UserError(f"{file}: damaged: preprocess_cfg is no object")
    size = positive_int(file, "preprocess_cfg", section, "size", image_size)
    if size != image_size:
        raise UserError(
            f"{file}: preprocess_cfg.size is {size}, but vision_cfg.image_size {image_size}"
        )
    check_computed(file, "preprocess_cfg", section, {"mode": ("RGB", "RGB"), "fill_color": (0, 0)})
    interpolation = section.get("interpolation") or "bicubic"
    # "random" is of training; open_clip evaluates such a model by bicubic.
    interpolation = "bicubic" if interpolation == "random" else interpolation
    resize = section.get("resize_mode") or "shortest"
    if interpolation not in ("bicubic", "bilinear") or resize not in RESIZES:
        raise UserError(
            f"{file}: preprocess_cfg has interpolation {interpolation!r} and resize_mode "
            f"{resize!r}; expected bicubic or bilinear, and one of {', '.join(RESIZES)}"
        )
    prepared = Preprocessing(
        image_size,
        colours(file, section, "mean", CLIP_MEAN),
        colours(file, section, "std", CLIP_STD),
        "drop",
        interpolation,
        resize,
    )
    return checked(file, prepared)
