"""The named sizes: "B/16" is ViT-Base on patches of 16 pixels, as in the papers."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from mlip_jax.config import UserError, suggestion

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
QUICK = "quick"
SIZES = (QUICK, *_LARGE)


def apply(config: ConfigDict, size: str) -> None:
    """Sets the sizes of both encoders.

    "quick" is made for two CPU cores: 32 pixels, 16 patches after a convolutional stem. The others
    are ViTs of the literature at 224 pixels with CLIP's text encoders (context 77).

    Raises:
      UserError: for an unknown name.
    """
    if size == QUICK:
        _set(config.model.image, image_size=32, patch_size=8, width=128, depth=4, heads=2)
        _set(config.model.image, stem="conv")
        _set(config.model.text, tokenizer="clip_8k", context_length=32)
        _set(config.model.text, width=128, depth=1, heads=2, causal=False, pooling="mean")
        _set(config.model, embed_dim=128, token_dim=64)
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


def _set(node: ConfigDict, **values: Any) -> None:
    for key, value in values.items():
        node[key] = value
