"""Encoders and heads: a batch of images and token ids -> embeddings of every perspective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mlip_jax.config import IMAGE_VIEWS
from mlip_jax.models import merging
from mlip_jax.models.layers import dense
from mlip_jax.models.text import TextEncoder
from mlip_jax.models.vit import ImageEncoder, ImageViews

Embeddings = dict[str, Array]


def normalize(x: Float[Array, "... width"]) -> Float[Array, "... width"]:
    """L2 norm 1 on the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


class Head(nn.Module):
    """Linear projection without bias, then L2 norm."""

    dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch dim"]:
        init = nn.initializers.normal(x.shape[-1] ** -0.5)
        x = dense(
            x.astype(self.dtype),
            self.dim,
            "projection",
            self.dtype,
            use_bias=False,
            kernel_init=init,
        )
        return normalize(x)


class TwoTower(nn.Module):
    """Image and text encoder with a head for every view that some perspective uses.

    Each image view has a projection of its own; the texts have one projection for the global
    level and one for the token level, so that all views of a level share one space.
    Attributes `image` and `text` are the encoders' fields; `critics` maps each perspective in use
    to its initial (scale, bias or None).
    """

    image: Mapping[str, Any]
    text: Mapping[str, Any]
    embed_dim: int
    token_dim: int
    critics: Mapping[str, tuple[float, float | None]]
    dtype: jnp.dtype

    def setup(self) -> None:
        self.image_encoder = ImageEncoder(**self.image, dtype=self.dtype)
        self.text_encoder = TextEncoder(**self.text, dtype=self.dtype)
        self.image_heads = {view: Head(self._dim(view), self.dtype) for view in self.critics}
        levels = {level(view) for view in self.critics}
        self.text_heads = {
            name: Head(self._dim(name), self.dtype)
            for name in ("text_global", "text_tokens")
            if level(name) in levels
        }
        self.log_scales = {
            view: self.param(f"log_scale_{view}", nn.initializers.constant(jnp.log(scale)), ())
            for view, (scale, _) in self.critics.items()
        }
        self.biases = {
            view: self.param(f"bias_{view}", nn.initializers.constant(bias), ())
            for view, (_, bias) in self.critics.items()
            if bias is not None
        }

    def _dim(self, view: str) -> int:
        return self.embed_dim if level(view) == "global" else self.token_dim

    def __call__(
        self,
        images: Float[Array, "batch image_size image_size 3"],
        token_ids: Int[Array, "batch context"],
        deterministic: bool = True,
    ) -> tuple[Embeddings, dict[str, Array], dict[str, Array]]:
        """Returns embeddings by view, scales (not their logs) and biases by perspective."""
        embeddings = self.embed_images(images, deterministic)
        embeddings |= self.embed_texts(token_ids, deterministic)
        scales = {view: jnp.exp(log_scale) for view, log_scale in self.log_scales.items()}
        return embeddings, scales, dict(self.biases)

    def embed_images(self, images: Array, deterministic: bool = True) -> Embeddings:
        """Normalised embeddings of every image view in use, and "sizes" [batch, merged]."""
        views = self.image_encoder(images, deterministic)
        embeddings = {view: head(getattr(views, view)) for view, head in self.image_heads.items()}
        return embeddings | {"sizes": views.sizes}

    def embed_texts(self, token_ids: Array, deterministic: bool = True) -> Embeddings:
        """Normalised embeddings of the text views in use, and "text_mask" [batch, context]."""
        views = self.text_encoder(token_ids, deterministic)
        embeddings = {view: head(getattr(views, view)) for view, head in self.text_heads.items()}
        return embeddings | {"text_mask": views.mask}

    def inspect_images(self, images: Array) -> ImageViews:
        """The image encoder's views before the heads, with the sources of merged tokens."""
        return self.image_encoder(images, True, inspect=True)


def level(view: str) -> str:
    """ "global" or "tokens", the level of a view's name."""
    return view.rsplit("_", 1)[-1]


def compute_dtype(config: ConfigDict) -> jnp.dtype:
    """The config's compute dtype; "auto" is bfloat16 unless the devices are CPUs."""
    name = config.compute_dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def merge_counts(config: ConfigDict) -> tuple[int, ...]:
    """Tokens merged in each block of the Spatial Stage (see `merging.schedule`)."""
    image = config.model.image
    return merging.schedule(
        image.merging.rate,
        (image.image_size // image.patch_size) ** 2,
        image.depth - image.frequency.depth,
        image.merging.schedule,
    )


def build(config: ConfigDict, *, vocab_size: int, start_id: int, end_id: int) -> TwoTower:
    """The model that a config describes.

    Args:
      config: the run's config.
      vocab_size: the tokenizer's size.
      start_id: its start-of-text token.
      end_id: its end-of-text token.

    Raises:
      UserError: for a merging rate that its schedule cannot reach.
    """
    image, text = config.model.image.to_dict(), config.model.text.to_dict()
    frequency, guided = image.pop("frequency"), image.pop("merging")
    for name in ("rate", "schedule"):
        guided.pop(name)
    text.pop("tokenizer")
    critics = {
        view: (
            config.perspectives[view].init_scale,
            config.perspectives[view].init_bias
            if config.perspectives[view].loss == "sigmoid"
            else None,
        )
        for view in IMAGE_VIEWS  # a ConfigDict would give them by the alphabet
        if config.perspectives[view].weight > 0
    }
    return TwoTower(
        image=image
        | guided
        | {
            "frequency_depth": frequency["depth"],
            "transform": frequency["transform"],
            "merge_counts": merge_counts(config),
        },
        text=text | {"vocab_size": vocab_size, "start_id": start_id, "end_id": end_id},
        embed_dim=config.model.embed_dim,
        token_dim=config.model.token_dim,
        critics=critics,
        dtype=compute_dtype(config),
    )
