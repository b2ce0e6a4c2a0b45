"""From captions to token ids."""

from __future__ import annotations

import functools
import gzip
import importlib.resources
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as _Encoder

from mlip_jax.core import places
from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.files import decode_json
from mlip_jax.core.texts import brief
from mlip_jax.data.text import encoders, hugging_face, wordpiece
from mlip_jax.data.text.captions import check_cleaning, clean, repairs, unescape, unescapes

# The processes that tokenise run side by side already, and threads of `tokenizers` do not survive a
# fork and warn about it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# "clip_8k" is CLIP's with its most frequent merges alone: an embedding table of 49,408 rows
# outweighs a small model, and slows its training by a quarter.
_CLIP_SIZES = {"clip": 49_408, "clip_8k": 8_192}
TOKENIZERS = (*_CLIP_SIZES, "wordpiece")

OWN_FILE = "mlip_tokenizer.json"  # of a folder that this package writes
_SOT, _EOT = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"
# CLIP's own pattern ignores case, which in texts of lower case takes the long s for an s, and makes
# of the iota below (U+0345) neither a letter nor anything else: it is left out.
_CLIP_WORDS = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
_CLIP_WRITTEN = rf"<[sſ]tart_of_text>|<end_of_text>|{_CLIP_WORDS}"


class Affixes(NamedTuple):
    """What a tokenizer puts around the words of a text, where that is not CLIP's or BERT's."""

    start: tuple[int, ...]
    end: tuple[int, ...]  # at least one
    pad: int
    vocab_size: int  # of the model: its table may have rows that no word has
    pads_left: bool = False  # before the text, not after it
    cuts_left: bool = False  # a text that is too long loses its first words
    longest: int | None = None  # ids of a text; None: as long as the context


class Tokenizer:
    """Texts to token ids and back.

    Ids are those of CLIP's tokenizer (Radford et al. 2021) as open_clip gives them, but for what
    ftfy mends there (see `captions.clean`), or of BERT's (Devlin et al. 2019) as Hugging Face gives
    them. A special token written in a text, such as "<|endoftext|>" or "[SEP]", is spelled like any
    other word, unless `written` is asked for. With `Affixes` they are those of another library's
    tokenizer, as it gives them.

    Attributes:
      vocab_size: how many ids there are.
      sot: the id that begins a text.
      eot: the id that ends it.
      pad: the id of what comes after.
      unescapes: whether it undoes HTML escapes.
      written: whether "<start_of_text>" and "<end_of_text>" in a text are the tokens themselves, as
        in open_clip.
      start: all ids before the words; what has no start has none.
      end: all ids after them.
      pads_left: whether padding comes before the start in place of after the end.
      cuts_left: whether a text that is too long loses its first words in place of its last ones.
      longest: how many ids a text may have, padding apart; None: as many as the context.
      cleaning: how texts are cleaned before all else, one of captions.CLEANINGS.
    """

    def __init__(
        self,
        encoder: _Encoder,
        cleaning: str = "none",
        affixes: Affixes | None = None,
        written: bool = False,
    ) -> None:
        """Takes a `tokenizers.Tokenizer` whose vocabulary has CLIP's or BERT's special tokens.

        Args:
          encoder: from texts to ids; its normaliser is taken away where it is CLIP's.
          cleaning: of texts, see `captions.clean`.
          affixes: of an encoder with other special tokens.
          written: see the attribute; of CLIP's tokenizer alone.

        Raises:
          UserError: for an unknown cleaning.
        """
        check_cleaning(cleaning)
        self._encoder = encoder
        self.cleaning = cleaning
        self._affixes = affixes
        self.written = written
        self._is_clip = not affixes and encoder.token_to_id(_SOT) is not None
        self.unescapes = self._is_clip or unescapes(cleaning)
        self.pads_left = affixes is not None and affixes.pads_left
        self.cuts_left = affixes is not None and affixes.cuts_left
        self.longest = affixes.longest if affixes else None
        if affixes:
            self.start, self.end, self.pad, self.vocab_size = affixes[:4]
            self.sot = affixes.start[0] if affixes.start else -1  # no id: nothing starts a text
            self.eot = affixes.end[0]
            self._check_ids()
            return
        self.vocab_size = encoder.get_vocab_size()
        if self._is_clip:
            encoder.normalizer = None  # `_prepared` does its work, as open_clip does
        start, end = (_SOT, _EOT) if self._is_clip else (wordpiece.START, wordpiece.END)
        sot, eot = encoder.token_to_id(start), encoder.token_to_id(end)
        if sot is None or eot is None:
            raise ValueError(f"a tokenizer without {start} and {end}")
        self.sot, self.eot = sot, eot
        self.start, self.end = (sot,), (eot,)
        self.pad = 0 if self._is_clip else encoder.token_to_id(wordpiece.PAD) or 0
        self._check_ids()

    def encode(self, texts: Sequence[str], context_length: int) -> np.ndarray:
        """Token ids, int32 [texts, context_length]: start, words, end, padding.

        A text that is too long loses its last words and keeps its end. `Affixes` may have it lose
        the first ones, or have the padding before the start.
        """
        room = min(context_length, self.longest or context_length)
        room -= len(self.start) + len(self.end)
        if room < 0:
            raise UserError(
                f"the tokenizer puts {len(self.start) + len(self.end)} tokens around a text, which "
                f"may have {room + len(self.start) + len(self.end)} in all"
            )
        ids = np.full((len(texts), context_length), self.pad, np.int32)
        prepared = [self._prepared(text) for text in texts]
        encodings = encoders.encode(self._encoder, prepared)
        for row, text, encoding in zip(ids, prepared, encodings, strict=True):
            words = self._with_written(text) if self.written and "_text>" in text else encoding.ids
            first = max(0, len(words) - room) if self.cuts_left else 0
            token_ids = (*self.start, *words[first : first + room], *self.end)
            top = context_length - len(token_ids) if self.pads_left else 0
            row[top : top + len(token_ids)] = token_ids
        return ids

    def _prepared(self, text: str) -> str:
        text = clean(text, self.cleaning)
        if not self._is_clip:
            return text
        if not repairs(self.cleaning):
            text = unescape(unicodedata.normalize("NFC", text))
        return " ".join(text.split()).lower()

    def _with_written(self, text: str) -> list[int]:
        """The ids of a text in which special tokens may be written."""
        special = {"<start_of_text>": self.sot, "<end_of_text>": self.eot}
        ids: list[int] = []
        for word, _ in _splitter(_CLIP_WRITTEN).pre_tokenize_str(text):
            if word in special:
                ids.append(special[word])
            else:
                ids += [token.id for token in self._encoder.model.tokenize(word)]
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of one row of ids, up to its end of text; lower case, single spaces."""
        words = [int(token) for token in ids]
        if self.eot in words:
            words = words[: words.index(self.eot)]
        words = [token for token in words if token != self.sot]
        text = self._encoder.decode(words, skip_special_tokens=False)
        return text.replace(_END_OF_WORD, " ").strip()

    def encoder_json(self) -> str:
        """The part that makes ids of words, as the `tokenizers` library's JSON.

        CLIP's has a normaliser there, for programs that know nothing of `captions.clean`.
        """
        if not self._is_clip:
            return self._encoder.to_str()
        encoder = _Encoder.from_str(self._encoder.to_str())
        encoder.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        return encoder.to_str()

    def to_json(self) -> str:
        """All of the tokenizer as text: the `tokenizers` library's JSON, wrapped if it cleans."""
        encoder = self.encoder_json()
        if self.cleaning == "none" and not self._affixes and not self.written:
            return encoder
        values: dict[str, Any] = {"cleaning": self.cleaning, "encoder": encoder}
        if self._affixes:
            values["affixes"] = self._affixes
        if self.written:
            values["written"] = True
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The inverse of `to_json`."""
        values = decode_json(text)
        if "encoder" not in values:
            return cls(_read(text))
        affixes = values.get("affixes")
        if affixes:
            start, end, *others = affixes
            affixes = Affixes(tuple(start), tuple(end), *others)
        written = values.get("written", False)
        return cls(_read(values["encoder"]), values["cleaning"], affixes, written)

    def _check_ids(self) -> None:
        """Raises ValueError for an id that has no row in a table of `vocab_size` rows."""
        for value in (self.vocab_size, 1 if self.longest is None else self.longest):
            if type(value) is not int or value < 1:
                raise ValueError(f"{brief(value)} is no number of tokens")
        ids = (max(encoders.highest_id(self._encoder), 0), *self.start, *self.end, self.pad)
        if not all(type(each) is int and 0 <= each < self.vocab_size for each in ids):
            raise ValueError(f"a tokenizer of {self.vocab_size} tokens with the id {max(ids)}")

    def __reduce__(self) -> tuple[object, ...]:
        return Tokenizer.from_json, (self.to_json(),)


def _read(text: str) -> _Encoder:
    encoder = encoders.read_encoder(text)
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def load_tokenizer(
    name: str,
    *,
    cleaning: str = "none",
    vocab_size: int = 8192,
    captions: Callable[[], Iterable[str]] | None = None,
    written: bool = False,
) -> Tokenizer:
    """The tokenizer that `config.model.text.tokenizer` names.

    Args:
      name: "clip"; "clip_8k"; "wordpiece", trained on `captions`; "wordpiece:PATH" of a
        vocab.txt or a folder that holds one; or "folder:PATH" of a model's folder.
      cleaning: `config.model.text.cleaning`; the tokenizer cleans whatever it encodes, and what it
        is trained on.
      vocab_size: the most entries of a trained vocabulary; of a "folder:PATH" the rows of the
        model's table.
      captions: gives the texts to train on, such as the method `captions` of the training set; it
        is called twice.
      written: whether CLIP's special tokens may be written in texts, see `Tokenizer`.

    Raises:
      UserError: for an unknown name or cleaning, a vocabulary that cannot be read, or no captions
        to train on.
    """
    check_cleaning(cleaning)
    if name in _CLIP_SIZES:
        return Tokenizer(_clip(_CLIP_SIZES[name]), cleaning, written=written)
    kind, _, path = name.partition(":")
    if kind == "wordpiece" and path:
        return Tokenizer(wordpiece.read(places.local(path).expanduser()), cleaning)
    if kind == "folder" and path:
        return folder_tokenizer(places.local(path).expanduser(), cleaning, vocab_size)
    if name != "wordpiece":
        raise UserError(
            f"unknown tokenizer {name!r}: expected one of {', '.join(TOKENIZERS)}, wordpiece:PATH, "
            f"folder:PATH{suggestion(kind, TOKENIZERS)}"
        )
    if captions is None:
        raise UserError(
            "the tokenizer 'wordpiece' is trained on captions, and none were given: pass "
            "captions=source.captions, or name a vocabulary by wordpiece:PATH"
        )
    encoder = wordpiece.train(
        lambda: (clean(caption, cleaning) for caption in captions()), vocab_size
    )
    return Tokenizer(encoder, cleaning)


def folder_tokenizer(
    folder: Path, cleaning: str | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """The tokenizer that a model's folder holds: this package's, or Hugging Face's files.

    Args:
      folder: with this package's `OWN_FILE`, Hugging Face's tokenizer.json, or CLIP's vocab.json
        and merges.txt.
      cleaning: of texts; None: as the folder's files say.
      vocab_size: rows of the model's table; None: as many as there are tokens.

    Raises:
      UserError: for a folder without a tokenizer, or with one that is damaged or too large.
    """
    tokenizer_file = folder / OWN_FILE
    if not tokenizer_file.is_file():
        parts = hugging_face.read(folder, cleaning)
        size = encoders.highest_id(parts.encoder) + 1
        if vocab_size is not None and vocab_size < size:
            raise UserError(
                f"{folder}: its tokenizer has {size} tokens, its model only {vocab_size}: get "
                "both from one place"
            )
        affixes = Affixes(
            parts.start,
            parts.end,
            parts.pad,
            vocab_size or size,
            parts.pads_left,
            parts.cuts_left,
            parts.longest,
        )
        return Tokenizer(parts.encoder, parts.cleaning, affixes)
    try:
        return Tokenizer.from_json(tokenizer_file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{tokenizer_file}: damaged: {error}; export the model again") from None


@functools.cache
def _clip(vocab_size: int) -> _Encoder:
    packed = importlib.resources.files(__package__) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")
    # The order of the ids: bytes, bytes that end a word, merges, the two special tokens.
    letters = _byte_letters()
    words = [*letters, *(letter + _END_OF_WORD for letter in letters)]
    pairs = map(str.split, lines[1 : vocab_size - len(words) - 1])
    merges = [(left, right) for left, right in pairs]
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
    encoder.pre_tokenizer = _splitter(_CLIP_WORDS)
    encoder.decoder = decoders.ByteLevel()
    return encoder


def _splitter(words: str) -> pre_tokenizers.PreTokenizer:
    """Finds the words of a text and writes each in the letters of its bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's vocabulary (as in GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = range(256 - len(printable))
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in others]
