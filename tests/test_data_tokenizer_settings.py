"""Settings of Hugging Face's tokenizer folders: computed as transformers does, or refused."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Encoder
from tokenizers import models, normalizers, pre_tokenizers, processors

from mlip_jax.core.errors import UserError
from mlip_jax.data.text.tokenizer import Tokenizer, folder_tokenizer, load_tokenizer

# By AutoTokenizer of transformers 5.24 on the folders below, with padding="max_length" and
# truncation to 12 ids.
REFERENCE = json.loads(
    (Path(__file__).parent / "data/hugging_face_settings.json").read_text("utf-8")
)


def clip():
    """CLIP's tokens with a normaliser that keeps upper case."""
    encoder = Encoder.from_str(load_tokenizer("clip_8k").encoder_json())
    encoder.normalizer = normalizers.NFC()
    return closed(encoder, ["<|startoftext|>"], ["<|endoftext|>"])


def gemma():
    letters = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGH\u2581.,'"))
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters]
    merges = [("d", "o"), ("do", "g"), ("\u2581", "dog")]
    words += [f"<0x{byte:02X}>" for byte in range(256)] + [a + b for a, b in merges]
    vocabulary = {word: index for index, word in enumerate(words)}
    encoder = Encoder(
        models.BPE(vocabulary, merges, fuse_unk=True, unk_token="<unk>", byte_fallback=True)
    )
    encoder.normalizer = normalizers.Replace(" ", "\u2581")
    encoder.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    encoder.add_special_tokens(words[:5])
    return closed(encoder, [], ["<eos>"])


def bert(lowercase=True):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "A", "dog", "Dog"]
    words += ["caf\u00e9", "cafe", "it", "'", "s", ",", "x"]
    vocabulary = {word: index for index, word in enumerate(words)}
    encoder = Encoder(models.WordPiece(vocabulary, unk_token="[UNK]"))
    encoder.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    encoder.add_special_tokens(words[:5])
    return closed(encoder, ["[CLS]"], ["[SEP]"])


def t5():
    """Its normaliser and its pre-tokeniser are none of T5's."""
    words = [(word, 0.0) for word in ("<pad>", "</s>", "<unk>")]
    words += [(letter, -4.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz,'ADG"]
    encoder = Encoder(models.Unigram([*words, ("\u2581dog", -2.0), ("\u2581a", -2.5)], 2, False))
    encoder.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("x", "y")]
    )
    encoder.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    encoder.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return closed(encoder, [], ["</s>"])


def closed(encoder, start, end):
    encoder.add_special_tokens([*start, *end])
    encoder.post_processor = processors.TemplateProcessing(
        single=[*start, "$A", *end],
        special_tokens=[(token, encoder.token_to_id(token)) for token in (*start, *end)],
    )
    return encoder


def sided():
    encoder = clip()
    encoder.enable_padding(direction="left", pad_id=8191, pad_token="<|endoftext|>")
    encoder.enable_truncation(9, direction="left")
    return encoder


CLIP = {
    "pad_token": "<|endoftext|>",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}
FAST = CLIP | {"tokenizer_class": "PreTrainedTokenizerFast"}
GEMMA = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
BERT = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
ADDED = {
    "content": "<dog>",
    "special": False,
    "normalized": True,
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
}
FOLDERS = {
    # A class that writes in lower case, whatever tokenizer.json says.
    "clip_class": (clip, CLIP | {"tokenizer_class": "CLIPTokenizer"}),
    "clip_class_fast": (clip, CLIP | {"tokenizer_class": "CLIPTokenizerFast"}),
    "clip_bos": (clip, CLIP | {"tokenizer_class": "CLIPTokenizer", "add_bos_token": False}),
    "clip_left": (
        clip,
        CLIP
        | {
            "tokenizer_class": "CLIPTokenizer",
            "padding_side": "left",
            "truncation_side": "left",
        },
    ),
    "siglip2": (gemma, GEMMA | {"tokenizer_class": "Siglip2Tokenizer", "padding_side": "right"}),
    "gemma": (gemma, GEMMA | {"tokenizer_class": "GemmaTokenizer", "padding_side": "right"}),
    "gemma_noside": (gemma, GEMMA | {"tokenizer_class": "GemmaTokenizer"}),
    "bert": (bert, BERT | {"tokenizer_class": "BertTokenizer", "do_lower_case": False}),
    "bert_accents": (bert, BERT | {"tokenizer_class": "BertTokenizer", "strip_accents": False}),
    "bert_json": (lambda: bert(False), BERT | {"tokenizer_class": "BertTokenizerFast"}),
    "t5": (t5, {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "legacy": False}),
    # tokenizer.json as it stands, and what changes none of its ids.
    "fast": (clip, FAST),
    "backend": (clip, CLIP | {"tokenizer_class": "TokenizersBackend"}),
    "no_class": (clip, CLIP),
    "fast_lower": (clip, FAST | {"do_lower_case": True, "strip_accents": True}),
    "fast_prefix": (clip, FAST | {"add_prefix_space": True, "legacy": True}),
    "fast_eos_only": (clip, FAST | {"add_eos_token": True}),
    "added": (clip, FAST | {"added_tokens_decoder": {"8192": ADDED}}),
    "extra": (clip, FAST | {"additional_special_tokens": ["dog</w>"]}),
    # Sides.
    "left": (clip, FAST | {"padding_side": "left"}),
    "cutleft": (clip, FAST | {"truncation_side": "left"}),
    "json_left": (sided, FAST),
}


def folder(path, make, settings):
    path.mkdir(exist_ok=True)
    make().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_equal_transformers(tmp_path, name):
    tokenizer = folder_tokenizer(folder(tmp_path, *FOLDERS[name]))
    for copy in (tokenizer, Tokenizer.from_json(tokenizer.to_json())):
        assert copy.encode(REFERENCE["texts"], 12).tolist() == REFERENCE["ids"][name]


def test_a_clip_without_a_class_is_clips(tmp_path):
    path = folder(tmp_path, clip, CLIP)
    (path / "config.json").write_text('{"model_type": "clip"}')
    ids = folder_tokenizer(path).encode(REFERENCE["texts"], 12).tolist()
    assert ids == REFERENCE["ids"]["clip_class"] != REFERENCE["ids"]["no_class"]


def test_clips_two_files_take_its_settings(tmp_path):
    model = json.loads(load_tokenizer("clip_8k").encoder_json())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{pairs}\n")
    settings = CLIP | {"do_lower_case": False, "truncation_side": "left", "padding_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = folder_tokenizer(tmp_path).encode(REFERENCE["texts"], 12).tolist()
    assert ids == REFERENCE["ids"]["clip_left"]


def test_the_longest_text_is_the_tokenizers(tmp_path):
    tokenizer = folder_tokenizer(folder(tmp_path, clip, FAST | {"model_max_length": 5}))
    for copy in (tokenizer, Tokenizer.from_json(tokenizer.to_json())):
        rows = copy.encode(["a a a a a a a", "a"], 8).tolist()
        assert rows == [[8190, *[320] * 3, *[8191] * 4], [8190, 320, *[8191] * 6]]
    assert tokenizer.encode(["a a a"], 4).tolist() == [[8190, 320, 320, 8191]]
    endless = folder_tokenizer(folder(tmp_path, clip, FAST | {"model_max_length": 1e30}))
    assert endless.encode(["a " * 30], 20)[0, 18] == 320


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"add_bos_token": False}, "add_bos_token=False, but the template .* make them agree"),
        ({"split_special_tokens": True}, "split_special_tokens=True, which is not computed here"),
        ({"auto_map": {"AutoTokenizer": ["a.B", None]}}, "auto_map=.*, which is not computed"),
        ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs=.*, which is not"),
        ({"padding_side": "both"}, "padding_side is 'both'; expected left or right"),
        ({"truncation_side": "middle"}, "truncation_side is 'middle'; expected left or right"),
        ({"model_max_length": float("nan")}, "model_max_length is nan; expected a number above 0"),
        ({"model_max_length": "long"}, "model_max_length is 'long'; expected a number above 0"),
        (
            {"tokenizer_class": "LlamaTokenizerFast"},
            "tokenizer_class is 'LlamaTokenizerFast'.*name PreTrainedTokenizerFast",
        ),
        ({"tokenizer_class": "GemmaTokenizer", "pad_token": "<|"}, "has no token '<.'"),
        ({"sep_token": "\udce9"}, "tokenizer_config.json: a text holds half of a surrogate pair"),
        ({"added_tokens_decoder": {"1": {"content": "\ud83d"}}}, "half of a surrogate pair"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        folder_tokenizer(folder(tmp_path, clip, FAST | settings))


def test_a_class_of_another_kind_of_model_is_refused(tmp_path):
    for name in ("CLIPTokenizer", "Siglip2Tokenizer"):
        with pytest.raises(UserError, match=f"tokenizer_class is {name}, .* holds no BPE"):
            folder_tokenizer(folder(tmp_path, bert, BERT | {"tokenizer_class": name}))
    with pytest.raises(UserError, match="do_lower_case is 'no', expected true or false"):
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": "no"}
        folder_tokenizer(folder(tmp_path, bert, BERT | settings))
