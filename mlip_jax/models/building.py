"""From a config to the model it describes, and to what follows from its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError
from mlip_jax.core.registry import IMAGE_ENCODERS, LOSSES, PREDICTIONS, TEXT_ENCODERS
from mlip_jax.core.schema import PERSPECTIVES, is_used
from mlip_jax.models import merging
from mlip_jax.models.grad_cam import Path, Tokens
from mlip_jax.models.two_tower import Embeddings, TwoTower

if TYPE_CHECKING:
    from mlip_jax.models.encoders import ImageEncoderKind


@runtime_checkable
class Vocabulary(Protocol):
    """What a model must know of its tokenizer."""

    vocab_size: int
    sot: int  # the start-of-text token
    eot: int
    pads_left: bool


def compute_dtype(config: ConfigDict) -> jnp.dtype:
    """The config's compute dtype; "auto" is bfloat16 unless the devices are CPUs."""
    name = config.compute_dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def image_encoder(config: ConfigDict) -> ImageEncoderKind:
    """The entry of the image encoder that a config names.

    Raises:
      UserError: for a name that is not in the table.
    """
    return IMAGE_ENCODERS[config.model.image.architecture]


def grid(config: ConfigDict) -> int:
    """Patches (of a ViT) or cells of the last features (of a ResNet) along a side of the image."""
    return image_encoder(config).grid(config)


def seen(config: ConfigDict) -> int:
    """Pixels along a side of the image that the grid covers; the last ones may fill no patch."""
    return image_encoder(config).seen(config)


def evidence_layers(config: ConfigDict) -> Mapping[Path, Tokens]:
    """The layers that Grad-CAM takes: the last ones whose tokens have a place in the image.

    Returns:
      By the module's path, how to bring its output to [batch, tokens, width].

    Raises:
      UserError: for an encoder that has none.
    """
    evidence = image_encoder(config).evidence
    if evidence is None:
        raise UserError(
            f"the image encoder {config.model.image.architecture!r} names no layers whose tokens "
            "have a place in the image: it cannot be grounded"
        )
    return evidence(config)


def training_patches(config: ConfigDict) -> int:
    """Patches of an image that patch dropout keeps, rounded; at least one."""
    return max(1, round((1 - config.model.image.patch_dropout) * grid(config) ** 2))


def merge_counts(config: ConfigDict, training: bool = False) -> tuple[int, ...]:
    """Tokens merged in each block of the Spatial Stage (see `merging.schedule`).

    Args:
      config: the run's config.
      training: of the patches that patch dropout keeps; otherwise of all.
    """
    image = config.model.image
    if not image_encoder(config).patch_tokens:
        return ()
    patches = training_patches(config) if training else grid(config) ** 2
    blocks = image.depth - image.frequency.depth
    try:
        return merging.schedule(image.merging.rate, patches, blocks, image.merging.schedule)
    except UserError as error:
        if patches == grid(config) ** 2:
            raise
        raise UserError(
            f"{error} (of the {patches} patches that config.model.image.patch_dropout="
            f"{image.patch_dropout} keeps)"
        ) from None


def build(
    config: ConfigDict, *, vocab_size: int, start_id: int, end_id: int, training: bool = True
) -> TwoTower:
    """The model that a config describes.

    Args:
      config: the run's config.
      vocab_size: the tokenizer's size.
      start_id: its start-of-text token.
      end_id: its end-of-text token.
      training: whether config.model.*.remat and patch_dropout count: what takes no gradient of
        parameters says no.

    Raises:
      UserError: for a merging rate that its schedule cannot reach.
    """
    model = config.model
    critics = {
        view: (
            config.perspectives[view].init_scale,
            config.perspectives[view].init_bias
            if config.perspectives[view].learn_bias
            or LOSSES[config.perspectives[view].loss].learns_bias
            else None,
        )
        for view in PERSPECTIVES  # a ConfigDict would give them by the alphabet
        if is_used(config, view)
    }
    texts = {"vocab_size": vocab_size, "start_id": start_id, "end_id": end_id}
    return TwoTower(
        image={
            "architecture": model.image.architecture,
            **image_encoder(config).fields(config, training),
            "remat": training and model.image.remat,
        },
        text={
            "architecture": model.text.architecture,
            **TEXT_ENCODERS[model.text.architecture].fields(config),
            **texts,
            "remat": training and model.text.remat,
        },
        embed_dim=model.embed_dim,
        token_dim=model.token_dim,
        head=model.head,
        critic=model.critic,
        prior=model.prior_weight > 0,
        critics=critics,
        predictions={
            name: {
                **PREDICTIONS[name].fields(config),
                **texts,
                "remat": training and model[name].remat,
            }
            for name in PREDICTIONS
            if config.perspectives[name].weight > 0
        },
        frozen=tuple(tower for tower in ("image", "text") if not config.optimizer.rates[tower]),
        dtype=compute_dtype(config),
    )


def build_for(config: ConfigDict, tokenizer: Vocabulary, *, training: bool = True) -> TwoTower:
    """The model that a config describes, for the texts of a tokenizer; see `build`.

    Raises:
      UserError: as `build`, and for a decoder of texts that a tokenizer pads at their beginning.
    """
    if tokenizer.pads_left and config.perspectives.caption.weight > 0:
        raise UserError(
            f"config.model.text.tokenizer={config.model.text.tokenizer!r} pads texts at their "
            "beginning, which the caption decoder cannot read: set "
            "config.perspectives.caption.weight=0, or take another tokenizer"
        )
    return build(
        config,
        vocab_size=tokenizer.vocab_size,
        start_id=tokenizer.sot,
        end_id=tokenizer.eot,
        training=training,
    )


def with_attention(network: TwoTower, forms: Mapping[str, str]) -> TwoTower:
    """The model with other forms of attention; the parameters are the same.

    Args:
      network: the model.
      forms: of some towers ("image", "text"); see `models.attention`.
    """
    towers = {"image": network.image, "text": network.text}
    changed: dict[str, Any] = {
        name: {**towers[name], "attention_form": form} for name, form in forms.items()
    }
    return network.clone(**changed)


def parameter_shapes(config: ConfigDict, tokenizer: Vocabulary) -> Any:
    """The shapes and types of the parameters of `build_for`."""
    network = build_for(config, tokenizer, training=False)
    key = jax.random.key(0)
    return jax.eval_shape(lambda: initialise(network, config, key)["params"])


def embed_kept(network: TwoTower, variables: Any, images: Array, config: ConfigDict) -> Embeddings:
    """`embed_images` of what patch dropout keeps, with nothing else left out: to count its work."""
    return _of_kept(network, variables, config, images, method="embed_images")


def all_kept(
    network: TwoTower, variables: Any, images: Array, token_ids: Array, config: ConfigDict
) -> Embeddings:
    """The network's embeddings of images and texts, and what it predicts, as `embed_kept`."""
    embeddings: Embeddings = _of_kept(network, variables, config, images, token_ids)[0]
    return embeddings


def _of_kept(
    network: TwoTower, variables: Any, config: ConfigDict, *inputs: Array, method: str | None = None
) -> Any:
    if not config.model.image.patch_dropout:
        return network.apply(variables, *inputs, method=method)
    image = {**network.image, "dropout": 0.0, "drop_path": 0.0}
    result, _ = network.clone(image=image).apply(
        variables,
        *inputs,
        deterministic=False,
        rngs={"dropout": jax.random.key(0)},
        mutable=["batch_stats"],
        method=method,
    )
    return result


def initialise(network: TwoTower, config: ConfigDict, key: Array) -> dict[str, Any]:
    """The network's variables at the start: "params" and, with batch norm, "batch_stats"."""
    size = config.model.image.image_size
    # Two examples: shapes only, parameters do not depend on the values.
    images = jnp.zeros((2, size, size, 3), jnp.float32)
    token_ids = jnp.zeros((2, config.model.text.context_length), jnp.int32)
    variables = network.init(
        key,
        images,
        token_ids,
        images if "augmented_image" in network.critics else None,
        token_ids if "other_caption" in network.critics else None,
        method="touch",
    )
    return dict(variables)
