"""Token-level similarity (FILIP, arXiv 2111.07783), with weights for merged tokens.

    image_to_text[i, j] = sum over k of weight_ik * max over m of a_ik . b_jm
    text_to_image[i, j] = masked mean over m of max over k of a_ik . b_jm

All pairs cost images x texts x tokens x words. That array never exists whole: blocks of texts are
scored one after the other, and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mlip_jax.objectives.contrastive import Scalar

ImageTokens = Float[Array, "images tokens width"]
TextTokens = Float[Array, "texts words width"]
Weights = Float[Array, "images tokens"]
Mask = Bool[Array, "texts words"]


def _reduce(
    products: Float[Array, "... tokens words"],
    weights: Float[Array, "... tokens"],
    mask: Bool[Array, "... words"],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Both directed similarities from the products of every token with every word."""
    lowest = jnp.finfo(products.dtype).min
    best_word = jnp.max(jnp.where(mask[..., None, :], products, lowest), axis=-1)
    words = jnp.sum(mask, axis=-1).astype(products.dtype)
    # A text without words is as similar to everything: 0, not the lowest float.
    best_word = jnp.where(words[..., None] > 0, best_word, 0.0)
    image_to_text = jnp.sum(weights * best_word, axis=-1)
    best_token = jnp.where(mask, jnp.max(products, axis=-2), 0.0)
    text_to_image = jnp.sum(best_token, axis=-1) / jnp.maximum(words, 1.0)
    return image_to_text, text_to_image


def _float32(*arrays: Array) -> tuple[Array, ...]:
    """Before anything is split in parts, whose gradients would be summed in a smaller type."""
    return tuple(array.astype(jnp.float32) for array in arrays)


def tokenwise_similarity(
    image_tokens: ImageTokens,
    text_tokens: TextTokens,
    image_weights: Weights,
    text_mask: Mask,
    *,
    chunk: int = 32,
) -> tuple[Float[Array, "images texts"], Float[Array, "images texts"]]:
    """Similarity of all images with all texts, in both directions.

    Args:
      image_tokens: L2-normalised.
      text_tokens: L2-normalised.
      image_weights: share of each token in its image (size / patches); rows sum to 1.
      text_mask: True at words.
      chunk: texts scored at a time; memory is images x tokens x chunk x words.

    Returns:
      (image_to_text, text_to_image), each [images, texts], float32; for a pair they differ.
    """
    image_tokens, text_tokens = _float32(image_tokens, text_tokens)
    texts = text_tokens.shape[0]
    chunk = min(chunk, texts)
    blocks = -(-texts // chunk)
    padding = blocks * chunk - texts
    tokens = jnp.pad(text_tokens, ((0, padding), (0, 0), (0, 0)))
    mask = jnp.pad(text_mask, ((0, padding), (0, 0)))

    @jax.checkpoint
    def score(block: tuple[Array, Array]) -> tuple[Array, Array]:
        block_tokens, block_mask = block
        return block_similarity(image_tokens, block_tokens, image_weights, block_mask)

    blocked = (
        tokens.reshape(blocks, chunk, *tokens.shape[1:]),
        mask.reshape(blocks, chunk, mask.shape[1]),
    )
    image_to_text, text_to_image = jax.lax.map(score, blocked)
    images = image_tokens.shape[0]

    def whole(x: Float[Array, "blocks images chunk"]) -> Float[Array, "images texts"]:
        return jnp.moveaxis(x, 0, 1).reshape(images, blocks * chunk)[:, :texts]

    return whole(image_to_text), whole(text_to_image)


def block_similarity(
    image_tokens: ImageTokens, text_tokens: TextTokens, image_weights: Weights, text_mask: Mask
) -> tuple[Float[Array, "images texts"], Float[Array, "images texts"]]:
    """`tokenwise_similarity` at once: memory is images x tokens x texts x words."""
    # At the platform's default precision: by far the most products of a step, and cosines.
    products = jnp.einsum("ikd,jmd->ijkm", image_tokens, text_tokens)
    return _reduce(products, image_weights[:, None], text_mask[None])


def paired_similarity(
    image_tokens: ImageTokens, text_tokens: TextTokens, image_weights: Weights, text_mask: Mask
) -> tuple[Float[Array, "images"], Float[Array, "images"]]:
    """Similarity of image i with text i only, in both directions, each [images]."""
    products = jnp.einsum("ikd,imd->ikm", image_tokens, text_tokens)
    return _reduce(products, image_weights, text_mask)


def shifted_scores(
    image_tokens: ImageTokens,
    text_tokens: Float[Array, "more words width"],
    image_weights: Weights,
    text_mask: Bool[Array, "more words"],
    shifts: int,
) -> Float[Array, "2 shifts1 images"]:
    """Similarity of image i with text i + k for k = 0..shifts, in both directions.

    The texts are `shifts` rows more than the images.
    """
    image_tokens, text_tokens = _float32(image_tokens, text_tokens)
    images = image_tokens.shape[0]
    scores = [
        paired_similarity(
            image_tokens,
            text_tokens[shift : shift + images],
            image_weights,
            text_mask[shift : shift + images],
        )
        for shift in range(shifts + 1)
    ]
    return jnp.stack([jnp.stack([pair[direction] for pair in scores]) for direction in (0, 1)])


def directed(
    of_pairs: Callable[[Array], Scalar], scores: Float[Array, "2 shifts1 images"]
) -> Scalar:
    """The mean of a loss's two directions, from scaled scores as `shifted_scores` gives them."""
    return (of_pairs(scores[0]) + of_pairs(scores[1])) / 2
