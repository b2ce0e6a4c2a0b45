"""Encoders and heads: a batch of images and token ids -> embeddings of every perspective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mlip_jax.core.registry import IMAGE_ENCODERS, PREDICTIONS, TEXT_ENCODERS
from mlip_jax.core.schema import IMAGE_VIEWS, PERSPECTIVES
from mlip_jax.models.dropout import numbered, row_keys
from mlip_jax.models.heads import (
    ConcatCritic,
    LinearHead,
    PriorDiscriminator,
    ProjectionHead,
)
from mlip_jax.models.text import TextViews
from mlip_jax.models.vit import ImageViews

Embeddings = dict[str, Array]
# What the names of parameters begin with that serve learning from teachers alone.
OF_TEACHERS = "teacher_heads_"
PREDICTORS = "predictors_"  # what the parameters of predictions are named after


class TwoTower(nn.Module):
    """Image and text encoder with a head for every view that some perspective uses.

    Each image view has a projection of its own; the texts have one projection for the global
    level and one for the token level, so that all views of a level share one space. The
    perspectives within a modality have two projections each, one a side.
    Attributes `image` and `text` are the encoders' fields and their "architecture"; `critics` maps
    each perspective in use to its initial (scale, bias or None). A "concat" critic takes the
    encoders' features as they are: there are no heads on global views then. `predictions` maps each
    perspective in use that predicts to its module's fields. `frozen` names the towers ("image",
    "text") that run as in evaluation. `to_teachers` maps the names of projections of embeddings to
    the widths that they give.
    """

    image: Mapping[str, Any]
    text: Mapping[str, Any]
    embed_dim: int
    token_dim: int
    head: str
    critic: str
    prior: bool
    critics: Mapping[str, tuple[float, float | None]]
    predictions: Mapping[str, Mapping[str, Any]]
    frozen: tuple[str, ...]
    dtype: jnp.dtype
    to_teachers: Mapping[str, int] = field(default_factory=dict)

    if TYPE_CHECKING:

        def apply(self, *args: Any, **kwargs: Any) -> Any:
            """What the method returns; Flax's type takes it for variables as well."""

    def setup(self) -> None:
        self.image_encoder = self._encoder(IMAGE_ENCODERS, self.image)
        self.text_encoder = self._encoder(TEXT_ENCODERS, self.text)
        # A set's order would differ between processes, and so would their programs.
        views = dict.fromkeys([*self.critics, *(PERSPECTIVES[view] for view in self.critics)])
        heads = {view: self._head(view) for view in views}
        self.image_heads = {view: head for view, head in heads.items() if _is_of_images(view)}
        self.text_heads = {view: head for view, head in heads.items() if not _is_of_images(view)}
        pairwise = self.critic == "concat"
        self.pair_critics = {
            view: ConcatCritic(self.dtype)
            for view in self.critics
            if pairwise and level(view) != "tokens"
        }
        scaled = [view for view in self.critics if view not in self.pair_critics]
        self.log_scales = {
            view: self.param(
                f"log_scale_{view}",
                nn.initializers.constant(jnp.log(self.critics[view][0])),
                (),
            )
            for view in scaled
        }
        self.biases = {
            view: self.param(f"bias_{view}", nn.initializers.constant(bias), ())
            for view in self.critics
            if (bias := self.critics[view][1]) is not None
        }
        self.priors = (
            {side: PriorDiscriminator(self.dtype) for side in ("image", "text")}
            if self.prior
            else {}
        )
        self.teacher_heads = {
            name: LinearHead(width, self.dtype) for name, width in self.to_teachers.items()
        }
        self.predictors = {
            name: PREDICTIONS[name].module(**fields, dtype=self.dtype)
            for name, fields in self.predictions.items()
        }

    def _encoder(self, kinds: Mapping[str, Any], fields: Mapping[str, Any]) -> nn.Module:
        fields = dict(fields)
        return kinds[fields.pop("architecture")].module(**fields, dtype=self.dtype)

    def _head(self, view: str) -> nn.Module | None:
        if level(view) == "tokens":
            return LinearHead(self.token_dim, self.dtype)
        if self.critic == "concat":
            return None
        if self.head == "projection_block":
            return ProjectionHead(self.embed_dim, self.dtype)
        return LinearHead(self.embed_dim, self.dtype, bias=self.head == "linear_bias")

    def __call__(
        self,
        images: Float[Array, "batch image_size image_size 3"],
        token_ids: Int[Array, "batch context"] | Float[Array, "batch width"],
        images_2: Float[Array, "batch image_size image_size 3"] | None = None,
        token_ids_2: Int[Array, "batch context"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Embeddings, dict[str, Array], dict[str, Array]]:
        """Embeds a batch.

        Args:
          images: normalised.
          token_ids: of their captions; or float32 [batch, width], the global view that the text
            encoder gives of them, where nothing else of it is asked for.
          images_2: another view of each image, for the perspective "augmented_image".
          token_ids_2: another caption of each, for "other_caption".
          deterministic: as in evaluation: no dropout, running statistics.

        Returns:
          Embeddings by view (see `objectives.perspectives.term_loss`), with them the sum of each
          example's losses and their number, "..._count", of every prediction; scales (not their
          logs) and biases by perspective.
        """
        with numbered(self):
            image, embeddings = self._embed("image", images, images_2, deterministic)
            text, of_texts = self._embed("text", token_ids, token_ids_2, deterministic)
            embeddings |= of_texts
            for name, predictor in self.predictors.items():
                losses, counts = predictor(image, text, token_ids, deterministic)
                embeddings |= {name: losses, f"{name}_count": counts}
        return embeddings, *self.scales_and_biases()

    def scales_and_biases(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """Scales (not their logs) and biases by perspective."""
        scales = {view: jnp.exp(log_scale) for view, log_scale in self.log_scales.items()}
        return scales, dict(self.biases)

    def embed_images(
        self, images: Array, deterministic: bool = True, images_2: Array | None = None
    ) -> Embeddings:
        """Normalised embeddings of every image view in use, and "sizes" [batch, merged].

        The views of "augmented_image" are there when `images_2` is given.
        """
        return self._embed("image", images, images_2, deterministic)[1]

    def embed_texts(
        self, token_ids: Array, deterministic: bool = True, token_ids_2: Array | None = None
    ) -> Embeddings:
        """Normalised embeddings of the text views in use, and "text_mask" [batch, context].

        The views of "other_caption" are there when `token_ids_2` is given.
        """
        return self._embed("text", token_ids, token_ids_2, deterministic)[1]

    def _embed(
        self, tower: str, inputs: Array, second_inputs: Array | None, deterministic: bool
    ) -> tuple[Any, Embeddings]:
        """A tower's views of the inputs, and the embeddings of those in use with what they need."""
        heads = self.image_heads if tower == "image" else self.text_heads
        views, second = self._encode(tower, inputs, second_inputs, deterministic)
        embeddings = {}
        for view, head in heads.items():
            features = _features(view, views, second)
            if features is not None:
                embeddings[view] = _project(head, features, deterministic)
        embeddings |= self._prior(tower, _global(views), deterministic)
        if tower == "image":
            return views, embeddings | {"sizes": views.sizes}
        return views, embeddings | {"text_mask": views.mask}

    def _encode(
        self, tower: str, inputs: Array, second: Array | None, deterministic: bool
    ) -> tuple[Any, Any]:
        """The views of the inputs and of the second inputs, by one pass; None without them."""
        encoder = self.image_encoder if tower == "image" else self.text_encoder
        deterministic = deterministic or tower in self.frozen
        if tower == "text" and jnp.issubdtype(inputs.dtype, jnp.floating):
            return _known(inputs.astype(self.dtype)), None
        if second is None:
            return encoder(inputs, deterministic), None
        # In turn, so that an example's two rows stay on its device; in one pass, so that batch norm
        # moves its statistics once a step.
        both = jnp.stack([inputs, second], axis=1).reshape(-1, *inputs.shape[1:])
        views = encoder(both, deterministic)
        return tuple(jax.tree.map(lambda rows, of=of: rows[of::2], views) for of in (0, 1))

    def _prior(self, side: str, features: Array, deterministic: bool) -> Embeddings:
        """The discriminator's logits of the prior and of the features, in training."""
        if not self.prior or (deterministic and not self.is_initializing()):
            return {}
        features = features.astype(jnp.float32)
        prior = features  # at initialisation there is no chance to draw from
        if not self.is_initializing():
            keys = row_keys(self, len(features))
            prior = jax.vmap(lambda key: jax.random.uniform(key, features.shape[1:]))(keys)
        discriminate = self.priors[side]
        logits = jnp.stack([discriminate(prior), discriminate(features)], axis=-1)
        return {f"{side}_prior": logits}

    def score_pairs(
        self, view: str, one: Float[Array, "batch width"], other: Float[Array, "k batch width_2"]
    ) -> Float[Array, "k batch"]:
        """What the concat critic of a perspective says of features, `other` several times over.

        Its bias is added, where it learns one.
        """
        one = jnp.broadcast_to(one, (*other.shape[:2], one.shape[-1]))
        return self.pair_critics[view](one, other) + self.biases.get(view, 0.0)

    def project_to_teacher(
        self, name: str, embeddings: Float[Array, "batch width"]
    ) -> Float[Array, "batch teacher_width"]:
        """Embeddings by one of the projections of `to_teachers`, L2-normalised."""
        projected: Array = self.teacher_heads[name](embeddings)
        return projected

    def touch(
        self,
        images: Array,
        token_ids: Array,
        images_2: Array | None = None,
        token_ids_2: Array | None = None,
    ) -> None:
        """Calls all that has parameters, so that initialisation finds it; takes a batch."""
        embeddings, _, _ = self(images, token_ids, images_2, token_ids_2)
        for view in self.pair_critics:
            self.score_pairs(view, embeddings[view], embeddings[PERSPECTIVES[view]][None])
        for name in self.teacher_heads:
            self.project_to_teacher(name, embeddings["text_global"])  # all are as wide

    def text_features(self, token_ids: Int[Array, "batch context"]) -> Float[Array, "batch width"]:
        """The text encoder's global view, before the heads; float32."""
        views, _ = self._encode("text", token_ids, None, True)
        return views.text_global.astype(jnp.float32)

    def inspect_images(self, images: Array) -> ImageViews:
        """The image encoder's views before the heads, with the sources of merged tokens."""
        return self.image_encoder(images, True, inspect=True)


def _known(text_global: Array) -> TextViews:
    """The views of texts of which no more than the global one is known: they have no words."""
    batch, width = text_global.shape
    return TextViews(text_global, jnp.zeros((batch, 0, width)), jnp.zeros((batch, 0), bool))


def _is_of_images(view: str) -> bool:
    return view in IMAGE_VIEWS or view.startswith("augmented_image")


def _features(
    view: str, views: ImageViews | TextViews, second: ImageViews | TextViews | None
) -> Array | None:
    """What the head of a view takes; None for the pairs of a modality without second views."""
    if hasattr(views, view):
        return getattr(views, view)
    if second is None:
        return None
    return _global(second if view.endswith("_2") else views)


def _global(views: ImageViews | TextViews) -> Array:
    return views.spatial_global if isinstance(views, ImageViews) else views.text_global


def _project(head: nn.Module | None, features: Array, deterministic: bool) -> Array:
    return features.astype(jnp.float32) if head is None else head(features, deterministic)


def level(view: str) -> str:
    """ "global" or "tokens", the level of a view's name."""
    return view.rsplit("_", 1)[-1]
