"""A stranger's tokenizer.json: what it may ask for, and what ends as one line."""

import json

import pytest

from mlip_jax.core.errors import UserError
from mlip_jax.data.text import encoders
from mlip_jax.data.text.tokenizer import Affixes, Tokenizer, load_tokenizer

GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
CHAIN = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}


@pytest.fixture(scope="module")
def values():
    return json.loads(load_tokenizer("clip_8k").to_json())


def split(pattern):
    regex = {"Regex": pattern}
    return {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}


def chained(kind, *parts):
    return {"type": "Sequence", kind: list(parts)}


REFUSED = [
    ({"normalizer": chained("normalizers", *[GROWS] * 4)}, "times as long"),
    ({"normalizer": chained("normalizers", *[chained("normalizers", GROWS)] * 4)}, "times as long"),
    ({"normalizer": chained("normalizers", *[{"type": "ByteLevel"}] * 40)}, "times as long"),
    ({"normalizer": chained("normalizers", *[{"type": "Strip"}] * 99)}, "more than 64 parts"),
    ({"pre_tokenizer": split("(a+)+$")}, "may never come to an end"),
    ({"pre_tokenizer": chained("pretokenizers", split("(\\\\s*x)*$"))}, "may never come to an end"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_would_take_all_memory_or_for_ever_is_refused(values, changes, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_json(json.dumps(values | changes))


def test_usual_parts_are_taken(values):
    usual = [CHAIN, {"type": "Replace", "pattern": {"String": " "}, "content": "_"}]
    pattern = r"[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    text = json.dumps(values | {"normalizer": chained("normalizers", *usual)})
    assert Tokenizer.from_json(text).encode(["A b"], 8).shape == (1, 8)
    assert Tokenizer.from_json(json.dumps(values | {"pre_tokenizer": split(pattern)}))


def test_padding_of_its_own_is_not_followed(values):
    padding = {"strategy": {"Fixed": 10**15}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    tokenizer = Tokenizer.from_json(json.dumps(values | {"padding": padding}))
    assert tokenizer.encode(["a cat"], 8).shape == (1, 8)


def test_an_id_without_a_row_is_refused(values):
    model = values["model"] | {"vocab": values["model"]["vocab"] | {"zzzz": 10**8}}
    with pytest.raises(ValueError, match="of 8192 tokens|of 8193 tokens with the id 100000000"):
        Tokenizer.from_json(json.dumps(values | {"model": model}))
    encoder = encoders.read_encoder(json.dumps(values))
    for affixes in (Affixes((), (8192,), 0, 8192), Affixes((), (1,), -2, 8192)):
        with pytest.raises(ValueError, match="a tokenizer of 8192 tokens"):
            Tokenizer(encoder, affixes=affixes)


class PanicException(BaseException):
    """By its name, as Rust's is known."""


def test_a_panic_of_the_library_is_one_line(monkeypatch):
    def panic(*_, **__):
        raise PanicException("retry-limit-in-match over")

    class Encoder:
        encode_batch_fast = panic

    with pytest.raises(UserError, match="cannot encode these texts: retry-limit-in-match over"):
        encoders.encode(Encoder(), ["aaa"])
    with pytest.raises(ValueError, match="retry-limit"):
        encoders.guarded(panic)
