"""Patches that training leaves out: which, how many, and what is computed of the others."""

import functools
import io
import itertools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from test_models import (
    BATCH,
    PATCHES,
    WIDTH,
    build,
    encode,
    images,
    parameters,
    small_config,
    token_ids,
)

from mlip_jax.core.errors import UserError
from mlip_jax.core.schema import IMAGE_VIEWS
from mlip_jax.devices import parallel
from mlip_jax.models import building, vit
from mlip_jax.models.dropout import NUMBER, ROWS, random_patches
from mlip_jax.training import summary
from mlip_jax.training.step_cost import step_flops

KEPT = PATCHES // 2


class Choice(nn.Module):
    """Draws for some rows."""

    rows: int
    patches: int
    kept: int

    @nn.compact
    def __call__(self):
        return random_patches(self, self.rows, self.patches, self.kept)


def choose(rows, patches, kept, numbers=None):
    variables = {} if numbers is None else {ROWS: {NUMBER: jnp.asarray(numbers)}}
    choice = Choice(rows, patches, kept)
    return np.asarray(choice.apply(variables, rngs={"dropout": jax.random.key(0)}))


def test_every_choice_of_patches_is_as_likely():
    rows, patches, kept = 9000, 6, 3
    chosen = choose(rows, patches, kept)
    choices = list(itertools.combinations(range(patches), kept))  # in order, none twice
    counts = dict.fromkeys(choices, 0)
    for row in chosen:
        counts[tuple(row)] += 1
    mean = rows / len(choices)
    deviations = np.array(list(counts.values())) - mean
    # Pearson's statistic of 20 choices; 43.8 is exceeded once in a thousand draws.
    assert np.sum(deviations**2) / mean < 43.8


def test_the_choice_is_a_matter_of_the_row_alone():
    all_rows = choose(8, 50, 20)
    np.testing.assert_array_equal(choose(3, 50, 20, [6, 1, 4]), all_rows[[6, 1, 4]])
    assert len(np.unique(all_rows, axis=0)) == 8
    # Two views of a row lie beside one another, and each has a choice of its own.
    np.testing.assert_array_equal(choose(4, 50, 20, [1, 3]), all_rows[[2, 3, 6, 7]])


@functools.cache
def in_training(seed=0, **changes):
    """The image encoder's views and the embeddings of a training step's forward pass."""
    model = build(small_config(**{f"model.image.{key}": value for key, value in changes.items()}))

    def both(model, *inputs):
        return model.image_encoder(inputs[0], False), model(*inputs, deterministic=False)[0]

    @jax.jit
    def run(params, key):
        variables = {"params": params}
        return model.apply(variables, images(), token_ids(), method=both, rngs={"dropout": key})

    return jax.device_get(run(parameters(), jax.random.key(seed)))


def test_training_keeps_as_many_of_every_image_and_merges_their_share():
    views, embeddings = in_training(patch_dropout=0.5)
    left = KEPT // 2  # at the rate 0.5
    assert views.spatial_tokens.shape == (BATCH, left, WIDTH)
    np.testing.assert_array_equal(views.sizes.sum(axis=1), KEPT)
    assert views.frequency_tokens.shape == (BATCH, PATCHES, WIDTH)
    assert embeddings["spatial_tokens"].shape[:2] == embeddings["sizes"].shape == (BATCH, left)
    assert embeddings["frequency_tokens"].shape[:2] == (BATCH, PATCHES)
    # The Frequency Stage sees all patches. What follows it has another choice with each key.
    np.testing.assert_allclose(views.frequency_tokens, encode().frequency_tokens, rtol=1e-5)
    other, _ = in_training(patch_dropout=0.5, seed=1)
    assert np.abs(other.spatial_global - views.spatial_global).max() > 1e-4


def test_evaluation_sees_all_patches():
    jax.tree.map(np.testing.assert_array_equal, encode(patch_dropout=0.75), encode())


@pytest.mark.parametrize("frequency_depth", [1, 0])
def test_the_blocks_see_the_patches_that_are_kept(frequency_depth):
    """The Spatial Stage by hand, on patches and frequency features that were taken out."""
    chosen = np.array([[0, 2, 3, 5, 8, 9, 13, 15], [1, 4, 6, 7, 10, 11, 12, 14]])
    changes = {"patch_dropout": 0.5, "frequency.depth": frequency_depth, "depth": 3}
    if not frequency_depth:
        changes["merging.guidance"] = "spatial"
    changes = {f"model.image.{key}": value for key, value in changes.items()}
    used = ("spatial_global", "spatial_tokens")
    weights = {f"perspectives.{view}.weight": float(view in used) for view in IMAGE_VIEWS}
    config = small_config(**changes, **weights)
    model, counts = build(config), building.merge_counts(config, training=True)
    before = f"frequency_{frequency_depth - 1}" if frequency_depth else "patch_embedding"

    def capture(module, _):
        return module.name == before

    @jax.jit
    def by_hand(params):
        evaluated, state = model.apply(
            {"params": params}, images(), method="inspect_images", capture_intermediates=capture
        )
        params = params["image_encoder"]
        (x,) = state["intermediates"]["image_encoder"][before]["__call__"]
        x = x if frequency_depth else x + params["position"]
        x, features = (
            None if tokens is None else jnp.take_along_axis(tokens, chosen[:, :, None], axis=1)
            for tokens in (x.reshape(BATCH, PATCHES, WIDTH), evaluated.frequency_tokens)
        )
        class_token = jnp.broadcast_to(params["class_token"], (BATCH, 1, WIDTH))
        x, size = jnp.concatenate([class_token, x], axis=1), jnp.ones((BATCH, 1 + KEPT))
        fields = {
            name: model.image[name]
            for name in vit.SpatialBlock.__annotations__
            if name in model.image
        }
        for index, r in enumerate(counts):
            block = vit.SpatialBlock(**fields, r=r, dtype=model.dtype)
            variables = {"params": params[f"spatial_{index}"]}
            x, size, features, *_ = block.apply(variables, x, size, features, True)
        norm = nn.LayerNorm(epsilon=1e-5)
        return norm.apply({"params": params["norm_spatial"]}, x), size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit, "random_patches", lambda *_: jnp.asarray(chosen))
        views = jax.jit(
            lambda params: model.apply(
                {"params": params},
                images(),
                method=lambda model, images: model.image_encoder(images, False),
            )
        )(parameters())
    x, size = by_hand(parameters())
    assert sum(counts) == KEPT // 2
    np.testing.assert_allclose(views.spatial_global, x[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(views.spatial_tokens, x[:, 1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(views.sizes, size[:, 1:])


def test_what_a_run_prints_is_what_training_keeps():
    def printed(**changes):
        changes = {f"model.image.{name}": value for name, value in changes.items()}
        config = small_config(**changes)
        network = build(config)
        variables = jax.eval_shape(lambda: building.initialise(network, config, jax.random.key(0)))
        console = Console(file=io.StringIO(), width=200)
        step = types.SimpleNamespace(memory_analysis=lambda: None)
        mesh = jax.make_mesh((1, 1, 1), parallel.AXES, devices=jax.devices()[:1])
        summary.print_compiled(console, network, variables, step, config, mesh)
        flops = summary.forward_flops(network, variables, config)
        text = console.file.getvalue()
        return text, flops["image encoder"], step_flops(network, variables, config)

    text, image, step = printed()
    assert "tokens an image: 16 patches, 8 after merging; compute" in text
    text, less, less_step = printed(patch_dropout=0.5, dropout=0.1)
    assert "16 patches, 8 after merging; in training 8, 4 after merging; compute" in text
    # One of four blocks, the Frequency Stage, sees all.
    assert 0.4 * image < less < 0.75 * image and less_step < 0.8 * step


@pytest.mark.parametrize(
    ("share", "kept"), [(0.0, 16), (0.02, 16), (0.5, 8), (0.7, 5), (0.75, 4), (0.99, 1)]
)
def test_how_many_patches_a_share_keeps(share, kept):
    assert building.training_patches(small_config(**{"model.image.patch_dropout": share})) == kept


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UserError, match=rf"patch_dropout={share} must be (in \[0, 1\)|finite)"):
        small_config(**{"model.image.patch_dropout": share})


def test_a_resnet_has_no_patches():
    resnet = {
        "model.image.architecture": "resnet",
        "model.image.depth": 18,
        "model.image.stem": "small",
        "model.image.frequency.depth": 0,
        "model.image.merging.rate": 0.0,
        "model.image.patch_dropout": 0.5,
    }
    with pytest.raises(UserError, match="patch_dropout=0.5 does not go with a ResNet: it has no"):
        small_config(**resnet)


def test_a_merging_rate_out_of_reach_of_what_is_kept_is_refused_in_training_alone():
    late = {"model.image.merging.schedule": "0,0,1"}  # all in the last block
    config = small_config(**late, **{"model.image.patch_dropout": 0.55})
    message = r"largest rate here is 0.428 \(of the 7 patches that config.model.image.patch_dropout"
    with pytest.raises(UserError, match=message):
        build(config)
    building.build(config, vocab_size=32, start_id=30, end_id=31, training=False)
