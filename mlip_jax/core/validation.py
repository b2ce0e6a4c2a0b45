"""What makes a config's values wrong, beyond their types."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from mlip_jax.core import stages
from mlip_jax.core.errors import UserError, choose
from mlip_jax.core.registry import (
    DISTILLATIONS,
    IMAGE_ENCODERS,
    LOSSES,
    OPTIMIZERS,
    PREDICTIONS,
    SCHEDULES,
    TEXT_ENCODERS,
)
from mlip_jax.core.schema import (
    ACTIVATIONS,
    ATTENTIONS,
    CLEANINGS,
    IMAGE_VIEWS,
    NORMALIZATIONS,
    OWN_AVERAGE,
    PERSPECTIVES,
    PROBES,
    default,
    flatten,
    is_used,
    lessons,
)

_LARGEST_FLOAT = 3.4e38  # of float32, in which the parameters are trained
_LARGEST_INT = 2**31 - 1
_LARGEST_LONG = 2**63 - 1
_LONGEST_NAME = 255  # bytes of a folder's name

# None of them holds for NaN.
_RANGES: dict[str, Callable[[float], bool]] = {
    "above 0": lambda value: value > 0,
    "at least -1": lambda value: value >= -1,
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "at least 2 (a contrastive loss compares pairs)": lambda value: value >= 2,
    "at least 3 (a text has a start, a word and an end)": lambda value: value >= 3,
    "above 0 and at most 1": lambda value: 0 < value <= 1,
    "above 0 and at most 1,000": lambda value: 0 < value <= 1000,
    "from -1 to 1,024": lambda value: -1 <= value <= 1024,
    "from -1 to 100,000": lambda value: -1 <= value <= 100_000,
    "from 0 to 1,000": lambda value: 0 <= value <= 1000,
    "from 1 to 1,000": lambda value: 1 <= value <= 1000,
    "from 1 to 8,192": lambda value: 1 <= value <= 8192,
    "from 1 to 1,000,000": lambda value: 1 <= value <= 1_000_000,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 2]": lambda value: 0 <= value <= 2,
}
# A pattern of keys and what their values must be; the first pattern that fits a key counts.
_RULES = (
    (r"batch_size", "at least 2 (a contrastive loss compares pairs)"),
    (r"seed", "at least 0"),
    (r"model\.text\.context_length", "at least 3 (a text has a start, a word and an end)"),
    (r"samples|log_every|token_chunk|evaluation\.batch_size|checkpoint\.keep_last", "at least 1"),
    (r"accumulation|evaluation\.probe\.draws", "at least 1"),
    (r"evaluation\.box_threshold", "in [0, 1)"),
    # Beyond any model: of a stranger's config, they would take all memory, or minutes.
    (r"model\.image\.(image|patch)_size", "from 1 to 8,192"),
    (r"model\.(image|caption)\.depth", "from 1 to 1,000"),
    (r"model\.(image\.frequency|text)\.depth", "from 0 to 1,000"),
    (r"model\..*(width|heads|_dim)", "from 1 to 1,000,000"),
    (r"model\.text\.vocab_size", "at least 1"),
    (r"model\..*\.mlp_ratio", "above 0 and at most 1,000"),
    (r"optimizer\.max_scale|.*\.init_scale", "at least 1"),
    (r"optimizer\.(learning_rate|eps)|model\..*\.norm_epsilon", "above 0"),
    (r"optimizer\.(lookahead\.alpha|layer_decay)", "above 0 and at most 1"),
    (r"model\.adapters\.rank", "from 0 to 1,000"),
    (r"optimizer\.(b1|b2|ema|momentum)|model\..*(dropout|drop_path|prior_weight)", "in [0, 1)"),
    (r"data\.caption\..*|data\.augment\.(flip|trim|grayscale|blur|morphology)", "in [0, 1]"),
    (r"data\.max_skipped_share|model\.image\.merging\.(.*_mix|rate)", "in [0, 1]"),
    (r"perspectives\.caption\.parallel", "in [0, 1]"),
    (r"data\.augment\.(affine|color)", "in [0, 2]"),
    (r"data\.workers", "from -1 to 1,024"),
    (r"data\.window", "from -1 to 100,000"),
    (r"optimizer\.(weight_decay|clip_norm|rates\..*|lookahead\.period)", "at least 0"),
    (
        r"(optimizer\.warmup|optimizer\.cooldown|checkpoint\.every|evaluation\.every)_samples",
        "at least -1",
    ),
    (
        r"distillation\..*|.*(_samples|_penalty|\.weight|\.depth|\.odds|\.queries)",
        "at least 0",
    ),
    (r"evaluation\.frequency_mix|checkpoint\.keep_best", "at least 0"),
)
_LONG = re.compile(r"seed|(.*_)?samples")  # whole numbers that may be large

_MOST_STEPS = 2**31 - 1  # the state counts them in an int32


def validate(config: ConfigDict) -> None:
    """Checks what the types cannot. Rooms check what only they know (a rho, a mesh) themselves.

    Raises:
      UserError: one line that names the key, its value and what it may be.
    """
    validate_model(config)
    if not (config.epochs >= 0 or config.epochs == -1):
        raise UserError(
            f"config.epochs={config.epochs:g} must be above 0, 0 (config.samples says it) or -1 "
            "(by the size of the set)"
        )
    if config.epochs <= 0:
        check_length(config, f"config.samples={config.samples}")
    crop = config.data.augment.crop
    if len(crop) != 2 or not 0 < crop[0] <= crop[1] <= 1:
        raise UserError(
            f"config.data.augment.crop={crop} must be two shares of the area, the smaller first, "
            "above 0 and at most 1"
        )
    choose("compute_dtype", config.compute_dtype, ("auto", "float32", "bfloat16"))
    choose("attention", config.attention, ("auto", *ATTENTIONS))
    if config.attention == "cudnn" and config.compute_dtype == "float32":
        raise UserError(
            "config.attention='cudnn' computes in bfloat16 only, not in config.compute_dtype="
            "'float32': set config.attention='auto'"
        )
    choose("data.decode", config.data.decode, ("fast", "exact"))
    choose("data.orientation", config.data.orientation, ("ignore", "exif"))
    choose("ring", config.ring, ("auto", "always", "never"))
    choose("equal_texts", config.equal_texts, ("count", "mask"))
    choose("evaluation.probe.method", config.evaluation.probe.method, PROBES)
    shots = config.evaluation.probe.shots
    if not shots or min(shots) < 1:
        raise UserError(
            f"config.evaluation.probe.shots={shots} must be numbers of "
            "images a class, each at least 1"
        )
    towers = [name for name in ("image", "text") if config.model[name].pretrained]
    if config.model.pretrained and towers:
        raise UserError(
            f"config.model.pretrained and config.model.{towers[0]}.pretrained both say what the "
            "run starts from: leave one of them ''"
        )
    for view in PERSPECTIVES:
        LOSSES.check(f"perspectives.{view}.loss", config.perspectives[view].loss)
    _check_adapters(config)
    _check_embedded(config)
    _check_critic(config)
    _check_teachers(config)
    _check_accumulation(config)
    _check_optimizer(config)
    _check_perspectives(config)
    _check_stages(config)


def _check_stages(config: ConfigDict) -> None:
    for number, stage in enumerate(stages.plain(config), 1):
        with stages.naming(number, len(config.stages)):
            validate(stage)
    if config.stages and not config.epochs:
        stages.of(config)


def check_length(config: ConfigDict, said_by: str) -> None:
    """Raises UserError unless config.samples are a number of steps that a run may have.

    `said_by` is what the error names in place of the samples.
    """
    if config.samples < config.batch_size:
        raise UserError(f"{said_by} is less than one batch of {config.batch_size}")
    steps = config.samples // config.batch_size
    if steps > _MOST_STEPS:
        raise UserError(
            f"{said_by} in batches of {config.batch_size} are {steps:,} steps, and a run has at "
            f"most {_MOST_STEPS:,}: raise config.batch_size"
        )


def validate_model(config: ConfigDict) -> None:
    """Checks every value by itself, and what a model that is loaded depends on.

    What only training needs, such as the table of losses, is left out: a model can be used without
    the file that registers its loss.

    Raises:
      UserError: as `validate`.
    """
    defaults = flatten(default().to_dict())
    for key, value in flatten(config.to_dict()).items():
        if not key.startswith("options."):  # the user's own: any key and any value
            _check_value(key, value, defaults[key])
    _check_name(config.name)
    choose("model.head", config.model.head, ("linear", "linear_bias", "projection_block"))
    _check_image(config)
    _check_text(config)
    _check_widths(config)
    for name in PREDICTIONS:
        if config.perspectives[name].weight > 0:
            PREDICTIONS[name].check(config)


def _check_image(config: ConfigDict) -> None:
    image = config.model.image
    choose("model.image.normalization", image.normalization, NORMALIZATIONS)
    IMAGE_ENCODERS.check("model.image.architecture", image.architecture)
    IMAGE_ENCODERS[image.architecture].check(config)


def _check_text(config: ConfigDict) -> None:
    text = config.model.text
    choose("model.text.activation", text.activation, ACTIVATIONS)
    choose("model.text.cleaning", text.cleaning, CLEANINGS)
    if not text.tokenizer.startswith(("wordpiece:", "folder:")):
        tokenizers = ("clip", "clip_8k", "wordpiece", "wordpiece:PATH", "folder:PATH")
        choose("model.text.tokenizer", text.tokenizer, tokenizers)
    if not text.tokenizer.startswith("folder:") and text.vocab_size < 64:
        raise UserError(
            f"config.model.text.vocab_size={text.vocab_size} must be at least 64 (letters alone "
            "need as many)"
        )
    TEXT_ENCODERS.check("model.text.architecture", text.architecture)
    TEXT_ENCODERS[text.architecture].check(config)


def _check_widths(config: ConfigDict) -> None:
    model = config.model
    choose("model.critic", model.critic, ("dot", "concat"))
    encoder = IMAGE_ENCODERS[model.image.architecture]
    widths = {"image": encoder.feature_width(config), "text": model.text.width}
    for tower, width in widths.items():
        if model.head == "projection_block" and model.critic == "dot" and width > model.embed_dim:
            raise UserError(
                f"config.model.head='projection_block' starts as a copy: embed_dim="
                f"{model.embed_dim} must be at least the {tower} encoder's width, {width}"
            )


def _check_critic(config: ConfigDict) -> None:
    if config.model.critic == "dot":
        return
    for view in PERSPECTIVES:
        perspective = config.perspectives[view]
        if not perspective.weight or view.endswith("_tokens"):
            continue
        if LOSSES[perspective.loss].of_pairs is None:
            raise UserError(
                f"config.perspectives.{view}.loss={perspective.loss!r} scores all pairs; "
                "config.model.critic='concat' can only score some: use 'jsd', or the critic 'dot'"
            )
    named = {*config.evaluation.retrieval, *config.evaluation.zero_shot} - {"validation"}
    if named:
        raise UserError(
            f"config.evaluation names {', '.join(sorted(named))}, but config.model.critic='concat' "
            "has no joint space to rank in: name 'validation' alone"
        )


def _check_accumulation(config: ConfigDict) -> None:
    norms = {
        "model.image.architecture": IMAGE_ENCODERS[config.model.image.architecture].batch_norm,
        "model.head": config.model.head == "projection_block" and config.model.critic == "dot",
    }
    for key, has_norm in norms.items():
        if config.accumulation > 1 and has_norm:
            value = flatten(config.to_dict())[key]
            raise UserError(
                f"config.accumulation={config.accumulation} does not go with config.{key}="
                f"{value!r}: its batch norm would see a part of the batch at a time, which is "
                "another model; set config.accumulation=1"
            )


def _check_adapters(config: ConfigDict) -> None:
    model = config.model
    try:
        re.compile(model.adapters.pattern)
    except re.error as error:
        raise UserError(
            f"config.model.adapters.pattern={model.adapters.pattern!r} is no regular expression: "
            f"{error}"
        ) from None
    starts = (model.pretrained, model.image.pretrained, model.text.pretrained, config.start_from)
    if model.adapters.rank and not any(starts):
        raise UserError(
            f"config.model.adapters.rank={model.adapters.rank} adapts a model that is there: start "
            "from one (a config file's pretrained=FOLDER), or set the rank to 0"
        )
    norms = IMAGE_ENCODERS[model.image.architecture].batch_norm
    if model.adapters.rank and norms and config.optimizer.rates.image:
        raise UserError(
            f"config.model.adapters.rank={model.adapters.rank}: the batch norms of a "
            f"{model.image.architecture} would move beside its adapters; set "
            "config.optimizer.rates.image=0, and the texts' encoder alone is adapted"
        )


def _check_embedded(config: ConfigDict) -> None:
    """Whether captions can be embedded once: by an encoder that stays, and their global view."""
    embedded = config.model.text.embedded
    choose("model.text.embedded", embedded, ("each_step", "once"))
    if embedded == "each_step":
        return
    words = [view for view in IMAGE_VIEWS if PERSPECTIVES[view] == "text_tokens"]
    obstacles = {
        "the text encoder is trained (config.optimizer.rates.text above 0)": (
            config.optimizer.rates.text
        ),
        "its kernels are adapted (config.model.adapters.rank above 0)": config.model.adapters.rank,
        **{
            f"config.perspectives.{name} has a weight and needs more than a caption's one vector": (
                config.perspectives[name].weight
            )
            for name in (*words, "other_caption", "caption")
        },
    }
    for obstacle, stands in obstacles.items():
        if stands:
            raise UserError(f"config.model.text.embedded='once' cannot be: {obstacle}")


def _check_optimizer(config: ConfigDict) -> None:
    settings = config.optimizer
    OPTIMIZERS.check("optimizer.name", settings.name)
    SCHEDULES.check("optimizer.schedule", settings.schedule)
    if settings.ema and settings.lookahead.period:
        raise UserError(
            f"config.optimizer.ema={settings.ema} and config.optimizer.lookahead.period="
            f"{settings.lookahead.period} both say what is evaluated: set one of them to 0"
        )
    if not any(settings.rates.values()):
        raise UserError("every config.optimizer.rates.* is 0: there is nothing to train")


def _check_perspectives(config: ConfigDict) -> None:
    if not any(is_used(config, view) for view in IMAGE_VIEWS):
        raise UserError(
            "every config.perspectives.*.weight between image and text is 0: there is nothing to "
            "train on"
        )
    for view in PERSPECTIVES:
        perspective = config.perspectives[view]
        depth = config.model.image.frequency.depth
        if perspective.weight and view.startswith("frequency") and depth == 0:
            raise UserError(
                f"config.perspectives.{view}.weight={perspective.weight} needs a Frequency Stage: "
                f"set config.model.image.frequency.depth or the weight to 0"
            )
        few = LOSSES[perspective.loss].of_pairs is not None
        if few and not 1 <= perspective.shifts < config.batch_size:
            raise UserError(
                f"config.perspectives.{view}.shifts={perspective.shifts} must be from 1 to "
                f"{config.batch_size - 1}, one less than the batch"
            )
        if perspective.weight and not few and (perspective.learn_bias or perspective.odds != 1):
            key = "learn_bias" if perspective.learn_bias else "odds"
            raise UserError(
                f"config.perspectives.{view}.{key}={perspective[key]} is of losses that score few "
                f"pairs, such as 'jsd'; the loss is {perspective.loss!r}"
            )


def _check_teachers(config: ConfigDict) -> None:
    weights = lessons(config)
    keys = [f"config.distillation.{way}.{view}" for way, view in weights]
    if weights and not config.teacher:
        raise UserError(
            f"{keys[0]}={next(iter(weights.values())):g} without a teacher: set config.teacher to "
            f"a folder that holds a model, or to {OWN_AVERAGE!r}, the run's own average"
        )
    if not config.teacher:
        return
    if not weights:
        ways = ", ".join(f"config.distillation.{way}.spatial_global" for way in DISTILLATIONS)
        raise UserError(
            f"config.teacher={','.join(config.teacher)!r} teaches nothing: give one of {ways} a "
            "weight, such as 1"
        )
    if len({*config.teacher}) < len(config.teacher):
        raise UserError(f"config.teacher={config.teacher} names a model twice")
    if OWN_AVERAGE in config.teacher and not config.optimizer.ema:
        raise UserError(
            f"config.teacher={OWN_AVERAGE!r} is the average of the run's parameters, and there is "
            "none: set config.optimizer.ema, such as 0.999"
        )
    if config.model.critic != "dot":
        raise UserError(
            f"config.model.critic={config.model.critic!r} has no joint space, and a teacher needs "
            "one: set config.model.critic='dot' or config.teacher=''"
        )
    depth = config.model.image.frequency.depth
    if depth == 0 and any(view.startswith("frequency") for _, view in weights):
        key = next(key for key in keys if ".frequency" in key)
        raise UserError(
            f"{key} needs a Frequency Stage: set config.model.image.frequency.depth or the weight "
            "to 0"
        )


def _check_value(key: str, value: Any, default_value: Any) -> None:
    """One key's value by itself: of the default's type, a number that computers hold, in range."""
    if isinstance(default_value, tuple):
        kind = type(default_value[0]) if default_value else str
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, tuple) or not all(type(element) in kinds for element in value):
            raise UserError(
                f"config.{key}={value!r}: expected a value of type tuple of {kind.__name__}"
            )
        if "" in value:
            raise UserError(f"config.{key}={value!r} has an empty element: leave it out")
        elements = value
    elif type(value) is type(default_value):
        elements = (value,)
    else:
        kind = type(default_value)
        raise UserError(f"config.{key}={value!r}: expected a value of type {kind.__name__}")
    for element in elements:
        if isinstance(element, str) and not _is_of_paths(element):
            raise UserError(f"config.{key}={element!r} has a character that no path can have")
        if isinstance(element, float) and not abs(element) <= _LARGEST_FLOAT:
            raise UserError(f"config.{key}={value} must be finite, and at most {_LARGEST_FLOAT:g}")
        most = _LARGEST_LONG if _LONG.fullmatch(key.rpartition(".")[2]) else _LARGEST_INT
        if isinstance(element, int) and abs(element) > most:
            raise UserError(f"config.{key} has a value of more than {most:,}")
    _check_range(key, value)


def _is_of_paths(text: str) -> bool:
    """Whether a path may hold the text: no zero byte, and what the file system can encode."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False


def _check_name(name: str) -> None:
    """The name is that of a folder, in runs/ and wherever results are kept."""
    for part in name.split("/"):
        if part in ("", ".", "..") or len(os.fsencode(part)) > _LONGEST_NAME:
            raise UserError(
                f"config.name={name[:_LONGEST_NAME]!r} must be a name that a folder can have, of "
                f"1 to {_LONGEST_NAME} bytes"
            )


def _check_range(key: str, value: Any) -> None:
    wanted = _wanted(key)
    if wanted and not _RANGES[wanted](value):
        raise UserError(f"config.{key}={value} must be {wanted}")


@functools.cache  # of a few hundred keys
def _wanted(key: str) -> str:
    """What a key's value must be; "" for anything."""
    return next((words for pattern, words in _RULES if re.fullmatch(pattern, key)), "")
