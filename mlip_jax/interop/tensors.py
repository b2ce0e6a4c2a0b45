"""What every reader of foreign weights shares: the files' tensors, and parameters made of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from mlip_jax.core import places
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_json
from mlip_jax.core.texts import brief, wrong_path

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NO_PICKLES = (
    "pickles can run code and are never read: where torch is, convert it by "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
)
_FLOATS = ("F64", "F32", "F16", "BF16")


class Recipe(NamedTuple):
    """How a parameter is made of a file's tensors."""

    names: tuple[str, ...]
    shape: tuple[int, ...]  # of each of them
    build: Callable[..., np.ndarray]


def read(path: str | Path, skip: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file or folder by name, as float32; no name that `skip` holds.

    A folder has model.safetensors, or shards that model.safetensors.index.json lists.

    Raises:
      UserError: for a missing or damaged file, or a tensor that is not of floats.
    """
    tensors = {}
    for file in _files(places.local(path)):
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 -- no Mapping
                if skip(name):
                    continue
                kind = opened.get_slice(name).get_dtype()
                if kind not in _FLOATS:
                    raise UserError(
                        f"{file}: tensor {name} is of type {kind}; use a file of "
                        f"{', '.join(_FLOATS[:-1])} or {_FLOATS[-1]}"
                    )
                tensors[name] = opened.get_tensor(name).astype(np.float32)
    return tensors


def shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a safetensors file or folder, without their values.

    Raises:
      UserError: for a missing or damaged file.
    """
    found = {}
    for file in _files(places.local(path)):
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 -- no Mapping
                found[name] = tuple(opened.get_slice(name).get_shape())
    return found


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file; what goes wrong while it is read is told as the file's."""
    try:
        with safe_open(file, framework="np") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        if _is_pickle(file):
            raise UserError(
                f"{file}: is a pickle by content, not safetensors; {_NO_PICKLES}"
            ) from None
        raise UserError(f"{file}: cannot be read as safetensors: {error}") from None


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not index.is_file():
        raise UserError(f"{path}: {_lacking(path)}")
    try:
        names = set(read_json(index, advice="get it again")["weight_map"].values())
        strange = [name for name in names if wrong_path(name) or not Path(name).name == name != ""]
        if strange:
            name = min(strange)
            raise UserError(f"{index}: names {brief(name)}, which is no file of its folder")
        return [path / name for name in sorted(names)]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: damaged: {error!r}; get it again") from None


def _lacking(path: Path) -> str:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if not pickles:
        return "the folder has no model.safetensors; pickled weights are not read"
    return f"the folder has no model.safetensors, only {pickles[0]}, a pickle; {_NO_PICKLES}"


def _is_pickle(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            start = opened.read(10)
    except OSError:
        return False
    # torch.save's zip, or a bare pickle of protocol 2 to 5: of safetensors, byte 8 opens a JSON.
    bare = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return start[:4] == b"PK\x03\x04" or (bare and start[8:9] != b"{")


def build(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    recipes: Mapping[str, Recipe],
    hint: Callable[[str, tuple[int, ...] | None, tuple[int, ...] | None], str],
) -> dict[str, np.ndarray]:
    """Makes parameters of a file's tensors, all of them.

    Args:
      path: where the tensors come from, for messages.
      tensors: by the file's names.
      recipes: by the parameters' names.
      hint: (a tensor's name, its shape, the wanted one) -> what to change; a shape is None where
        the file lacks the tensor, or nothing asks for it.

    Raises:
      UserError: for a tensor that is missing, of another shape, or asked for by no recipe.
    """
    shapes = {name: recipe.shape for recipe in recipes.values() for name in recipe.names}
    for verb, names in (
        ("lacks", shapes.keys() - tensors.keys()),
        ("also has", tensors.keys() - shapes.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            first = min(names)
            raise UserError(
                f"{path}: unlike the configured model the file {verb} tensor {first}{more}: "
                f"{hint(first, None, None)}"
            )
    for name, shape in sorted(shapes.items()):
        if tensors[name].shape != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {tensors[name].shape}, the configured model "
                f"wants {shape}: {hint(name, tensors[name].shape, shape)}"
            )
    return {
        key: np.asarray(recipe.build(*(tensors[name] for name in recipe.names)), order="C")
        for key, recipe in recipes.items()
    }


def same(tensor: np.ndarray) -> np.ndarray:
    """For a `Recipe` that takes a tensor as it is."""
    return tensor
