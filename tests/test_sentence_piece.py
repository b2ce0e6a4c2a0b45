"""SentencePiece's models against sentencepiece 0.2.3 and transformers 5.24.

tests/data/spiece_tiny.model is a unigram model of 115 pieces with a table of characters of its own,
trained by sentencepiece on some captions; the JSON holds ids of odd texts, those of transformers
cut at 24.
"""

import json
import shutil
from pathlib import Path

import pytest

from mlip_jax.core.errors import UserError
from mlip_jax.data.text import sentence_piece
from mlip_jax.data.text.tokenizer import Tokenizer, folder_tokenizer

DATA = Path(__file__).parent / "data"
FILE = DATA / "spiece_tiny.model"
GOLDEN = json.loads((DATA / "spiece_tiny.json").read_text())


def folder_of(path, **settings):
    shutil.copy(FILE, path / "spiece.model")
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def test_ids_are_those_of_sentencepiece():
    encoder = sentence_piece.read(FILE)
    encodings = encoder.encode_batch(GOLDEN["texts"], add_special_tokens=False)
    assert [encoding.ids for encoding in encodings] == GOLDEN["sentencepiece"]
    ids = encoder.encode("a dog runs through the grass", add_special_tokens=False).ids
    assert encoder.decode(ids) == "a dog runs through the grass"


@pytest.mark.parametrize(("kind", "pad"), [("T5Tokenizer", 0), ("SiglipTokenizer", 1)])
def test_a_folder_is_read_as_transformers_reads_it(tmp_path, kind, pad):
    tokenizer = folder_tokenizer(folder_of(tmp_path, tokenizer_class=kind))
    expected = [ids + [pad] * (24 - len(ids)) for ids in GOLDEN[kind]]
    assert tokenizer.encode(GOLDEN["texts"], 24).tolist() == expected
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.encode(GOLDEN["texts"], 24).tolist() == expected


def test_a_folder_may_tell_by_its_model(tmp_path):
    folder = folder_of(tmp_path)
    with pytest.raises(UserError, match="puts no token at the end"):
        folder_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "siglip"}')
    assert folder_tokenizer(folder).encode(["A dog!"], 4).tolist() == [
        [*GOLDEN["SiglipTokenizer"][GOLDEN["texts"].index("A dog runs!")][:2], 1, 1]
    ]


def message(**changes):
    """The bytes of the model with other fields."""
    model = sentence_piece._parsed(FILE)
    for name, value in changes.items():
        section, field = name.split("__")
        setattr(getattr(model, section), field, value)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no SentencePiece model"),
        (b"\xff" * 40, "no SentencePiece model"),
        (FILE.read_bytes()[:900], "no SentencePiece model"),
        (message(trainer__model_type=2), "only SentencePiece models of the type unigram"),
        (message(normalizer__add_dummy_prefix=False), "add_dummy_prefix is False; only True"),
        (message(normalizer__precompiled_charsmap=b"abc"), "damaged"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, content, expected):
    file = tmp_path / "spiece.model"
    file.write_bytes(content)
    with pytest.raises(UserError, match=expected) as raised:
        sentence_piece.read(file)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)
