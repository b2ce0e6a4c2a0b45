"""open_clip's folder, for `open_clip.create_model_and_transforms("local-dir:FOLDER")`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlip_jax.export import plain_clip
from mlip_jax.inference import Model
from mlip_jax.interop import clip_layouts
from mlip_jax.interop.foreign import MissingPreprocessing, MissingTokenizer
from mlip_jax.interop.open_clip import CONFIG, WEIGHTS
from mlip_jax.models.layers import EPSILON

_CLIP_TOKENS = 49_408


def write(folder: Path, model: Model) -> list[str]:
    """Writes `CONFIG`, the weights and, where it is not CLIP's own, the tokenizer.

    Args:
      folder: empty.
      model: loaded.

    Returns:
      What is lost, in words.

    Raises:
      UserError: for a model that open_clip's CLIP does not compute, with what it is.
    """
    image, text = model.config.model.image, model.config.model.text
    quick = {tower.activation == "quick_gelu" for tower in (image, text)}
    prepared = model.preprocess
    reasons = plain_clip.reasons(model) | {
        "one of its towers has quick_gelu, the other has not": len(quick) > 1,
        "its texts see what comes after, but not their padding": (
            not text.causal and not text.attend_padding
        ),
        f"its texts are pooled by {text.pooling!r}": text.pooling == "mean",
        f"images are resized by {prepared.interpolation!r}": (
            prepared.interpolation not in ("bicubic", "bilinear")
        ),
        "images are cropped from a larger size": prepared.short_side != 0,
    }
    plain_clip.refuse("open_clip", reasons)
    layout = clip_layouts.open_clip(text_prefix="", siglip=False, text_bias=False, image_bias=False)
    plain_clip.save_weights(folder / WEIGHTS[0], layout, model)
    values: dict[str, Any] = {"model_cfg": _model(model, quick.pop())}
    if not isinstance(prepared, MissingPreprocessing):
        values["preprocess_cfg"] = {
            "size": prepared.image_size,
            "mode": "RGB",
            "mean": list(prepared.mean),
            "std": list(prepared.std),
            "interpolation": prepared.interpolation,
            "resize_mode": prepared.resize,
            "fill_color": 0,
        }
    plain_clip.write_json(folder / CONFIG, values)
    if not _has_clips_tokens(model):
        plain_clip.write_tokenizer(folder, model.tokenizer, text.context_length)
    return plain_clip.notes(model, "round")


def _has_clips_tokens(model: Model) -> bool:
    return (
        model.config.model.text.tokenizer == "clip" and model.tokenizer.vocab_size == _CLIP_TOKENS
    )


def _model(model: Model, quick: bool) -> dict[str, Any]:
    image, text = model.config.model.image, model.config.model.text
    vision_cfg = _tower(image) | {
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "head_width": image.width // image.heads,
    }
    if not image.pre_norm:
        vision_cfg["no_ln_pre"] = True
    highest = model.tokenizer.eot == model.tokenizer.vocab_size - 1
    pooling = {"first": "first", "final": "last", "highest": "argmax"}.get(text.pooling)
    text_cfg = _tower(text) | {
        "context_length": text.context_length,
        "vocab_size": model.tokenizer.vocab_size,
        "heads": text.heads,
        "pool_type": pooling or ("argmax" if highest else "eos"),
    }
    if text_cfg["pool_type"] == "eos":
        text_cfg["eos_id"] = model.tokenizer.eot
    if not text.causal:
        text_cfg["no_causal_mask"] = True
    if not _has_clips_tokens(model) and not isinstance(model.tokenizer, MissingTokenizer):
        text_cfg["hf_tokenizer_name"] = model.config.name  # of local-dir: the folder itself
        cleaning = text.cleaning if text.cleaning != "none" else "whitespace"
        text_cfg["tokenizer_kwargs"] = {"clean": cleaning}
    values = {
        "embed_dim": model.config.model.embed_dim,
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
        "quick_gelu": quick,
    }
    if "bias_spatial_global" in model.variables["params"]:
        values["init_logit_bias"] = model.logit_bias
    return values


def _tower(tower: Any) -> dict[str, Any]:
    values = {"layers": tower.depth, "width": tower.width, "mlp_ratio": tower.mlp_ratio}
    if tower.activation == "gelu_tanh":
        values["act_kwargs"] = {"approximate": "tanh"}
    if tower.norm_epsilon != EPSILON:
        values["norm_kwargs"] = {"eps": tower.norm_epsilon}
    return values
