"""ResNets in torchvision's layout and names, as safetensors, which holds no pickles."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import traverse_util

from mlip_jax.interop import tensors
from mlip_jax.interop.tensors import Recipe

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def read(
    path: str | Path, wanted_params: Mapping[str, Any], wanted_stats: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of torchvision's ResNet as parameters and statistics of `ResNet`.

    The classifier is left out.

    Args:
      path: a safetensors file, or a folder with a model.safetensors.
      wanted_params: the encoder's parameters, or anything with their structure and shapes.
      wanted_stats: its running statistics, alike.

    Returns:
      Parameters and statistics, trees as those wanted, of float32 arrays.

    Raises:
      UserError: for a file that is missing, damaged or of another model.
    """
    recipes = {
        key: _recipe(key[1:], tuple(leaf.shape))
        for key, leaf in traverse_util.flatten_dict(
            {"params": dict(wanted_params), "batch_stats": dict(wanted_stats)}
        ).items()
    }
    skipped = re.compile(r"^fc\.|\.num_batches_tracked$")
    file_tensors = tensors.read(path, lambda name: bool(skipped.search(name)))
    arrays = tensors.build(path, file_tensors, recipes, _hint)
    trees = traverse_util.unflatten_dict(arrays)
    return trees["params"], trees["batch_stats"]


def _recipe(key: tuple[str, ...], shape: tuple[int, ...]) -> Recipe:
    *block, module, leaf = key
    name = f"{_module(*block, module)}.{_LEAVES[leaf]}"
    if leaf != "kernel":
        return Recipe((name,), shape, tensors.same)
    # Theirs are [outputs, inputs, rows, columns]; of 1x1 convolutions ours are matrices.
    rows, columns, inputs, outputs = (1,) * (4 - len(shape)) + shape
    return Recipe(
        (name,),
        (outputs, inputs, rows, columns),
        lambda tensor: tensor.transpose(2, 3, 1, 0).reshape(shape),
    )


def _module(*path: str) -> str:
    """stage_0_block_1, norm_0 -> layer1.1.bn1."""
    *block, module = path
    if not block:
        return {"stem_convolution": "conv1", "stem_norm": "bn1"}[module]
    _, stage, _, index = block[0].split("_")
    if module.startswith("shortcut"):
        module = "downsample.1" if module.endswith("norm") else "downsample.0"
    else:
        kind, number = module.split("_")
        module = f"{'conv' if kind == 'convolution' else 'bn'}{int(number) + 1}"
    return f"layer{int(stage) + 1}.{index}.{module}"


def _hint(name: str, has: tuple[int, ...] | None, wanted: tuple[int, ...] | None) -> str:
    if has is None or wanted is None:
        return "set config.model.image.depth to the file's"
    if name == "conv1.weight" and has[2:] != wanted[2:]:
        stems: dict[tuple[int, ...], str] = {(7, 7): "imagenet", (3, 3): "small"}
        stem = stems.get(has[2:])
        return f"set config.model.image.stem to {stem!r}" if stem else "no such stem is known here"
    return "set config.model.image.width and depth to the file's"
