"""The maps into the joint space: the published projection block, and critics of pairs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.models.heads import (
    ConcatCritic,
    PriorDiscriminator,
    ProjectionBlock,
    ProjectionHead,
    noisy_identity,
)
from mlip_jax.objectives.prior import prior_matching

DATA = Path(__file__).parent / "data"
FLOAT32 = jnp.dtype("float32")


@pytest.fixture(scope="module")
def published():
    with np.load(DATA / "projection_block.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def variables(published):
    """The published block's parameters and running statistics before its one training step."""

    def norm(name):
        return {"scale": published[f"{name}_weight"], "bias": published[f"{name}_bias"]}

    params = {
        "hidden": {"kernel": published["feature_nonlinear_0_weight"].T},
        "norm_hidden": norm("feature_nonlinear_1"),
        "output": {
            "kernel": published["feature_nonlinear_3_weight"].T,
            "bias": published["feature_nonlinear_3_bias"],
        },
        "shortcut": {
            "kernel": published["feature_shortcut_weight"].T,
            "bias": published["feature_shortcut_bias"],
        },
        "norm": norm("feature_block_ln"),
    }
    stats = {
        "mean": published["feature_nonlinear_1_running_mean"],
        "var": published["feature_nonlinear_1_running_var"],
    }
    return {"params": params, "batch_stats": {"norm_hidden": stats}}


def test_the_projection_block_equals_the_published_one(published, variables):
    block, x = ProjectionBlock(48, FLOAT32), jnp.asarray(published["x"])
    output, updated = jax.jit(lambda x: block.apply(variables, x, False, mutable=["batch_stats"]))(
        x
    )
    np.testing.assert_allclose(output, published["train_output"], rtol=1e-5, atol=1e-5)
    stats = updated["batch_stats"]["norm_hidden"]
    for statistic, name in ((stats["mean"], "mean"), (stats["var"], "var")):
        expected = published[f"feature_nonlinear_1_running_{name}_after"]
        np.testing.assert_allclose(statistic, expected, rtol=1e-5, atol=1e-7, err_msg=name)
    evaluated = block.apply({"params": variables["params"]} | updated, x)
    expected = published["eval_output_after_one_train_step"]
    np.testing.assert_allclose(evaluated, expected, rtol=1e-5, atol=1e-5)


def test_the_shortcut_starts_as_a_noisy_copy():
    kernel = np.asarray(noisy_identity(jax.random.key(0), (6, 9)))
    diagonal = np.eye(6, 9, dtype=bool)
    np.testing.assert_array_equal(kernel[diagonal], 1.0)
    noise = kernel[~diagonal]
    assert np.abs(noise).max() <= 0.01 and noise.std() > 0.004
    params = ProjectionHead(9, FLOAT32).init(jax.random.key(1), jnp.ones((2, 6)))["params"]
    assert (np.diag(params["block"]["shortcut"]["kernel"]) == 1).all()


def test_heads_give_unit_rows_in_bfloat16_too():
    x = jax.random.normal(jax.random.key(0), (4, 6))
    for dtype in (FLOAT32, jnp.dtype("bfloat16")):
        rows = ProjectionHead(8, dtype).init_with_output(jax.random.key(1), x)[0]
        assert rows.dtype == FLOAT32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1.0, rtol=1e-5)


def test_the_concat_critic_scores_pairs_each_for_itself():
    keys = jax.random.split(jax.random.key(0), 3)
    one, other = jax.random.normal(keys[0], (4, 6)), jax.random.normal(keys[1], (4, 5))
    critic = ConcatCritic(FLOAT32)
    scores, variables = critic.init_with_output(keys[2], one, other)
    assert scores.shape == (4,)
    swapped = critic.apply(variables, one, other[::-1])
    assert not np.allclose(scores, swapped)
    np.testing.assert_allclose(
        critic.apply(variables, one[::-1], other[::-1]), scores[::-1], rtol=1e-5
    )


def test_the_prior_term_is_the_discriminators_cross_entropy():
    rng = np.random.default_rng(0)
    prior, features = rng.normal(size=(2, 7)).astype(np.float32)
    likely, unlikely = 1 / (1 + np.exp(-prior)), 1 / (1 + np.exp(features))
    expected = -np.log(likely).mean() - np.log(unlikely).mean()
    loss = prior_matching(jnp.asarray(prior), jnp.asarray(features))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    logits, _ = PriorDiscriminator(FLOAT32).init_with_output(jax.random.key(0), jnp.ones((3, 5)))
    assert logits.shape == (3,)
