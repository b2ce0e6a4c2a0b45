"""Encoders of the `tokenizers` library from a stranger's JSON: bounded before they are used.

The library itself ends the process, or takes all memory, for what a file may ask of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer

from mlip_jax.core.errors import UserError, first_line
from mlip_jax.core.files import decode_json

_MOST_BYTES = 256 * 2**20
_MOST_PARTS = 64  # of a chain of normalizers or of splitters
_MOST_GROWTH = 10_000  # bytes of a normalised text for a byte of the text
_UNFOLDED = 18  # bytes that a character may become when it is decomposed
_GROWTH = {
    **dict.fromkeys(("NFKC", "NFKD", "Precompiled"), _UNFOLDED),
    **dict.fromkeys(("NFC", "NFD", "Lowercase"), 3),
    **dict.fromkeys(("Strip", "StripAccents", "Nmt"), 1),
    "BertNormalizer": 9,
}
_OTHER_GROWTH = 4  # such as bytes that become letters
# A group with a repetition in it that is repeated itself, such as (a+)+: takes for ever to fail.
_NESTED = re.compile(r"\([^()]*(?<!\\)[+*}][^()]*\)[+*{]")
_PANIC = "PanicException"  # of Rust: no Exception


def read_encoder(text: str) -> Tokenizer:
    """The encoder in a tokenizer.json, without the cut and the padding that it asks for.

    Raises:
      ValueError: for what is none, or asks for more memory than any model's.
      Exception: of the library, which raises Exception itself.
    """
    if len(text) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES >> 20} MiB are not read")
    values = decode_json(text)
    growth = 1
    for part in _parts(values.get("normalizer")):
        growth *= _growth(part)
        if growth > _MOST_GROWTH:
            raise ValueError(f"its normalizer makes texts more than {_MOST_GROWTH:,} times as long")
    for part in (*_parts(values.get("normalizer")), *_parts(values.get("pre_tokenizer"))):
        pattern = part.get("pattern")
        expression = pattern.get("Regex") if isinstance(pattern, dict) else None
        if _NESTED.search(str(expression or "")):
            raise ValueError(f"the pattern {expression!r} may never come to an end")
    return guarded(Tokenizer.from_str, text)


def encode(encoder: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """The texts' encodings, without special tokens.

    Raises:
      UserError: where the library gives up, as on a pattern that never comes to an end.
    """
    try:
        return guarded(encoder.encode_batch_fast, list(texts), add_special_tokens=False)
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"the tokenizer cannot encode these texts: {first_line(error)}") from None


class _Panic(ValueError):
    """The library's own end, as an error."""


def guarded(function: Any, *arguments: Any, **options: Any) -> Any:
    """What a function of the library gives; its panic is a ValueError."""
    try:
        return function(*arguments, **options)
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        raise _Panic(first_line(Exception(str(error)))) from None


def highest_id(encoder: Tokenizer) -> int:
    """The highest id of its tokens; -1 where it has none."""
    return max(encoder.get_vocab().values(), default=-1)


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """A normalizer or splitter, or those of a chain, however nested."""
    left, count = [part], 0
    while left:
        part = left.pop()
        if not isinstance(part, dict):
            continue
        count += 1
        if count > _MOST_PARTS:
            raise ValueError(f"a chain of more than {_MOST_PARTS} parts is not read")
        inner = [part.get(key) for key in ("normalizers", "pretokenizers")]
        chain = next((each for each in inner if isinstance(each, list)), None)
        if chain is None:
            yield part
        else:
            left += chain


def _growth(part: dict[str, Any]) -> int:
    """How many times as long a normalizer may make a text."""
    kind = part.get("type")
    if kind == "Replace":
        return 1 + len(str(part.get("content", "")).encode("utf-8", "replace"))
    if kind == "Prepend":
        return 1 + len(str(part.get("prepend", "")).encode("utf-8", "replace"))
    return _GROWTH.get(str(kind), _OTHER_GROWTH)
