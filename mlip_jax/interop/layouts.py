"""CLIP and SigLIP in the layouts of other libraries: which tensor is which parameter, both ways.

The names are those of open_clip 3, timm 1 and transformers 5. A layout is a rule from a parameter's
path to the file's tensors; `read` and `write` apply it in the two directions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from mlip_jax.core.errors import UserError
from mlip_jax.interop import tensors
from mlip_jax.interop.tensors import Recipe

Shape = tuple[int, ...]


class Kind(NamedTuple):
    """How a parameter and a file's tensors are made of each other."""

    shape: Callable[[Shape, int], Shape]  # (the parameter's, how many tensors) -> of each tensor
    read: Callable[..., np.ndarray]  # (the parameter's shape, tensors) -> the parameter
    write: Callable[[np.ndarray, Shape], tuple[np.ndarray, ...]]  # (parameter, a tensor's shape)


def _patch_shape(shape: Shape, _: int) -> Shape:
    side = math.isqrt(shape[0] // 3)
    return shape[1], 3, side, side


KINDS = {
    "same": Kind(
        lambda shape, _: shape,
        lambda _, tensor: tensor,
        lambda value, _: (value,),
    ),
    # PyTorch's matrices are [outputs, inputs].
    "linear": Kind(
        lambda shape, _: shape[::-1],
        lambda _, tensor: tensor.T,
        lambda value, _: (value.T,),
    ),
    # Several matrices, or biases, whose outputs follow each other here.
    "joined": Kind(
        lambda shape, count: (shape[-1] // count, *shape[:-1]),
        lambda _, *parts: np.concatenate(parts).T,
        lambda value, shape: tuple(np.split(value.T, value.shape[-1] // shape[0])),
    ),
    # A convolution over the patches, [outputs, 3, rows, columns], is a matrix here.
    "patch": Kind(
        _patch_shape,
        lambda shape, tensor: tensor.transpose(2, 3, 1, 0).reshape(shape),
        lambda value, shape: (value.reshape(*shape[2:], 3, shape[0]).transpose(3, 2, 0, 1),),
    ),
    # The positions of a grid as rows.
    "grid": Kind(
        lambda shape, _: (shape[0] * shape[1], shape[2]),
        lambda shape, tensor: tensor.reshape(shape),
        lambda value, shape: (value.reshape(shape),),
    ),
    # A class token that brings its own position here.
    "class": Kind(
        lambda shape, _: shape,
        lambda _, token, position: token + position,
        lambda value, _: (value, np.zeros_like(value)),
    ),
    # What a layout goes without.
    "zero": Kind(
        lambda shape, _: shape,
        lambda shape: np.zeros(shape, np.float32),
        lambda value, _: (),
    ),
    "identity": Kind(
        lambda shape, _: shape,
        lambda shape: np.eye(*shape, dtype=np.float32),
        lambda value, _: (),
    ),
}


class Part(NamedTuple):
    """The tensors of one parameter."""

    names: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Layout:
    """Where another library keeps a two-tower model.

    Attributes:
      name: of the library and the model, for messages.
      parts: parameters by path -> their tensors.
      modules: modules by path, "{}" standing for a block's number, -> theirs; kernels are matrices.
      joined: modules whose one matrix is several there.
      cut: tensors that hold two parts one after the other, and how many rows the first has: one,
        or a share of all. The parts are called NAME#0 and NAME#1 here.
      led: tensors that have a first axis of one more; named twice, two of them.
      skipped: a pattern of tensors that are no weights.
    """

    name: str
    parts: Mapping[str, Part]
    modules: Mapping[str, str]
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cut: Mapping[str, float] = field(default_factory=dict)
    led: tuple[str, ...] = ()
    skipped: str = r"(^|\.)(position_ids|attn_mask)$|^(input_resolution|context_length|vocab_size)$"

    def part(self, key: str) -> Part:
        """The tensors of the parameter at a path.

        Raises:
          KeyError: for a parameter that the layout has no place for.
        """
        if key in self.parts:
            return self.parts[key]
        module, _, leaf = key.rpartition("/")
        number = re.search(r"_(\d+)/", module)
        pattern = module if number is None else module.replace(number[0], "_{}/", 1)
        end = "bias" if leaf == "bias" else "weight"
        block = number[1] if number else ""
        if pattern in self.joined:
            names = tuple(_tensor(name.format(block), end) for name in self.joined[pattern])
            return Part(names, "joined")
        kind = "linear" if leaf == "kernel" else "same"
        return Part((_tensor(self.modules[pattern].format(block), end),), kind)


def _tensor(module: str, end: str) -> str:
    """MODULE.weight; the matrices of PyTorch's attention are called MODULE_weight."""
    return f"{module}{end}" if module.endswith("_") else f"{module}.{end}"


def read(
    weights: Path,
    layout: Layout,
    wanted: Mapping[str, Any],
    prepare: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict,
) -> dict[str, Any]:
    """The weights of a file in another library's layout, as parameters of `TwoTower`.

    Args:
      weights: a safetensors file, or a folder as `tensors.read` takes it.
      layout: of the file.
      wanted: the parameters, or anything with their structure and shapes.
      prepare: what is done with the file's tensors before they are taken.

    Returns:
      A tree as `wanted`, of float32 arrays.

    Raises:
      UserError: for a file that is missing, damaged or of another model.
    """
    skipped = re.compile(layout.skipped)
    file_tensors: dict[str, np.ndarray] = {}
    found = prepare(tensors.read(weights, lambda name: bool(skipped.search(name))))
    for name, tensor in found.items():
        if name in ("logit_scale", "logit_bias") and tensor.size == 1:
            tensor = tensor.reshape(())
        for _ in range(layout.led.count(name)):
            if tensor.ndim > 1 and len(tensor) == 1:
                tensor = tensor[0]
        if name in layout.cut and tensor.ndim:
            share = layout.cut[name]
            rows = round(share * len(tensor)) if share < 1 else 1
            first = tensor[:rows] if share < 1 else tensor[0]
            file_tensors |= {f"{name}#0": first, f"{name}#1": tensor[rows:]}
        else:
            file_tensors[name] = tensor
    flat = traverse_util.flatten_dict(dict(wanted), sep="/")
    recipes = {key: _recipe(layout, key, tuple(leaf.shape)) for key, leaf in flat.items()}
    parameters = tensors.build(weights, file_tensors, recipes, _hint)
    return traverse_util.unflatten_dict(parameters, sep="/")


def _hint(name: str, has: Shape | None, wanted: Shape | None) -> str:
    del name, has, wanted
    return "the config beside it is of another model; get both from one place"


def _recipe(layout: Layout, key: str, shape: Shape) -> Recipe:
    names, kind = layout.part(key)
    rule = KINDS[kind]
    return Recipe(
        names, rule.shape(shape, max(len(names), 1)), lambda *parts: rule.read(shape, *parts)
    )


def write(layout: Layout, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `read`: a model's parameters as the tensors of another library's file.

    Raises:
      UserError: for a parameter that the layout has no place for.
    """
    file_tensors: dict[str, np.ndarray] = {}
    for key, leaf in traverse_util.flatten_dict(dict(params), sep="/").items():
        value = np.asarray(leaf, np.float32)
        try:
            names, kind = layout.part(key)
        except KeyError:
            raise UserError(f"{layout.name} has no place for the parameter {key}") from None
        rule = KINDS[kind]
        parts = rule.write(value, rule.shape(value.shape, max(len(names), 1)))
        file_tensors |= dict(zip(names, parts, strict=True))
    for name in layout.cut:
        if f"{name}#0" in file_tensors:
            first, second = file_tensors.pop(f"{name}#0"), file_tensors.pop(f"{name}#1")
            file_tensors[name] = np.concatenate(
                [np.atleast_2d(first) if second.ndim > 1 else first, second]
            )
    file_tensors |= {name: file_tensors[name][None] for name in layout.led if name in file_tensors}
    return {name: np.asarray(tensor, order="C") for name, tensor in file_tensors.items()}
