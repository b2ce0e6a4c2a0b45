"""The image encoder: Frequency Stage, then Spatial Stage with guided merging -> views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from mlip_jax.models import guidance, merging
from mlip_jax.models.dropout import DropPath, random_patches
from mlip_jax.models.frequency import FrequencyBlock
from mlip_jax.models.guidance import Before, Seen
from mlip_jax.models.layers import (
    EPSILON,
    MLP,
    TOKEN_INIT,
    Attention,
    AttentionPool,
    PatchEmbedding,
    add,
    layer_norm,
    recomputed,
)
from mlip_jax.models.merging import Plan


class ImageViews(NamedTuple):
    """What the image encoder sees. The frequency views are None without a Frequency Stage."""

    spatial_global: Float[Array, "batch width"]
    spatial_tokens: Float[Array, "batch merged width"]
    # Patches behind each spatial token; they sum to N, or to what patch dropout keeps of it.
    sizes: Float[Array, "batch merged"]
    frequency_global: Float[Array, "batch width"] | None = None
    frequency_tokens: Float[Array, "batch patches width"] | None = None
    # On request only:
    source: Float[Array, "batch merged patches"] | None = None  # the patches each token stands for
    importance: Float[Array, "batch patches"] | None = None  # guidance in the first merging block
    # As `source`, of the tokens that the global view reads: those that enter the last block, or,
    # with attention pooling, those that leave it.
    last_source: Float[Array, "batch tokens patches"] | None = None
    # By name, what each way of `guidance.GUIDES` that the encoder has says of the patches in the
    # first block that merges, or in the first; see `ImageEncoder`.
    guides: dict[str, Float[Array, "batch patches"]] | None = None


@dataclass(frozen=True)
class Merging:
    """How blocks merge tokens: the keys of config.model.image.merging but for how many.

    Attributes:
      guidance: where importance comes from, see `guidance.parts`.
      guidance_mix: alpha, the weight of the first of two ways against the second.
      similarity_mix: beta, the weight of the keys' similarity against the frequency features'.
      importance_penalty: gamma, what an important token loses of its similarity.
      proportional_attention: a token's logits grow by the log of the patches behind it.
    """

    guidance: str
    guidance_mix: float
    similarity_mix: float
    importance_penalty: float
    proportional_attention: bool

    @property
    def guides(self) -> tuple[str, ...]:
        """The names of the ways that tell importance."""
        return guidance.parts(self.guidance)

    @property
    def by_frequency(self) -> bool:
        """Whether frequency features have a say in what is merged."""
        return any(guidance.GUIDES[name].frequency for name in self.guides)

    def importance(self, seen: Seen) -> Float[Array, "batch patches"] | None:
        """The importance of the patch tokens; None where merging has no guidance."""
        return guidance.importance(self.guides, self.guidance_mix, seen)


class SpatialBlock(nn.Module):
    """A pre-LN transformer block that merges `r` tokens between attention and MLP, as ToMe does."""

    r: int
    heads: int
    mlp_ratio: float
    activation: str
    dropout: float
    drop_path: float
    merging: Merging
    dtype: jnp.dtype
    class_token: bool = True  # the first token is one
    epsilon: float = EPSILON  # of the norms
    attention_form: str = "plain"  # see `models.attention`

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        size: Float[Array, "batch tokens"],
        features: Float[Array, "batch patches width"] | None,
        deterministic: bool,
        scores: dict[str, Float[Array, "batch patches"]] | None = None,
    ) -> tuple[Array, Array, Array | None, dict[str, Array], Plan | None, Seen]:
        """Goes through the block.

        Args:
          x: tokens.
          size: patches behind each.
          features: frequency tokens of the patches.
          deterministic: no dropout, no stochastic depth.
          scores: of the ways of guidance that read the image before the Spatial Stage.

        Returns:
          Tokens, sizes, features and scores after the block, the plan of its merging, and what
          guides it.
        """
        y = layer_norm("norm_attention", self.dtype, self.epsilon)(x)
        y, keys, class_attention, received = Attention(
            self.heads, self.dropout, self.dtype, self.attention_form, name="attention"
        )(y, deterministic, size=size if self.merging.proportional_attention else None)
        x = x + DropPath(self.drop_path)(y, deterministic)
        first, scores, plan = int(self.class_token), dict(scores or {}), None
        seen = Seen(class_attention[:, first:], received[:, first:], features, scores)
        if self.r:
            plan = merging.match(
                keys,
                self.r,
                guidance=self.merging.importance(seen),
                features=features if self.merging.by_frequency else None,
                class_token=self.class_token,
                similarity_mix=self.merging.similarity_mix,
                importance_penalty=self.merging.importance_penalty,
            )
            x, merged_size = merging.merge(plan, x, size)
            if features is not None:
                features = _merge_features(plan, features, size, first)
            scores = {
                name: _merge_features(plan, score[..., None], size, first)[..., 0]
                for name, score in scores.items()
            }
            size = merged_size
        y = layer_norm("norm_mlp", self.dtype, self.epsilon)(x)
        y = MLP(self.mlp_ratio, self.activation, self.dropout, self.dtype, name="mlp")(
            y, deterministic
        )
        return x + DropPath(self.drop_path)(y, deterministic), size, features, scores, plan, seen


def _merge_features(plan: Plan, features: Array, size: Array, first: int) -> Array:
    """Carries the patch tokens' features through a merge: the plan from token `first` on.

    That is 1 where there is a class token.
    """
    patches = Plan(plan.slot[:, first:], plan.count)
    # Slots are numbered with the class token's in place; it alone gets no patch and is dropped.
    to_slot = merging.assignment(patches)
    weight = to_slot * size[:, None, first:]
    share = weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1.0)
    merged = jnp.einsum("bst,btd->bsd", share, features.astype(jnp.float32))
    return jax.lax.stop_gradient(merged[:, first:].astype(features.dtype))


def _take(
    tokens: Float[Array, "batch patches width"], numbers: Int[Array, "batch kept"]
) -> Float[Array, "batch kept width"]:
    """Each row's tokens of these numbers: a product with a 0/1 matrix, as its gradient is."""
    chosen = jax.nn.one_hot(numbers, tokens.shape[1], dtype=tokens.dtype)
    return jnp.einsum("bkn,bnd->bkd", chosen, tokens, precision=jax.lax.Precision.HIGHEST)


class _Merged(NamedTuple):
    """What leaves the Spatial Stage, the class token included where there is one."""

    tokens: Float[Array, "batch tokens width"]
    size: Float[Array, "batch tokens"]  # patches behind each token
    # On request only, see `ImageViews`:
    origin: Array | None  # which tokens that entered each one stands for
    last_origin: Array | None  # the same before the last block
    importance: Array | None
    guides: dict[str, Array] | None


class ImageEncoder(nn.Module):
    """ViT of `depth` blocks, the first `frequency_depth` of them a Frequency Stage.

    In training the Spatial Stage takes `training_patches` of the patches, drawn anew for each image
    (FLIP, arXiv 2212.00794). The Frequency Stage, whose transform needs the whole grid, and its
    views keep all of them: a choice of ours, as is merging by the rate of what is kept.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    stem: str
    activation: str
    dropout: float
    drop_path: float
    frequency_depth: int
    transform: str
    merge_counts: tuple[int, ...]  # tokens to merge, one number a spatial block
    training_patches: int
    training_merge_counts: tuple[int, ...]  # the same, of the patches in training
    merging: Merging
    dtype: jnp.dtype
    remat: bool = False  # blocks are computed again for their gradient
    pre_norm: bool = False  # a norm before the Spatial Stage, as CLIP's ViTs have
    pooling: str = "class"  # the global view: the class token, or "attention", as SigLIP's
    norm_epsilon: float = EPSILON  # of the Spatial Stage's norms
    attention_form: str = "plain"  # see `models.attention`

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch image_size image_size 3"],
        deterministic: bool = True,
        inspect: bool = False,
    ) -> ImageViews:
        """Encodes normalised images.

        Args:
          images: float, after mean and standard deviation.
          deterministic: no dropout, no stochastic depth, all patches.
          inspect: also return where merged tokens come from and the guidance of the first merge;
            for `deterministic` alone.
        """
        x, embedding = self._frequency_stage(images, deterministic)
        frequency_tokens = frequency_global = features = None
        if self.frequency_depth:
            frequency_tokens = layer_norm("norm_frequency", self.dtype)(x)
            frequency_global = jnp.mean(frequency_tokens.astype(jnp.float32), axis=1)
            features = jax.lax.stop_gradient(frequency_tokens)
        merge_counts = self.merge_counts
        scores = self._scores(images, embedding, features, inspect)
        if not deterministic and self.training_patches < x.shape[1]:
            kept = random_patches(self, x.shape[0], x.shape[1], self.training_patches)
            x = _take(x, kept)
            features = None if features is None else _take(features, kept)
            scores = {name: _take(score[..., None], kept)[..., 0] for name, score in scores.items()}
            merge_counts = self.training_merge_counts
        merged = self._spatial_stage(x, features, scores, merge_counts, deterministic, inspect)
        first, last_origin = self._first_patch, merged.last_origin
        x = layer_norm("norm_spatial", self.dtype, self.norm_epsilon)(merged.tokens)
        if first:
            spatial_global = x[:, 0]
        else:
            last_origin = merged.origin
            spatial_global = AttentionPool(
                self.heads,
                self.mlp_ratio,
                self.activation,
                self.norm_epsilon,
                self.dtype,
                name="pool",
            )(x, deterministic, merged.size if self.merging.proportional_attention else None)
        return ImageViews(
            spatial_global=spatial_global,
            spatial_tokens=x[:, first:],
            sizes=merged.size[:, first:],
            frequency_global=frequency_global,
            frequency_tokens=frequency_tokens,
            source=_of_patches(merged.origin, first),
            importance=merged.importance,
            last_source=_of_patches(last_origin, first),
            guides=merged.guides,
        )

    @property
    def _first_patch(self) -> int:
        """The number of the first patch token in the Spatial Stage."""
        return int(self.pooling == "class")

    def _block_fields(self, block: int) -> dict[str, Any]:
        """What the blocks of both stages have in common; stochastic depth grows with `block`."""
        return {
            "mlp_ratio": self.mlp_ratio,
            "activation": self.activation,
            "dropout": self.dropout,
            "dtype": self.dtype,
            "drop_path": float(np.linspace(0.0, self.drop_path, self.depth)[block]),
        }

    def _scores(
        self, images: Array, embedding: Array, features: Array | None, inspect: bool
    ) -> dict[str, Array]:
        """What the ways of guidance say that read the image here: those in use, or all."""
        names = self._possible_guides if inspect else self.merging.guides
        if not inspect and not any(self.merge_counts):
            return {}
        if features is not None:
            features = features.reshape(embedding.shape)
        pixels = guidance.grid_of(images, self.patch_size)
        return guidance.scores_before(names, Before(pixels, embedding, features))

    @property
    def _possible_guides(self) -> tuple[str, ...]:
        return guidance.possible(
            frequency=self.frequency_depth > 0, class_token=bool(self._first_patch)
        )

    def _frequency_stage(
        self, images: Array, deterministic: bool
    ) -> tuple[Float[Array, "batch patches width"], Float[Array, "batch rows columns width"]]:
        """Patches with their positions, after the Frequency Stage where there is one.

        And before both.
        """
        grid = self.image_size // self.patch_size
        x = PatchEmbedding(
            self.width, self.patch_size, self.stem, self.dtype, name="patch_embedding"
        )(images)
        embedding = x
        position = self.param("position", TOKEN_INIT, (grid, grid, self.width))
        x = add(x, position)
        for index in range(self.frequency_depth):
            x = recomputed(FrequencyBlock, self.remat, deterministic=2)(
                **self._block_fields(index), transform=self.transform, name=f"frequency_{index}"
            )(x, deterministic)
        return rearrange(x, "b r c d -> b (r c) d"), embedding

    def _spatial_stage(
        self,
        x: Float[Array, "batch patches width"],
        features: Float[Array, "batch patches width"] | None,
        scores: dict[str, Array],
        merge_counts: tuple[int, ...],
        deterministic: bool,
        inspect: bool,
    ) -> _Merged:
        """Attention over the class token, if there is one, and the patches; blocks merge tokens."""
        if self._first_patch:
            # The class token brings its own position; a sum of two parameters would be one.
            class_token = self.param("class_token", TOKEN_INIT, (self.width,))
            class_tokens = add(jnp.zeros_like(x[:, :1]), class_token)
            x = jnp.concatenate([class_tokens, x], axis=1)
        if self.pre_norm:
            x = layer_norm("norm_pre", self.dtype, self.norm_epsilon)(x)
        size = jnp.ones(x.shape[:2], jnp.float32)
        origin = last_origin = importance = guides = None
        first_merge = next((index for index, r in enumerate(merge_counts) if r), 0)
        for index, r in enumerate(merge_counts):
            last_origin = origin
            x, size, features, scores, plan, seen = recomputed(
                SpatialBlock, self.remat, deterministic=4
            )(
                **self._block_fields(self.frequency_depth + index),
                r=r,
                heads=self.heads,
                merging=self.merging,
                class_token=bool(self._first_patch),
                epsilon=self.norm_epsilon,
                attention_form=self.attention_form,
                name=f"spatial_{index}",
            )(x, size, features, deterministic, scores)
            if inspect and plan is not None:
                origin = merging.source(plan, origin)
            if inspect and index == first_merge:
                guides = guidance.all_scores(
                    self._possible_guides, self.merging.guides, self.merging.guidance_mix, seen
                )
                importance = self.merging.importance(seen) if plan is not None else None
        return _Merged(x, size, origin, last_origin, importance, guides)


def _of_patches(origin: Array | None, first: int) -> Array | None:
    return None if origin is None else origin[:, first:, first:]
