"""The encoders that a config can name: for each, its module and all that anybody asks about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
from einops import rearrange
from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError, choose
from mlip_jax.core.schema import ACTIVATIONS, flatten
from mlip_jax.models import building, guidance, resnet
from mlip_jax.models.bert import BertEncoder
from mlip_jax.models.grad_cam import Path, Tokens
from mlip_jax.models.resnet import ResNet
from mlip_jax.models.text import TextEncoder
from mlip_jax.models.vit import ImageEncoder, Merging

# Keys of config.model.image and .text that describe no encoder.
_NOT_OF_IMAGE = ("pretrained", "normalization", "patch_dropout", "remat")
_NOT_OF_TEXT = ("pretrained", "tokenizer", "vocab_size", "cleaning", "remat", "embedded")


def _nothing(config: ConfigDict) -> None:
    del config


@dataclass(frozen=True)
class ImageEncoderKind:
    """An image encoder.

    Attributes:
      module: a Flax module, called as `module(images, deterministic, inspect=False)` on normalised
        images [batch, size, size, 3]; returns `vit.ImageViews`. Besides `fields` it has the fields
        `dtype`, what it computes in, and `remat`, whether blocks are computed again for their
        gradient.
      fields: (config, whether for training) -> its other fields.
      grid: cells or patches along a side of its spatial tokens.
      feature_width: of its global view.
      check: raises UserError for a config that it cannot follow.
      describe: it in some words.
      seen: pixels along a side, from the first, that its spatial tokens cover.
      evidence: the layers that Grad-CAM takes: by a module's path, how to bring its output to
        [batch, tokens, width]. None: grounding and saliency are not to be had.
      patch_tokens: whether its tokens are a ViT's: they can be merged and dropped, and their
        positions fitted to another grid. Its attention has the forms of `models.attention`.
      batch_norm: whether it normalises over the batch.
    """

    module: type[nn.Module]
    fields: Callable[[ConfigDict, bool], Mapping[str, Any]]
    grid: Callable[[ConfigDict], int]
    feature_width: Callable[[ConfigDict], int]
    check: Callable[[ConfigDict], None] = _nothing
    describe: Callable[[ConfigDict], str] = lambda config: config.model.image.architecture
    seen: Callable[[ConfigDict], int] = lambda config: config.model.image.image_size
    evidence: Callable[[ConfigDict], Mapping[Path, Tokens]] | None = None
    patch_tokens: bool = False
    batch_norm: bool = False


@dataclass(frozen=True)
class TextEncoderKind:
    """A text encoder.

    Attributes:
      module: a Flax module, called as `module(token_ids, deterministic)` on ids [batch, context];
        returns `text.TextViews`. Besides `fields` it has the fields `vocab_size`, `start_id`,
        `end_id`, `dtype` and `remat`.
      fields: config -> its other fields.
      check: raises UserError for a config that it cannot follow.
      describe: it in some words.
      attention_forms: whether its attention has the forms of `models.attention`.
    """

    module: type[nn.Module]
    fields: Callable[[ConfigDict], Mapping[str, Any]]
    check: Callable[[ConfigDict], None] = _nothing
    describe: Callable[[ConfigDict], str] = lambda config: config.model.text.architecture
    attention_forms: bool = False


def _vit_fields(config: ConfigDict, training: bool) -> dict[str, Any]:
    image = _without(config.model.image, *_NOT_OF_IMAGE, "architecture", "merging")
    frequency = image.pop("frequency")
    return {
        **image,
        "merging": Merging(**_without(config.model.image.merging, "rate", "schedule")),
        "frequency_depth": frequency["depth"],
        "transform": frequency["transform"],
        "merge_counts": building.merge_counts(config),
        "training_patches": (
            building.training_patches(config) if training else building.grid(config) ** 2
        ),
        "training_merge_counts": building.merge_counts(config, training),
    }


def _vit_grid(config: ConfigDict) -> int:
    return config.model.image.image_size // config.model.image.patch_size


def _vit_seen(config: ConfigDict) -> int:
    return _vit_grid(config) * config.model.image.patch_size


def _vit_evidence(config: ConfigDict) -> dict[Path, Tokens]:
    """The normalised patch tokens that the last block attends to (our choice).

    Its class token reads nothing else, and its own patch tokens reach no global embedding. With
    attention pooling it is the tokens that are pooled. The frequency view is a mean over the tokens
    of the Frequency Stage, which come in addition.
    """
    image = config.model.image
    last = image.depth - image.frequency.depth - 1
    layers: dict[Path, Tokens] = {
        ("image_encoder", f"spatial_{last}", "norm_attention"): lambda tokens: tokens[:, 1:]
    }
    if image.pooling == "attention":
        layers = {("image_encoder", "norm_spatial"): lambda tokens: tokens}
    if image.frequency.depth:
        layers["image_encoder", "norm_frequency"] = lambda tokens: tokens
    return layers


def _describe_vit(config: ConfigDict) -> str:
    image = config.model.image
    seen = _vit_seen(config)
    unseen = "" if seen == image.image_size else f", the last {image.image_size - seen} not seen"
    return (
        f"ViT, depth {image.depth}, {image.width} wide, {image.heads} heads; "
        f"{image.image_size} px in patches of {image.patch_size}{unseen}"
    )


def _check_vit(config: ConfigDict) -> None:
    image = config.model.image
    choose("model.image.stem", image.stem, ("patch", "conv"))
    choose("model.image.pooling", image.pooling, ("class", "attention"))
    choose("model.image.activation", image.activation, ACTIVATIONS)
    choose("model.image.frequency.transform", image.frequency.transform, ("auto", "fft", "matmul"))
    guidance.parts(image.merging.guidance)
    check_sizes(config, "image")
    _check_guidance(config)
    if image.image_size < image.patch_size:
        raise UserError(
            f"config.model.image.image_size={image.image_size} is smaller than "
            f"patch_size={image.patch_size}"
        )
    if image.stem == "conv" and image.patch_size & (image.patch_size - 1):
        raise UserError(
            f"config.model.image.stem='conv' halves the image: patch_size={image.patch_size} must "
            "be a power of two, or the stem 'patch'"
        )
    if image.frequency.depth >= image.depth:
        raise UserError(
            f"config.model.image.frequency.depth={image.frequency.depth} must be from 0 to "
            f"{image.depth - 1}: the Spatial Stage needs at least one of the {image.depth} blocks"
        )


def _check_guidance(config: ConfigDict) -> None:
    """Finds a guidance of the merging that the encoder cannot give."""
    image = config.model.image
    if image.merging.rate <= 0:
        return
    guides = [guidance.GUIDES[name] for name in guidance.parts(image.merging.guidance)]
    if image.frequency.depth == 0 and any(guide.frequency for guide in guides):
        raise UserError(
            f"config.model.image.merging.guidance={image.merging.guidance!r} needs a Frequency "
            "Stage (config.model.image.frequency.depth > 0); use 'spatial' or 'none'"
        )
    if image.pooling != "class" and any(guide.class_token for guide in guides):
        raise UserError(
            f"config.model.image.merging.guidance={image.merging.guidance!r} needs a class token, "
            f"which config.model.image.pooling={image.pooling!r} goes without; use 'frequency' or "
            "'none'"
        )


def _check_resnet(config: ConfigDict) -> None:
    image = config.model.image
    choose("model.image.stem", image.stem, ("imagenet", "small"))
    if image.depth not in resnet.DEPTHS:
        depths = ", ".join(map(str, resnet.DEPTHS))
        raise UserError(f"config.model.image.depth={image.depth}: a ResNet has {depths} layers")
    for key, what in (
        ("merging.rate", "it has no tokens to merge"),
        ("frequency.depth", "a Frequency Stage is a part of a ViT"),
        ("dropout", "it has none"),
        ("drop_path", "it has none"),
        ("patch_dropout", "it has no patches"),
        ("pre_norm", "it has none"),
    ):
        value = flatten(image.to_dict())[key]
        if value:
            raise UserError(
                f"config.model.image.{key}={value} does not go with a ResNet: {what}; set it to 0, "
                "or config.model.image.architecture='vit'"
            )


def _describe_resnet(config: ConfigDict) -> str:
    image = config.model.image
    return f"ResNet-{image.depth}, {image.width} channels in the first stage; {image.image_size} px"


def _resnet_evidence(config: ConfigDict) -> dict[Path, Tokens]:
    """Its last grid."""
    path = ("image_encoder", resnet.last_block(config.model.image.depth))
    return {path: lambda cells: rearrange(cells, "b r c d -> b (r c) d")}


def _check_clip(config: ConfigDict) -> None:
    text = config.model.text
    choose("model.text.pooling", text.pooling, ("last", "mean", "first", "highest", "final"))
    check_sizes(config, "text")
    if text.pretrained:
        raise UserError(
            "config.model.text.pretrained is for config.model.text.architecture='bert'; leave it "
            "'' for 'clip'"
        )


def _check_bert(config: ConfigDict) -> None:
    text = config.model.text
    choose("model.text.pooling", text.pooling, ("tanh", "first", "mean", "mean_all", "last"))
    check_sizes(config, "text")
    if text.drop_path:
        raise UserError(
            f"config.model.text.drop_path={text.drop_path} does not go with 'bert': set it to 0"
        )


def check_sizes(config: ConfigDict, part: str) -> None:
    """Raises UserError for a width, heads or mlp_ratio of config.model.`part` that do not go."""
    sizes = config.model[part]
    if sizes.width % sizes.heads:
        raise UserError(
            f"config.model.{part}.width={sizes.width} is not a multiple of heads={sizes.heads}"
        )
    if round(sizes.width * sizes.mlp_ratio) < 1:
        raise UserError(
            f"config.model.{part}.mlp_ratio={sizes.mlp_ratio} leaves nothing of the width "
            f"{sizes.width}: raise it"
        )


def _describe_text(words: str, config: ConfigDict) -> str:
    text = config.model.text
    return f"{words}, depth {text.depth}, {text.width} wide, {text.heads} heads"


def _without(section: ConfigDict, *names: str) -> dict[str, Any]:
    return {name: value for name, value in section.to_dict().items() if name not in names}


VIT = ImageEncoderKind(
    module=ImageEncoder,
    fields=_vit_fields,
    grid=_vit_grid,
    feature_width=lambda config: config.model.image.width,
    check=_check_vit,
    describe=_describe_vit,
    seen=_vit_seen,
    evidence=_vit_evidence,
    patch_tokens=True,
)
RESNET = ImageEncoderKind(
    module=ResNet,
    fields=lambda config, training: {
        name: config.model.image[name] for name in ("depth", "width", "stem")
    },
    grid=lambda config: (
        -(-config.model.image.image_size // resnet.reduction(config.model.image.stem))
    ),
    feature_width=lambda config: resnet.feature_width(
        config.model.image.depth, config.model.image.width
    ),
    check=_check_resnet,
    describe=_describe_resnet,
    evidence=_resnet_evidence,
    batch_norm=True,
)
CLIP = TextEncoderKind(
    module=TextEncoder,
    fields=lambda config: _without(config.model.text, *_NOT_OF_TEXT, "architecture"),
    check=_check_clip,
    describe=lambda config: _describe_text(
        "causal transformer" if config.model.text.causal else "bidirectional transformer", config
    ),
    attention_forms=True,
)
BERT = TextEncoderKind(
    module=BertEncoder,
    fields=lambda config: _without(
        config.model.text,
        *_NOT_OF_TEXT,
        "architecture",
        *("causal", "drop_path", "attend_padding", "norm_epsilon"),
    ),
    check=_check_bert,
    describe=lambda config: _describe_text("BERT", config),
)
