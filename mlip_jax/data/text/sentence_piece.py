"""SentencePiece's models (spiece.model): a vocabulary, and how texts are normalised before it."""

from __future__ import annotations

import functools
import re
import string
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as _Encoder

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_file

_SPACE = "\u2581"  # what a space is written as
_UNIGRAM = 1
_UNKNOWN, _USER_DEFINED = 2, 4  # types of pieces
# The fields of sentencepiece_model.proto that are read: number, type, default. A message's name
# stands for one of its kind, repeated where it begins with "*".
_MESSAGES: dict[str, dict[str, tuple[int, str, str]]] = {
    "Model": {
        "pieces": (1, "*Piece", ""),
        "trainer": (2, "Trainer", ""),
        "normalizer": (3, "Normalizer", ""),
    },
    "Piece": {"piece": (1, "STRING", ""), "score": (2, "FLOAT", ""), "type": (3, "INT32", "1")},
    "Trainer": {
        "model_type": (3, "INT32", "1"),
        "treat_whitespace_as_suffix": (24, "BOOL", "false"),
        "byte_fallback": (35, "BOOL", "false"),
    },
    "Normalizer": {
        "precompiled_charsmap": (2, "BYTES", ""),
        "add_dummy_prefix": (3, "BOOL", "true"),
        "remove_extra_whitespaces": (4, "BOOL", "true"),
        "escape_whitespaces": (5, "BOOL", "true"),
    },
}


def read(path: Path, siglip: bool = False) -> _Encoder:
    """The encoder of a model; its ids are SentencePiece's.

    But for marks on a character that the model normalises, such as half-width katakana's, which the
    `tokenizers` library normalises otherwise, and for the names of control symbols written in a
    text, which are these symbols, as in transformers.

    Args:
      path: a file such as spiece.model.
      siglip: texts are changed as by transformers' SiglipTokenizer first: a mark of a space before
        them, then small letters, no punctuation, single spaces.

    Raises:
      UserError: for a file that cannot be read, or is of a kind that is not computed here.
    """
    model = _parsed(path)
    trainer, normalizer = model.trainer, model.normalizer
    if trainer.model_type != _UNIGRAM:
        raise UserError(f"{path}: only SentencePiece models of the type unigram are read")
    for name, value, wanted in (
        ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix, False),
        ("add_dummy_prefix", normalizer.add_dummy_prefix, True),
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, True),
        ("escape_whitespaces", normalizer.escape_whitespaces, True),
    ):
        if value != wanted:
            raise UserError(f"{path}: {name} is {value}; only {wanted} is supported")
    if any(piece.type == _USER_DEFINED for piece in model.pieces):
        raise UserError(f"{path}: pieces that its user has defined are not supported")
    unknown = next((i for i, piece in enumerate(model.pieces) if piece.type == _UNKNOWN), None)
    if unknown is None:
        raise UserError(f"{path}: damaged: it has no piece for what is unknown")
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    try:
        encoder = _Encoder(models.Unigram(pieces, unknown, trainer.byte_fallback))
        charsmap = normalizer.precompiled_charsmap
        steps: list[normalizers.Normalizer] = (
            [normalizers.Precompiled(charsmap)] if charsmap else []
        )
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{path}: damaged: {error}") from None
    first: list[normalizers.Normalizer] = []
    prefix: list[normalizers.Normalizer] = [normalizers.Prepend(_SPACE)]
    if siglip:
        first = [normalizers.Replace(_SPACE, " "), *prefix, normalizers.Lowercase()]
        first += [_replace(rf"[{re.escape(string.punctuation)}]", ""), _replace(r"\s+", " ")]
        prefix = []
    else:
        steps.append(_replace("^ +", ""))
    spaces = [_replace(" +", _SPACE), _replace(f"{_SPACE}+$", "")]
    encoder.normalizer = normalizers.Sequence([*first, *steps, *spaces, *prefix])
    encoder.pre_tokenizer = pre_tokenizers.Split(_SPACE, behavior="merged_with_next")
    encoder.decoder = decoders.Metaspace(_SPACE, prepend_scheme="always")
    return encoder


def _replace(pattern: str, content: str) -> normalizers.Normalizer:
    return normalizers.Replace(Regex(pattern), content)


def _parsed(path: Path) -> Any:
    content = read_file(path)
    try:
        model = _message()()
        model.ParseFromString(content)
    except DecodeError:
        model = None
    if model is None or not model.pieces:
        raise UserError(f"{path}: damaged, or no SentencePiece model: get it again")
    return model


@functools.cache
def _message() -> Any:
    """The class of SentencePiece's message, as far as it is read."""
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="mlip_jax/sentence_piece.proto", package="mlip_jax.sentence_piece", syntax="proto2"
    )
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, (number, kind, default) in fields.items():
            repeated, kind = kind.startswith("*"), kind.lstrip("*")
            field = described.field.add(
                name=name,
                number=number,
                label=field_type.LABEL_REPEATED if repeated else field_type.LABEL_OPTIONAL,
            )
            if kind in _MESSAGES:
                field.type = field_type.TYPE_MESSAGE
                field.type_name = f".{file.package}.{kind}"
            else:
                field.type = field_type.Type.Value(f"TYPE_{kind}")
            if default:
                field.default_value = default
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.Model"))
