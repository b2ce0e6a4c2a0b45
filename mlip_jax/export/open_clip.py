"""open_clip's folder, for `open_clip.create_model_and_transforms("local-dir:FOLDER")`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlip_jax.data.text.captions import repairs
from mlip_jax.export import plain_clip
from mlip_jax.inference import Model
from mlip_jax.interop import clip_layouts
from mlip_jax.interop.foreign import MissingPreprocessing, MissingTokenizer, with_lost
from mlip_jax.interop.open_clip import CLEANINGS, CONFIG, WEIGHTS
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
    lost = plain_clip.notes(model, "round") + _text_notes(model)
    plain_clip.write_json(folder / CONFIG, with_lost(values, lost))
    if not _has_clips_tokens(model):
        plain_clip.write_tokenizer(folder, model.tokenizer, text.context_length)
    return lost


def _text_notes(model: Model) -> list[str]:
    """What becomes other token ids there than here, in words."""
    tokenizer = model.tokenizer
    if isinstance(tokenizer, MissingTokenizer):
        return []
    sentences = []
    if not repairs(tokenizer.cleaning):
        also = "" if tokenizer.unescapes else " and undoes HTML escapes"
        sentences.append(
            f"open_clip mends texts by ftfy (curly quotes, ligatures, full-width letters, decoding "
            f"mistakes){also}, this model does not: such texts have other features there "
            "(--config.model.text.cleaning=ftfy_whitespace trains with the same)"
        )
    if not _has_clips_tokens(model):
        return sentences + plain_clip.written_notes(tokenizer)
    if not tokenizer.written:
        sentences.append(
            "open_clip takes <start_of_text> and <end_of_text> in a text for the special tokens, "
            "this model spells them like any other word"
        )
    return sentences


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
    cleaning = _cleaning(text.cleaning)
    if _has_clips_tokens(model):
        if cleaning == "canonicalize":
            text_cfg["tokenizer_kwargs"] = {"clean": cleaning}  # else it writes in lower case alone
    elif not isinstance(model.tokenizer, MissingTokenizer):
        text_cfg["hf_tokenizer_name"] = model.config.name  # of local-dir: the folder itself
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


def _cleaning(name: str) -> str:
    """open_clip's name of the cleaning that is nearest to ours, but for ftfy."""
    theirs = {ours: name for name, ours in CLEANINGS.items()}
    return theirs.get(name) or ("canonicalize" if name == "canonicalize" else "whitespace")


def _tower(tower: Any) -> dict[str, Any]:
    values = {"layers": tower.depth, "width": tower.width, "mlp_ratio": tower.mlp_ratio}
    if tower.activation == "gelu_tanh":
        values["act_kwargs"] = {"approximate": "tanh"}
    if tower.norm_epsilon != EPSILON:
        values["norm_kwargs"] = {"eps": tower.norm_epsilon}
    return values
