"""Tokenizers as Hugging Face's folders of models hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as _Encoder

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_json

# What transformers 5 takes where the files do not say.
_PADS = {
    "CLIPTokenizer": "<|endoftext|>",
    "CLIPTokenizerFast": "<|endoftext|>",
    "SiglipTokenizer": "</s>",
}
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_PROBE = "a"


class Parts(NamedTuple):
    """What a tokenizer is made of."""

    encoder: _Encoder
    cleaning: str  # see `captions.clean`
    start: tuple[int, ...]  # ids before the words
    end: tuple[int, ...]  # and after them
    pad: int


def read(folder: Path, cleaning: str | None = None) -> Parts:
    """The tokenizer of a folder: tokenizer.json, or CLIP's vocab.json and merges.txt.

    What goes around the words, and pads, is as tokenizer_config.json, special_tokens_map.json and
    tokenizer.json say.

    Args:
      folder: of a model.
      cleaning: in place of the one that the folder's kind of tokenizer does.

    Raises:
      UserError: for a folder without a tokenizer, or with one that is damaged or of a kind that is
        not known here.
    """
    settings = _settings(folder)
    kind = settings.get("tokenizer_class")
    encoder = _encoder(folder)
    encoder.no_truncation()
    padding = encoder.padding or {}
    encoder.no_padding()
    if cleaning is None:
        cleaning = "siglip" if kind == "SiglipTokenizer" else "none"
        if cleaning == "siglip" and settings.get("do_lower_case") is False:
            raise UserError(f"{folder}: a SigLIP tokenizer that keeps upper case is not read")
    start, end = _affixes(encoder, settings)
    if not end and kind == "SiglipTokenizer":
        end = (_id(folder, encoder, settings.get("eos_token", "</s>")),)
    if not end:
        raise UserError(
            f"{folder}: its tokenizer puts no token at the end of a text, as CLIP's and SigLIP's do"
        )
    pad = settings.get("pad_token") or _PADS.get(str(kind)) or padding.get("pad_token")
    if pad is None:
        raise UserError(f"{folder}: tokenizer_config.json names no pad_token")
    return Parts(encoder, cleaning, start, end, _id(folder, encoder, pad))


def _encoder(folder: Path) -> _Encoder:
    tokenizer_file, words, merges = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    try:
        if tokenizer_file.is_file():
            return _Encoder.from_str(tokenizer_file.read_text(encoding="utf-8"))
        if words.is_file() and merges.is_file():
            return _clip(words, merges)
    except UserError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{folder}: its tokenizer cannot be read: {error}") from None
    other = next((file.name for file in folder.glob("*.model")), None)
    also = f" ({other} alone is not read)" if other else ""
    raise UserError(
        f"{folder} has no tokenizer.json{also}: write one with transformers, "
        "AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
    )


def _clip(words: Path, merges: Path) -> _Encoder:
    """CLIP's, as transformers makes it of the two files."""
    vocabulary = read_json(words, advice="get it again")
    lines = merges.read_text(encoding="utf-8").split("\n")
    words_of = (line.split() for line in lines if not line.startswith("#version"))
    pairs = [(left, right) for left, right in filter(None, words_of)]
    end = "<|endoftext|>"
    encoder = _Encoder(
        models.BPE(vocab=vocabulary, merges=pairs, end_of_word_suffix="</w>", unk_token=end)
    )
    encoder.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    encoder.decoder = decoders.ByteLevel()
    start = "<|startoftext|>"
    encoder.add_special_tokens([start, end])
    encoder.post_processor = processors.RobertaProcessing(
        (end, _id(words.parent, encoder, end)),
        (start, _id(words.parent, encoder, start)),
        False,
        False,
    )
    return encoder


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; special tokens as plain texts."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= read_json(folder / name, missing={}, advice="get it again")
    return {
        key: value["content"] if isinstance(value, dict) and "content" in value else value
        for key, value in settings.items()
    }


def _affixes(
    encoder: _Encoder, settings: dict[str, Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after a text's words."""
    bare = encoder.encode(_PROBE, add_special_tokens=False).ids
    affixed = encoder.encode(_PROBE, add_special_tokens=True).ids
    before = next(
        (at for at in range(len(affixed)) if affixed[at : at + len(bare)] == bare), len(affixed)
    )
    start, end = tuple(affixed[:before]), tuple(affixed[before + len(bare) :])
    # Gemma's tokenizers are told by flags, whatever the template in tokenizer.json.
    for flag, token in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
        if isinstance(settings.get(flag), bool):
            identity = encoder.token_to_id(str(settings.get(token)))
            ids = (identity,) if settings[flag] and identity is not None else ()
            start, end = (ids, end) if token == "bos_token" else (start, ids)
    return start, end


def _id(folder: Path, encoder: _Encoder, token: str) -> int:
    token_id = encoder.token_to_id(token)
    if token_id is None:
        raise UserError(f"{folder}: its tokenizer has no token {token!r}")
    return token_id
