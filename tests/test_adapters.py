"""Low-rank adapters, the decay of the learning rate by depth, and frozen image encoders."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from test_step import BATCH, END, START, VOCABULARY, assert_same, batch

import mlip_jax
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.validation import validate
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.devices import parallel
from mlip_jax.models import adapters, building
from mlip_jax.objectives import perspectives
from mlip_jax.storage.saved import served
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training.state import abstract_state, initial_state
from mlip_jax.training.step import Objective, make_train_step
from mlip_jax.training.teachers import NO_TEACHERS

QKV = "image_encoder/spatial_0/attention/qkv/kernel"


def config_with(**changes):
    """A tiny CLIP with adapters of rank 2."""
    config = schema.default()
    config.batch_size, config.samples = BATCH, 100 * BATCH
    image, text = config.model.image, config.model.text
    image.image_size, image.patch_size, image.width, image.depth, image.heads = 16, 8, 16, 2, 2
    text.context_length, text.width, text.depth, text.heads = 8, 16, 2, 2
    config.model.embed_dim = 16
    config.model.pretrained = "somewhere"
    config.model.adapters.rank = 2
    config.optimizer.update(name="sgd", learning_rate=0.1, warmup_samples=0, ema=0.5)
    config.update_from_flattened_dict(changes)
    validate(config)
    return config


def parts(config, mesh=None):
    model = building.build(config, vocab_size=VOCABULARY, start_id=START, end_id=END)
    optimizer = optimizers.make(config)
    step = make_train_step(model, optimizer, config, Preprocessing.of(config), mesh)
    return model, optimizer, step


@functools.cache
def start():
    """A state whose adapters already do something."""
    config = config_with()
    model, optimizer, _ = parts(config)
    state = jax.jit(lambda: initial_state(model, optimizer, config))()
    moved = jax.tree.map(lambda leaf: leaf + 0.1, state.params[adapters.ADAPTERS])
    return state.replace(params=state.params | {adapters.ADAPTERS: moved})


@functools.cache
def after():
    _, _, step = parts(config_with())
    return jax.jit(step)(start(), batch())


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def test_they_start_as_the_model_that_is_there():
    config = config_with()
    model, optimizer, _ = parts(config)
    state = jax.jit(lambda: initial_state(model, optimizer, config))()
    plain = dict(state.params)
    chosen = flat(plain.pop(adapters.ADAPTERS))
    assert len(chosen) == 2 * 2 * (2 + 2)  # qkv and out of two blocks in two towers, A and B
    assert chosen[f"{QKV}/a"].shape == (16, 2) and chosen[f"{QKV}/b"].shape == (2, 48)
    assert len({leaf.tobytes() for name, leaf in chosen.items() if name.endswith("/a")}) == 8
    assert_same(adapters.merged(state.params), plain)


def test_a_kernel_is_used_with_its_product():
    params = start().params
    kernel, product = flat(params)[QKV], flat(params[adapters.ADAPTERS])
    expected = np.asarray(kernel) + np.asarray(product[f"{QKV}/a"]) @ product[f"{QKV}/b"]
    merged = flat(adapters.merged(params))
    np.testing.assert_allclose(merged[QKV], expected, rtol=1e-6)
    assert not any(name.startswith(adapters.ADAPTERS) for name in merged)
    fields = {"params": params, "ema": {}, "slow": {}, "batch_stats": {}}
    assert_same(served(fields)["params"], adapters.merged(params))


def test_only_adapters_and_heads_learn():
    state, metrics = after()
    before = start()
    for encoder in ("image_encoder", "text_encoder"):
        assert_same(state.params[encoder], before.params[encoder])
        assert_same(state.ema[encoder], before.ema[encoder])
    changed = jax.tree.map(
        lambda one, other: bool(np.any(one != other)), state.params, before.params
    )
    assert all(jax.tree.leaves(changed[adapters.ADAPTERS]))
    assert all(jax.tree.leaves(changed["image_heads_spatial_global"]))
    kept = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.optimizer)]
    assert any(adapters.ADAPTERS in name for name in kept)
    assert not any("encoder" in name and adapters.ADAPTERS not in name for name in kept)
    assert np.isfinite(metrics["loss"])


def test_their_gradient_follows_from_the_kernels():
    """By the chain rule: dA = dW B^T and dB = A^T dW, where W + A B is a plain model's kernel."""
    adapted, plain = config_with(), config_with(**{"model.adapters.rank": 0})

    def gradient(config, params):
        model, _, _ = parts(config)
        objective = Objective(
            model=model,
            config=config,
            preprocessing=Preprocessing.of(config),
            mesh=None,
            terms=perspectives.terms(config),
            key=jax.random.key(0),
            teachers=NO_TEACHERS,
            lessons={},
        )
        rows = batch() | {"number": jnp.arange(BATCH)}
        state = start().replace(params=params)
        return jax.jit(lambda *given: objective.value_and_gradient(*given, ())[-1])(state, rows)

    params = start().params
    products = flat(params[adapters.ADAPTERS])
    actual = flat(gradient(adapted, params)[adapters.ADAPTERS])
    whole = flat(gradient(plain, adapters.merged(params)))
    for name in (QKV, "text_encoder/block_1/attention/out/kernel"):
        a, b, kernel = products[f"{name}/a"], products[f"{name}/b"], whole[name]
        np.testing.assert_allclose(actual[f"{name}/a"], kernel @ b.T, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(actual[f"{name}/b"], a.T @ kernel, rtol=1e-4, atol=1e-7)


def test_several_devices_learn_the_same():
    config = config_with(**{"mesh.data": 4, "mesh.fsdp": 2})
    mesh = parallel.make_mesh(config.mesh, BATCH)
    model, optimizer, step = parts(config, mesh)
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, abstract_state(model, optimizer, config, mesh)
    )
    state, _ = jax.jit(step, out_shardings=(shardings, parallel.replicated(mesh)))(
        jax.device_put(start(), shardings),
        jax.device_put(batch(), parallel.batch_sharding(mesh)),
    )
    assert_same(state.params, after()[0].params, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.adapters.pattern": "no_such"}, "'no_such' matches no kernel .* such as image_enc"),
        ({"model.adapters.pattern": "("}, "is no regular expression"),
        ({"model.pretrained": ""}, "adapts a model that is there: start from one"),
        ({"model.adapters.rank": 1001}, "from 0 to 1,000"),
        (
            {"model.image.architecture": "resnet", "model.image.stem": "small"}
            | {"model.image.depth": 18},
            "batch norm.*config.optimizer.rates.image=0",
        ),
    ],
)
def test_what_cannot_be_adapted(changes, words):
    with pytest.raises(UserError, match=words):
        config = config_with(**changes)
        model, optimizer, _ = parts(config)
        jax.eval_shape(lambda: initial_state(model, optimizer, config))


def test_a_frozen_tower_has_no_adapters():
    config = config_with(**{"optimizer.rates.image": 0.0})
    model, optimizer, _ = parts(config)
    state = jax.eval_shape(lambda: initial_state(model, optimizer, config))
    assert list(state.params[adapters.ADAPTERS]) == ["text_encoder"]


def test_a_run_with_adapters_is_served_and_goes_on_without_them(trained, tiny, tmp_path, capsys):
    config = schema.from_json(tiny.with_suffix(".json").read_text())
    config.model.pretrained, config.model.adapters.rank = str(trained), 2
    config.samples = 4 * config.batch_size
    run = tmp_path / "run"
    mlip_jax.train(config, run)
    assert re.search(
        r"adapters of rank 2 on \d+ kernels: [\d,]+ parameters", capsys.readouterr().err
    )
    before, model = mlip_jax.load(trained), mlip_jax.load(run)
    kernels = [flat(each._variables["params"]) for each in (before, model)]
    assert kernels[0].keys() == kernels[1].keys()
    moved = {name for name in kernels[0] if np.any(kernels[0][name] != kernels[1][name])}
    encoders = {name for name in moved if "_encoder/" in name}
    assert encoders and all(re.search(r"attention/(qkv|out)/kernel$", name) for name in encoders)


def test_rates_decay_with_depth():
    config = config_with(
        **{"optimizer.layer_decay": 0.5, "optimizer.rates.text": 0.1, "model.adapters.rank": 0}
        | {"model.image.depth": 3, "model.image.frequency.depth": 1}
        | {"optimizer.schedule": "constant"}
    )
    model, optimizer, _ = parts(config)
    params = jax.eval_shape(lambda: initial_state(model, optimizer, config)).params
    shares = flat(optimizers.layer_shares(params, 0.5))
    expected = {
        "image_encoder/patch_embedding/patch/kernel": 1 / 16,
        "image_encoder/class_token": 1 / 16,
        "image_encoder/frequency_0/mlp/up/kernel": 1 / 8,
        "image_encoder/spatial_0/mlp/up/kernel": 1 / 4,
        "image_encoder/spatial_1/mlp/up/kernel": 1 / 2,
        "image_encoder/norm_spatial/scale": 1,
        "text_encoder/embedding": 1 / 8,
        "text_encoder/block_0/mlp/up/kernel": 1 / 4,
        "text_encoder/norm/scale": 1,
        "text_heads_text_global/projection/kernel": 1,
        "log_scale_spatial_global": 1,
    }
    assert {name: shares[name] for name in expected} == expected
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    config.optimizer.clip_norm = config.optimizer.weight_decay = 0.0
    optimizer = optimizers.make(config)
    updates, _ = optimizer.update(ones, optimizer.init(ones), ones)
    moves = {name: -float(leaf.ravel()[0]) / 0.1 for name, leaf in flat(updates).items()}
    for name, share in expected.items():
        tower = 0.1 if name.startswith("text_encoder") else 1.0
        assert moves[name] == pytest.approx(share * tower, rel=1e-5), name
