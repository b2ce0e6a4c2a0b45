"""BERT and its reader against Hugging Face's.

tests/data/bert_tiny is transformers 5.23's BertModel with random weights: its folder's config.json
and safetensors; two texts of 9 and 4 tokens, last hidden states and the pooler's output.
"""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlip_jax.core.errors import UserError
from mlip_jax.interop import bert as reader
from mlip_jax.models.bert import BertEncoder

DATA = Path(__file__).parent / "data"
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
FILE = DATA / "bert_tiny.safetensors"
START, END, CONTEXT = 1, 2, 12
QKV_OF_BLOCK_1 = "encoder.layer.1.attention.self"


@functools.cache
def reference():
    return dict(np.load(DATA / "bert_tiny_io.npz"))


def encoder(**changes):
    fields = {
        "vocab_size": 60,
        "start_id": START,
        "end_id": END,
        "context_length": CONTEXT,
        "width": 32,
        "depth": 2,
        "heads": 4,
        "mlp_ratio": 2.0,
        "activation": "gelu",
        "pooling": "tanh",
        "dropout": 0.1,
        "dtype": FLOAT32,
    }
    return BertEncoder(**fields | changes)


def parameter_shapes(**changes):
    model = encoder(**changes)
    ids = jnp.zeros((1, model.context_length), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids)["params"]


@functools.cache
def parameters():
    return reader.read(FILE, parameter_shapes())


def encode(token_ids, params=None, **changes):
    variables = {"params": parameters() if params is None else params}
    return jax.jit(encoder(**changes).apply)(variables, jnp.asarray(token_ids))


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of the tiny BERT."""
    shutil.copy(DATA / "bert_tiny_config.json", tmp_path / "config.json")
    shutil.copy(FILE, tmp_path / "model.safetensors")
    return tmp_path


def test_it_is_bert():
    expected = reference()
    views = encode(expected["token_ids"])
    mask = expected["mask"]
    np.testing.assert_allclose(views.text_tokens[mask], expected["hidden"][mask], atol=1e-5)
    np.testing.assert_allclose(views.text_global, expected["pooled"], atol=1e-5)
    index = np.arange(CONTEXT)
    words = (index > 0) & (index < mask.sum(axis=1, keepdims=True) - 1)
    np.testing.assert_array_equal(views.mask, words)


def test_pooling():
    expected = reference()
    hidden, mask = expected["hidden"], expected["mask"]
    word_masks = mask & (expected["token_ids"] != START)
    pooled = {
        "first": hidden[:, 0],
        "last": hidden[np.arange(2), mask.sum(axis=1) - 1],
        "mean": np.stack(
            [rows[word_mask].mean(0) for rows, word_mask in zip(hidden, word_masks, strict=True)]
        ),
        "mean_all": np.stack(
            [rows[valid].mean(0) for rows, valid in zip(hidden, mask, strict=True)]
        ),
    }
    params = reader.read(FILE, parameter_shapes(pooling="mean"))
    assert "pooler" in parameters() and "pooler" not in params
    for pooling, value in pooled.items():
        views = encode(expected["token_ids"], params, pooling=pooling)
        np.testing.assert_allclose(views.text_global, value, atol=1e-5, err_msg=pooling)


def test_what_comes_after_the_end_changes_nothing():
    token_ids = reference()["token_ids"]
    other = np.where(reference()["mask"], token_ids, [[7], [END]]).astype(np.int32)
    views, others = encode(token_ids), encode(other)
    mask = reference()["mask"]
    np.testing.assert_array_equal(views.text_global, others.text_global)
    np.testing.assert_array_equal(views.text_tokens[mask], others.text_tokens[mask])
    np.testing.assert_array_equal(views.mask, others.mask)


def test_half_precision_stays():
    ids = jnp.asarray(reference()["token_ids"])
    for pooling in ("tanh", "mean", "last", "first"):
        model = encoder(pooling=pooling, dtype=BFLOAT16)
        key = jax.random.key(0)
        views, _ = jax.eval_shape(
            lambda model=model, key=key: model.init_with_output(
                {"params": key, "dropout": key}, ids, deterministic=False
            )
        )
        assert views.text_global.dtype == views.text_tokens.dtype == BFLOAT16
    assert all(leaf.dtype == FLOAT32 for leaf in jax.tree.leaves(parameter_shapes(dtype=BFLOAT16)))


def test_describe(folder):
    assert reader.describe(folder) == {
        "width": 32,
        "depth": 2,
        "heads": 4,
        "mlp_ratio": 2.0,
        "vocab_size": 60,
        "positions": 24,
        "activation": "gelu",
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "roberta", "model_type is 'roberta'; only 'bert' is supported"),
        ("hidden_act", "relu", "hidden_act is 'relu'; only 'gelu'"),
        ("layer_norm_eps", 1e-5, "layer_norm_eps is 1e-05; only 1e-12"),
        ("position_embedding_type", "relative_key", "'relative_key'; only 'absolute'"),
        ("hidden_size", None, "damaged: hidden_size is None"),
    ],
)
def test_another_config_is_refused(folder, key, value, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=re.escape(message)):
        reader.describe(folder)


def test_what_is_no_folder_is_refused(folder):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        reader.describe(folder / "nowhere")
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        reader.read(folder / "nowhere", parameter_shapes())
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not JSON: .*, line 1, column 2"):
        reader.describe(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="cannot read .*config.json: No such file"):
        reader.describe(folder)


def test_positions_beyond_the_context_are_left_out():
    table = load_file(FILE)["embeddings.position_embeddings.weight"]
    assert len(table) == 24
    np.testing.assert_array_equal(parameters()["position"], table[:CONTEXT])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"context_length": 30},
            "tensor embeddings.position_embeddings.weight has shape (24, 32), the configured model "
            "wants (30, 32): set config.model.text.context_length to 24 or less",
        ),
        (
            {"vocab_size": 50},
            "tensor embeddings.word_embeddings.weight has shape (60, 32), the configured model "
            "wants (50, 32): set config.model.text.tokenizer",
        ),
        (
            {"mlp_ratio": 4.0},
            "tensor encoder.layer.0.intermediate.dense.bias has shape (64,), the configured model "
            "wants (128,): set config.model.text.width and mlp_ratio",
        ),
        ({"depth": 3}, "lacks tensor encoder.layer.2.attention.output.LayerNorm.bias and 15 more"),
        ({"depth": 1}, "also has tensor encoder.layer.1.attention.output.LayerNorm.bias and 15"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_another_model_is_refused(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        reader.read(FILE, parameter_shapes(**changes))


def test_a_missing_tensor_is_named(folder):
    tensors = load_file(FILE)
    for name in (f"{QKV_OF_BLOCK_1}.key.bias", "pooler.dense.bias"):
        remaining = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(remaining, folder / "model.safetensors")
        with pytest.raises(UserError, match=f"lacks tensor {name}: set config.model.text"):
            reader.read(folder, parameter_shapes())


def older(name):
    """A name as in the first BERT files, which are of the model with its heads."""
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    return "bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")


def test_other_names_heads_and_shards(folder):
    tensors = {older(name): tensor for name, tensor in load_file(FILE).items()}
    tensors["bert.embeddings.position_ids"] = np.arange(24)[None]
    tensors["cls.predictions.bias"] = np.zeros(60, np.float32)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(
        np.testing.assert_array_equal, reader.read(folder, parameter_shapes()), parameters()
    )
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match="b.safetensors: cannot be read as safetensors"):
        reader.read(folder, parameter_shapes())
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="index.json: expected a JSON object, found a list"):
        reader.read(folder, parameter_shapes())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(folder, dtype):
    halves = {name: tensor.astype(dtype) for name, tensor in load_file(FILE).items()}
    save_file(halves, folder / "model.safetensors")
    params = reader.read(folder, parameter_shapes())
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(
        params["embedding"], halves["embeddings.word_embeddings.weight"].astype(np.float32)
    )
