"""Tokenizer and captions."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from mlip_jax.config import UserError
from mlip_jax.data import text

GOLDEN = json.loads((Path(__file__).parent / "data/clip_bpe_golden.json").read_text("utf-8"))
NEVER = {"first": 1.0, "tags": 0.0, "shuffle": 0.0, "word_dropout": 0.0}


@pytest.fixture(scope="module")
def tokenizer() -> text.Tokenizer:
    return text.load_tokenizer("clip")


@pytest.mark.parametrize("entry", GOLDEN, ids=range(len(GOLDEN)))
def test_ids_equal_clips(tokenizer, entry):
    ids = tokenizer.encode([entry["text"]], 77)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids[0], entry["ids"])


def test_vocabulary(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.sot, tokenizer.eot) == (49408, 49406, 49407)


def test_long_text_keeps_its_end(tokenizer):
    ids = tokenizer.encode(["one two three four five six", "one"], 5)
    assert ids[0, 0] == tokenizer.sot and ids[0, -1] == tokenizer.eot
    np.testing.assert_array_equal(ids[1, 3:], 0)
    assert tokenizer.encode([], 5).shape == (0, 5)


def test_special_tokens_cannot_be_written(tokenizer):
    ids = tokenizer.encode(["a <|endoftext|> b <|startoftext|>"], 32)[0]
    assert (ids == tokenizer.eot).sum() == 1 and (ids == tokenizer.sot).sum() == 1


def test_html_entities_and_unicode(tokenizer):
    assert tokenizer.decode(tokenizer.encode(["Fish &amp;amp; CHIPS"], 16)[0]) == "fish & chips"
    assert tokenizer.decode(tokenizer.encode(["Naïve 😀 café"], 24)[0]) == "naïve 😀 café"


@pytest.mark.parametrize(
    "copy",
    [
        lambda tokenizer: text.Tokenizer.from_json(tokenizer.to_json()),
        lambda tokenizer: pickle.loads(pickle.dumps(tokenizer)),
    ],
    ids=["json", "pickle"],
)
def test_copies_are_the_same(tokenizer, copy):
    texts = [entry["text"] for entry in GOLDEN]
    np.testing.assert_array_equal(copy(tokenizer).encode(texts, 77), tokenizer.encode(texts, 77))


def test_unknown_tokenizer_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'clip'"):
        text.load_tokenizer("clipp")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("the left hand, a Right turn", "the right hand, a Left turn"),
        ("bright copyright leftover", "bright copyright leftover"),
        ("LEFT-pointing", "RIGHT-pointing"),
    ],
)
def test_mirrored_captions(before, after):
    assert text.swap_sides(before) == after
    assert text.swap_sides(after) == before


def test_compose():
    captions, tags = ("dog face", "puppy"), ("animals", "mammal")

    def composed(**chances):
        config = {**NEVER, **chances}
        return {text.compose(captions, tags, config, np.random.default_rng(i)) for i in range(60)}

    assert composed() == {"dog face"}
    assert composed(first=0.0) == composed(first=0.5) == {"dog face", "puppy"}
    assert composed(tags=1.0) == {"dog face, animals, mammal"}
    assert len(composed(tags=1.0, shuffle=1.0)) == 6
    assert composed(word_dropout=1.0) == {"dog", "face"}
    assert text.compose(("",), (), {**NEVER, "word_dropout": 1.0}, np.random.default_rng(0)) == ""


def test_the_cut_vocabulary_spells_the_same_texts():
    whole, cut = text.load_tokenizer("clip"), text.load_tokenizer("clip_8k")
    assert cut.vocab_size == 8192 and cut.encode(["a cat"], 8).max() == cut.eot == 8191
    words = "a zygomorphic flower, trinidad and tobago"
    assert cut.decode(cut.encode([words], 40)[0]) == whole.decode(whole.encode([words], 40)[0])
