"""Meshes and sharding rules; a sharded loss is the loss of one device."""

import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from token_losses import token_loss

from mlip_jax.cli import command_line
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.devices import parallel
from mlip_jax.models import building
from mlip_jax.objectives import perspectives, sharded
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training.state import abstract_state, initial_state

BATCH = 16
CONFIGS = Path(__file__).parents[1] / "configs"


def axes(data=1, fsdp=1, tensor=1):
    return ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 1), (2, 4, 1)),
        ((2, 2, -1), (2, 2, 2)),
        ((4, 2, 1), (4, 2, 1)),
    ],
)
def test_one_axis_takes_what_remains(shape, expected):
    mesh = parallel.make_mesh(axes(*shape), BATCH)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert tuple(mesh.shape.values()) == expected


@pytest.mark.parametrize(
    ("shape", "batch", "message"),
    [
        ((3, 1, 1), 16, r"\(data=3, fsdp=1, tensor=1\) does not fit the 8 devices"),
        ((-1, 3, 1), 16, "does not fit the 8 devices"),
        ((16, 1, 1), 16, "does not fit the 8 devices"),
        ((-1, -1, 1), 16, "at most one -1"),
        ((0, 8, 1), 16, "each axis at least 1"),
        ((-2, 8, 1), 16, "each axis at least 1"),
        ((4, 2, 1), 20, "batch_size=20 is not divided by data.fsdp=8 .*nearest: 16 or 24"),
        ((4, 2, 1), 5, "nearest: 8"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(shape, batch, message):
    with pytest.raises(UserError, match=message):
        parallel.make_mesh(axes(*shape), batch)


def test_the_tensor_axis_does_not_divide_the_batch():
    assert parallel.make_mesh(axes(2, 1, 4), 6).shape["tensor"] == 4


def test_rows_of_a_batch_lie_on_data_and_fsdp():
    mesh = parallel.make_mesh(axes(2, 2, 2), BATCH)
    rows = {"image": np.arange(BATCH * 3).reshape(BATCH, 3)}
    batch = parallel.global_batch(rows, mesh)["image"]
    np.testing.assert_array_equal(batch, rows["image"])
    assert batch.sharding == parallel.batch_sharding(mesh)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(BATCH // 4, 3)}


@pytest.fixture(scope="module")
def small():
    """A model whose every kernel 8 devices divide, and its config."""
    config = schema.default()
    image, text = config.model.image, config.model.text
    image.image_size, image.patch_size, image.width, image.depth, image.heads = 16, 4, 32, 2, 2
    image.frequency.depth = 1
    text.context_length, text.width, text.depth, text.heads = 8, 32, 1, 2
    config.model.embed_dim = config.model.token_dim = 16
    model = building.build(config, vocab_size=64, start_id=62, end_id=63)
    return model, optax.adam(1e-3), config


def test_rules_resolve_to_a_readable_table(small):
    mesh = parallel.make_mesh(axes(2, 2, 2), BATCH)
    params = abstract_state(*small, mesh).params
    table = parallel.sharding_table(params, mesh)
    assert sum(count for *_, count in table) == sum(leaf.size for leaf in jax.tree.leaves(params))
    resolved = {pattern: spec for pattern, spec, _ in table}
    assert resolved["(qkv|up|patch|projection|hidden|shortcut)/kernel$"] == "fsdp, tensor"
    assert resolved["(out|down|output)/kernel$"] == "tensor, fsdp"
    assert resolved["text_encoder/embedding$"] == "fsdp, tensor"
    assert resolved["filter$"] == "None, None, fsdp"
    assert resolved["all others"] == "replicated"
    one = parallel.sharding_table(params, parallel.make_mesh(axes(8), BATCH))
    assert {spec for _, spec, _ in one} == {"replicated"}


def test_an_axis_that_the_mesh_does_not_divide_stays_whole():
    mesh = parallel.make_mesh(axes(1, 4, 2), BATCH)
    for shape, spec in [((12, 6), ("fsdp", "tensor")), ((6, 6), (None, "tensor")), ((6, 5), ())]:
        assert tuple(parallel.sharding_of("block_0/mlp/up/kernel", shape, mesh).spec) == spec


def test_a_convolution_of_one_pixel_is_sharded_as_a_matrix():
    mesh = parallel.make_mesh(axes(1, 4, 2), BATCH)
    for shape, spec in [
        ((3, 3, 12, 6), (None, None, "fsdp", "tensor")),
        ((12, 6), ("fsdp", "tensor")),
    ]:
        assert tuple(parallel.sharding_of("block_0/convolution_1/kernel", shape, mesh).spec) == spec


def test_a_device_of_8_holds_an_eighth_of_the_big_kernels(small):
    model, optimizer, config = small
    mesh = parallel.make_mesh(axes(1, 8), BATCH)
    abstract = abstract_state(model, optimizer, config, mesh)
    state = jax.jit(
        lambda: initial_state(model, optimizer, config),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
    )()
    device_elements = all_elements = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = parallel.path_name(path)
        device = leaf.addressable_shards[0].data.size
        if name.endswith(("kernel", "embedding", "filter")):
            assert device * 8 == leaf.size, name
        device_elements, all_elements = device_elements + device, all_elements + leaf.size
    assert device_elements < all_elements / 5  # the rest is small: biases, norms, positions
    # The optimizer's copies lie where their parameters lie.
    for moment in (state.optimizer[0].mu, state.optimizer[0].nu):
        places = jax.tree.map(lambda leaf: leaf.sharding, moment)
        assert places == jax.tree.map(lambda leaf: leaf.sharding, state.params)


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2)])
@pytest.mark.parametrize("name", ["clip", "mlip"])
def test_a_device_of_8_holds_an_eighth_of_a_base_model(name, shape):
    """Optimizer and EMA included; what is replicated is small beside the kernels."""
    file = f"--config={CONFIGS / name}.py:size=B/16,data=jsonl:pairs.jsonl"
    config = command_line.parse([file, "--config.optimizer.ema=0.99"]).config
    model = building.build(config, vocab_size=49408, start_id=49406, end_id=49407)
    mesh = parallel.make_mesh(axes(*shape), BATCH)
    leaves = jax.tree.leaves(abstract_state(model, optimizers.make(config), config, mesh))
    all_elements = sum(leaf.size for leaf in leaves)
    device_elements = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    assert all_elements > 4 * 130e6
    assert device_elements < 1.03 * all_elements / 8


def test_a_rule_of_the_config_comes_first(small):
    model, optimizer, config = small
    config = config.copy_and_resolve_references()
    config.sharding = ("image_encoder.*up/kernel$=- tensor", "filter$=")
    mesh = parallel.make_mesh(axes(2, 2, 2), BATCH)
    abstract = abstract_state(model, optimizer, config, mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name, spec = parallel.path_name(path), tuple(leaf.sharding.spec)
        if name.endswith("up/kernel"):
            assert spec == ((None, "tensor") if "image_encoder" in name else ("fsdp", "tensor"))
        if name.endswith("filter"):
            assert spec == ()
    rules = parallel.sharding_rules(config.sharding, abstract.params)
    table = parallel.sharding_table(abstract.params, mesh, rules)
    assert ("image_encoder.*up/kernel$", "None, tensor") in {row[:2] for row in table}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("up/kernels$=fsdp", "'up/kernels.=fsdp' matches no parameter; they are such as image_enc"),
        ("kernel", "'kernel' is not PATTERN=AXES"),
        ("=fsdp", "'=fsdp' is not PATTERN=AXES"),
        ("^image_encoder=fsdp", "is not PATTERN=AXES.* searched in the whole path"),
        ("up/kernel$=fspd", "'fspd' is none of data, fsdp, tensor, -; did you mean 'fsdp'"),
        ("up/kernel$=fsdp fsdp", "names an axis of the mesh twice"),
        ("up/kernel$=- - fsdp", "has 3 axes, but image_encoder/.*up/kernel has the shape"),
        ("(up/kernel$=fsdp", "is no regular expression: missing"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(small, rule, message):
    model, optimizer, config = small
    config = config.copy_and_resolve_references()
    config.sharding = (rule,)
    with pytest.raises(UserError, match=message):
        abstract_state(model, optimizer, config, parallel.make_mesh(axes(8), BATCH))


LOSSES = {
    "softmax": ("softmax", 1, 1.0),
    "sigmoid": ("sigmoid", 1, 1.0),
    "jsd": ("jsd", 1, 1.0),
    "jsd5": ("jsd", 5, 3.0),  # on 4 and 8 devices more than a device has rows
}


def value_and_gradients(embeddings, scales, biases, mesh=None):
    """Of every loss, the total over a global and a token-level perspective."""
    results = {}
    for name, (loss, shifts, odds) in LOSSES.items():
        terms = tuple(
            perspectives.Term(view, loss, weight, shifts, 0, odds)
            for view, weight in (("spatial_global", 1.0), ("spatial_tokens", 0.5))
        )

        def total(embeddings, scales, biases, terms=terms):
            fixed = {"sizes": jnp.float32, "text_mask": bool}
            assert all(embeddings[key].dtype == dtype for key, dtype in fixed.items())
            return perspectives.total_loss(
                terms, embeddings, scales, biases, jnp.float32(0), chunk=3, mesh=mesh
            )

        def of_floats(floats, total=total):
            learned, scales, biases = floats
            return total(embeddings | learned, scales, biases)

        learned = {k: v for k, v in embeddings.items() if k not in ("sizes", "text_mask")}
        results[name] = jax.value_and_grad(of_floats, has_aux=True)((learned, scales, biases))
    return results


@functools.cache
def one_device():
    rng = np.random.default_rng(0)

    def unit(*shape):
        x = rng.normal(size=shape)
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    embeddings = {
        "spatial_global": unit(BATCH, 8),
        "text_global": unit(BATCH, 8),
        "spatial_tokens": unit(BATCH, 5, 6),
        "text_tokens": unit(BATCH, 4, 6),
        "sizes": rng.integers(1, 4, (BATCH, 5)).astype(np.float32),
        "text_mask": np.arange(4) < rng.integers(1, 5, (BATCH, 1)),
    }
    views = ("spatial_global", "spatial_tokens")
    scales = dict(zip(views, np.float32([9.0, 6.0]), strict=True))
    biases = dict(zip(views, np.float32([-4.0, -2.0]), strict=True))
    arguments = embeddings, scales, biases
    return arguments, jax.device_get(jax.jit(value_and_gradients)(*arguments))


@pytest.mark.parametrize(("data", "fsdp"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 4), (4, 2)])
def test_a_sharded_loss_is_the_loss_of_one_device(data, fsdp):
    (embeddings, scales, biases), expected = one_device()
    mesh = jax.make_mesh(
        (data, fsdp, 1),
        parallel.AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[: data * fsdp],
    )
    rows, everywhere = parallel.batch_sharding(mesh), parallel.replicated(mesh)
    place = functools.partial(jax.tree.map, lambda x: jax.device_put(x, everywhere))
    actual = jax.jit(functools.partial(value_and_gradients, mesh=mesh))(
        jax.device_put(embeddings, rows), place(scales), place(biases)
    )
    learned = actual["softmax"][1][0]
    assert learned["spatial_tokens"].sharding.is_equivalent_to(rows, 3)
    actual = jax.device_get(actual)
    for name in LOSSES:
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(
                a, b, rtol=1e-4, atol=1e-6, err_msg=name
            ),
            actual[name],
            expected[name],
        )


def batch_mesh(devices):
    return jax.make_mesh(
        (devices, 1, 1),
        parallel.AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[:devices],
    )


@pytest.mark.parametrize("level", ["global", "tokens"])
@pytest.mark.parametrize("shifts", [1, 2])
def test_jsd_asks_the_neighbour_once_and_gathers_nothing(level, shifts):
    """A shift needs a few rows of one other device, there and, for the gradient, back."""
    mesh = batch_mesh(8)
    rows, everywhere = parallel.batch_sharding(mesh), parallel.replicated(mesh)
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    if level == "global":
        loss = functools.partial(sharded.jsd, shifts=shifts, mesh=mesh)
        arguments = [shape((BATCH, 8), jnp.float32), shape((BATCH, 8), jnp.float32), scale]
    else:
        loss = functools.partial(token_loss, "jsd", shifts=shifts, mesh=mesh)
        arguments = [
            shape((BATCH, 5, 6), jnp.float32),
            shape((BATCH, 4, 6), jnp.float32),
            shape((BATCH, 5), jnp.float32),
            shape((BATCH, 4), bool),
            scale,
        ]
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    text = program.as_text()
    assert len(re.findall(r" collective-permute(?:-start)?\(", text)) == 2  # there and back
    for gathering in ("all-gather", "all-to-all"):
        assert gathering not in text


def test_shifted_rows_are_rolled_rows():
    rows = jnp.arange(BATCH * 3.0).reshape(BATCH, 3)
    mesh = batch_mesh(8)
    shifted = jax.jit(lambda rows: sharded.shifted(rows, 5, mesh))(
        jax.device_put(rows, parallel.batch_sharding(mesh))
    )
    expected = jnp.stack([jnp.roll(rows, -shift, axis=0) for shift in range(6)])
    np.testing.assert_array_equal(shifted, expected)
    np.testing.assert_array_equal(sharded.shifted(rows, 5, None), expected)
