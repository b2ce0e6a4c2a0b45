"""Token merging: ToMe's published outputs, and what holds for every merge."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_jax.core.errors import UserError
from mlip_jax.models import merging

DATA = Path(__file__).parent / "data"
BATCH, PATCHES, WIDTH = 3, 14, 8


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_without_guidance_it_is_tome(case):
    with np.load(DATA / "tome_merge.npz") as file:
        prefix = f"{case}_"
        published = {k.removeprefix(prefix): file[k] for k in file.files if k.startswith(prefix)}
    plan = merging.match(
        jnp.asarray(published["metric"]),
        int(published["r"]),
        class_token=bool(published["class_token"]),
    )
    tokens, size = merging.merge(
        plan, jnp.asarray(published["tokens"]), jnp.asarray(published["size"])
    )
    np.testing.assert_allclose(tokens, published["merged"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(size, published["merged_size"])
    np.testing.assert_array_equal(merging.source(plan), published["source"])


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "metric": normal(BATCH, 1 + PATCHES, WIDTH),
        "features": normal(BATCH, PATCHES, WIDTH),
        "guidance": merging.rank01(normal(BATCH, PATCHES)),
        "tokens": normal(BATCH, 1 + PATCHES, WIDTH),
        "size": jnp.asarray(rng.integers(1, 6, (BATCH, 1 + PATCHES)), jnp.float32),
    }


@functools.partial(jax.jit, static_argnames=("r", "penalty", "mix"))
def guided_slots(metric, guidance, features, r, penalty=0.1, mix=0.5):
    plan = merging.match(
        metric,
        r,
        guidance=guidance,
        features=features,
        similarity_mix=mix,
        importance_penalty=penalty,
    )
    assert plan.count == metric.shape[1] - r
    return plan.slot


def guided(arrays, r, **options):
    slot = guided_slots(arrays["metric"], arrays["guidance"], arrays["features"], r, **options)
    return merging.Plan(slot, 1 + PATCHES - r)


@pytest.mark.parametrize("r", [1, 4, 7])
def test_guided_choice_equals_the_definition(arrays, r):
    plan = guided(arrays, r)
    for index in range(BATCH):
        guidance = np.asarray(arrays["guidance"][index])

        def cosines(x):
            x = np.asarray(x, np.float64)
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
            return x @ x.T

        similarity = 0.5 * cosines(arrays["metric"][index, 1:]) + 0.5 * cosines(
            arrays["features"][index]
        )
        order = np.argsort(guidance)
        sources, destinations = order[: PATCHES // 2], order[PATCHES // 2 :]
        best = {s: max(destinations, key=lambda d, s=s: similarity[s, d]) for s in sources}
        strength = {s: similarity[s, best[s]] - 0.1 * guidance[s] for s in sources}
        merged = sorted(sources, key=lambda s: -strength[s])[:r]
        # The order is kept: the class token, then the patches that stay.
        kept_patches = [n for n in range(PATCHES) if n not in merged]
        expected = [0] + [
            1 + kept_patches.index(best[n] if n in merged else n) for n in range(PATCHES)
        ]
        np.testing.assert_array_equal(plan.slot[index], expected)


def test_beta_and_gamma_count(arrays):
    slots = [guided(arrays, 4, **options).slot for options in ({"mix": 1.0}, {"penalty": 5.0}, {})]
    assert not np.array_equal(slots[0], slots[2])
    assert not np.array_equal(slots[1], slots[2])
    # With a large gamma the least important go first.
    least = np.argsort(arrays["guidance"], axis=1)[:, :4]
    for row, patches in zip(np.asarray(slots[1]), least, strict=True):
        assert all(np.sum(row == row[1 + patch]) > 1 for patch in patches)


def test_a_request_for_more_than_half_merges_half(arrays):
    plan = merging.match(arrays["metric"], 12, guidance=arrays["guidance"])
    assert plan.count == 1 + PATCHES - PATCHES // 2
    assert int(plan.slot.max()) == plan.count - 1


@pytest.mark.parametrize("guidance", [False, True])
def test_nothing_to_merge_changes_nothing(arrays, guidance):
    plan = merging.match(arrays["metric"], 0, guidance=arrays["guidance"] if guidance else None)
    tokens, size = merging.merge(plan, arrays["tokens"], arrays["size"])
    np.testing.assert_array_equal(tokens, arrays["tokens"])
    np.testing.assert_array_equal(size, arrays["size"])


def merge_often(arrays, guidance, tokens):
    """Three merges in a row: tokens, sizes and sources after each, with sizes 1 at the start."""

    @jax.jit
    def run(metric, features, importance, tokens):
        size = jnp.ones(tokens.shape[:2], jnp.float32)
        steps, origin = [], None
        for r in (5, 3, 2):
            options = {}
            if guidance:
                options = {"guidance": importance, "features": features}
            plan = merging.match(metric, r, **options)
            origin = merging.source(plan, origin)
            metric, _ = merging.merge(plan, metric, size)
            if guidance:
                patches = merging.Plan(plan.slot[:, 1:] - 1, plan.count - 1)
                features, _ = merging.merge(patches, features, size[:, 1:])
                importance = merging.rank01(features[:, :, 0])
            tokens, size = merging.merge(plan, tokens, size)
            steps.append((tokens, size, origin))
        return steps

    return jax.device_get(run(arrays["metric"], arrays["features"], arrays["guidance"], tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("guidance", [False, True])
def test_what_every_merge_keeps(arrays, guidance, dtype):
    tokens = arrays["tokens"].astype(dtype)
    mean = np.mean(np.asarray(tokens, np.float32), axis=1)
    room = 1e-5 if dtype == "float32" else 2e-2
    left = 1 + PATCHES
    steps = merge_often(arrays, guidance, tokens)
    for r, (merged, size, origin) in zip((5, 3, 2), steps, strict=True):
        left -= r
        assert merged.shape == (BATCH, left, WIDTH) and merged.dtype == dtype
        assert size.shape == (BATCH, left) and size.dtype == jnp.float32
        # The class token stays as it was, first and alone.
        np.testing.assert_array_equal(merged[:, 0], tokens[:, 0])
        np.testing.assert_array_equal(size[:, 0], 1.0)
        # Sizes: a partition of the patches.
        np.testing.assert_array_equal(size.sum(axis=1), 1.0 + PATCHES)
        assert set(np.unique(origin)) == {0.0, 1.0}
        np.testing.assert_array_equal(origin.sum(axis=1), 1.0)
        np.testing.assert_array_equal(origin.sum(axis=2), size)
        # The size-weighted mean of all tokens, and of each token's patches.
        merged = np.asarray(merged, np.float32)
        weighted_mean = np.einsum("bs,bsd->bd", size, merged) / (1 + PATCHES)
        np.testing.assert_allclose(weighted_mean, mean, atol=room)
        patches = np.einsum("bsn,bnd->bsd", origin, np.asarray(tokens, np.float32))
        np.testing.assert_allclose(merged, patches / np.asarray(size)[..., None], atol=2 * room)


def test_sizes_weigh_and_keep_their_shape(arrays):
    plan = guided(arrays, 5)
    tokens, size = merging.merge(plan, arrays["tokens"], arrays["size"][..., None])
    assert size.shape == (BATCH, 1 + PATCHES - 5, 1)
    for index in range(BATCH):
        for slot in range(plan.count):
            members = np.flatnonzero(plan.slot[index] == slot)
            weights = np.asarray(arrays["size"][index])[members]
            expected = weights @ np.asarray(arrays["tokens"][index])[members] / weights.sum()
            np.testing.assert_allclose(tokens[index, slot], expected, rtol=1e-4, atol=1e-6)
            assert size[index, slot, 0] == weights.sum()


@pytest.mark.parametrize("guidance", [False, True])
def test_gradient_flows_through_the_mean_and_not_through_the_choice(arrays, guidance):
    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
    def gradients(metric, importance, features, tokens):
        options = {}
        if guidance:
            options = {"guidance": importance, "features": features}
        plan = merging.match(metric, 5, **options)
        merged, _ = merging.merge(plan, tokens, arrays["size"])
        return jnp.sum(jnp.sin(merged))

    names = ("metric", "guidance", "features", "tokens")
    *choice, tokens = gradients(*(arrays[name] for name in names))
    for gradient in choice:
        np.testing.assert_array_equal(gradient, 0.0)
    assert (np.abs(tokens).max(axis=2) > 0).all()  # every token is part of some mean


def test_importance_mixes_ranks():
    spatial = jnp.asarray([[0.1, 0.7, 0.2, 0.0]])
    frequency = jnp.asarray([[9.0, 1.0, 3.0, 2.0]])
    np.testing.assert_allclose(merging.rank01(spatial), [[1 / 3, 1, 2 / 3, 0]])
    np.testing.assert_allclose(
        merging.importance(spatial, frequency, 0.25),
        [[0.25 + 0.75 / 3, 0.75, 0.25 * 2 / 3 + 0.75 * 2 / 3, 0.25 / 3]],
        rtol=1e-6,
    )
    np.testing.assert_array_equal(merging.importance(spatial, None, 0.25), merging.rank01(spatial))
    np.testing.assert_array_equal(
        merging.importance(None, frequency, 0.25), merging.rank01(frequency)
    )
    with pytest.raises(ValueError, match="both guidances are None"):
        merging.importance(None, None, 0.5)


def test_equal_scores_rank_by_place():
    np.testing.assert_allclose(merging.rank01(jnp.zeros((1, 3))), [[0, 0.5, 1]])


def test_a_count_by_a_product_is_the_count():
    rng = np.random.default_rng(0)
    for others in (1, 3, 196, 1024, 3136):
        flags = jnp.asarray(rng.random((3, 5, others)) < 0.9)
        counts = jax.jit(merging.count_by_product)(flags)
        assert counts.dtype == merging.count(flags).dtype == jnp.int32
        np.testing.assert_array_equal(counts, merging.count(flags))


SPREADS = ["even", "early", "4,2,1,1", "0,0,1,1"]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("tokens", [16, 25, 49, 196])
def test_a_schedule_merges_what_the_rate_says_or_names_the_largest(spread, tokens):
    for percent in range(0, 96, 5):
        try:
            counts = merging.schedule(percent / 100, tokens, 4, spread)
        except UserError as error:
            largest = float(re.search(r"largest rate here is ([\d.]+)$", str(error))[1])
            assert largest < percent / 100
            assert sum(merging.schedule(largest, tokens, 4, spread)) > 0
            with pytest.raises(UserError, match="cannot be reached"):
                merging.schedule(largest + 1.1 / tokens, tokens, 4, spread)
            continue
        assert all(type(r) is int for r in counts)
        assert sum(counts) == round(percent / 100 * tokens)
        left = tokens
        for r in counts:
            assert 0 <= r <= left // 2
            left -= r


def test_schedules_spread_as_they_say():
    assert merging.schedule(0.5, 64, 4, "even") == (8, 8, 8, 8)
    assert merging.schedule(0.5, 60, 4, "early") == (12, 9, 6, 3)
    assert merging.schedule(0.5, 64, 4, "4,2,1,1") == (16, 8, 4, 4)
    assert merging.schedule(0.5, 64, 4, "0,0,1,1") == (0, 0, 16, 16)
    assert merging.schedule(0.0, 64, 4, "even") == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("rate", "spread", "message"),
    [
        (0.5, "evne", "did you mean 'even'"),
        (0.5, "1,2,x,4", "neither even, early nor a comma list"),
        (0.5, "1,2,3", "one weight for each of the 4 blocks"),
        (0.5, "1,2,3,-1", "none negative"),
        (0.5, "0,0,0,0", "one above 0"),
        (0.96, "even", r"rate=0.96 must lie in \[0, 0.95\]"),
        (-0.1, "even", r"must lie in \[0, 0.95\]"),
        (float("nan"), "even", r"must lie in \[0, 0.95\]"),
        (0.9, "0,0,0,1", "largest rate here is 0.5"),
    ],
)
def test_a_bad_schedule_is_refused(rate, spread, message):
    with pytest.raises(UserError, match=message):
        merging.schedule(rate, 64, 4, spread)
