"""Low-rank adapters of an encoder's kernels: LoRA (Hu et al. 2021, arXiv 2106.09685).

A kernel W of shape [inputs, outputs] is used as W + A B, with A of shape [inputs, rank] and B of
shape [rank, outputs]. W stays as it was; A starts random and B at 0, so that a run starts as the
model that it starts from. The paper's factor alpha / rank is 1: another one is another learning
rate, which config.optimizer.rates.image and .text set. What is evaluated, served and exported
has the sums W + A B in the place of W, and no adapters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array
from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError

ADAPTERS = "adapters"  # among the parameters
_A, _B = "a", "b"
_ENCODERS = ("image_encoder", "text_encoder")


def add(params: Mapping[str, Any], config: ConfigDict, key: Array) -> dict[str, Any]:
    """The parameters with the adapters that config.model.adapters asks for.

    Args:
      params: of the model.
      config: the run's.
      key: of the random values.

    Raises:
      UserError: where the pattern matches no kernel of a tower that is trained.
    """
    settings = config.model.adapters
    if not settings.rank:
        return dict(params)
    trained = [name for name in _ENCODERS if config.optimizer.rates[name.split("_")[0]]]
    kernels = {
        path: leaf
        for path, leaf in _flat({name: params[name] for name in trained}).items()
        if path.endswith("/kernel") and leaf.ndim == 2
    }
    chosen = {path: leaf for path, leaf in kernels.items() if re.search(settings.pattern, path)}
    if not chosen:
        some = ", ".join(sorted(kernels)[:3])
        raise UserError(
            f"config.model.adapters.pattern={settings.pattern!r} matches no kernel of a tower that "
            f"is trained, such as {some}"
        )
    flat = {}
    for number, (path, kernel) in enumerate(sorted(chosen.items())):
        inputs, outputs = kernel.shape
        draw = jax.random.normal(jax.random.fold_in(key, number), (inputs, settings.rank))
        flat[f"{path}/{_A}"] = (draw / jnp.sqrt(inputs)).astype(kernel.dtype)
        flat[f"{path}/{_B}"] = jnp.zeros((settings.rank, outputs), kernel.dtype)
    return dict(params) | {ADAPTERS: traverse_util.unflatten_dict(flat, sep="/")}


def merged(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the model alone: every adapter added to its kernel.

    Of shapes instead of arrays, those of the kernels.
    """
    if ADAPTERS not in params:
        return params
    flat = _flat({name: part for name, part in params.items() if name != ADAPTERS})
    adapters = _flat(params[ADAPTERS])
    for name in adapters:
        path, _, part = name.rpartition("/")
        if part == _A and not isinstance(flat[path], jax.ShapeDtypeStruct):
            flat[path] = flat[path] + adapters[name] @ adapters[f"{path}/{_B}"]
    return traverse_util.unflatten_dict(flat, sep="/")


def describe(params: Mapping[str, Any]) -> list[str]:
    """What learns in the place of the encoders, in words; [] without adapters."""
    flat = _flat(params.get(ADAPTERS, {}))
    if not flat:
        return []
    ranks = {leaf.shape[1] for name, leaf in flat.items() if name.endswith(f"/{_A}")}
    count = sum(math.prod(leaf.shape) for leaf in flat.values())
    return [
        f"adapters of rank {min(ranks)} on {len(flat) // 2} kernels: {count:,} parameters learn in "
        "the place of the encoders'"
    ]


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(dict(tree), sep="/")
