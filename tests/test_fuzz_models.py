"""Folders of models by strangers: read rightly, or one line that says what is wrong with them.

By `-m slow`, every reader meets 20,000 files.
"""

import functools
import json
import shutil
import struct

import jax
import numpy as np
import pytest
from fuzzing import EXAMPLES, gives, meet, watched
from safetensors.numpy import save
from test_data_tokenizer_settings import BERT, FAST, bert, clip, gemma
from test_foreign import hugging_face_folder, open_clip_folder, small_encoder, write_preprocessor

from mlip_jax.core import schema
from mlip_jax.core.validation import validate_model
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.text.tokenizer import folder_tokenizer, load_tokenizer
from mlip_jax.interop import artefact, model_folders, open_clip, tensors

folder = watched  # a fixture

TEXTS = ["a dog, a café", "", "x" * 300, "<|endoftext|> [SEP] \ud7ff\u0301\ufb03"]


def settings(place):
    """The config and the preprocessing in a folder, as far as they can be used."""
    config, preprocessing = model_folders.settings(place)
    validate_model(config)
    schema.from_json(schema.to_json(config))
    assert preprocessing.image_size == config.model.image.image_size or preprocessing.image_size > 0
    return config


def small_model(place):
    """An exported model of one tensor."""
    config = schema.default()
    config.model.text.tokenizer = "clip_8k"
    variables = {"params": {"a": {"kernel": np.zeros((2, 2), np.float32)}}}
    tokenizer = load_tokenizer("clip_8k")
    written = artefact.Artefact(config, variables, tokenizer, Preprocessing.of(config), 3, {})
    artefact.write(place, written)


@EXAMPLES
def test_exported_configs(folder, examples):
    small_model(folder)
    file = folder / artefact.CONFIG
    whole = json.loads(file.read_text())
    words = ("vit", "resnet", "bert", "jsd", "sigmoid", "squash", "missing", "drop")

    def check(text):
        file.write_text(text)
        gives(settings, folder)

    meet("exported", lambda odd: odd.changed(whole, 2, words), check, examples)


@EXAMPLES
@pytest.mark.parametrize("kind", ["hf_clip", "siglip", "open_clip"])
def test_configs_of_other_libraries(folder, kind, examples, monkeypatch):
    monkeypatch.setattr(open_clip, "load_tokenizer", functools.cache(load_tokenizer))
    place = folder / "model"
    if kind == "open_clip":
        file = open_clip_folder(place) / "open_clip_config.json"
    else:
        file = hugging_face_folder(place, kind) / "config.json"
        write_preprocessor(place, size=32)
    preprocessor = place / "preprocessor_config.json"
    files = [path for path in (file, preprocessor) if path.is_file()]
    whole = {path: json.loads(path.read_text()) for path in files}
    words = ("gelu", "quick_gelu", "argmax", "tok", "mean", "bicubic", "longest", 32, 224, 2)

    def make(odd):
        path = odd.choice(files)
        return path, odd.changed(whole[path], 2, words)

    def check(example):
        path, text = example
        path.write_text(text)
        gives(settings, place)
        path.write_text(json.dumps(whole[path]))

    meet(kind, make, check, examples)


PARTS = (
    *({"type": kind} for kind in ("NFC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel")),
    {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 99},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Prepend", "prepend": "a" * 200},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Whitespace"},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    {"type": "Split", "pattern": {"Regex": "[a-z]|"}, "behavior": "Isolated", "invert": True},
    {"type": "Digits", "individual_digits": True},
    {"type": "Punctuation", "behavior": "Removed"},
    {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "max_input_chars_per_word": 0},
    {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0, "byte_fallback": False},
    {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},
    {"type": "WordLevel", "vocab": {"a": 4_000_000_000}, "unk_token": "a"},
    {"length": 10**9, "strategy": {"Fixed": 10**9}, "direction": "Left", "pad_id": 0},
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
)
CHAINS = ({"type": "Sequence", key: [*PARTS[:9]]} for key in ("normalizers", "pretokenizers"))


def small(make):
    """A tokenizer.json of as few words as its kind needs."""
    values = json.loads(make().to_str())
    if make is clip:
        return json.loads(small_encoder().to_str())
    return values


def check_ids(folder):
    """Every id has a row in the table, where the folder has a tokenizer that encodes."""
    tokenizer = gives(folder_tokenizer, folder)
    if tokenizer is not None:
        ids = gives(tokenizer.encode, TEXTS, 12)
        assert ids is None or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)


@EXAMPLES
def test_tokenizers(folder, examples):
    words = (*PARTS, *CHAINS, "left", "Right", 10**9, "[CLS]", "<eos>")
    kinds = [
        (small(bert), BERT | {"tokenizer_class": "BertTokenizer", "model_max_length": 5}),
        (small(bert), BERT | {"tokenizer_class": "PreTrainedTokenizerFast"}),
        (small(clip), FAST | {"pad_token": "</s>", "bos_token": "<s>", "eos_token": "</s>"}),
        (small(gemma), {"tokenizer_class": "GemmaTokenizer"}),
    ]

    def make(odd):
        tokenizer, own = odd.choice(kinds)
        texts = {"tokenizer.json": json.dumps(tokenizer), "tokenizer_config.json": json.dumps(own)}
        if odd.once_in(3):
            texts["tokenizer_config.json"] = odd.changed(own, 2, words)
        else:
            texts["tokenizer.json"] = odd.changed(tokenizer, 2, words)
        return texts

    def check(texts):
        for name, text in texts.items():
            (folder / name).write_text(text)
        check_ids(folder)

    meet("tokenizers", make, check, examples)


@EXAMPLES
def test_own_tokenizers(folder, examples):
    file = folder / "mlip_tokenizer.json"
    shutil.copyfile("/dev/null", file)
    encoder = json.dumps(small(clip))
    wrapped = {
        "cleaning": "none",
        "encoder": encoder,
        "affixes": [[298], [299], 5, 300, False, False, None],
        "written": False,
    }

    def make(odd):
        if odd.once_in(2):
            return odd.changed(wrapped, 2, ("clip_lite", 10**9, -1))
        return json.dumps({**wrapped, "encoder": odd.changed(json.loads(encoder), 2, PARTS)})

    def check(text):
        file.write_text(text)
        check_ids(folder)

    meet("own tokenizers", make, check, examples)


@EXAMPLES
def test_weights(folder, examples):
    small_model(folder)
    file = folder / artefact.WEIGHTS
    whole = save({f"params/{n}/kernel": np.ones((2, n + 1), np.float32) for n in range(3)})
    (length,) = struct.unpack("<Q", whole[:8])
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    words = ("params", "params/0", "batch_stats/a", "I64", "BF16", "F8_E4M3", 2**62, "other/a")

    def make(odd):
        if odd.once_in(3):
            return odd.damaged(whole)
        text = odd.changed(header, 2, words).encode("utf-8", "replace")
        claimed = len(text) if odd.once_in(2) else odd.choice((0, 2**63, 2**40, len(text) + 9))
        return struct.pack("<Q", claimed if odd.once_in(4) else len(text)) + text + body

    def check(data):
        file.write_bytes(data)
        found = gives(tensors.read, file, lambda name: False)
        for tensor in (found or {}).values():
            assert tensor.dtype == np.float32
        read = gives(artefact.read, folder) if found is not None else None
        if read is not None:
            assert jax.tree.leaves(read.variables) or not found

    meet("weights", make, check, examples)


@EXAMPLES
def test_lists_of_weights(folder, examples):
    names = {f"a{n}": f"model-{n}.safetensors" for n in range(2)}
    for name in names.values():
        (folder / name).write_bytes(save({name: np.ones(2, np.float32)}))

    def check(text):
        (folder / "model.safetensors.index.json").write_text(text)
        gives(tensors.read, folder, lambda name: False)

    def make(odd):
        return odd.changed({"metadata": {}, "weight_map": names}, 2, ("../outside/victim",))

    meet("lists of weights", make, check, examples)
