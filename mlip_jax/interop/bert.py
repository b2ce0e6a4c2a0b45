"""BERT as Hugging Face's transformers saves it: config.json and safetensors, no pickles."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from mlip_jax.core import places
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_json
from mlip_jax.interop import tensors
from mlip_jax.interop.tensors import Recipe
from mlip_jax.models.bert import EPSILON, TOKEN_TYPES

# Of a config.json: what is computed here, and what a key that is left out means.
_COMPUTED: dict[str, tuple[Any, Any]] = {
    "model_type": ("bert", None),
    "hidden_act": ("gelu", "gelu"),
    "layer_norm_eps": (EPSILON, EPSILON),
    "position_embedding_type": ("absolute", "absolute"),
    "type_vocab_size": (TOKEN_TYPES, TOKEN_TYPES),
    "is_decoder": (False, False),
}
_SIZES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "positions": "max_position_embeddings",
}
# Of sentence-transformers' models.
_POOLING_FILE = "1_Pooling/config.json"
_POOLINGS = {"pooling_mode_mean_tokens": "mean_all", "pooling_mode_cls_token": "first"}
_POSITION = "embeddings.position_embeddings.weight"
_VOCABULARY = "embeddings.word_embeddings.weight"


def describe(path: str | Path) -> dict[str, Any]:
    """The sizes in a Hugging Face BERT folder's config.json.

    Returns:
      width, depth, heads, mlp_ratio, vocab_size, positions (the longest context) and activation.

    Raises:
      UserError: when config.json is missing or damaged, or is of a model that `BertEncoder` does
        not compute.
    """
    folder = places.local(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; expected one with config.json and safetensors")
    file = folder / "config.json"
    values = read_json(file, advice="get it again")
    for key, (computed, absent) in _COMPUTED.items():
        if (value := values.get(key, absent)) != computed:
            raise UserError(f"{file}: {key} is {value!r}; only {computed!r} is supported")
    sizes = {}
    for name, key in {**_SIZES, "hidden": "intermediate_size"}.items():
        sizes[name] = values.get(key)
        if type(sizes[name]) is not int or sizes[name] < 1:
            raise UserError(f"{file}: damaged: {key} is {sizes[name]!r}; expected a whole number")
    ratio = sizes.pop("hidden") / sizes["width"]
    return {**sizes, "mlp_ratio": ratio, "activation": values.get("hidden_act", "gelu")}


def pooling(path: str | Path) -> str:
    """How a sentence-transformers folder makes one vector of a text; "" for any other folder.

    Raises:
      UserError: when it says so in a way that `BertEncoder` does not compute.
    """
    file = places.local(path) / _POOLING_FILE
    if not file.is_file():
        return ""
    values = read_json(file, advice="get it again")
    chosen = [key for key, value in values.items() if key.startswith("pooling_mode") and value]
    if len(chosen) == 1 and chosen[0] in _POOLINGS:
        return _POOLINGS[chosen[0]]
    raise UserError(
        f"{file}: {' and '.join(chosen) or 'no pooling'}; only {' or '.join(_POOLINGS)} is "
        "supported"
    )


def read(path: str | Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a Hugging Face BERT as parameters of `BertEncoder`.

    Of a position table longer than the context the first rows are taken. Task heads, and the
    pooler unless it is wanted, are left out.

    Args:
      path: a folder with model.safetensors or its shards, or one safetensors file.
      wanted: the encoder's parameters, or anything with their structure and shapes.

    Returns:
      A tree as `wanted`, of float32 arrays.

    Raises:
      UserError: for a file that is missing, damaged or of another model.
    """
    shapes = {
        key: tuple(leaf.shape)
        for key, leaf in traverse_util.flatten_dict(dict(wanted), sep="/").items()
    }
    recipes = {key: _recipe(key, shape) for key, shape in shapes.items()}
    skipped = r"(^|\.)position_ids$|^cls\." + ("" if "pooler/kernel" in shapes else r"|^pooler\.")
    file_tensors = _read(path, re.compile(skipped))
    rows = shapes["position"][0]
    if _POSITION in file_tensors and len(file_tensors[_POSITION]) > rows:
        file_tensors[_POSITION] = file_tensors[_POSITION][:rows]
    parameters = tensors.build(path, file_tensors, recipes, _hint)
    return traverse_util.unflatten_dict(parameters, sep="/")


def _read(path: str | Path, skipped: re.Pattern[str]) -> dict[str, np.ndarray]:
    """The encoder's tensors under their plain names: no prefix, norms of a weight and a bias."""
    file_tensors = tensors.read(path, lambda name: bool(skipped.search(name.removeprefix("bert."))))
    if any(name.startswith("bert.") for name in file_tensors):
        file_tensors = {
            name: tensor for name, tensor in file_tensors.items() if name.startswith("bert.")
        }
    plain = {}
    for name, tensor in file_tensors.items():
        # Files as old as BERT call a norm's scale gamma and its bias beta.
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name.removeprefix("bert."))
        plain[re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)] = tensor
    return plain


_MODULES = {
    "norm_embedding": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
    "out": "attention.output.dense",
    "norm_attention": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm_mlp": "output.LayerNorm",
}
_TABLES = {
    "embedding": _VOCABULARY,
    "position": _POSITION,
    "token_type": "embeddings.token_type_embeddings.weight",
}


def _recipe(key: str, shape: tuple[int, ...]) -> Recipe:
    if key in _TABLES:
        return Recipe((_TABLES[key],), shape, tensors.same)
    *block, module, leaf = key.split("/")
    prefix = f"encoder.layer.{block[0].removeprefix('block_')}." if block else ""
    end = "bias" if leaf == "bias" else "weight"
    if module == "qkv":
        names = tuple(f"{prefix}attention.self.{part}.{end}" for part in ("query", "key", "value"))
        # Theirs are [outputs, inputs].
        part = (*shape[:-1], shape[-1] // 3)[::-1]
        return Recipe(names, part, lambda *parts: np.concatenate(parts).T)
    return Recipe((f"{prefix}{_MODULES[module]}.{end}",), shape[::-1], np.transpose)


def _hint(name: str, has: tuple[int, ...] | None, wanted: tuple[int, ...] | None) -> str:
    if has is None or wanted is None:
        if name.startswith("pooler."):
            return "set config.model.text.pooling to another than 'tanh'"
        return "set config.model.text.depth as its config.json says"
    if name == _VOCABULARY and has[0] != wanted[0]:
        return "set config.model.text.tokenizer to wordpiece:FOLDER of the file's own vocabulary"
    if name == _POSITION and has[0] != wanted[0]:
        return f"set config.model.text.context_length to {has[0]} or less"
    return "set config.model.text.width and mlp_ratio as its config.json says"
