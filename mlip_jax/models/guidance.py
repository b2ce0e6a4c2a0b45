"""Where token merging's importance of a patch comes from: one table of ways to tell it.

A way reads what the image encoder has at hand, either once, before the Spatial Stage (its scores
are then merged along with the tokens), or anew in every block that merges. Only ranks count: see
`merging.importance`. All of them are our choice; the evaluation `guidance` measures them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.models import merging
from mlip_jax.models.frequency import filter_grid, resolve_transform

TEMPERATURE = 0.1  # of closeness to the mean token
_KEPT = 0.25  # share of the frequencies, from the lowest, that count as low in each direction

Scores = Float[Array, "batch patches"]


class Before(NamedTuple):
    """What is known of an image before the Spatial Stage, on its grid of patches."""

    pixels: Float[Array, "batch rows columns side side 3"]  # normalised
    embedding: Float[Array, "batch rows columns width"]  # the patches', without positions
    features: Float[Array, "batch rows columns width"] | None  # frequency tokens, if there are any


class Seen(NamedTuple):
    """What a block of the Spatial Stage knows of its patch tokens when it merges."""

    class_attention: Scores  # head-mean attention of the first token, which is the class token
    received: Scores  # head-mean attention of all tokens, the mean over them
    features: Float[Array, "batch patches width"] | None  # frequency tokens, merged alike
    scores: Mapping[str, Scores]  # of the ways that read the image before, merged alike


@dataclass(frozen=True)
class Guide:
    """A way to tell how important each patch is.

    Attributes:
      about: it in some words.
      before: `Before` -> the scores; None: it reads `Seen`.
      within: `Seen` -> the scores.
      frequency: whether it needs a Frequency Stage.
      class_token: whether it needs a class token.
    """

    about: str
    before: Callable[[Before], Scores] | None = None
    within: Callable[[Seen], Scores] | None = None
    frequency: bool = False
    class_token: bool = False


def _features(seen: Seen) -> tuple[Array, Array]:
    """The frequency tokens and their mean over the tokens, float32, without a gradient."""
    assert seen.features is not None  # `check` has seen to it
    features = jax.lax.stop_gradient(seen.features.astype(jnp.float32))
    return features, jnp.mean(features, axis=1, keepdims=True)


def frequency_importance(features: Float[Array, "batch patches width"]) -> Scores:
    """a_f = softmax over tokens of cos(F_n, mean F) / 0.1."""
    features = jax.lax.stop_gradient(features.astype(jnp.float32))
    mean = jnp.mean(features, axis=1, keepdims=True)
    return jax.nn.softmax(_cosine(features, mean) / TEMPERATURE, axis=-1)


def _cosine(tokens: Array, mean: Array) -> Scores:
    norms = jnp.linalg.norm(tokens, axis=-1) * jnp.linalg.norm(mean, axis=-1)
    return jnp.sum(tokens * mean, axis=-1) / jnp.maximum(norms, 1e-12)


def _closeness(seen: Seen) -> Scores:
    return frequency_importance(_features(seen)[0])


def _distance(seen: Seen) -> Scores:
    return -_cosine(*_features(seen))


def _norm(seen: Seen) -> Scores:
    return jnp.linalg.norm(_features(seen)[0], axis=-1)


def _projection(seen: Seen) -> Scores:
    features, mean = _features(seen)
    return jnp.sum(features * mean, axis=-1)


def _high_frequency(before: Before) -> Scores:
    assert before.features is not None
    grid = before.features.astype(jnp.float32)
    rows, columns = grid.shape[1:3]
    low_rows = jnp.abs(jnp.fft.fftfreq(rows)) <= _KEPT / 2
    low_columns = jnp.fft.rfftfreq(columns) <= _KEPT / 2
    low = (low_rows[:, None] & low_columns).astype(jnp.float32)
    gain = jnp.stack([low, jnp.zeros_like(low)], axis=-1)
    kernel = jnp.broadcast_to(gain[:, :, None], (*low.shape, grid.shape[-1], 2))
    smooth = filter_grid(grid, kernel, resolve_transform("auto"))
    return _flat(jnp.linalg.norm(grid - smooth, axis=-1))


def _contrast(before: Before) -> Scores:
    """The standard deviation of a patch's pixels about its mean colour."""
    centred = before.pixels - jnp.mean(before.pixels, axis=(3, 4), keepdims=True)
    return _flat(jnp.sqrt(jnp.mean(centred**2, axis=(3, 4, 5))))


def _edges(before: Before) -> Scores:
    """The spectrum of a patch's pixels, weighed by the square of the frequency: its gradient."""
    differences = (jnp.diff(before.pixels, axis=axis) ** 2 for axis in (3, 4))
    return _flat(jnp.sqrt(sum(jnp.sum(each, axis=(3, 4, 5)) for each in differences)))


def _border(before: Before) -> Scores:
    """The distance of a patch's pixels from the median colour of the outermost pixels.

    What fills the border is background more often than not (Zhu et al., CVPR 2014).
    """
    pixels = rearrange(before.pixels, "b r c p q ch -> b (r p) (c q) ch")
    sides = pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]
    color = jnp.median(jnp.concatenate(sides, axis=1), axis=1)
    apart = (before.pixels - color[:, None, None, None, None]) ** 2
    return _flat(jnp.sqrt(jnp.mean(apart, axis=(3, 4, 5))))


def _embedding(before: Before) -> Scores:
    """How far a patch's embedding lies from the image's mean patch."""
    tokens = before.embedding.astype(jnp.float32)
    return _flat(jnp.linalg.norm(tokens - jnp.mean(tokens, axis=(1, 2), keepdims=True), axis=-1))


def _random(before: Before) -> Scores:
    """Drawn by the image's pixels: the same wherever it stands in a batch."""
    pixels = rearrange(before.pixels.astype(jnp.float32), "b r c p q ch -> b (r c p q ch)")
    factors = 2 * jnp.arange(pixels.shape[1], dtype=jnp.uint32) + 1
    bits = jnp.sum(jax.lax.bitcast_convert_type(pixels, jnp.uint32) * factors, axis=1)
    count = before.pixels.shape[1] * before.pixels.shape[2]
    return jax.vmap(
        lambda bits: jax.random.uniform(jax.random.fold_in(jax.random.key(0), bits), (count,))
    )(bits)


def _flat(grid: Float[Array, "batch rows columns"]) -> Scores:
    return jax.lax.stop_gradient(rearrange(grid, "b r c -> b (r c)"))


GUIDES: Mapping[str, Guide] = {
    "spatial": Guide(
        "attention of the class token", within=lambda seen: seen.class_attention, class_token=True
    ),
    "frequency": Guide("closeness to the mean frequency token", within=_closeness, frequency=True),
    "received": Guide("attention of all tokens", within=lambda seen: seen.received),
    "distance": Guide("distance from the mean frequency token", within=_distance, frequency=True),
    "norm": Guide("norm of the frequency token", within=_norm, frequency=True),
    "projection": Guide(
        "product with the mean frequency token", within=_projection, frequency=True
    ),
    "high_frequency": Guide(
        "what a low-pass filter takes from the frequency token",
        before=_high_frequency,
        frequency=True,
    ),
    "contrast": Guide("standard deviation of the pixels", before=_contrast),
    "edges": Guide("gradient of the pixels", before=_edges),
    "border": Guide("distance of the pixels from the border's colour", before=_border),
    "embedding": Guide("distance of the patch embedding from the mean one", before=_embedding),
    "random": Guide("drawn by lot", before=_random),
}
NONE = "none"  # ToMe's merging
BOTH = "both"  # another word for "frequency+spatial"


def parts(guidance: str) -> tuple[str, ...]:
    """The names of GUIDES in the value of config.model.image.merging.guidance: none, one or two.

    Raises:
      UserError: for anything else; it names the nearest.
    """
    if guidance == NONE:
        return ()
    names = tuple(("frequency+spatial" if guidance == BOTH else guidance).split("+"))
    valid = (NONE, BOTH, *GUIDES)
    wrong = next((name for name in names if name not in GUIDES), None)
    if wrong is not None or len(names) > 2:
        raise UserError(
            f"config.model.image.merging.guidance={guidance!r}: expected one of "
            f"{', '.join(valid)}, or two of the ways as ONE+OTHER"
            f"{suggestion(guidance if wrong is None else wrong, valid)}"
        )
    return names


def possible(*, frequency: bool, class_token: bool) -> tuple[str, ...]:
    """The names of the ways that an encoder with or without these has."""
    return tuple(
        name
        for name, guide in GUIDES.items()
        if (frequency or not guide.frequency) and (class_token or not guide.class_token)
    )


def scores_before(names: Iterable[str], before: Before) -> dict[str, Scores]:
    """The scores of those of the ways that read the image before the Spatial Stage."""
    guides = ((name, GUIDES[name].before) for name in names)
    return {name: read(before) for name, read in guides if read is not None}


def scores_within(name: str, seen: Seen) -> Scores:
    """The scores of one way in a block."""
    read = GUIDES[name].within
    return seen.scores[name] if read is None else read(seen)


def importance(names: tuple[str, ...], mix: float, seen: Seen) -> Scores | None:
    """G of one way or of two, `mix` of the first; None of none."""
    if not names:
        return None
    first, *other = (scores_within(name, seen) for name in names)
    return merging.importance(other[0] if other else None, first, mix)


def all_scores(
    names: tuple[str, ...], configured: tuple[str, ...], mix: float, seen: Seen
) -> dict[str, Scores]:
    """What each of the named ways says, and of two together those that stand to reason.

    Args:
      names: from `possible`.
      configured: from `parts`, of the encoder's own guidance.
      mix: the weight of the first of two.
      seen: in a block.
    """
    scores = {name: scores_within(name, seen) for name in names}
    pairs = {BOTH: parts(BOTH)}
    if len(configured) == 2 and configured != pairs[BOTH]:
        pairs["+".join(configured)] = configured
    for name, pair in pairs.items():
        if set(pair) <= set(names):
            scores[name] = cast(Scores, importance(pair, mix, seen))
    return scores


def grid_of(images: Float[Array, "batch height width 3"], patch_size: int) -> Array:
    """The pixels of whole patches, as `Before` has them."""
    rows, columns = (side // patch_size * patch_size for side in images.shape[1:3])
    return rearrange(
        images[:, :rows, :columns],
        "b (r p) (c q) ch -> b r c p q ch",
        p=patch_size,
        q=patch_size,
    )
