"""A model in another library's folder: what it is, before and with its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import decode_json, is_number
from mlip_jax.data.images.preprocessing import Preprocessing, check_image_size
from mlip_jax.data.text.tokenizer import Tokenizer
from mlip_jax.interop import layouts
from mlip_jax.interop.layouts import Layout
from mlip_jax.models import building

Computed = Mapping[str, tuple[Any, Any]]
_MOST = 2**31 - 1  # of a whole number in a config


@dataclass(frozen=True)
class Foreign:
    """A model that another library has written.

    Attributes:
      folder: where it lies.
      config: of the same model here.
      layout: of its tensors.
      weights: the file, or the folder, that holds them.
      tokenizer: what its folder says of texts.
      preprocessing: what its folder says of images.
      lost: what an export of this package's left behind, in words.
    """

    folder: Path
    config: ConfigDict
    layout: Layout
    weights: Path
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    lost: tuple[str, ...] = ()

    def params(self) -> dict[str, Any]:
        """The parameters, a tree of float32 arrays.

        Raises:
          UserError: for weights that are missing, damaged or of another model.
        """
        wanted = building.parameter_shapes(self.config, self.tokenizer)
        return layouts.read(self.weights, self.layout, wanted)


class MissingTokenizer(Tokenizer):
    """Stands where a folder holds no tokenizer that fits: token ids can still be embedded."""

    def __init__(self, vocab_size: int, sot: int, eot: int, reason: str) -> None:
        """Takes the ids by the model's config, and why there is no more than that."""
        self.vocab_size, self.sot, self.eot, self.pad = vocab_size, sot, eot, eot
        self.start, self.end = (sot,), (eot,)
        self.cleaning, self.unescapes, self.written = "none", False, False
        self.pads_left, self.cuts_left, self.longest = False, False, None
        self.reason = reason

    def encode(self, texts: Any, context_length: int) -> np.ndarray:
        """Raises UserError: why texts cannot be tokenised."""
        raise UserError(f"{self.reason}; encode_token_ids takes ids without it")

    def to_json(self) -> str:
        """Raises UserError: why it cannot be written."""
        raise UserError(self.reason)


@dataclass(frozen=True)
class MissingPreprocessing(Preprocessing):
    """Stands where a folder does not say how images are prepared: arrays can still be embedded."""

    reason: str = ""

    def __call__(self, image: Any) -> np.ndarray:
        """Raises UserError: why images cannot be prepared."""
        raise UserError(f"{self.reason}; encode_image_array takes normalised pixels without it")

    def normalize(self, images: Any) -> Any:
        """Raises UserError: why pixels cannot be normalised."""
        return self(images)

    def to_dict(self) -> dict[str, Any]:
        """Raises UserError: why it cannot be written."""
        raise UserError(self.reason)


_EXPORT = "mlip_jax"


def with_lost(values: Mapping[str, Any], lost: Sequence[str]) -> dict[str, Any]:
    """Another library's config, with what an export to it left behind, which `lost` reads."""
    return dict(values) | ({_EXPORT: {"lost": list(lost)}} if lost else {})


def lost(values: Mapping[str, Any]) -> tuple[str, ...]:
    """What an export left behind, by the config that it wrote; () for a config of others."""
    export = values.get(_EXPORT)
    sentences = export.get("lost") if isinstance(export, dict) else None
    return tuple(map(str, sentences)) if isinstance(sentences, list) else ()


_MISSING = "missing"


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """A tokenizer, or what stands for it, as text."""
    if not isinstance(tokenizer, MissingTokenizer):
        return tokenizer.to_json()
    values = (tokenizer.vocab_size, tokenizer.sot, tokenizer.eot, tokenizer.reason)
    return json.dumps({_MISSING: values})


def tokenizer_of(text: str) -> Tokenizer:
    """The inverse of `tokenizer_json`."""
    values = decode_json(text)
    if _MISSING in values:
        return MissingTokenizer(*values[_MISSING])
    return Tokenizer.from_json(text)


def preprocessing_values(preprocessing: Preprocessing) -> dict[str, Any]:
    """A preprocessing, or what stands for it, as plain values."""
    if not isinstance(preprocessing, MissingPreprocessing):
        return preprocessing.to_dict()
    return {_MISSING: preprocessing.reason, "image_size": preprocessing.image_size}


def preprocessing_of(values: Mapping[str, Any]) -> Preprocessing:
    """The inverse of `preprocessing_values`."""
    if _MISSING in values:
        check_image_size(values["image_size"])
        return MissingPreprocessing(values["image_size"], reason=str(values[_MISSING]))
    return Preprocessing.from_dict(values)


def checked(file: Path, preprocessing: Preprocessing) -> Preprocessing:
    """A preprocessing that a file describes.

    Raises:
      UserError: where no model's images are prepared so.
    """
    try:
        preprocessing.check()
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    return preprocessing


def base_config(folder: Path) -> ConfigDict:
    """What configs of other libraries' models share: plain ViTs, merged, if at all, as by ToMe."""
    config = schema.default()
    config.name = folder.resolve().name
    merging = config.model.image.merging
    merging.guidance, merging.proportional_attention = "none", True
    config.model.text.attend_padding = True
    return config


def check_computed(file: Path, section: str, values: Mapping[str, Any], computed: Computed) -> None:
    """Refuses a model that is computed otherwise than here.

    Args:
      file: for messages.
      section: of the file.
      values: the section's.
      computed: by key, what is computed here and what a key that is left out means.

    Raises:
      UserError: naming the key.
    """
    for key, (supported, absent) in computed.items():
        value = values.get(key, absent)
        value = absent if value is None else value
        if value != supported:
            raise UserError(
                f"{file}: {section}.{key} is {value!r}; only {supported!r} is supported"
            )


def positive_int(file: Path, section: str, values: Mapping[str, Any], key: str, absent: int) -> int:
    """A positive whole number of a config; a square's sides may be given as two alike.

    Raises:
      UserError: when it is none.
    """
    value = values.get(key)
    value = absent if value is None else value
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]
    if type(value) is not int or not 1 <= value <= _MOST:
        raise UserError(f"{file}: {section}.{key} is {value!r}; expected a whole number above 0")
    return value


def chosen(
    file: Path,
    section: str,
    values: Mapping[str, Any],
    key: str,
    known: Mapping[Any, str],
    absent: Any,
) -> str:
    """Our word for a value of a config.

    Raises:
      UserError: when it is not known.
    """
    value = values.get(key)
    value = absent if value is None else value
    # Compared, not looked up: a list has no hash.
    word = next((word for name, word in known.items() if name == value), None)
    if word is None:
        raise UserError(
            f"{file}: {section}.{key} is {value!r}; expected one of {', '.join(map(str, known))}"
        )
    return word


def number(file: Path, section: str, values: Mapping[str, Any], key: str, absent: float) -> float:
    """A positive number of a config.

    Raises:
      UserError: when it is none.
    """
    value = values.get(key)
    value = absent if value is None else value
    if not is_number(value) or not value > 0:
        raise UserError(f"{file}: {section}.{key} is {value!r}; expected a number above 0")
    return float(value)


def section_of(file: Path, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object inside a config's.

    Raises:
      UserError: when it is missing, or no object.
    """
    section = values.get(key)
    if not isinstance(section, dict):
        raise UserError(f"{file}: damaged: {key} is {type(section).__name__}, expected an object")
    return section


def colours(
    file: Path, values: Mapping[str, Any], key: str, absent: Any
) -> tuple[float, float, float]:
    """Three numbers, a channel each, or one for all.

    Raises:
      UserError: when they are none.
    """
    value = values.get(key)
    value = absent if value is None else value
    value = [value] * 3 if isinstance(value, (int, float)) else value
    try:
        first, second, third = map(float, value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{file}: {key} is {value!r}; expected three numbers") from None
    return first, second, third


def tokenizer_or_reason(
    read: Callable[[], Tokenizer], vocab_size: int, sot: int, eot: int
) -> Tokenizer:
    """What `read` gives, or a stand-in that tells why it gives nothing."""
    try:
        return read()
    except UserError as error:
        return MissingTokenizer(vocab_size, sot, eot, str(error))
