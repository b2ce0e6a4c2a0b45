"""BERT's tokenizer (Devlin et al. 2019): WordPiece vocabularies, read or trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as _Encoder
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_json
from mlip_jax.data.text.hugging_face import bert_options

PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"

_SPECIAL = (PAD, UNKNOWN, START, END, "[MASK]")
_INNER = "##"  # before a piece that goes on a word
_MAX_LETTERS = 1000  # rarer ones are unknown, as in BERT's own training
_MIN_FREQUENCY = 2


def train(captions: Callable[[], Iterable[str]], vocab_size: int) -> _Encoder:
    """An uncased encoder with a vocabulary learned from captions, the same in every process.

    Special tokens have the ids 0 to 4, the others follow in the order of their code points. Words
    and pairs seen once add nothing.

    Args:
      captions: gives the texts, the same ones at both calls.
      vocab_size: the most entries that the vocabulary may have.

    Raises:
      UserError: when there is no text, or the size has no room for letters.
    """
    encoder = encoder_of({token: index for index, token in enumerate(_SPECIAL)})
    words = _count_words(encoder, captions())
    if not words:
        raise UserError(
            "config.model.text.tokenizer='wordpiece' is trained on the captions of "
            "config.data.train, and there are none"
        )
    room = (vocab_size - len(_SPECIAL)) // 2  # a letter begins words and goes on words
    if room < 1:
        raise UserError(
            f"config.model.text.vocab_size={vocab_size} must be at least {len(_SPECIAL) + 2}: "
            f"{len(_SPECIAL)} special tokens and the letters"
        )
    letters = _frequent_letters(words, min(room, _MAX_LETTERS))
    # The library numbers letters inside words in an order that changes with the process, and breaks
    # ties by number; as special tokens they are numbered first, in this order.
    inner = sorted({letter for word in words for letter in word[1:]} & set(letters))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        show_progress=False,
        special_tokens=[*_SPECIAL, *(_INNER + letter for letter in inner)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
    )
    encoder.train_from_iterator(captions(), trainer)
    learned = sorted(encoder.get_vocab().keys() - set(_SPECIAL))
    return encoder_of({token: index for index, token in enumerate((*_SPECIAL, *learned))})


def _count_words(encoder: _Encoder, texts: Iterable[str]) -> Counter[str]:
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text.split(" "))
    words: Counter[str] = Counter()
    for text, times in raw.items():  # few, and slow to normalise
        pieces = encoder.pre_tokenizer.pre_tokenize_str(encoder.normalizer.normalize_str(text))
        for piece, _ in pieces:
            words[piece] += times
    return words


def _frequent_letters(words: Counter[str], count: int) -> list[str]:
    """The most frequent letters, in the order of their code points."""
    letters: Counter[str] = Counter()
    for word, times in words.items():
        for letter in word:
            letters[letter] += times
    return sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:count])


def read(path: Path) -> _Encoder:
    """The encoder of a vocab.txt, an entry a line, or of a folder that holds one.

    A tokenizer_config.json beside it says whether case, accents and Chinese words are kept, as for
    Hugging Face's BertTokenizer; without one the vocabulary is uncased.

    Raises:
      UserError: for a missing or unreadable file, an entry that is there twice, or a special token
        that is not there.
    """
    file = path / "vocab.txt" if path.is_dir() else path
    vocabulary: dict[str, int] = {}
    for index, token in enumerate(_text(file).rstrip("\n").split("\n")):
        first = vocabulary.setdefault(token, index)
        if first != index:
            raise UserError(f"{file}:{index + 1}: {token!r} is in line {first + 1} already")
    missing = [token for token in (UNKNOWN, START, END) if token not in vocabulary]
    if missing:
        raise UserError(f"{file} is no WordPiece vocabulary: {', '.join(missing)} not in it")
    return encoder_of(vocabulary, **_options(file.parent / "tokenizer_config.json"))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8") from None


def _options(file: Path) -> dict[str, Any]:
    """How Hugging Face's config of a BERT tokenizer, if it exists, has texts normalised."""
    values = read_json(file, missing=None)
    return {} if values is None else bert_options(file, values)


def encoder_of(vocabulary: dict[str, int], **options: Any) -> _Encoder:
    """BERT's encoder; `options` are those of BertNormalizer. No text can spell a special token."""
    model = models.WordPiece(
        vocab=vocabulary,
        unk_token=UNKNOWN,
        max_input_chars_per_word=100,
        continuing_subword_prefix=_INNER,
    )
    encoder = _Encoder(model)
    encoder.normalizer = normalizers.BertNormalizer(**options)
    encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    encoder.decoder = decoders.WordPiece(prefix=_INNER)
    return encoder
