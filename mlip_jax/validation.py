"""What makes a config's values wrong, beyond their types."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from mlip_jax.config import GUIDANCES, LOSSES, OPTIMIZERS, UserError, choose, flatten

# None of them holds for NaN.
_RANGES: dict[str, Callable[[float], bool]] = {
    "above 0": lambda value: 0 < value < math.inf,
    "at least -1": lambda value: value >= -1,
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "at least 2 (a contrastive loss compares pairs)": lambda value: value >= 2,
    "at least 3 (a text has a start, a word and an end)": lambda value: value >= 3,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 2]": lambda value: 0 <= value <= 2,
}
# A pattern of keys and what their values must be; the first pattern that fits a key counts.
_RULES = (
    (r"batch_size", "at least 2 (a contrastive loss compares pairs)"),
    (r"model\.text\.context_length", "at least 3 (a text has a start, a word and an end)"),
    (r"samples|log_every|token_chunk|evaluation\.batch_size|checkpoint\.keep_last", "at least 1"),
    (r"model\..*(width|heads|_size|_dim)|model\.image\.depth", "at least 1"),
    (r"optimizer\.max_scale|.*\.init_scale", "at least 1"),
    (r"optimizer\.(learning_rate|eps)|model\..*\.mlp_ratio", "above 0"),
    (r"optimizer\.(b1|b2|ema)|model\..*(dropout|drop_path)", "in [0, 1)"),
    (r"data\.caption\..*|data\.augment\.(flip|trim|grayscale|blur|morphology)", "in [0, 1]"),
    (r"data\.max_skipped_share|model\.image\.merging\..*_mix", "in [0, 1]"),
    (r"data\.augment\.(affine|color)", "in [0, 2]"),
    (r"data\.workers", "at least -1"),
    (r"optimizer\.(weight_decay|clip_norm)|.*(_samples|_penalty|\.weight|\.depth)", "at least 0"),
    (r"evaluation\.frequency_mix|checkpoint\.keep_best", "at least 0"),
)


def validate(config: ConfigDict) -> None:
    """Checks what the types cannot. Rooms check what only they know (a rho, a mesh) themselves.

    Raises:
      UserError: one line that names the key, its value and what it may be.
    """
    for key, value in flatten(config.to_dict()).items():
        _check_range(key, value)
    if config.samples < config.batch_size:
        raise UserError(
            f"config.samples={config.samples} is less than one batch of {config.batch_size}"
        )
    crop = config.data.augment.crop
    if len(crop) != 2 or not 0 < crop[0] <= crop[1] <= 1:
        raise UserError(
            f"config.data.augment.crop={crop} must be two shares of the area, the smaller first, "
            "above 0 and at most 1"
        )
    choose("compute_dtype", config.compute_dtype, ("auto", "float32", "bfloat16"))
    choose("optimizer.name", config.optimizer.name, OPTIMIZERS)
    choose("model.text.tokenizer", config.model.text.tokenizer, ("clip", "clip_8k"))
    choose("model.text.pooling", config.model.text.pooling, ("last", "mean"))
    choose("model.image.stem", config.model.image.stem, ("patch", "conv"))
    choose(
        "model.image.frequency.transform",
        config.model.image.frequency.transform,
        ("auto", "fft", "matmul"),
    )
    choose("model.image.merging.guidance", config.model.image.merging.guidance, GUIDANCES)
    for tower in ("image", "text"):
        sizes = config.model[tower]
        choose(f"model.{tower}.activation", sizes.activation, ("gelu", "quick_gelu"))
        if sizes.width % sizes.heads:
            raise UserError(
                f"config.model.{tower}.width={sizes.width} is not a multiple of heads={sizes.heads}"
            )
    image = config.model.image
    if image.image_size % image.patch_size:
        raise UserError(
            f"config.model.image.image_size={image.image_size} is not a multiple of "
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
    if image.frequency.depth == 0 and image.merging.rate > 0:
        if image.merging.guidance in ("frequency", "both"):
            raise UserError(
                f"config.model.image.merging.guidance={image.merging.guidance!r} needs a Frequency "
                "Stage (config.model.image.frequency.depth > 0); use 'spatial' or 'none'"
            )
    if not any(perspective.weight > 0 for perspective in config.perspectives.values()):
        raise UserError("every config.perspectives.*.weight is 0: there is nothing to train on")
    for view, perspective in config.perspectives.items():
        choose(f"perspectives.{view}.loss", perspective.loss, LOSSES)
        if perspective.weight and view.startswith("frequency") and image.frequency.depth == 0:
            raise UserError(
                f"config.perspectives.{view}.weight={perspective.weight} needs a Frequency Stage: "
                f"set config.model.image.frequency.depth or the weight to 0"
            )
        if perspective.loss == "jsd" and not 1 <= perspective.shifts < config.batch_size:
            raise UserError(
                f"config.perspectives.{view}.shifts={perspective.shifts} must be from 1 to "
                f"{config.batch_size - 1}, one less than the batch"
            )


def _check_range(key: str, value: Any) -> None:
    wanted = next((words for pattern, words in _RULES if re.fullmatch(pattern, key)), None)
    if wanted and not _RANGES[wanted](value):
        raise UserError(f"config.{key}={value} must be {wanted}")
