"""The named sizes: "B/16" is ViT-Base on patches of 16 pixels, as in the papers."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError, suggestion

# width, depth, heads of the image encoder; width, depth, heads of the text encoder; joint width.
_LARGE = {
    "Ti/16": (192, 12, 3, 192, 12, 3, 192),
    "S/32": (384, 12, 6, 384, 12, 6, 384),
    "S/16": (384, 12, 6, 384, 12, 6, 384),
    "B/32": (768, 12, 12, 512, 12, 8, 512),
    "B/16": (768, 12, 12, 512, 12, 8, 512),
    "L/16": (1024, 24, 16, 768, 12, 12, 768),
    "L/14": (1024, 24, 16, 768, 12, 12, 768),
}
# Layers of the image encoder; the text encoder is BERT-base from scratch, as in CLIP-Lite.
_RESNETS = {"RN18": 18, "RN50": 50, "RN101": 101, "RN152": 152}
QUICK = "quick"
CLIP_HF = "clip_hf"
# For some thousand photographs: pixels, patch, width of both encoders, depth of the image encoder,
# heads.
PHOTOGRAPHS = {"tiny_64": (64, 8, 128, 4, 2), "small_112": (112, 16, 192, 6, 3)}
SMALL = (QUICK, CLIP_HF, *PHOTOGRAPHS)  # for two CPU cores or one GPU
SIZES = (*SMALL, *_LARGE, *_RESNETS)


def apply(config: ConfigDict, size: str) -> None:
    """Sets the sizes of both encoders.

    "quick" is made for two CPU cores: 32 pixels, 16 patches after a convolutional stem. "clip_hf"
    has only the parts of CLIP that Hugging Face's and open_clip's layouts hold: 64 pixels, 64
    patches, a norm before the blocks, causal texts. "tiny_64" and "small_112" are for some thousand
    photographs, on a CPU and on a GPU: 64 pixels, 64 patches, and 112 pixels, 49 patches, after a
    convolutional stem. The others take 224 pixels: the ViTs of the literature with CLIP's text
    encoders (context 77), or ResNets with a BERT (context 30).

    Raises:
      UserError: for an unknown name.
    """
    if size == QUICK:
        _set(config.model.image, image_size=32, patch_size=8, width=128, depth=3, heads=2)
        _set(config.model.image, stem="conv")
        _set(config.model.text, tokenizer="clip_8k", context_length=32)
        _set(config.model.text, width=128, depth=1, heads=2, causal=False, pooling="mean")
        _set(config.model, embed_dim=128, token_dim=64)
        return
    if size == CLIP_HF:
        _set(config.model.image, image_size=64, patch_size=8, width=192, depth=6, heads=3)
        _set(config.model.image, stem="patch", pre_norm=True)
        _set(config.model.text, tokenizer="clip_8k", context_length=32, causal=True)
        _set(config.model.text, width=192, depth=4, heads=3, pooling="last")
        _set(config.model, embed_dim=192, token_dim=64)
        return
    if size in PHOTOGRAPHS:
        pixels, patch, width, depth, heads = PHOTOGRAPHS[size]
        _set(config.model.image, image_size=pixels, patch_size=patch, stem="conv")
        _set(config.model.image, width=width, depth=depth, heads=heads)
        _set(config.model.text, tokenizer="clip_8k", context_length=24)
        _set(config.model.text, width=width, depth=2, heads=heads, causal=False, pooling="mean")
        _set(config.model, embed_dim=width, token_dim=64)
        return
    if size in _RESNETS:
        resnet_and_bert(config, image_size=224, layers=_RESNETS[size], stem="imagenet")
        _set(config.model.text, context_length=30, width=768, depth=12, heads=12, dropout=0.1)
        _set(config.model, embed_dim=2048, token_dim=256)
        return
    if size not in _LARGE:
        raise UserError(
            f"unknown size {size!r}: expected one of {', '.join(SIZES)}{suggestion(size, SIZES)}"
        )
    width, depth, heads, text_width, text_depth, text_heads, joint = _LARGE[size]
    patch = int(size.split("/")[1])
    _set(config.model.image, image_size=224, patch_size=patch, stem="patch")
    _set(config.model.image, width=width, depth=depth, heads=heads)
    _set(config.model.text, context_length=77, causal=True, pooling="last")
    _set(config.model.text, width=text_width, depth=text_depth, heads=text_heads)
    _set(config.model, embed_dim=joint, token_dim=min(joint, 256))


def resnet_and_bert(
    config: ConfigDict, *, image_size: int, layers: int, stem: str, width: int = 64
) -> None:
    """Makes the encoders a ResNet of `layers` layers and a BERT with a vocabulary of its own."""
    _set(config.model.image, architecture="resnet", image_size=image_size, stem=stem)
    _set(config.model.image, depth=layers, width=width, normalization="imagenet")
    _set(config.model.text, architecture="bert", tokenizer="wordpiece", pooling="tanh")


def _set(node: ConfigDict, **values: Any) -> None:
    for key, value in values.items():
        node[key] = value
