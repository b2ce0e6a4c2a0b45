"""The parts of a model that a config takes from files of other programs."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from mlip_jax.core import places
from mlip_jax.core.errors import UserError
from mlip_jax.data.images.preprocessing import NORMALIZATIONS, Preprocessing
from mlip_jax.interop import bert, model_folders, positions, resnet
from mlip_jax.models import building


def read(config: ConfigDict, wanted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `config.model.pretrained` or `config.model.*.pretrained` name; {} where they do not.

    Of a whole model every parameter is taken that the config's model has too; positions are
    resampled for another image size. Blocks of a Frequency Stage that it goes without start as
    copies of their input, by a last layer of zeros, so that the run starts as the model that it
    starts from: a choice of ours.

    Args:
      config: the run's.
      wanted: the model's variables, or anything with their structure and shapes.

    Returns:
      Variables of float32 numpy arrays: collection -> encoder -> its tree.

    Raises:
      UserError: for a file that cannot be read, or holds another model than the config's.
    """
    place = _place(config)
    if not place:
        return {}
    whole = bool(config.model.pretrained)
    variables = _read_whole(config, wanted) if whole else _read_towers(config, wanted)
    model_folders.check_finite(variables, place)
    return variables


def _place(config: ConfigDict) -> str:
    """What the model, or its towers, start from; "" where nothing is named."""
    model = config.model
    towers = (model.image.pretrained, model.text.pretrained)
    return model.pretrained or " and ".join(filter(None, towers))


def _read_towers(config: ConfigDict, wanted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    image, text = config.model.image.pretrained, config.model.text.pretrained
    variables: dict[str, dict[str, Any]] = {"params": {}}
    if text:
        _check_sizes(config, text)
        variables["params"]["text_encoder"] = bert.read(text, wanted["params"]["text_encoder"])
    if image and _is_described(config):
        _read_image_tower(config, wanted, variables)
    elif image:
        params, stats = resnet.read(
            image, wanted["params"]["image_encoder"], wanted["batch_stats"]["image_encoder"]
        )
        variables["params"]["image_encoder"] = params
        variables["batch_stats"] = {"image_encoder": stats}
    return variables


def _is_described(config: ConfigDict) -> bool:
    """Whether what the image encoder starts from says what it is; torchvision's ResNets do not."""
    if config.model.image.architecture != "resnet":
        return True
    folder = places.local(config.model.image.pretrained).expanduser()
    try:
        return model_folders.kind(folder) in ("workdir", "exported")
    except UserError:
        return False


def _read_image_tower(
    config: ConfigDict, wanted: Mapping[str, Any], variables: dict[str, dict[str, Any]]
) -> None:
    folder = places.local(config.model.image.pretrained).expanduser()
    pretrained, _ = model_folders.image_tower(folder)
    image = config.model.image
    _check_tower(folder, "image", image, pretrained, _IMAGE_SIZES)
    for depth, kept in ((image, pretrained), (image.frequency, pretrained.frequency)):
        if depth.depth != kept.depth:
            raise UserError(
                f"config.model.image has {image.depth} blocks, {image.frequency.depth} of them of "
                f"the Frequency Stage, but the encoder in {folder} has {pretrained.depth} and "
                f"{pretrained.frequency.depth}: set depth and frequency.depth so"
            )
    towers = model_folders.read_image_tower(folder, wanted["params"]["image_encoder"])
    if building.image_encoder(config).patch_tokens:
        towers["params"] = positions.fit(towers["params"], building.grid(config))
    for collection, part in towers.items():
        shapes, found = (
            {name: leaf.shape for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
            for tree in (dict(wanted[collection]["image_encoder"]), part["image_encoder"])
        )
        if shapes != found:
            name = min(
                key for key in shapes.keys() | found.keys() if shapes.get(key) != found.get(key)
            )
            raise UserError(
                f"{folder}: {name} of the image encoder has shape {found.get(name)}, the config's "
                f"model wants {shapes.get(name)}: see interop.pretrained.adopt_image, which sets "
                "the sizes"
            )
        variables.setdefault(collection, {}).update(part)


def adopt_image(config: ConfigDict, path: str) -> None:
    """Makes the config's image encoder the one in a folder, frozen: LiT (arXiv 2111.07991).

    Sizes, pixel mean and deviation become the encoder's; a Frequency Stage stays where it has one.
    What is learned on top of it is the images' projection. config.optimizer.rates.image, the share
    of the learning rate, tunes it.

    Args:
      config: a recipe's.
      path: a folder that `mlip_jax.load` takes, or one of timm's ViTs.

    Raises:
      UserError: for a folder that holds no image encoder, or whose normalisation has no name here.
    """
    folder = places.local(path).expanduser()
    pretrained, preprocessing = model_folders.image_tower(folder)
    image = config.model.image
    for key in ("image_size", *_IMAGE_SIZES):
        image[key] = pretrained[key]
    image.frequency.depth = pretrained.frequency.depth
    image.normalization = _normalization(folder, preprocessing)
    image.pretrained = path
    image.dropout = image.drop_path = image.patch_dropout = 0.0
    config.optimizer.rates.image = 0.0


def adopt_bert(config: ConfigDict, path: str) -> None:
    """Makes the config's text encoder the one in a Hugging Face BERT folder, vocabulary included.

    The joint space becomes at least as wide as the encoder, as a projection block needs it. Texts
    are pooled as a sentence-transformers folder says; of another folder all tokens but the padding
    count alike, unless the config has a BERT already.

    Raises:
      UserError: for a folder that `bert.describe` or `bert.pooling` refuses.
    """
    sizes = bert.describe(path)
    text = config.model.text
    own = text.pooling if text.architecture == "bert" else "mean_all"
    text.pooling = bert.pooling(path) or own
    text.drop_path = 0.0  # it has none
    text.architecture, text.pretrained, text.tokenizer = "bert", path, f"wordpiece:{path}"
    for key in _ADOPTED:
        text[key] = sizes[key]
    config.model.embed_dim = max(config.model.embed_dim, sizes["width"])
    text.context_length = min(text.context_length, sizes["positions"])


def adopt_frozen_bert(config: ConfigDict, path: str, *, once: bool = False) -> None:
    """`adopt_bert` with the encoder frozen: what is learned on top of it is the texts' projection.

    config.optimizer.rates.text, the share of the learning rate, tunes it.

    Args:
      config: changed in place.
      path: the folder.
      once: whether it embeds every caption once, before the first step; for datasets of which the
        captions' vectors fit into memory.

    Raises:
      UserError: as `adopt_bert`.
    """
    adopt_bert(config, path)
    config.optimizer.rates.text = 0.0
    if once:
        config.model.text.embedded = "once"


_ADOPTED = ("width", "depth", "heads", "mlp_ratio", "activation")


def _check_sizes(config: ConfigDict, path: str) -> None:
    """Finds what no tensor's shape would tell, such as another number of heads."""
    if places.local(path).is_file():
        return  # there is no config.json to compare with
    for key, value in bert.describe(path).items():
        if key in _ADOPTED and config.model.text[key] != value:
            raise UserError(
                f"config.model.text.{key}={config.model.text[key]}, but the model in {path} has "
                f"{value}: set it so"
            )


_IMAGE_SIZES = (
    "architecture",
    "patch_size",
    "width",
    "depth",
    "heads",
    "mlp_ratio",
    "stem",
    "activation",
    "pre_norm",
    "pooling",
    "norm_epsilon",
)
_TEXT_SIZES = (
    "architecture",
    "vocab_size",
    "cleaning",
    "context_length",
    "width",
    "depth",
    "heads",
    "mlp_ratio",
    "causal",
    "attend_padding",
    "pooling",
    "activation",
    "norm_epsilon",
)


def adopt(config: ConfigDict, path: str) -> ConfigDict | None:
    """Makes the config's model the one in a folder, to train on from there.

    Sizes, tokenizer, pixel mean and deviation become the model's, the learning rate a tenth: what
    is learned already moves less (a choice of ours). Logit scales may reach CLIP's 100, where such
    models have theirs. Objectives and data stay the config's; `keep_own` brings a run's own back.

    Args:
      config: a recipe's.
      path: any folder that `mlip_jax.load` takes.

    Returns:
      The config of a model of this project; None for another library's.

    Raises:
      UserError: for a folder that holds no model, or whose normalisation has no name here.
    """
    folder = places.local(path).expanduser()
    pretrained, preprocessing = model_folders.settings(folder)
    image, text = config.model.image, config.model.text
    for key in ("image_size", *_IMAGE_SIZES):
        image[key] = pretrained.model.image[key]
    image.frequency.depth = pretrained.model.image.frequency.depth
    image.merging.proportional_attention = True  # its attention has never met a merged token
    image.normalization = _normalization(folder, preprocessing)
    for key in _TEXT_SIZES:
        text[key] = pretrained.model.text[key]
    tokenizer_name = pretrained.model.text.tokenizer
    text.tokenizer = tokenizer_name if tokenizer_name in ("clip", "clip_8k") else f"folder:{path}"
    for key in ("embed_dim", "token_dim", "head", "critic"):
        config.model[key] = pretrained.model[key]
    config.model.pretrained = path
    config.optimizer.learning_rate *= 0.1
    config.optimizer.max_scale = 100.0
    return pretrained if model_folders.kind(folder) in ("workdir", "exported") else None


def keep_own(config: ConfigDict, own: ConfigDict | None) -> bool:
    """Keeps what a run was trained for, where it is one of the config's own method.

    That is its perspectives with their losses, weights and scales, and its merging. Another config
    is another objective: of a run under that only the bound of the scales stays.

    Args:
      config: after `adopt`, with the objectives of its method.
      own: what `adopt` returned; None: nothing happens.

    Returns:
      Whether the run is of the same method.
    """
    if own is None:
        return False
    config.optimizer.max_scale = own.optimizer.max_scale
    if own.name != config.name:
        return False
    for view, perspective in own.perspectives.items():
        config.perspectives[view].update(perspective)
        config.perspectives[view].warmup_samples = 0  # it has been through that
    config.model.image.merging.update(own.model.image.merging)
    config.model.caption.update(own.model.caption)
    config.evaluation.frequency_mix = own.evaluation.frequency_mix
    return True


def _normalization(folder: Path, preprocessing: Preprocessing) -> str:
    values = preprocessing.to_dict()
    for name, (mean, std) in NORMALIZATIONS.items():
        if np.allclose(values["mean"], mean, atol=1e-6) and np.allclose(
            values["std"], std, atol=1e-6
        ):
            return name
    raise UserError(
        f"{folder}: its pixels are normalised by {values['mean']} and {values['std']}, which is "
        f"none of {', '.join(NORMALIZATIONS)}: it can be evaluated, not trained on"
    )


# The last layers of Frequency Stages that a model goes without.
_STARTS_AT_ZERO = re.compile(r"/frequency_\d+/mlp/down/")


def _check_tower(
    folder: Path, tower: str, wanted: ConfigDict, pretrained: ConfigDict, keys: Collection[str]
) -> None:
    for key in sorted(set(keys) - {"depth", "vocab_size", "cleaning"}):
        if wanted[key] != pretrained[key]:
            raise UserError(
                f"config.model.{tower}.{key}={wanted[key]!r}, but the model in {folder} has "
                f"{pretrained[key]!r}: set it so"
            )


def _read_whole(config: ConfigDict, wanted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    folder = places.local(config.model.pretrained).expanduser()
    pretrained = model_folders.read(folder)
    for tower, keys in (("image", _IMAGE_SIZES), ("text", _TEXT_SIZES)):
        _check_tower(folder, tower, config.model[tower], pretrained.config.model[tower], keys)
    variables = dict(pretrained.variables)
    if building.image_encoder(config).patch_tokens:
        variables["params"] = positions.fit(variables["params"], building.grid(config))
    has = traverse_util.flatten_dict(variables, sep="/")
    wanted_leaves = traverse_util.flatten_dict(dict(wanted), sep="/")
    start_values = {}
    for key, leaf in wanted_leaves.items():
        if key in has and has[key].shape == leaf.shape:
            start_values[key] = np.asarray(has[key], np.float32)
        elif key in has:
            raise UserError(
                f"{folder}: {key} has shape {has[key].shape}, the config's model wants "
                f"{leaf.shape}: see interop.pretrained.adopt, which sets the sizes"
            )
        elif _STARTS_AT_ZERO.search(key):
            start_values[key] = np.zeros(leaf.shape, np.float32)
    if not any("image_encoder/spatial_0/" in key for key in start_values):
        raise UserError(f"{folder}: the config's model shares no block of its image encoder")
    return traverse_util.unflatten_dict(start_values, sep="/")


def summary(
    config: ConfigDict, variables: Mapping[str, Any], wanted: Mapping[str, Any]
) -> list[str]:
    """What a run starts from, in words: what is taken and what is new; [] for a fresh start.

    Args:
      config: the run's.
      variables: from `read`.
      wanted: the model's variables, or anything with their structure and shapes.
    """
    if not variables:
        return []
    wanted_leaves = traverse_util.flatten_dict(dict(wanted), sep="/")
    has = {
        key
        for key, value in traverse_util.flatten_dict(dict(variables), sep="/").items()
        if not (_STARTS_AT_ZERO.search(key) and not np.any(value))
    }
    new = wanted_leaves.keys() - has
    sizes = {key: math.prod(leaf.shape) for key, leaf in wanted_leaves.items()}
    share = sum(sizes[key] for key in has) / sum(sizes.values())
    lines = [
        f"starts from {_place(config)}: {len(has)} of {len(wanted_leaves)} tensors, "
        f"{100 * share:.1f} % of the parameters"
    ]
    if new:
        parts = sorted({"/".join(key.split("/")[1:3]) for key in new})
        lines.append(f"  new: {', '.join(parts)}")
    return lines
