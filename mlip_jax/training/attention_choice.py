"""Which form of attention a run trains with: what its config names, or what a probe finds fastest.

On GPUs and TPUs "auto" times every form on the largest attention of each tower, forth and back,
before the step is compiled. On CPUs it is the plain form, which measured fastest. What a probe has
found is kept in the workdir: a run that goes on has to compute the same bits.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError, first_line
from mlip_jax.core.files import read_json, write_atomically
from mlip_jax.core.registry import TEXT_ENCODERS
from mlip_jax.core.schema import ATTENTIONS, views_of
from mlip_jax.devices import parallel, processes
from mlip_jax.models.attention import attend
from mlip_jax.models.building import compute_dtype, image_encoder, training_patches
from mlip_jax.models.guidance import parts

RECORD = "attention.json"
_PROBED = ("gpu", "tpu")  # platforms
_PLATFORMS = {"cudnn": "gpu", "pallas": "tpu"}  # of forms that others do not have
_TOLERANCE = 0.03  # of a form's results, relative to the plain form's: some roundings of bfloat16
_ROUNDS, _CALLS = 7, 10  # the median of rounds, each of some calls


@dataclass(frozen=True)
class Shape:
    """The largest attention of a tower on one device.

    Attributes:
      rows: examples.
      tokens: of an example.
      heads: of a device.
      head: their width.
      causal: whether a token attends to none after it.
      padded: whether rows have lengths of their own.
      sized: whether the logits get the log of the tokens' sizes.
      first: whether the attention of the first token is asked for.
      received: whether the attention of all tokens is.
    """

    rows: int
    tokens: int
    heads: int
    head: int
    causal: bool = False
    padded: bool = False
    sized: bool = False
    first: bool = False
    received: bool = False

    def __str__(self) -> str:
        return f"{self.rows} x {self.heads} heads x {self.tokens} tokens x {self.head}"


@dataclass(frozen=True)
class Choice:
    """The form of each tower whose attention has several, and what to print about it."""

    forms: dict[str, str]
    lines: list[str]


def shapes(config: ConfigDict, mesh: Mesh) -> dict[str, Shape]:
    """The largest attention of each tower ("image", "text") whose attention has several forms."""
    image, text = config.model.image, config.model.text
    shards = parallel.batch_shards(mesh, config.accumulation)

    def shape(tower: ConfigDict, view: str, tokens: int, **more: Any) -> Shape:
        heads = max(tower.heads // mesh.shape["tensor"], 1)
        rows = max(config.batch_size * views_of(config, view) // shards, 1)
        return Shape(rows, tokens, heads, tower.width // tower.heads, **more)

    shapes = {}
    if image_encoder(config).patch_tokens:
        merging, guides = image.merging, parts(image.merging.guidance)
        shapes["image"] = shape(
            image,
            "augmented_image",
            training_patches(config) + (image.pooling == "class"),
            sized=merging.proportional_attention,
            first=merging.rate > 0 and "spatial" in guides,
            received=merging.rate > 0 and "received" in guides,
        )
    if TEXT_ENCODERS[text.architecture].attention_forms:
        shapes["text"] = shape(
            text,
            "other_caption",
            text.context_length,
            causal=text.causal,
            padded=not text.attend_padding,
        )
    return shapes


def named(config: ConfigDict, platform: str) -> str:
    """The form that a config names for a platform; "auto" is "plain" where nothing is probed.

    Raises:
      UserError: when there is no such form on the platform.
    """
    only = _PLATFORMS.get(config.attention, platform)
    if platform != only:
        raise UserError(
            f"config.attention={config.attention!r} is for {only.upper()}s, not for "
            f"{platform.upper()}s: set config.attention='auto'"
        )
    return "plain" if config.attention == "auto" else config.attention


def check(config: ConfigDict, mesh: Mesh) -> None:
    """Refuses a form that config.attention names and that cannot be had here; all processes call.

    Raises:
      UserError: one line with the reason.
    """
    form = named(config, _device(mesh).platform)
    if form not in _candidates(mesh):
        raise UserError(
            f"config.attention={form!r} does not go with config.mesh.tensor={config.mesh.tensor}, "
            "which may split a head: set config.attention='auto'"
        )
    if form not in _PLATFORMS:
        return

    def attempt() -> None:
        for tower, shape in shapes(config, mesh).items():
            try:
                _Contest(shape, compute_dtype(config)).enter(form, repeatable=False)
            except Exception as error:  # of JAX, XLA or cuDNN, of many types
                raise UserError(
                    f"config.attention={form!r} cannot compute the {tower} attention of {shape} "
                    f"in {compute_dtype(config).name}: {_line(error)}; set config.attention='auto'"
                ) from error

    processes.by_first(attempt)


def choose(config: ConfigDict, mesh: Mesh, folder: Path | None = None) -> Choice:
    """The forms to train with; every process calls it and gets the same.

    Args:
      config: checked by `check`.
      mesh: the devices.
      folder: the workdir, where the finding of a probe is looked for and kept; None: nowhere.

    Raises:
      UserError: when the workdir's record is damaged.
    """
    device = _device(mesh)
    towers = shapes(config, mesh)
    if not towers:
        return Choice({}, [])
    if config.attention != "auto" or device.platform not in _PROBED:
        form = named(config, device.platform)
        return Choice(dict.fromkeys(towers, form), [f"attention: {form}"])

    def decide() -> Choice:
        # Other devices may have another fastest; on those of before the bits must be the same.
        kept = _kept(folder) if folder else {}
        forms = kept.get("forms", {})
        if kept.get("device") == device.device_kind and {*forms.values()} <= {*_candidates(mesh)}:
            return Choice(forms, [f"attention: {_words(forms)}, as this run began"])
        here = [
            form
            for form in _candidates(mesh)
            if _PLATFORMS.get(form, device.platform) == device.platform
        ]
        choice = _probe(towers, compute_dtype(config), here)
        if folder:
            record = {"device": device.device_kind, "forms": choice.forms, "probe": choice.lines}
            write_atomically(folder / RECORD, json.dumps(record, indent=2) + "\n")
        return choice

    return processes.by_first(decide)


def _device(mesh: Mesh) -> jax.Device:
    return mesh.devices.flat[0]


def _kept(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    kept = read_json(path, missing={}, advice="mend it or remove it")
    if not isinstance(kept.get("forms", {}), dict):
        raise UserError(f'{path}: "forms" must be an object; mend it or remove it')
    return kept


def _words(forms: dict[str, str]) -> str:
    return ", ".join(f"{tower} {form}" for tower, form in forms.items())


def _line(error: Exception) -> str:
    return first_line(error)[:200].rstrip(".")


def _candidates(mesh: Mesh) -> list[str]:
    """The forms that can be sharded: the tensor axis may split a head, which no kernel takes."""
    return [form for form in ATTENTIONS if form not in _PLATFORMS or mesh.shape["tensor"] == 1]


def _probe(towers: dict[str, Shape], dtype: jnp.dtype, candidates: list[str]) -> Choice:
    forms, lines = {}, []
    for tower, shape in towers.items():
        contest = _Contest(shape, dtype)
        left_out = []
        for form in candidates:
            try:
                contest.enter(form)
            except Exception as error:  # of JAX, XLA or cuDNN, of many types
                left_out.append(f"; not {form}: {_line(error)}")
        seconds = contest.seconds()
        forms[tower] = min(seconds, key=lambda form: seconds[form], default="plain")
        figures = ", ".join(f"{form} {1e3 * median:.3g} ms" for form, median in seconds.items())
        lines.append(f"  {tower}, {shape}, forth and back: {figures}{''.join(left_out)}")
    return Choice(forms, [f"attention: {_words(forms)}, by a probe", *lines])


def _error(results: Any, plain: Any) -> float:
    """The largest distance of two arrays of the same place, relative to the plain one's norm."""

    def relative(one: Array, other: Array) -> float:
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))

    return max(jax.tree.leaves(jax.tree.map(relative, results, plain)))


class _Contest:
    """Forms of one attention, on random arrays on one device of this process."""

    def __init__(self, shape: Shape, dtype: jnp.dtype) -> None:
        self._shape = shape
        rows, tokens, width = shape.rows, shape.tokens, shape.heads * shape.head
        keys = jax.random.split(jax.random.key(0), 3)
        with jax.default_device(jax.local_devices()[0]):
            self._qkv = jax.random.normal(keys[0], (rows, tokens, 3 * width), dtype)
            self._gradient = jax.random.normal(keys[1], (rows, tokens, width), dtype)
            self._size = jax.random.uniform(keys[2], (rows, tokens), minval=1.0, maxval=4.0)
            self._lengths = jnp.full(rows, tokens, jnp.int32)
        self._entered: dict[str, Callable[[], Any]] = {}

    def enter(self, form: str, repeatable: bool = True) -> None:
        """Compiles a form and runs it; it takes part unless it fails.

        A form of which a compiler makes something else than the plain form fails too.

        Args:
          form: one of `ATTENTIONS`.
          repeatable: whether a form fails whose bits differ from one call to the next, as those
            of gradients that are summed in any order do.
        """
        program = self._program(form)
        first, second = jax.block_until_ready((program(), program()))
        same = jax.tree.leaves(jax.tree.map(jnp.array_equal, first, second))
        if repeatable and not all(same):
            raise ValueError("its bits differ from one call to the next")
        if form in _PLATFORMS and "plain" in self._entered:
            error = _error(first, self._entered["plain"]())
            if not error < _TOLERANCE:
                raise ValueError(f"it differs from the plain form by {error:.2g} of its norm")
        self._entered[form] = program

    def seconds(self) -> dict[str, float]:
        """The median time of a call of each form that takes part, by turns."""
        times: dict[str, list[float]] = {form: [] for form in self._entered}
        for _ in range(_ROUNDS):
            for form, program in self._entered.items():
                start = time.perf_counter()
                for _ in range(_CALLS):
                    last = program()
                jax.block_until_ready(last)
                times[form].append((time.perf_counter() - start) / _CALLS)
        return {form: statistics.median(rounds) for form, rounds in times.items()}

    def _program(self, form: str) -> Callable[[], Any]:
        shape = self._shape

        def forth_and_back(qkv: Array, gradient: Array, lengths: Array, size: Array) -> Any:
            def attention(qkv: Array) -> tuple[Array, tuple[Array | None, ...]]:
                out, _, first, received = attend(
                    qkv,
                    shape.heads,
                    form,
                    shape.causal,
                    lengths if shape.padded else None,
                    size if shape.sized else None,
                )
                asked = first if shape.first else None, received if shape.received else None
                return out, asked

            out, pull, asked = jax.vjp(attention, qkv, has_aux=True)
            return out, pull(gradient), asked

        program = jax.jit(forth_and_back)
        return lambda: program(self._qkv, self._gradient, self._lengths, self._size)
