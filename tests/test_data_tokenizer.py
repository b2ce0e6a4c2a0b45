"""Tokenizer and captions."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import ftfy
import numpy as np
import pytest
from tokenizers import Tokenizer as Encoder

from mlip_jax.core.errors import UserError
from mlip_jax.data.text import captions
from mlip_jax.data.text.tokenizer import Tokenizer, load_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "data/clip_bpe_golden.json").read_text("utf-8"))
ODD = json.loads((Path(__file__).parent / "data/open_clip_odd_texts.json").read_text("utf-8"))[
    "texts"
]
NEVER = {"first": 1.0, "tags": 0.0, "shuffle": 0.0, "word_dropout": 0.0}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("clip")


@pytest.mark.parametrize("entry", GOLDEN, ids=range(len(GOLDEN)))
def test_ids_equal_clips(tokenizer, entry):
    ids = tokenizer.encode([entry["text"]], 77)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids[0], entry["ids"])


def unequal(tokenizer, key, rows):
    """Texts whose ids are not open_clip's."""
    ids = tokenizer.encode([row["text"] for row in rows], 80)
    wrong = []
    for row, found in zip(rows, ids.tolist(), strict=True):
        expected = [tokenizer.sot, *row[key], tokenizer.eot]
        if found != expected + [0] * (80 - len(expected)):
            wrong.append(row["text"])
    return wrong


@pytest.mark.parametrize(
    ("cleaning", "key"),
    [
        ("none", "plain"),
        ("ftfy_whitespace", "ftfy"),
        ("ftfy_lower", "ftfy"),
        ("ftfy_canonicalize", "canonical"),
    ],
)
def test_ids_of_odd_texts_equal_open_clips(cleaning, key):
    encoder = Encoder.from_str(load_tokenizer("clip").encoder_json())
    tokenizer = Tokenizer(encoder, cleaning, written=True)
    assert unequal(tokenizer, key, ODD) == []
    copies = Tokenizer.from_json(tokenizer.to_json()), pickle.loads(pickle.dumps(tokenizer))
    assert [unequal(copy, key, ODD) for copy in copies] == [[], []]
    # Without `written`, special tokens in texts are words, whatever is around them.
    others = [row for row in ODD if "_of_text>" not in row["text"].lower()]
    plain = load_tokenizer("clip", cleaning=cleaning)
    assert unequal(plain, key, others) == [] and len(others) > 150
    special = [row for row in ODD if row not in others and tokenizer.eot in row["plain"]]
    assert len(unequal(plain, "plain", special)) == len(special) > 5


def test_a_tokenizer_of_an_earlier_version_gives_the_same_ids():
    saved = json.loads(load_tokenizer("clip").to_json())
    words = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    assert [part["type"] for part in saved["normalizer"]["normalizers"]] == ["NFC", "Lowercase"]
    saved["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = words
    others = [row for row in ODD if not re.search("_of_text>|'ſ|\u0345", row["text"], re.I)]
    assert unequal(Tokenizer.from_json(json.dumps(saved)), "plain", others) == []


def test_ftfy_is_spared_where_it_changes_nothing():
    rng = np.random.default_rng(0)
    letters = np.array([chr(code) for code in range(32, 127) if chr(code) != "&"])
    for _ in range(300):
        text = "".join(rng.choice(letters, 40))
        assert captions.repair(text) == ftfy.fix_text(text) == text
    assert captions.repair("\u201ccaf\u00c3\u00a9\u201d\x00") == '"caf\u00e9"'


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
        lambda tokenizer: Tokenizer.from_json(tokenizer.to_json()),
        lambda tokenizer: pickle.loads(pickle.dumps(tokenizer)),
    ],
    ids=["json", "pickle"],
)
def test_copies_are_the_same(tokenizer, copy):
    texts = [entry["text"] for entry in GOLDEN]
    np.testing.assert_array_equal(copy(tokenizer).encode(texts, 77), tokenizer.encode(texts, 77))


def test_unknown_tokenizer_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'clip'"):
        load_tokenizer("clipp")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("the left hand, a Right turn", "the right hand, a Left turn"),
        ("bright copyright leftover", "bright copyright leftover"),
        ("LEFT-pointing", "RIGHT-pointing"),
    ],
)
def test_mirrored_captions(before, after):
    assert captions.swap_sides(before) == after
    assert captions.swap_sides(after) == before


def test_compose():
    texts, tags = ("dog face", "puppy"), ("animals", "mammal")

    def composed(**chances):
        config = {**NEVER, **chances}
        return {captions.compose(texts, tags, config, np.random.default_rng(i)) for i in range(60)}

    assert composed() == {"dog face"}
    assert composed(first=0.0) == composed(first=0.5) == {"dog face", "puppy"}
    assert composed(tags=1.0) == {"dog face, animals, mammal"}
    assert len(composed(tags=1.0, shuffle=1.0)) == 6
    assert composed(word_dropout=1.0) == {"dog", "face"}
    assert (
        captions.compose(("",), (), {**NEVER, "word_dropout": 1.0}, np.random.default_rng(0)) == ""
    )


def test_the_cut_vocabulary_spells_the_same_texts():
    whole, cut = load_tokenizer("clip"), load_tokenizer("clip_8k")
    assert cut.vocab_size == 8192 and cut.encode(["a cat"], 8).max() == cut.eot == 8191
    words = "a zygomorphic flower, trinidad and tobago"
    assert cut.decode(cut.encode([words], 40)[0]) == whole.decode(whole.encode([words], 40)[0])


def test_two_captions_of_one_visit():
    texts, chances = ("one", "two", "three"), {**NEVER, "first": 0.0, "tags": 0.5}
    pairs = set()
    for seed in range(60):
        rng, alone = np.random.default_rng(seed), np.random.default_rng(seed)
        first, second = captions.compose_two(texts, ("tag",), chances, rng)
        assert first == captions.compose(texts, ("tag",), chances, alone)
        pairs.add((first.split(",")[0], second.split(",")[0]))
    assert pairs == {(a, b) for a in texts for b in texts if a != b}
    only = captions.compose_two(("one",), (), chances, np.random.default_rng(0))
    assert only == ("one", "one")


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A man's  dog, (brown)\tand #1: *big*!", "a mans dog brown and 1 big"),
        ('what? "yes"; no. ~5', "what yes no 5"),
        ("left-hand side/right", "left hand side right"),
        ("<PERSON> and <person> smile", "person and person smile"),
        ("<<person>>", "person"),
        ("Café Ünïcödé", "cafe unicode"),
        ("\u2026", ""),  # three full stops, once it is decomposed
        (" ?!\n", ""),
        (" ".join(map(str, range(40))), " ".join(map(str, range(30)))),
        ("keeps <tags> & @ signs_", "keeps <tags> & @ signs_"),
    ],
)
def test_cleaning(caption, cleaned):
    assert captions.clean_caption(caption) == cleaned
    assert captions.clean_caption(cleaned) == cleaned
    assert captions.usable([caption, caption], "clip_lite") == ((cleaned,) if cleaned else ())


def test_cleaning_and_mirroring_change_places():
    for caption in ("The LEFT-hand side, right?", "Bright leftover: to the right/left."):
        swapped = captions.clean_caption(captions.swap_sides(caption))
        assert swapped == captions.swap_sides(captions.clean_caption(caption))
    assert captions.swap_sides(captions.clean_caption("Bright, copyright!")) == "bright copyright"


@pytest.mark.parametrize("name", ["clip_8k", "wordpiece"])
def test_the_tokenizer_cleans(name):
    texts = ["A photo of a left-hand glove.", "caf\u00e9!"]
    plain, cleaning = (
        load_tokenizer(name, cleaning=cleaning, captions=lambda: texts * 3)
        for cleaning in ("none", "clip_lite")
    )
    cleaned = ["a photo of a left hand glove", "cafe"]
    expected_ids = cleaning.encode(cleaned, 16)
    assert (plain.cleaning, cleaning.cleaning) == ("none", "clip_lite")
    assert (plain.encode(texts, 16) != plain.encode(cleaned, 16)).any()
    copies = Tokenizer.from_json(cleaning.to_json()), pickle.loads(pickle.dumps(cleaning))
    for tokenizer in (cleaning, *copies):
        np.testing.assert_array_equal(tokenizer.encode(texts, 16), expected_ids)
        assert [tokenizer.decode(row) for row in expected_ids] == cleaned


def test_unknown_cleaning():
    with pytest.raises(UserError, match="config.model.text.cleaning='clip'.*did you mean"):
        load_tokenizer("clip", cleaning="clip")


# Tokens by Hugging Face's tokenizer with the vocabulary of bert-base-uncased. Of a vocabulary that
# holds these tokens alone, the longest pieces are the same.
BERT_GOLDEN = {
    "A man riding a wave on a surfboard.": "a man riding a wave on a surf ##board .",
    "Na\u00efve caf\u00e9, d\u00e9j\u00e0-vu!": "naive cafe , de ##ja - vu !",
    "unaffable": "una ##ffa ##ble",
    "\u6771\u4eac tower": "\u6771 \u4eac tower",
    "don't (stop) 3.14": "don ' t ( stop ) 3 . 14",
    "  two\tspaces\nand\u00a0more ": "two spaces and more",
    "\U0001f600 smile": "[UNK] smile",
    "&amp;": "& amp ;",
    "a" * 120 + " wave": "[UNK] wave",
    "": "",
}


def vocabulary(folder, tokens, **options):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    if options:
        (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return f"wordpiece:{folder}"


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_wordpiece_ids_equal_berts(tmp_path):
    pieces = sorted({piece for tokens in BERT_GOLDEN.values() for piece in tokens.split()})
    entries = ["a ", *SPECIAL, *(piece for piece in pieces if piece not in SPECIAL)]
    name = vocabulary(tmp_path, entries)
    for spec in (name, f"{name}/vocab.txt"):
        tokenizer = load_tokenizer(spec)
        numbers = (tokenizer.pad, tokenizer.sot, tokenizer.eot, tokenizer.vocab_size)
        assert numbers == (1, 3, 4, len(entries))
        for caption, tokens in BERT_GOLDEN.items():
            ids = [3, *map(entries.index, tokens.split()), 4]
            encoded = tokenizer.encode([caption], 16)[0]
            np.testing.assert_array_equal(encoded, ids + [1] * (16 - len(ids)))
    assert tokenizer.decode(tokenizer.encode(["Surfboard wave"], 16)[0]) == "surfboard wave"
    np.testing.assert_array_equal(
        tokenizer.encode(["a man and a wave"], 4)[0], [3, *map(entries.index, ("a", "man")), 4]
    )
    assert (tokenizer.encode(["a [SEP] wave [CLS]"], 16) == 4).sum() == 1  # its own end


def test_cased_vocabularies(tmp_path):
    name = vocabulary(tmp_path, [*SPECIAL, "Caf\u00e9", "cafe"], do_lower_case=False)
    assert load_tokenizer(name).encode(["Caf\u00e9 cafe"], 4).tolist() == [[2, 5, 6, 3]]
    vocabulary(tmp_path, [*SPECIAL, "Caf\u00e9", "cafe"], do_lower_case="no")
    with pytest.raises(UserError, match="tokenizer_config.json: do_lower_case is 'no'"):
        load_tokenizer(name)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([*SPECIAL, "a", "b", "a"], r"vocab.txt:8: 'a' is in line 6 already"),
        (["[PAD]", "[UNK]", "a"], r"vocab.txt is no WordPiece .*: \[CLS\], \[SEP\] not in it"),
        (None, r"cannot read .*vocab.txt: No such file"),
    ],
)
def test_wrong_vocabularies(tmp_path, entries, message):
    name = vocabulary(tmp_path, entries) if entries else f"wordpiece:{tmp_path}"
    with pytest.raises(UserError, match=message):
        load_tokenizer(name)


TRAIN = """
from mlip_jax.data.text.tokenizer import load_tokenizer
texts = [f"{a}{b}{c} \u00fc{c}{a} rare{a}{b}{c}" for a in "abcd" for b in "efgh" for c in "ijklm"]
print(load_tokenizer("wordpiece", vocab_size=60, captions=lambda: texts).to_json())
"""


def test_training_gives_the_same_vocabulary_in_every_process():
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": str(Path(__file__).parents[1]),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2", "3")
    ]
    first, *others = [run.communicate(timeout=60)[0] for run in runs]
    assert others == [first, first]
    tokenizer = Tokenizer.from_json(first)
    assert tokenizer.vocab_size == 60
    assert (tokenizer.pad, tokenizer.sot, tokenizer.eot) == (0, 2, 3)
    assert tokenizer.decode(tokenizer.encode(["Aei \u00dcia"], 16)[0]) == "aei uia"


def test_a_trained_vocabulary_keeps_its_size():
    words = [chr(code) * 2 for code in range(ord("a"), ord("z") + 1)]
    tokenizer = load_tokenizer("wordpiece", vocab_size=25, captions=lambda: words * 2)
    assert tokenizer.vocab_size <= 25
    assert tokenizer.decode(tokenizer.encode(["aa zz"], 8)[0]) == "aa [UNK]"
    with pytest.raises(UserError, match="vocab_size=6 must be at least 7"):
        load_tokenizer("wordpiece", vocab_size=6, captions=lambda: words)


def test_a_vocabulary_needs_captions():
    with pytest.raises(UserError, match="trained on captions, and none were given"):
        load_tokenizer("wordpiece")
    with pytest.raises(UserError, match="trained on the captions .*, and there are none"):
        load_tokenizer("wordpiece", captions=lambda: iter(()))
    for name in ("wordpeice", "wordpeice:x", "wordpiece:"):
        with pytest.raises(UserError, match="unknown tokenizer .*did you mean 'wordpiece'"):
            load_tokenizer(name)
