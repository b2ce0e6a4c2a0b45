"""ResNet and its reader against PyTorch's, and batch normalisation.

tests/data/resnet{18,50}_tiny are timm 1.0.31's, whose names and strides are torchvision's, 3 and 2
channels wide, with random weights and statistics: a state dict; images, the last grid in evaluation
and in training, and the running statistics after that one step in training, all in float64.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from mlip_jax.core.errors import UserError
from mlip_jax.core.schema import default
from mlip_jax.interop import resnet as reader
from mlip_jax.models import building, resnet
from mlip_jax.models.layers import BatchNorm
from mlip_jax.models.resnet import ResNet

DATA = Path(__file__).parent / "data"
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
MODELS = {
    18: ResNet(18, 3, "imagenet", FLOAT32),
    50: ResNet(50, 2, "small", FLOAT32),
}


def file_of(depth):
    return DATA / f"resnet{depth}_tiny.safetensors"


@functools.cache
def reference(depth):
    return dict(np.load(DATA / f"resnet{depth}_tiny_io.npz"))


def variable_shapes(model, side=16):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    return shapes["params"], shapes["batch_stats"]


@functools.cache
def variables(depth):
    params, stats = reader.read(file_of(depth), *variable_shapes(MODELS[depth]))
    return {"params": params, "batch_stats": stats}


def config_of(model):
    config = default()
    image = config.model.image
    image.architecture, image.depth, image.width = "resnet", model.depth, model.width
    return config


def close(value, expected, share=1e-5):
    """Equal up to 1e-4 of a value and to `share` of the largest."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=share * np.abs(expected).max())


@pytest.mark.parametrize("depth", MODELS)
def test_evaluation_is_pytorch(depth):
    model, expected = MODELS[depth], reference(depth)
    views, state = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]))(
        variables(depth), expected["images"]
    )
    batch, rows, columns, width = expected["grid"].shape
    assert width == building.image_encoder(config_of(model)).feature_width(config_of(model))
    assert rows == -(-expected["images"].shape[1] // resnet.reduction(model.stem))
    close(views.spatial_tokens, expected["grid"].reshape(batch, rows * columns, width))
    close(views.spatial_global, expected["mean"])
    np.testing.assert_array_equal(views.sizes, np.ones((batch, rows * columns), np.float32))
    assert views.frequency_global is None and views.source is None
    # Running statistics are left alone.
    jax.tree.map(
        np.testing.assert_array_equal, state, {"batch_stats": variables(depth)["batch_stats"]}
    )


@pytest.mark.parametrize("depth", MODELS)
def test_a_step_in_training_is_pytorch(depth, tmp_path):
    model, expected = MODELS[depth], reference(depth)
    run = functools.partial(model.apply, deterministic=False, mutable=["batch_stats"])
    views, state = jax.jit(run)(variables(depth), expected["images"])
    # The norms of 50 layers blow errors up: PyTorch's own float32 is 3e-5 off its float64 here.
    grid = expected["train_grid"].reshape(views.spatial_tokens.shape)
    close(views.spatial_tokens, grid, share=1e-4)
    after = {key: value for key, value in expected.items() if "running" in key}
    save_file(load_file(file_of(depth)) | after, tmp_path / "after.safetensors")
    _, stats = reader.read(tmp_path / "after.safetensors", *variable_shapes(model))
    jax.tree.map(close, state["batch_stats"], stats)


def test_every_depth_has_its_layers():
    for depth in resnet.DEPTHS:
        params, _ = variable_shapes(ResNet(depth, 2, "imagenet", FLOAT32), side=32)
        kernels = [
            path
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
            if "convolution" in (name := jax.tree_util.keystr(path)) and "kernel" in name
        ]
        # All convolutions on the main path, and the classifier, which is not here.
        assert len(kernels) + 1 == depth
    # As many as torchvision's resnet50 without its classifier.
    params, _ = variable_shapes(ResNet(50, 64, "imagenet", FLOAT32), side=32)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 23_508_032


def test_half_precision_stays():
    model = ResNet(50, 2, "small", BFLOAT16)
    run = functools.partial(model.apply, deterministic=False, mutable=["batch_stats"])
    views, state = jax.eval_shape(run, variables(50), reference(50)["images"])
    assert views.spatial_tokens.dtype == views.spatial_global.dtype == BFLOAT16
    assert all(leaf.dtype == FLOAT32 for leaf in jax.tree.leaves(state))
    params, _ = variable_shapes(model)
    assert all(leaf.dtype == FLOAT32 for leaf in jax.tree.leaves(params))


def test_batch_norm_sharded_is_batch_norm():
    """The whole batch's statistics, wherever its rows are."""
    norm = BatchNorm(FLOAT32)
    rng = np.random.default_rng(0)
    # Every row with a mean and a spread of its own: a device's statistics are not the batch's.
    offset, spread = rng.normal(size=(16, 1, 1)), rng.uniform(0.1, 4.0, (16, 1, 1))
    x = (offset + spread * rng.normal(size=(16, 3, 5))).astype(np.float32)
    start = norm.init(jax.random.key(0), jnp.asarray(x), True)
    run = jax.jit(functools.partial(norm.apply, deterministic=False, mutable=["batch_stats"]))
    expected, expected_state = run(start, jnp.asarray(x))
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    replicated = jax.device_put(start, NamedSharding(mesh, PartitionSpec()))
    value, state = run(replicated, rows)
    np.testing.assert_allclose(value, expected, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state, expected_state)
    flat = x.reshape(-1, 5)
    np.testing.assert_allclose(state["batch_stats"]["mean"], 0.1 * flat.mean(0), atol=1e-6)
    np.testing.assert_allclose(
        state["batch_stats"]["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            ResNet(18, 4, "imagenet", FLOAT32),
            "tensor bn1.bias has shape (3,), the configured model wants (4,): "
            "set config.model.image.width",
        ),
        (
            ResNet(18, 3, "small", FLOAT32),
            "tensor conv1.weight has shape (3, 3, 7, 7), the configured model wants (3, 3, 3, 3): "
            "set config.model.image.stem to 'imagenet'",
        ),
        (
            ResNet(34, 3, "imagenet", FLOAT32),
            "lacks tensor layer1.2.bn1.bias and 79 more: set config.model.image.depth",
        ),
    ],
    ids=["width", "stem", "depth"],
)
def test_another_model_is_refused(model, message):
    with pytest.raises(UserError, match=re.escape(message)):
        reader.read(file_of(18), *variable_shapes(model))


def test_a_deeper_file_is_refused(tmp_path):
    tensors = load_file(file_of(18))
    tensors["layer2.2.conv1.weight"] = tensors["layer2.1.conv1.weight"]
    save_file(tensors, tmp_path / "deeper.safetensors")
    with pytest.raises(UserError, match="also has tensor layer2.2.conv1.weight: set .*depth"):
        reader.read(tmp_path / "deeper.safetensors", *variable_shapes(MODELS[18]))


def test_what_is_no_safetensors_is_refused(tmp_path):
    with pytest.raises(UserError, match="none.safetensors: no such file"):
        reader.read(tmp_path / "none.safetensors", *variable_shapes(MODELS[18]))
    with pytest.raises(UserError, match="no model.safetensors"):
        reader.read(tmp_path, *variable_shapes(MODELS[18]))
    (tmp_path / "model.safetensors").write_bytes(b"PK pickled")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        reader.read(tmp_path, *variable_shapes(MODELS[18]))
    save_file({"conv1.weight": np.ones((3, 3, 7, 7), np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="conv1.weight is of type I8"):
        reader.read(tmp_path, *variable_shapes(MODELS[18]))


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 5, 7, 2), (1, 1, 1, 1), (2, 8, 5, 3)])
def test_every_second_cell_is_that_of_a_strided_slice(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    weights = jax.random.normal(jax.random.key(1), x[:, ::2, ::2].shape)
    (value, gradient), (expected, its_gradient) = (
        jax.value_and_grad(lambda x, take=take: jnp.sum(weights * take(x)))(x)
        for take in (lambda x: resnet.every(x, 2), lambda x: x[:, ::2, ::2])
    )
    assert value == expected
    np.testing.assert_array_equal(gradient, its_gradient)
