"""Hugging Face's `CLIPModel`, for `transformers.CLIPModel.from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlip_jax.data.text.captions import repairs
from mlip_jax.data.text.tokenizer import Tokenizer
from mlip_jax.export import plain_clip
from mlip_jax.inference import Model
from mlip_jax.interop import clip_layouts
from mlip_jax.interop.foreign import MissingPreprocessing, with_lost

_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def write(folder: Path, model: Model) -> list[str]:
    """Writes config.json, weights, preprocessor_config.json and the tokenizer's files.

    Args:
      folder: empty.
      model: loaded.

    Returns:
      What is lost, in words.

    Raises:
      UserError: for a model that `CLIPModel` does not compute, with what it is that it does not.
    """
    image, text = model.config.model.image, model.config.model.text
    end = model.tokenizer.eot
    is_clips = text.tokenizer in ("clip", "clip_8k")  # which write in lower case anyway
    reasons = plain_clip.reasons(model) | {
        "its ViT has no norm before the blocks, which CLIPModel's always has (train with "
        "--config.model.image.pre_norm=True; open_clip does without)": not image.pre_norm,
        "its texts see what comes after (config.model.text.causal=False)": not text.causal,
        f"its texts are pooled by {text.pooling!r}, not at their end": (
            text.pooling not in ("last", "highest")
        ),
        f"the highest id of a text is its end, and {end} is not the highest of "
        f"{model.tokenizer.vocab_size}": (
            text.pooling == "highest" and end != model.tokenizer.vocab_size - 1
        ),
        # There `CLIPModel` takes the highest id instead.
        "its texts end with the id 2": end == 2,
        "its logits have a bias, as the sigmoid loss learns it": model.logit_bias != 0,
        f"images are resized by {model.preprocess.resize!r}": model.preprocess.resize == "longest",
        f"config.model.text.cleaning={text.cleaning!r} is not a part of its tokenizer": (
            text.cleaning not in ("none", "whitespace", "ftfy_whitespace")
            and not (text.cleaning == "ftfy_lower" and is_clips)
        ),
    }
    plain_clip.refuse("Hugging Face's CLIPModel", reasons)
    layout = clip_layouts.hugging_face_clip()
    plain_clip.save_weights(folder / "model.safetensors", layout, model)
    lost = plain_clip.notes(model, "floor") + _text_notes(model.tokenizer, is_clips)
    plain_clip.write_json(folder / "config.json", with_lost(_config(model), lost))
    plain_clip.write_tokenizer(folder, model.tokenizer, text.context_length)
    if not isinstance(model.preprocess, MissingPreprocessing):
        plain_clip.write_json(folder / "preprocessor_config.json", _preprocessor(model))
    return lost


def _text_notes(tokenizer: Tokenizer, is_clips: bool) -> list[str]:
    """What becomes other token ids there than here, in words."""
    sentences = []
    if tokenizer.unescapes:
        sentences.append(
            "HTML escapes in texts, such as &amp;, which this model undoes, stay there"
        )
    if repairs(tokenizer.cleaning):
        sentences.append(
            "texts are not mended by ftfy there (curly quotes, ligatures, full-width letters, "
            "decoding mistakes), as they are here"
        )
    if is_clips:
        sentences.append(
            "transformers lower-cases letter by letter (a sigma that ends a word becomes another "
            "letter) and keeps control characters that are white space here"
        )
    return sentences + plain_clip.written_notes(tokenizer)


def _config(model: Model) -> dict[str, Any]:
    settings = model.config.model
    width = settings.embed_dim
    vision = _tower(settings.image) | {
        "model_type": "clip_vision_model",
        "image_size": settings.image.image_size,
        "patch_size": settings.image.patch_size,
        "num_channels": 3,
        "projection_dim": width,
    }
    text = _tower(settings.text) | {
        "model_type": "clip_text_model",
        "vocab_size": model.tokenizer.vocab_size,
        "max_position_embeddings": settings.text.context_length,
        "bos_token_id": model.tokenizer.sot if model.tokenizer.sot >= 0 else None,
        "eos_token_id": model.tokenizer.eot,
        "pad_token_id": model.tokenizer.pad,
        "projection_dim": width,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": width,
        "text_config": text,
        "vision_config": vision,
    }


def _tower(tower: Any) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": round(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "hidden_act": _ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.norm_epsilon,
    }


def _preprocessor(model: Model) -> dict[str, Any]:
    prepared = model.preprocess
    side = {"height": prepared.image_size, "width": prepared.image_size}
    crops = prepared.resize == "shortest"
    size = {"shortest_edge": prepared.short_side or prepared.image_size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size if crops else side,
        "resample": _RESAMPLE[prepared.interpolation],
        "do_center_crop": crops,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(prepared.mean),
        "image_std": list(prepared.std),
    }
