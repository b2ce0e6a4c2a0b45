"""What a trained model computes: compiled functions of its variables and a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.models import building
from mlip_jax.models.grad_cam import grad_cam
from mlip_jax.models.heads import normalize
from mlip_jax.models.two_tower import Embeddings, TwoTower, level
from mlip_jax.models.vit import ImageViews
from mlip_jax.models.writing import write_captions


class Program(NamedTuple):
    """A pure function of one array."""

    function: Callable[[ArrayLike], jax.Array]
    shape: tuple[int, ...]  # of its input, without the batch
    dtype: type[np.generic]


class Programs(NamedTuple):
    """The functions behind the methods of a `Model`, of its variables and some arrays.

    They hold no variables, so that models of one architecture may share them.
    """

    embed_array: jax.stages.Wrapped  # of images that are normalised
    embed_pixels: jax.stages.Wrapped
    embed_texts: jax.stages.Wrapped
    score_pairs: jax.stages.Wrapped
    inspect: jax.stages.Wrapped  # its images' ImageViews; the others return an array
    image_features: jax.stages.Wrapped
    saliency: jax.stages.Wrapped
    # Of a model with a decoder. Of images, and for each a temperature, a seed and a number, ids
    # [images, places]; it has the static arguments `beams`, and `draws`, whether the three count.
    captions: jax.stages.Wrapped
    caption_losses: jax.stages.Wrapped  # of images and ids, sums and counts [images, 2]


def global_view(network: TwoTower) -> str:
    """The image view that embeddings of whole images are of.

    Raises:
      UserError: for a model without a global view.
    """
    views = [view for view in network.critics if level(view) == "global"]
    if not views:
        raise UserError(
            "token-level perspectives alone give no embedding of a whole image: give "
            "config.perspectives.spatial_global.weight a value above 0"
        )
    # The class token has seen every stage; the frequency view lies before the merging.
    return "spatial_global" if "spatial_global" in views else views[0]


def programs(
    network: TwoTower, view: str, config: ConfigDict, preprocessing: Preprocessing
) -> Programs:
    """The functions of a model.

    Args:
      network: the model.
      view: the image view that is embedded; see `global_view`.
      config: the config it was trained by.
      preprocessing: what brings pixels to its range.
    """
    pairwise = network.critic == "concat"
    mix = config.evaluation.frequency_mix if "frequency_global" in network.critics else 0.0

    def embed_array(variables: Any, images: jax.Array) -> jax.Array:
        embeddings: Embeddings = network.apply(variables, images, method="embed_images")
        if not mix or view == "frequency_global":
            return embeddings[view]
        # Both views share the texts' space, so that a sum of scores is the score of a sum.
        return normalize(embeddings[view] + mix * embeddings["frequency_global"])

    def embed_pixels(variables: Any, images: jax.Array) -> jax.Array:
        return embed_array(variables, preprocessing.normalize(images))

    def embed_texts(variables: Any, token_ids: jax.Array) -> jax.Array:
        embeddings: Embeddings = network.apply(variables, token_ids, method="embed_texts")
        return embeddings["text_global"]

    def score_pairs(variables: Any, images: jax.Array, token_ids: jax.Array) -> jax.Array:
        pixels = preprocessing.normalize(images)
        outputs: tuple[Embeddings, dict[str, Array], dict[str, Array]]
        outputs = network.apply(variables, pixels, token_ids)
        embeddings, scales, _ = outputs
        image, text = embeddings[view], embeddings["text_global"]
        if pairwise:
            scores: Array = network.apply(variables, view, image, text[None], method="score_pairs")
            return scores[0]
        return scales[view] * jnp.sum(image * text, axis=-1)

    def inspect(variables: Any, images: jax.Array) -> ImageViews:
        pixels = preprocessing.normalize(images)
        views: ImageViews = network.apply(variables, pixels, method="inspect_images")
        return views

    def image_features(variables: Any, images: jax.Array) -> jax.Array:
        return inspect(variables, images).spatial_global.astype(jnp.float32)

    def saliency(variables: Any, images: jax.Array, token_ids: jax.Array) -> jax.Array:
        layers, side = building.evidence_layers(config), building.grid(config)

        def by_critic() -> jax.Array:
            return score_pairs(variables, images, token_ids)

        def by_cosine(texts: jax.Array) -> jax.Array:
            return jnp.sum(embed_pixels(variables, images) * texts, axis=-1)

        if pairwise:
            score = by_critic
        else:
            score = functools.partial(by_cosine, embed_texts(variables, token_ids))
        source = inspect(variables, images).last_source
        return _on_grid(grad_cam(score, layers), source, side)

    def captions(
        variables: Any,
        images: jax.Array,
        temperature: jax.Array,
        seeds: jax.Array,
        numbers: jax.Array,
        *,
        beams: int,
        draws: bool,
    ) -> jax.Array:
        pixels = preprocessing.normalize(images)
        if not draws:
            return write_captions(network, variables, pixels, beams)
        keys = jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))
        return write_captions(network, variables, pixels, 1, temperature, keys(seeds, numbers))

    def caption_losses(
        variables: Any, images: jax.Array, token_ids: jax.Array
    ) -> Float[Array, "images 2"]:
        pixels = preprocessing.normalize(images)
        outputs: tuple[Embeddings, dict[str, Array], dict[str, Array]]
        outputs = network.apply(variables, pixels, token_ids)
        losses, counts = outputs[0]["caption"], outputs[0]["caption_count"]
        return jnp.stack([losses, counts.astype(jnp.float32)], axis=-1)

    return Programs(
        embed_array=jax.jit(embed_array),
        embed_pixels=jax.jit(embed_pixels),
        embed_texts=jax.jit(embed_texts),
        score_pairs=jax.jit(score_pairs),
        inspect=jax.jit(inspect),
        image_features=jax.jit(image_features),
        saliency=jax.jit(saliency),
        captions=jax.jit(captions, static_argnames=("beams", "draws")),
        caption_losses=jax.jit(caption_losses),
    )


def _on_grid(
    maps: Mapping[Any, Float[Array, "batch _"]],
    source: Float[Array, "batch tokens patches"] | None,
    side: int,
) -> Float[Array, "batch side side"]:
    """The sum of maps over tokens, merged by `source` where they are fewer, as one over patches."""
    total: Array | float = 0.0
    for tokens in maps.values():
        if tokens.shape[1] != side * side:
            assert source is not None  # or nothing has been merged
            tokens = jnp.einsum("bt,btp->bp", tokens, source)
        total = total + tokens
    return jax.nn.relu(total).reshape(-1, side, side)
