"""Tokenizers as Hugging Face's folders of models hold them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as _Encoder

from mlip_jax.core.errors import UserError, first_line
from mlip_jax.core.files import read_json
from mlip_jax.core.texts import brief, is_whole
from mlip_jax.data.text import sentence_piece
from mlip_jax.data.text.encoders import guarded, read_encoder

# By tokenizer_class, without "Fast": the special tokens that transformers 5 takes where the files
# do not say. All but the first three are built by the class, whatever else tokenizer.json says.
_CLASSES: dict[str, dict[str, str]] = {
    "PreTrainedTokenizer": {},
    "TokenizersBackend": {},
    "SiglipTokenizer": {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"},
    "CLIPTokenizer": {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    },
    "BertTokenizer": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
    "T5Tokenizer": {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    "Siglip2Tokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
}
_PADS_LEFT = ("GemmaTokenizer", "Siglip2Tokenizer")  # where the files do not say
_OWN_AFFIXES = ("CLIPTokenizer", "BertTokenizer", "T5Tokenizer")
# Where no class is named: of a model_type, the class and the kind of model it has.
_BY_TYPE = {"clip": ("CLIPTokenizer", "BPE"), "siglip": ("SiglipTokenizer", "Unigram")}
# Settings that change ids and are not computed. Beside them and what is read below, the settings
# change none of a tokenizer.json's: add_prefix_space, legacy and do_lower_case, strip_accents and
# tokenize_chinese_chars of other classes than BERT's (transformers 5 does not look at them),
# clean_up_tokenization_spaces and errors (of decoding), and what describes a folder or a chat.
_REFUSED = ("auto_map", "fix_mistral_regex", "sp_model_kwargs", "split_special_tokens")
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_PROBE = "a"
_PIECES = "spiece.model"


class Parts(NamedTuple):
    """What a tokenizer is made of."""

    encoder: _Encoder
    cleaning: str  # see `captions.clean`
    start: tuple[int, ...]  # ids before the words
    end: tuple[int, ...]  # and after them
    pad: int
    pads_left: bool  # before the text, not after it
    cuts_left: bool  # a text that is too long loses its first words
    longest: int | None  # ids of a text, start and end included


def read(folder: Path, cleaning: str | None = None) -> Parts:
    """The tokenizer of a folder: tokenizer.json, CLIP's vocab.json and merges.txt, or spiece.model.

    Ids are those of transformers 5. What goes around the words, and pads, is as
    tokenizer_config.json, special_tokens_map.json and tokenizer.json say.

    Args:
      folder: of a model.
      cleaning: in place of the one that the folder's kind of tokenizer does.

    Raises:
      UserError: for a folder without a tokenizer, or with one that is damaged, of a kind that is
        not known here, or with a setting that is not computed here.
    """
    settings = _settings(folder)
    _check(folder, settings)
    encoder = _encoder(folder, settings)
    kind = _kind(folder, settings, encoder)
    settings = _CLASSES[kind] | settings
    truncation, padding = encoder.truncation or {}, encoder.padding or {}
    encoder.no_truncation()
    encoder.no_padding()
    encoder = _built(folder, kind, encoder, settings)
    _add_tokens(folder, encoder, settings)
    if cleaning is None:
        if kind == "SiglipTokenizer" and settings.get("do_lower_case") is False:
            raise UserError(f"{folder}: a SigLIP tokenizer that keeps upper case is not read")
        by_pieces = (folder / _PIECES).is_file() and not (folder / "tokenizer.json").is_file()
        cleaning = "siglip" if kind == "SiglipTokenizer" and not by_pieces else "none"
    try:
        start, end = _affixes(encoder)
    except ValueError as error:
        raise UserError(f"{folder}: its tokenizer cannot be used: {error}") from None
    if kind not in _OWN_AFFIXES:
        _check_flags(folder, encoder, settings, start, end)
    if not end and kind == "SiglipTokenizer":
        end = (_id(folder, encoder, settings["eos_token"]),)
    if not end:
        raise UserError(
            f"{folder}: its tokenizer puts no token at the end of a text, as CLIP's and SigLIP's do"
        )
    pad = settings.get("pad_token") or padding.get("pad_token")
    if pad is None:
        raise UserError(f"{folder}: tokenizer_config.json names no pad_token")
    absent = "left" if kind in _PADS_LEFT else "right"
    return Parts(
        encoder,
        cleaning,
        start,
        end,
        _id(folder, encoder, pad),
        _is_left(folder, settings, "padding_side", padding.get("direction", absent)),
        _is_left(folder, settings, "truncation_side", truncation.get("direction", "right")),
        _longest(folder, settings),
    )


def _check(folder: Path, settings: dict[str, Any]) -> None:
    """Raises UserError for what is not computed here."""
    name = settings.get("tokenizer_class")
    if name is not None and _class(name) not in _CLASSES:
        raise UserError(
            f"{folder}: tokenizer_class is {name!r}; known here are {', '.join(_CLASSES)} (and the "
            "same with Fast): where tokenizer.json says all of it, name PreTrainedTokenizerFast"
        )
    for key in _REFUSED:
        if settings.get(key):
            raise UserError(
                f"{folder}: tokenizer_config.json has {key}={settings[key]!r}, which is not "
                "computed here"
            )


def _class(name: object) -> str:
    return str(name).removesuffix("Fast")


def _kind(folder: Path, settings: dict[str, Any], encoder: _Encoder) -> str:
    """One of _CLASSES."""
    name = settings.get("tokenizer_class")
    if name is not None:
        return _class(name)
    model_type = read_json(folder / "config.json", missing={}).get("model_type")
    kind, model = _BY_TYPE.get(model_type, ("", ""))
    return kind if type(encoder.model).__name__ == model else "TokenizersBackend"


def _of_siglip(folder: Path, settings: dict[str, Any]) -> bool:
    name = settings.get("tokenizer_class")
    if name is None:
        return read_json(folder / "config.json", missing={}).get("model_type") == "siglip"
    return _class(name) == "SiglipTokenizer"


def _is_left(folder: Path, settings: dict[str, Any], key: str, absent: str) -> bool:
    side = settings.get(key) or absent
    if side not in ("left", "right"):
        raise UserError(f"{folder}: {key} is {side!r}; expected left or right")
    return str(side) == "left"


def _longest(folder: Path, settings: dict[str, Any]) -> int | None:
    longest = settings.get("model_max_length")
    if longest is None:
        return None
    # Not less than 1: no comparison holds for NaN.
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
        raise UserError(f"{folder}: model_max_length is {longest!r}; expected a number above 0")
    return int(min(longest, 2**31 - 1))  # transformers writes 1e30 for "as long as one likes"


def _encoder(folder: Path, settings: dict[str, Any]) -> _Encoder:
    tokenizer_file, words, merges = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    try:
        if tokenizer_file.is_file():
            return read_encoder(tokenizer_file.read_text(encoding="utf-8"))
        if words.is_file() and merges.is_file():
            settings.setdefault("tokenizer_class", "CLIPTokenizer")
            lines = merges.read_text(encoding="utf-8").split("\n")
            words_of = (line.split() for line in lines if not line.startswith("#version"))
            pairs = [(left, right) for left, right in filter(None, words_of)]
            return _Encoder(models.BPE(read_json(words, advice="get it again"), pairs))
        if (pieces := folder / _PIECES).is_file():
            return sentence_piece.read(pieces, _of_siglip(folder, settings))
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


def _built(folder: Path, kind: str, encoder: _Encoder, settings: dict[str, Any]) -> _Encoder:
    """The encoder as transformers 5 builds it for a class, of the vocabulary alone."""
    if kind == "CLIPTokenizer":
        return _clip(folder, encoder, settings)
    if kind == "BertTokenizer":
        options = bert_options(folder / "tokenizer_config.json", settings)
        encoder.normalizer = normalizers.BertNormalizer(**options)
        encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        start, end = settings["cls_token"], settings["sep_token"]
        encoder.post_processor = _template(folder, encoder, [start], [end])
    elif kind == "T5Tokenizer":
        charsmap = _charsmap(json.loads(encoder.to_str())["normalizer"])
        encoder.normalizer = normalizers.Precompiled(charsmap) if charsmap else None
        encoder.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=True),
            ]
        )
        encoder.post_processor = _template(folder, encoder, [], ["</s>"])
    elif kind in ("GemmaTokenizer", "Siglip2Tokenizer"):
        spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "\u2581")]
        lower: list[normalizers.Normalizer] = [normalizers.Lowercase()]
        encoder.normalizer = normalizers.Sequence(
            lower + spaces if kind == "Siglip2Tokenizer" else spaces
        )
        encoder.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        model = encoder.model
        if not isinstance(model, models.BPE):
            raise UserError(f"{folder}: tokenizer_class is {kind}, but tokenizer.json holds no BPE")
        model.fuse_unk = model.byte_fallback = True
    return encoder


def bert_options(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    """How a config of a BERT tokenizer has texts normalised: the options of BertNormalizer.

    Args:
      file: for messages.
      values: by Hugging Face's keys.

    Raises:
      UserError: for a value that is neither true nor false.
    """
    options = {}
    for key, (option, default) in _BERT_OPTIONS.items():
        options[option] = value = values.get(key, default)
        if value is not default and not isinstance(value, bool):
            raise UserError(f"{file}: {key} is {value!r}, expected true or false")
    return options


# Hugging Face's key -> the normaliser's option and its default; None: as the case is.
_BERT_OPTIONS = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}


def _charsmap(normalizer: dict[str, Any] | None) -> bytes | None:
    """SentencePiece's table of characters, where a normaliser of tokenizer.json holds one."""
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    for part in parts:
        if part["type"] == "Precompiled":
            return base64.b64decode(part["precompiled_charsmap"])
    return None


def _template(
    folder: Path, encoder: _Encoder, start: list[str], end: list[str]
) -> processors.TemplateProcessing:
    ids = [(token, _id(folder, encoder, token)) for token in (*start, *end)]
    return processors.TemplateProcessing(single=[*start, "$A", *end], special_tokens=ids)


def _clip(folder: Path, given: _Encoder, settings: dict[str, Any]) -> _Encoder:
    model = json.loads(given.to_str())["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"{folder}: tokenizer_class is CLIPTokenizer, but tokenizer.json holds no BPE"
        )
    encoder = _Encoder(
        models.BPE(
            vocab=model["vocab"],
            merges=[tuple(pair) for pair in model["merges"]],
            end_of_word_suffix="</w>",
            unk_token=settings["unk_token"],
        )
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
    added = given.get_added_tokens_decoder()
    encoder.add_tokens([added[identity] for identity in sorted(added)])
    start, end = settings["bos_token"], settings["eos_token"]
    encoder.post_processor = processors.RobertaProcessing(
        (end, _id(folder, encoder, end)), (start, _id(folder, encoder, start)), False, False
    )
    return encoder


def _add_tokens(folder: Path, encoder: _Encoder, settings: dict[str, Any]) -> None:
    """Makes tokens of what the settings name as such, so that they are found whole in texts.

    Special tokens that the vocabulary lacks are left out: no model has a row for them.

    Raises:
      UserError: for what names no tokens.
    """
    decoder = settings.get("added_tokens_decoder") or {}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    try:
        tokens = [AddedToken(**decoder[identity]) for identity in sorted(decoder, key=int)]
        more = extra if isinstance(extra, list) else extra.values()
        texts = [_token_text(token) for token in (*map(settings.get, _NAMED), *more) if token]
        known = [text for text in texts if encoder.token_to_id(text) is not None]
        tokens += [AddedToken(text, special=True) for text in known]
        there = {token.content for token in encoder.get_added_tokens_decoder().values()}
        guarded(encoder.add_tokens, [token for token in tokens if token.content not in there])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{folder}: tokenizer_config.json names a token that is none: {first_line(error)}"
        ) from None


def _token_text(token: Any) -> str:
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"{brief(text)} is no text")
    return text


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; special tokens as plain texts."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= _check_whole(
            folder / name, read_json(folder / name, missing={}, advice="get it again")
        )
    settings = {
        key: value["content"] if isinstance(value, dict) and "content" in value else value
        for key, value in settings.items()
    }
    for key in _NAMED:
        if not isinstance(settings.get(key), str | None):
            raise UserError(f"{folder}: {key} is {brief(settings[key])}; expected a text")
    return settings


def _check_whole(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The values; raises UserError for texts that the tokenizers library cannot hold."""
    if not is_whole(json.dumps(values, ensure_ascii=False)):
        raise UserError(f"{file}: a text holds half of a surrogate pair, which is no character")
    return values


def _affixes(encoder: _Encoder) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after a text's words."""
    bare = guarded(encoder.encode, _PROBE, add_special_tokens=False).ids
    affixed = guarded(encoder.encode, _PROBE, add_special_tokens=True).ids
    before = next(
        (at for at in range(len(affixed)) if affixed[at : at + len(bare)] == bare), len(affixed)
    )
    return tuple(affixed[:before]), tuple(affixed[before + len(bare) :])


def _check_flags(
    folder: Path,
    encoder: _Encoder,
    settings: dict[str, Any],
    start: tuple[int, ...],
    end: tuple[int, ...],
) -> None:
    """Raises UserError where flags and template disagree: transformers 4 and 5 do so, too."""
    for flag, token, ids in (
        ("add_bos_token", "bos_token", start),
        ("add_eos_token", "eos_token", end),
    ):
        value = settings.get(flag)
        if isinstance(value, bool) and value != (
            encoder.token_to_id(str(settings.get(token))) in ids
        ):
            raise UserError(
                f"{folder}: tokenizer_config.json has {flag}={value}, but the template in "
                "tokenizer.json does not: make them agree"
            )


def _id(folder: Path, encoder: _Encoder, token: str | None) -> int:
    token_id = None if token is None else encoder.token_to_id(token)
    if token_id is None:
        raise UserError(f"{folder}: its tokenizer has no token {token!r}")
    return token_id
