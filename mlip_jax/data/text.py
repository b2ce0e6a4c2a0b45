"""Captions: how one is composed at a visit, and how it becomes token ids."""

from __future__ import annotations

import functools
import gzip
import html
import importlib.resources
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as _Encoder

from mlip_jax.config import UserError, suggestion

# The processes that tokenise run side by side already, and threads of `tokenizers` do not survive a
# fork and warn about it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Name -> size of the vocabulary. "clip_8k" is CLIP's with its most frequent merges alone: an
# embedding table of 49,408 rows outweighs a small model, and slows its training by a quarter.
TOKENIZERS = {"clip": 49_408, "clip_8k": 8_192}

_SOT, _EOT = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


class Tokenizer:
    """Texts to token ids and back.

    Ids are those of CLIP's tokenizer (Radford et al. 2021) as open_clip gives them, but that
    "<|endoftext|>" written in a text is spelled like any other word.
    """

    def __init__(self, encoder: _Encoder) -> None:
        """Takes a `tokenizers.Tokenizer` whose vocabulary has CLIP's start and end of text."""
        self._encoder = encoder
        self.vocab_size: int = encoder.get_vocab_size()
        sot, eot = encoder.token_to_id(_SOT), encoder.token_to_id(_EOT)
        if sot is None or eot is None:
            raise ValueError(f"a tokenizer without {_SOT} and {_EOT}")
        self.sot: int = sot
        self.eot: int = eot

    def encode(self, texts: Sequence[str], context_length: int) -> np.ndarray:
        """Token ids, int32 [texts, context_length]: start, words, end, zeros.

        A text that is too long loses its last words and keeps its end.
        """
        ids = np.zeros((len(texts), context_length), np.int32)
        encodings = self._encoder.encode_batch_fast([_unescape(text) for text in texts])
        for row, encoding in zip(ids, encodings, strict=True):
            words = encoding.ids[: context_length - 2]
            row[: len(words) + 2] = (self.sot, *words, self.eot)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one row of ids, up to its end of text; lower case, single spaces."""
        words = [int(token) for token in ids]
        if self.eot in words:
            words = words[: words.index(self.eot)]
        words = [token for token in words if token != self.sot]
        text = self._encoder.decode(words, skip_special_tokens=False)
        return text.replace(_END_OF_WORD, " ").strip()

    def to_json(self) -> str:
        """All of the tokenizer as text, in the format of the `tokenizers` library."""
        return self._encoder.to_str()

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The inverse of `to_json`."""
        return cls(_Encoder.from_str(text))

    def __reduce__(self) -> tuple[object, ...]:
        return Tokenizer.from_json, (self.to_json(),)


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `config.model.text.tokenizer` names.

    Raises:
      UserError: for an unknown name.
    """
    if name not in TOKENIZERS:
        raise UserError(
            f"unknown tokenizer {name!r}: expected one of {', '.join(TOKENIZERS)}"
            f"{suggestion(name, TOKENIZERS)}"
        )
    return _clip(TOKENIZERS[name])


def _clip(vocab_size: int) -> Tokenizer:
    packed = importlib.resources.files("mlip_jax.data") / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")
    # The order of the ids: bytes, bytes that end a word, merges, the two special tokens.
    letters = _byte_letters()
    words = [*letters, *(letter + _END_OF_WORD for letter in letters)]
    merges = [tuple(line.split()) for line in lines[1 : vocab_size - len(words) - 1]]
    words += [left + right for left, right in merges] + [_SOT, _EOT]
    vocabulary = {word: index for index, word in enumerate(words)}
    encoder = _Encoder(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            end_of_word_suffix=_END_OF_WORD,
            unk_token=_EOT,
        )
    )
    encoder.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    encoder.decoder = decoders.ByteLevel()
    return Tokenizer(encoder)


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's vocabulary (as in GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = range(256 - len(printable))
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in others]


def _unescape(text: str) -> str:
    # Twice, as CLIP does: web captions are often escaped twice.
    return html.unescape(html.unescape(text)) if "&" in text else text


def compose(
    captions: Sequence[str],
    tags: Sequence[str],
    caption_config: ConfigDict | Mapping[str, float],
    rng: np.random.Generator,
) -> str:
    """The caption of one visit to a record.

    Args:
      captions: at least one; the first is the main one.
      tags: words that may be added after a comma.
      caption_config: `config.data.caption`: the chances `first` (the first caption is taken; else
        any of them, all alike), `tags`, `shuffle` (the parts change places) and `word_dropout`.
      rng: where chance comes from.
    """
    caption = captions[0]
    if len(captions) > 1 and rng.random() >= caption_config["first"]:
        caption = captions[rng.integers(len(captions))]
    parts = [caption]
    if tags and rng.random() < caption_config["tags"]:
        parts += tags
    if len(parts) > 1 and rng.random() < caption_config["shuffle"]:
        parts = [parts[index] for index in rng.permutation(len(parts))]
    text = ", ".join(parts)
    words = text.split()
    if caption_config["word_dropout"] and words:
        kept = rng.random(len(words)) >= caption_config["word_dropout"]
        kept[rng.integers(len(words))] = True
        text = " ".join(word for word, keep in zip(words, kept, strict=True) if keep)
    return text


def swap_sides(text: str) -> str:
    """The caption of the mirrored image: "left" and "right" change places, as whole words."""
    return _SIDES.sub(_other_side, text)


def _other_side(match: re.Match[str]) -> str:
    word = match[0]
    other = "right" if word.lower() == "left" else "left"
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other
