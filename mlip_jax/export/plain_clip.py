"""What the layouts of other libraries share: which models they can hold, and their side files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, models, processors
from tokenizers import Tokenizer as Encoder

from mlip_jax.core.errors import UserError
from mlip_jax.data.text.captions import repairs
from mlip_jax.data.text.tokenizer import Tokenizer
from mlip_jax.export.programs import decoder_notes
from mlip_jax.inference import Model
from mlip_jax.interop import layouts
from mlip_jax.interop.foreign import MissingPreprocessing, MissingTokenizer
from mlip_jax.interop.layouts import Layout
from mlip_jax.models.two_tower import PREDICTORS

# What encode_image and encode_text need; training's other heads and scales stay behind.
_KEPT = (
    "image_encoder",
    "text_encoder",
    "image_heads_spatial_global",
    "text_heads_text_global",
    "log_scale_spatial_global",
    "bias_spatial_global",
)


def refuse(library: str, reasons: Mapping[str, bool]) -> None:
    """Raises UserError with every reason that holds, unless none does."""
    obstacles = [reason for reason, holds in reasons.items() if holds]
    if obstacles:
        raise UserError(
            f"{library} has no place for this model: {'; '.join(obstacles)}. --format=mlip, "
            "stablehlo and onnx take any model"
        )


def reasons(model: Model) -> dict[str, bool]:
    """What neither library computes, and whether the model has it."""
    image, text = model.config.model.image, model.config.model.text
    return {
        f"its image encoder is a {image.architecture}, no ViT": image.architecture != "vit",
        f"its text encoder is a {text.architecture}": text.architecture != "clip",
        f"it has a Frequency Stage of {image.frequency.depth} blocks": image.frequency.depth > 0,
        f"it merges tokens (config.model.image.merging.rate={image.merging.rate}; export with 0 "
        "to leave that out)": image.merging.rate > 0,
        f"its stem is {image.stem!r}, not one map of each patch": image.stem != "patch",
        f"its images are pooled by {image.pooling!r}, not a class token": image.pooling != "class",
        f"its projections are {model.config.model.head!r}, not linear without bias": (
            model.config.model.head != "linear"
        ),
        "it scores pairs and has no joint space": model.pairwise,
        f"config.model.text.cleaning={text.cleaning!r} is not a part of its tokenizer": (
            text.cleaning not in ("none", "whitespace", "canonicalize")
            and not repairs(text.cleaning)
        ),
    }


def notes(model: Model, crop: str) -> list[str]:
    """What is lost on the way to a library that crops so (see `Preprocessing`), in words."""
    sentences = []
    if isinstance(model.preprocess, MissingPreprocessing):
        sentences.append(model.preprocess.reason)
    elif model.preprocess.transparency == "white":
        sentences.append("the library drops transparency, this model lays such images on white")
    if model.preprocess.orientation == "exif":
        sentences.append("the library ignores EXIF orientation, this model turns images upright")
    if model.preprocess.resize == "shortest" and model.preprocess.crop != crop:
        sentences.append(
            "where an odd number of pixels is cut off, the library's crop lies one pixel beside "
            "this model's"
        )
    if isinstance(model.tokenizer, MissingTokenizer):
        sentences.append(model.tokenizer.reason)
    sentences += decoder_notes(model)
    unused = sorted(
        name
        for name in model.variables["params"]
        if name not in _KEPT and not name.startswith(PREDICTORS)
    )
    if unused:
        sentences.append(f"left out, as no embedding needs them: {', '.join(unused)}")
    return sentences


def written_notes(tokenizer: Tokenizer) -> list[str]:
    """Whether a text may hold special tokens in the files that `write_tokenizer` writes, in words.

    Tokenizers from folders of other libraries take such words for special tokens here too.
    """
    if isinstance(tokenizer, MissingTokenizer):
        return []
    encoder = Encoder.from_str(tokenizer.encoder_json())
    tokens = [_token(encoder, identity) for identity in (*tokenizer.start, *tokenizer.end)]
    known = {token.content for token in encoder.get_added_tokens_decoder().values()}
    words = [token for token in dict.fromkeys(tokens) if token not in known]
    if not words:
        return []
    return [
        f"the library takes {' and '.join(words)} in a text for the special tokens, this model "
        "spells them like any other word"
    ]


def save_weights(file: Path, layout: Layout, model: Model) -> None:
    """Writes the weights in a library's layout.

    A patch embedding's bias, which CLIP's have not, becomes a part of every position.
    """
    params = jax.device_get(dict(model.variables["params"]))
    params = {name: part for name, part in params.items() if name in _KEPT}
    encoder = dict(params["image_encoder"])
    patch = dict(encoder["patch_embedding"]["patch"])
    encoder["position"] = np.asarray(encoder["position"]) + np.asarray(patch["bias"])
    encoder["patch_embedding"] = {"patch": {**patch, "bias": np.zeros_like(patch["bias"])}}
    params["image_encoder"] = encoder
    save_file(layouts.write(layout, params), file, {"format": "pt"})


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """Writes a tokenizer's files as transformers reads them, unless there is none."""
    if isinstance(tokenizer, MissingTokenizer):
        return
    encoder = Encoder.from_str(tokenizer.encoder_json())
    start = [_token(encoder, identity) for identity in tokenizer.start]
    end = [_token(encoder, identity) for identity in tokenizer.end]
    pad = encoder.id_to_token(tokenizer.pad)
    special = list(dict.fromkeys([*start, *end]))
    encoder.add_special_tokens([AddedToken(token, special=True) for token in special])
    encoder.post_processor = processors.TemplateProcessing(
        single=[*start, "$A", *end],
        special_tokens=[(token, encoder.token_to_id(token)) for token in special],
    )
    encoder.save(str(folder / "tokenizer.json"))
    settings = {
        "model_max_length": min(context_length, tokenizer.longest or context_length),
        "padding_side": "left" if tokenizer.pads_left else "right",
        "truncation_side": "left" if tokenizer.cuts_left else "right",
        "pad_token": pad,
        "bos_token": start[0] if start else None,
        "eos_token": end[0],
        "unk_token": getattr(encoder.model, "unk_token", None),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if isinstance(encoder.model, models.BPE) and start == ["<|startoftext|>"]:
        encoder.model.save(str(folder))  # vocab.json and merges.txt, which older versions read
        # CLIP's padding is behind the end, where nothing looks; transformers pads by it.
        settings |= {"tokenizer_class": "CLIPTokenizer", "pad_token": end[0]}
    write_json(folder / "tokenizer_config.json", settings)


def _token(encoder: Encoder, identity: int) -> str:
    token = encoder.id_to_token(identity)
    assert token is not None  # what starts and ends texts is in the vocabulary
    return token


def write_json(file: Path, values: Any) -> None:
    """Writes a JSON file as these libraries do."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
