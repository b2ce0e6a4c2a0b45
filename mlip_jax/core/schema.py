"""The configuration of a run: every key and its default.

A file in `configs/` starts from `default()`, changes what its experiment changes and returns the
result from `get_config(arg)`; `python -m mlip_jax.main --config=FILE[:name=value,...]` finds it.
Keys are fixed here: an override of a key that does not exist is refused with the nearest name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.files import decode_json, read_json
from mlip_jax.core.key_names import find_key
from mlip_jax.core.registry import DISTILLATIONS, EVALUATIONS

Number = TypeVar("Number", int, float)

# Perspective -> what it compares the view of its own name with: the texts, or, within a modality,
# another augmentation of the image, another caption of it.
PERSPECTIVES = {
    "spatial_global": "text_global",
    "frequency_global": "text_global",
    "spatial_tokens": "text_tokens",
    "frequency_tokens": "text_tokens",
    "augmented_image": "augmented_image_2",
    "other_caption": "other_caption_2",
}
IMAGE_VIEWS = tuple(view for view, other in PERSPECTIVES.items() if other.startswith("text_"))
TAUGHT_VIEWS = tuple(view for view in IMAGE_VIEWS if view.endswith("_global"))
# Teachers that are no folder: the run's own average; what `prepare --teacher` has kept.
OWN_AVERAGE, KEPT = "ema", "kept"
CLEANINGS = (
    "none",
    "clip_lite",
    "whitespace",
    "canonicalize",
    "siglip",
    "ftfy_whitespace",
    "ftfy_lower",
    "ftfy_canonicalize",
)
NORMALIZATIONS = ("clip", "imagenet", "siglip")
ATTENTIONS = ("plain", "xla", "cudnn", "pallas")
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_tanh")
PROBES = ("lbfgs", "ridge", "sgd")

# How several processes of a run find each other: flags, and the variables that they stand for.
PROCESS_VARIABLES = {
    "coordinator": "MLIP_COORDINATOR",
    "processes": "MLIP_PROCESSES",
    "process-id": "MLIP_PROCESS_ID",
}
ADDRESS = "host:port, such as 10.0.0.1:8476"  # of a coordinator, in words
# Keys that may change between two starts on one workdir: none of them moves a parameter.
_FREE_AT_RESUME = (
    "teacher",  # a place: whether it is the same model is seen by its weights
    "mesh",
    "sharding",
    "accumulation",
    "ring",
    "attention",
    "data.cache_dir",
    "data.workers",
    "data.max_skipped_share",
    "checkpoint",
    "evaluation",
    "log_every",
)


_OPTIONS = "options."  # where any key may stand


def default() -> ConfigDict:
    """Every key with its default: CLIP's training of a small ViT on the embedded data."""
    config = ConfigDict()
    config.name = "clip"
    config.seed = 0
    config.batch_size = 256  # global: all devices, all processes
    config.accumulation = 1  # parts that are embedded one after the other; the same gradient
    config.samples = 256_000  # image-text pairs seen in the whole run; the only clock
    # Passes over the training set, from which `samples` follows; 0: `samples` says it; -1: as many
    # as suit the size of the set, `samples` at most.
    config.epochs = 0.0
    # Texts, one a stage: its share of the run, then NAME=VALUE for what it changes (core.stages),
    # such as "0.9 image_size=32 batch_size=512"; the last stage has the config's own sizes.
    config.stages = ()
    # A workdir whose weights and optimizer this run starts from, its step at 0; "": afresh.
    config.start_from = ""
    config.compute_dtype = "auto"  # bfloat16 on accelerators, float32 on CPUs
    # Of training, in a ViT and a "clip" text encoder: "plain", our own, or "xla" or "cudnn", JAX's;
    # "auto": what a probe finds the fastest on a GPU, else "plain". Evaluation is "plain".
    config.attention = "auto"
    config.log_every = 10  # steps
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all remaining devices
    config.sharding = ()  # texts: rules PATTERN=AXES before the usual ones: see parallel.py

    config.data = data = ConfigDict()
    data.train = "emoji"  # a named set, KIND:PATH, or mix:SET*WEIGHT+SET*WEIGHT (docs/data.md)
    # The same grammar; "auto": the training set's own split; "5%": that share of it; "": none
    data.validation = "auto"
    data.cache_dir = ""  # "": $MLIP_JAX_CACHE, else ~/.cache/mlip_jax
    data.workers = -1  # processes that decode and augment; -1: by the number of cores
    # Shards whose samples are mixed; 0: all; -1: 16 of tar files, else all (docs/data.md)
    data.window = -1
    # "exif": images are turned upright as their EXIF data say, which the recipes take; "ignore":
    # as they are stored, which is what a config without the key means.
    data.orientation = "ignore"
    data.decode = "fast"  # "exact": photographs are decoded and resized for training by Pillow
    data.max_skipped_share = 0.01  # more unreadable images than this end the run
    data.caption = ConfigDict(
        {
            "first": 0.0,  # chance to take the first caption; else any of them, all alike
            "tags": 0.3,  # chance that the record's tags (such as its category) are added
            "shuffle": 0.0,  # chance that the caption's parts (name, tags) change places
            "word_dropout": 0.0,  # chance of each word to be left out; one always stays
        }
    )
    data.augment = ConfigDict(
        {
            "trim": 0.0,  # chance that margins of one colour are cut off first, to a square
            "crop": (0.6, 1.0),  # area of the random resized crop
            "flip": False,  # mirror; "left" and "right" change places in the caption
            "affine": 0.0,  # strength: 1 means up to 30 degrees, 20 % shear, 20 % shift
            "color": 0.0,  # strength of brightness, contrast, saturation and hue jitter
            "grayscale": 0.0,  # chance
            "blur": 0.0,  # chance
            "morphology": 0.0,  # chance of a 3x3 minimum or maximum filter: line width varies
        }
    )

    config.model = model = ConfigDict()
    model.embed_dim = 256
    model.token_dim = 256
    # A folder of weights that the encoders start from: an exported model's, open_clip's, or
    # Hugging Face's of CLIP or SigLIP. `interop.pretrained.adopt` sets the sizes to go with it.
    model.pretrained = ""
    # Of the global views; "linear_bias": with a bias; "projection_block": CLIP-Lite's
    model.head = "linear"
    model.critic = "dot"  # "concat": an MLP on both features; scores pairs, cannot retrieve
    model.prior_weight = 0.0  # CLIP-Lite's prior matching; the losses keep 1 - this
    # LoRA: kernels whose path matches the pattern learn a product of this rank, and nothing else of
    # the encoders moves; 0: none. The pattern is a regular expression.
    model.adapters = ConfigDict({"rank": 0, "pattern": r"attention/(qkv|out)/kernel$"})
    model.image = ConfigDict(
        {
            "architecture": "vit",  # or "resnet"
            # A folder with a model or with one of timm's ViTs, whose sizes
            # `interop.pretrained.adopt_image` sets; resnet: also torchvision's safetensors file
            "pretrained": "",
            "normalization": "clip",  # whose pixel mean and deviation; "imagenet", "siglip"
            "image_size": 48,
            "patch_size": 8,  # vit
            "width": 192,  # resnet: channels of the first stage, 64 in the literature
            "depth": 6,  # blocks in all: Frequency Stage + Spatial Stage; resnet: its layers
            "heads": 6,
            "mlp_ratio": 4.0,
            # vit: "patch", one linear map, or "conv", stacked 3x3 convolutions; resnet: "imagenet",
            # which reduces by 4 before the stages, or "small", which keeps the resolution.
            "stem": "patch",
            "activation": "gelu",  # or "quick_gelu", OpenAI's; "gelu_tanh", SigLIP's
            "pre_norm": False,  # vit: a norm before the Spatial Stage, as CLIP's have
            "pooling": "class",  # vit: the class token, or "attention", SigLIP's
            "norm_epsilon": 1e-5,  # vit
            "dropout": 0.0,
            "drop_path": 0.0,
            "patch_dropout": 0.0,  # vit: share of the patches left out in training
            "remat": False,  # blocks are computed again for their gradient: less memory, slower
            "frequency": {
                "depth": 0,  # blocks of the Frequency Stage; 0: a plain ViT
                "transform": "auto",  # "fft", "matmul"; "auto": what measured faster
            },
            "merging": {
                "rate": 0.0,  # rho: share of the patch tokens gone at the end
                "schedule": "even",  # "even", "early", or a comma list: tokens per block
                # "none"; a way of mlip_jax.models.guidance, such as "spatial" or "contrast"; two of
                # them, ONE+OTHER; or "both": frequency+spatial
                "guidance": "both",
                "guidance_mix": 0.5,  # alpha: the first way's importance against the second's
                "similarity_mix": 0.5,  # beta: keys against frequency features
                "importance_penalty": 0.1,  # gamma
                "proportional_attention": False,
            },
        }
    )
    model.text = ConfigDict(
        {
            "architecture": "clip",  # pre-LN; or "bert": post-LN, both directions
            "pretrained": "",  # bert: a Hugging Face folder of config.json and safetensors
            # "clip"; "clip_8k": its 8,192 most frequent tokens; "wordpiece": trained on the
            # captions; "wordpiece:PATH": of a vocab.txt or a folder that holds one;
            # "folder:PATH": the one that a model's folder holds
            "tokenizer": "clip",
            "vocab_size": 8192,  # the most that a trained vocabulary may have
            # "clip_lite": lower case, no punctuation, 30 words; others: `data.text.Tokenizer`
            "cleaning": "none",
            "context_length": 77,
            "width": 192,
            "depth": 3,
            "heads": 6,
            "mlp_ratio": 4.0,
            "causal": True,  # clip
            "attend_padding": False,  # clip: padding is attended to like words
            # "last": the end-of-text token; "mean": over all words; "first"; clip also "highest",
            # the highest id, and "final", the last place; bert also "tanh", its pooler on the
            # first, and "mean_all", a mean over the start as well
            "pooling": "last",
            "activation": "gelu",
            "norm_epsilon": 1e-5,  # clip
            "dropout": 0.0,
            "drop_path": 0.0,
            "remat": False,
            # Of a frozen encoder: captions are embedded in "each_step", or "once", before the first
            "embedded": "each_step",
        }
    )

    # The decoder that writes captions from the image's tokens, where perspectives.caption has a
    # weight; its context is the text encoder's.
    model.caption = ConfigDict(
        {
            "width": 192,
            "depth": 3,
            "heads": 6,
            "mlp_ratio": 4.0,
            "activation": "gelu",
            "dropout": 0.0,
            "queries": 0,  # of an attentional pooler before it, CoCa's; 0: all tokens, no pooler
            "remat": False,
        }
    )

    config.perspectives = ConfigDict(
        {
            view: {
                "weight": 1.0 if view == "spatial_global" else 0.0,
                "loss": "softmax",
                "shifts": 1,  # jsd: negatives per positive
                "warmup_samples": 0,  # the weight rises linearly over the first samples
                "init_scale": 1 / 0.07,
                # jsd: what the mean over the negatives weighs against the pair; 0: as many as the
                # other rows of the batch, which the negatives stand for
                "odds": 1.0,
                "learn_bias": False,  # jsd: a bias is added to the scores; sigmoid always has one
                "init_bias": 0.0,  # where a bias is learned
            }
            for view in PERSPECTIVES
        }
    )
    # Of `model.caption`, which exists where this weight is above 0.
    config.perspectives.caption = ConfigDict(
        {
            "weight": 0.0,
            "warmup_samples": 0,
            "parallel": 0.0,  # share of the captions that are predicted all tokens at once, CapPa's
        }
    )
    # Models that the run learns from: folders that `mlip_jax.load` opens; "ema": its own average;
    # "kept" or "kept:FOLDER": what `prepare --teacher` has kept beside the training set.
    config.teacher = ()
    # By way of learning and view, the weight of its loss; the mean over several teachers.
    config.distillation = ConfigDict(
        {way: dict.fromkeys(TAUGHT_VIEWS, 0.0) for way in DISTILLATIONS}
    )
    # Of rows of a batch whose texts have equal token ids: "count" them in the log, or "mask": they
    # are no negatives of each other. Rows of the same record never are.
    config.equal_texts = "count"
    config.token_chunk = 32  # texts a block of the token-level scores; bounds their memory

    # Losses over all pairs in blocks around the devices: "auto", where their scores are large;
    # "always", "never".
    config.ring = "auto"

    config.optimizer = ConfigDict(
        {
            # "muon": kernels get orthogonal updates, all else AdamW's; "sgd": with momentum
            "name": "adamw",
            # Of the rate after the warm-up: "cosine" falls to 0 at the end; "constant"; "wsd",
            # constant, then a cooldown; "rsqrt", by the root of the samples, then a cooldown.
            "schedule": "cosine",
            # The last samples, over which the rate falls to 0 in a line, whatever the schedule;
            # -1: a fifth of the run for "wsd" and "rsqrt", none for the others.
            "cooldown_samples": -1,
            "learning_rate": 1e-3,
            # Shares of the learning rate; an encoder with 0 is frozen.
            "rates": {"image": 1.0, "text": 1.0, "heads": 1.0},
            # Of an encoder's last block to the one before it, and so on: what is learned already
            # moves less the earlier it lies; 1: all alike.
            "layer_decay": 1.0,
            "momentum": 0.9,  # sgd
            "warmup_samples": 10_000,  # -1: a share of the run
            "b1": 0.9,
            "b2": 0.98,
            "eps": 1e-8,
            "weight_decay": 0.2,
            "clip_norm": 1.0,
            "max_scale": 100.0,
            "ema": 0.0,  # decay a step of the averaged parameters; 0: none
            "lookahead": {"period": 0, "alpha": 0.5},  # steps between two slow ones; 0: none
        }
    )
    # Of a config file's own, for the things that it registers: kept, and compared at a resume.
    config.options = ConfigDict()
    config.checkpoint = ConfigDict(
        {
            "every_samples": 50_000,  # 0: only at evaluations; -1: by the length of the run
            "keep_last": 2,
            "keep_best": 1,
            "best": "",
        }
    )
    config.evaluation = ConfigDict(
        {
            # Of retrieval and zero_shot; 0: only at the end; -1: by the length of the run
            "every_samples": 50_000,
            "batch_size": 256,
            # Sets by the grammar of data.train; "validation" is the run's own.
            "retrieval": ("validation",),
            "zero_shot": ("validation",),  # sets with labels
            # Of retrieval, beside hit recall, where a query has several right answers.
            "actual_recall": False,
            "linear_probe": (),
            "few_shot": (),
            "svm": (),
            "grounding": (),  # "compositions", or sets of regions
            "concepts": (),  # "gender", or the path of a JSON file
            "guidance": (),  # of token merging: "compositions", or datasets of images
            "calibration": (),  # sets of images with one class each
            "corruptions": (),  # sets with classes, or with captions
            "compositional": (),  # files of SugarCrepe's or Winoground's examples
            "multilingual": (),  # files of images with captions by language
            "captioning": (),  # sets with captions, of models with a decoder
            # Of templates.json; "auto": those of a well-known set; or a template with {}. The
            # subcommand evaluate takes several, with | between.
            "templates": "plain",
            "class_names": "",  # "": the set's; names in prompts.json, or a JSON file
            "frequency_mix": 0.0,  # image embedding: spatial + this * frequency, normalised
            "probe": {
                "method": "lbfgs",  # logistic regression; "ridge": closed form; "sgd": the papers'
                "shots": (1, 2, 4, 8, 16),  # images a class in few_shot
                "draws": 5,
            },
            "box_threshold": 0.5,  # of the saliency map's maximum; what is above makes the box
        }
    )
    for family in EVALUATIONS:
        if family not in config.evaluation:  # registered
            config.evaluation[family] = ()
    return config


def arguments(arg: str | None, **defaults: str) -> dict[str, str]:
    """Reads the part of --config after the colon, "name=value,name=value".

    Args:
      arg: the text after the colon, or None.
      **defaults: the names that this config takes, with their defaults.

    Raises:
      UserError: for a name that the config does not take.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, equals, value = part.partition("=")
        if name not in defaults or not equals:
            raise UserError(
                f"config argument {part!r}: expected name=value with a name of "
                f"{', '.join(defaults)}{suggestion(name, defaults)}"
            )
        values[name] = value
    return values


def whole_number(name: str, text: str) -> int:
    """The value of a config argument that must be a whole number.

    Raises:
      UserError: when it is not.
    """
    return _converted(name, text, int, "a whole number")


def number(name: str, text: str) -> float:
    """The value of a config argument that must be a number.

    Raises:
      UserError: when it is not.
    """
    return _converted(name, text, float, "a number")


def _converted(name: str, text: str, kind: Callable[[str], Number], expected: str) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"config argument {name}={text!r}: expected {expected}") from None


def lessons(config: ConfigDict) -> dict[tuple[str, str], float]:
    """The weights of config.distillation that are above 0, by way of learning and view."""
    return {
        (way, view): float(weight)
        for way in DISTILLATIONS
        for view in TAUGHT_VIEWS
        if (weight := config.distillation[way][view]) > 0
    }


def is_used(config: ConfigDict, view: str) -> bool:
    """Whether a perspective's view is trained: by its own loss or by a teacher."""
    taught = any(view == lesson for _, lesson in lessons(config))
    return bool(config.perspectives[view].weight > 0 or taught)


def views_of(config: ConfigDict, perspective: str) -> int:
    """Inputs of a modality for each example: two where that perspective within it is in use."""
    return 2 if config.perspectives[perspective].weight > 0 else 1


def is_address(text: str) -> bool:
    """Whether a text is `ADDRESS`, with a port that there is: 1 to 65535."""
    match = re.fullmatch(r"\S+:(\d{1,5})", text)
    return match is not None and 1 <= int(match[1]) <= 65535


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """The config as JSON text; tuples become lists and `from_json` turns them back."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`. Keys that this version added since take their defaults.

    Raises:
      UserError: for a key that this version does not know.
      ValueError, TypeError: for a text that is no JSON, or values of other types.
    """
    return from_values(decode_json(text))


def from_file(path: Path) -> ConfigDict:
    """The config in a file that `to_json` has filled.

    Raises:
      UserError: when it cannot be read, is damaged, or has a key that this version does not know.
    """
    values = read_json(path, advice="mend it or remove it")
    try:
        return from_values(values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): mend it or remove it") from error


def from_values(values: Any) -> ConfigDict:
    """The config of what its JSON text holds; see `from_json`."""
    config = default()
    _update(config, values, "")
    return config


def _update(config: Any, values: Any, prefix: str) -> None:
    if not (isinstance(config, ConfigDict) and isinstance(values, Mapping)):
        where = prefix.rstrip(".") or "the config"
        wanted = "must" if isinstance(config, ConfigDict) else "must not"
        raise TypeError(f"{where} {wanted} be an object")
    for key, value in values.items():
        if prefix == _OPTIONS:
            config[key] = ConfigDict(value) if isinstance(value, Mapping) else value
            continue
        if key not in config:
            raise UserError(f"unknown config key {prefix}{key}{suggestion(key, config.keys())}")
        if isinstance(value, Mapping) or isinstance(config[key], ConfigDict):
            _update(config[key], value, f"{prefix}{key}.")
        elif value is None:
            raise TypeError(f"{prefix}{key} must not be null")
        else:
            try:
                config[key] = tuple(value) if isinstance(value, list) else value
            except OverflowError:  # a whole number that no float holds
                raise ValueError(f"{prefix}{key} is too large") from None


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """What keeps `new` from going on where `old` stopped, a line a key: "key: old -> new"."""
    old_flat, new_flat = flatten(old.to_dict()), flatten(new.to_dict())
    return [
        f"{key}: {old_flat.get(key)} -> {new_flat.get(key)}"
        for key in sorted(old_flat.keys() | new_flat.keys())
        if old_flat.get(key) != new_flat.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in _FREE_AT_RESUME)
    ]


def set_key(config: ConfigDict, key: str, value: Any) -> None:
    """config.a.b = value for the dotted key "a.b".

    Raises:
      UserError: for an unknown key, or a value of another type.
    """
    *path, last = key.split(".")
    node = config
    for name in path:
        node = node.get(name)
        if not isinstance(node, ConfigDict):
            raise _unknown_key(config, key)
    if last not in node:
        raise _unknown_key(config, key)
    if value is None:  # which would pass for any type
        raise UserError(f"config.{key}=None: leave it out, or give a value")
    try:
        node[last] = value
    except TypeError as error:
        raise UserError(f"config.{key}={value!r}: {error}") from None


def _unknown_key(config: ConfigDict, key: str) -> UserError:
    found = find_key(key, list(flatten(config.to_dict())))
    return UserError(f"unknown config key {key}" + (f"; did you mean {found!r}?" if found else ""))
