"""CLIP-Lite's training: its terms, its optimizer, and what it keeps between steps."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import BATCH, END, START, VOCABULARY, assert_same
from test_step import batch as one_view

import mlip_jax
from mlip_jax import main as door
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.validation import validate
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.devices import parallel
from mlip_jax.models import building, resnet
from mlip_jax.objectives import contrastive, perspectives
from mlip_jax.storage.saved import restore_fields
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training.state import abstract_state, initial_state
from mlip_jax.training.step import make_train_step

# One block a stage: a ResNet-18 takes three times as long to compile.
STAGES = {18: (1, 1, 1, 1)}
ALL_TERMS = ("spatial_global", "augmented_image", "other_caption")


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "_STAGES", STAGES)
        yield


def small_config(**changes):
    """A tiny CLIP-Lite with every optional term, SGD, Lookahead and a rate a tower."""
    config = schema.default()
    config.update_from_flattened_dict(
        {
            "batch_size": BATCH,
            "samples": 100 * BATCH,
            "model.image.architecture": "resnet",
            "model.image.image_size": 16,
            "model.image.depth": 18,
            "model.image.width": 4,
            "model.image.stem": "small",
            "model.text.architecture": "bert",
            "model.text.pooling": "tanh",
            "model.text.context_length": 8,
            "model.text.width": 16,
            "model.text.depth": 1,
            "model.text.heads": 2,
            "model.text.dropout": 0.1,
            "model.embed_dim": 32,
            "model.head": "projection_block",
            "model.prior_weight": 0.1,
            "optimizer.name": "sgd",
            "optimizer.learning_rate": 0.1,
            "optimizer.rates.text": 0.5,
            "optimizer.rates.heads": 0.25,
            "optimizer.warmup_samples": 1,
            "optimizer.weight_decay": 1e-4,
            "optimizer.clip_norm": 10.0,
            "optimizer.lookahead.period": 3,
        }
    )
    for view in ALL_TERMS:
        config.perspectives[view].weight = 1.0
        config.perspectives[view].loss = "jsd"
    config.update_from_flattened_dict(changes)
    validate(config)
    return config


def build(config):
    return building.build(config, vocab_size=VOCABULARY, start_id=START, end_id=END)


def parts(config, mesh=None):
    model, optimizer = build(config), optimizers.make(config)
    step = make_train_step(model, optimizer, config, Preprocessing.of(config), mesh)
    return model, optimizer, step


@functools.cache
def two_views():
    """The batch of test_step with a second view of each image and another caption."""
    one = one_view()
    return one | {
        "image_2": np.ascontiguousarray(one["image"][:, :, ::-1]),
        "token_ids_2": np.roll(one["token_ids"], 3, axis=0),
    }


@functools.cache
def history():
    """The states of 7 steps on one batch; states[0] is the start."""
    config = small_config()
    model, optimizer, step = parts(config)
    state = jax.jit(lambda: initial_state(model, optimizer, config))()
    states, metrics, step = [jax.device_get(state)], [], jax.jit(step)
    for _ in range(7):
        state, step_metrics = step(state, two_views())
        states.append(jax.device_get(state))
        metrics.append({key: float(value) for key, value in step_metrics.items()})
    return states, metrics


def test_every_term_is_learned_and_weighed():
    _, metrics = history()
    for step_metrics in metrics:
        terms = sum(step_metrics[f"loss/{view}"] for view in ALL_TERMS)
        expected = 0.9 * terms + 0.1 * step_metrics["loss/prior"]
        np.testing.assert_allclose(step_metrics["loss"], expected, rtol=1e-5)
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]


def test_every_parameter_and_statistic_moves():
    before, after = history()[0][0], history()[0][3]
    for part in ("params", "slow", "batch_stats"):
        moved = jax.tree.map(
            lambda a, b: np.abs(a - b).max(), getattr(before, part), getattr(after, part)
        )
        for path, change in jax.tree_util.tree_leaves_with_path(moved):
            name = parallel.path_name(path)
            # All tokens are of type 0, and a key's bias moves no attention.
            assert change > 0 or "token_type" in name, f"{part}/{name}"


def test_lookahead_pulls_back_every_third_step():
    states, _ = history()
    for step in (1, 2):
        assert_same(states[step].slow, states[0].params)
    assert_same(states[3].slow, states[3].params, rtol=1e-5, atol=1e-7)
    assert_same(states[5].slow, states[3].slow)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[5].slow, states[6].slow)
    assert max(jax.tree.leaves(moved)) > 0
    assert_same(states[6].evaluated["params"], states[6].slow)


def test_lookahead_moves_the_slow_weights_by_alpha():
    config = small_config(**{"optimizer.lookahead.alpha": 0.25, "optimizer.lookahead.period": 2})
    plain = small_config(**{"optimizer.lookahead.period": 0})
    start = {"image_encoder": {"kernel": jnp.ones((2, 2))}}
    gradient = jax.tree.map(lambda x: 0.3 * x, start)
    fast, optimizer = start, optimizers.make(plain)
    state = optimizer.init(fast)
    for _ in range(2):
        updates, state = optimizer.update(gradient, state, fast)
        fast = optax.apply_updates(fast, updates)
    pair, optimizer = optax.LookaheadParams(start, start), optimizers.make(config)
    state = optimizer.init(pair)
    for _ in range(2):
        updates, state = optimizer.update(gradient, state, pair)
        pair = optax.apply_updates(pair, updates)
    expected = jax.tree.map(lambda old, new: old + 0.25 * (new - old), start, fast)
    assert_same(pair.slow, expected, rtol=1e-6)
    assert_same(pair.fast, expected, rtol=1e-6)


def test_sgd_moves_each_tower_at_its_rate():
    """One step by hand: momentum starts at the gradient, with the decay of matrices in it."""
    config = small_config(**{"optimizer.lookahead.period": 0})
    params = {
        name: {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.ones(2)}
        for name in ("image_encoder", "text_encoder", "image_heads_spatial_global")
    }
    gradient = jax.tree.map(lambda x: 0.1 * x, params)
    optimizer = optimizers.make(config)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    rate = float(optimizers.learning_rate(config)(jnp.zeros((), jnp.int32)))
    for name, share in zip(params, (1.0, 0.5, 0.25), strict=True):
        kernel, bias = updates[name]["kernel"], updates[name]["bias"]
        np.testing.assert_allclose(kernel, -rate * share * (0.2 + 1e-4 * 2.0), rtol=1e-5)
        np.testing.assert_allclose(bias, -rate * share * 0.1, rtol=1e-5)


def test_statistics_move_once_a_step():
    """The first norm of the image encoder sees both views in one pass, as one batch."""
    states, _ = history()
    config = small_config()
    pixels = [Preprocessing.of(config).normalize(two_views()[key]) for key in ("image", "image_2")]
    model = build(config)

    def stem(variables, images):
        return model.apply(
            variables,
            images,
            method=lambda model, x: model.image_encoder(x, False),
            mutable=["batch_stats"],
            capture_intermediates=lambda module, _: module.name == "stem_convolution",
        )[1]["intermediates"]["image_encoder"]["stem_convolution"]["__call__"][0]

    variables = {"params": states[0].params, "batch_stats": states[0].batch_stats}
    values = np.asarray(stem(variables, jnp.concatenate(pixels)))
    values = values.reshape(-1, values.shape[-1])
    stats = states[1].batch_stats["image_encoder"]["stem_norm"]
    np.testing.assert_allclose(stats["mean"], 0.1 * values.mean(0), rtol=1e-4, atol=1e-6)
    expected = 0.9 + 0.1 * values.var(0, ddof=1)
    np.testing.assert_allclose(stats["var"], expected, rtol=1e-4)


def test_a_sharded_step_is_the_step_of_one_device():
    config = small_config(**{"model.text.dropout": 0.0, "model.prior_weight": 0.0})
    model, optimizer, step = parts(config)
    start = jax.jit(lambda: initial_state(model, optimizer, config))()
    expected = jax.device_get(jax.jit(step)(start, two_views()))
    for axes in ((8, 1, 1), (2, 4, 1)):
        mesh = jax.make_mesh(axes, parallel.AXES, (jax.sharding.AxisType.Auto,) * 3)
        abstract = abstract_state(model, optimizer, config, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        placed = jax.device_put(start, shardings)
        _, _, sharded_step = parts(config, mesh)
        actual = jax.jit(sharded_step, out_shardings=(shardings, parallel.replicated(mesh)))(
            placed, jax.device_put(two_views(), parallel.batch_sharding(mesh))
        )
        assert_same(actual, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_frozen_encoder_keeps_its_parameters_and_statistics(tower):
    config = small_config(
        **{
            f"optimizer.rates.{tower}": 0.0,
            "optimizer.lookahead.period": 0,
            "optimizer.ema": 0.5,
        }
    )
    model, optimizer, step = parts(config)
    state = jax.jit(lambda: initial_state(model, optimizer, config))()
    after, metrics = jax.jit(step)(state, two_views())
    frozen, other = f"{tower}_encoder", {"image": "text", "text": "image"}[tower] + "_encoder"
    assert_same(after.params[frozen], state.params[frozen])
    assert_same(after.ema[frozen], state.params[frozen])
    kept = jax.tree_util.tree_leaves_with_path(after.optimizer)
    names = [jax.tree_util.keystr(path) for path, _ in kept]
    assert any(other in name for name in names) and not any(frozen in name for name in names)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), after.params, state.params)
    assert max(jax.tree.leaves(moved[other])) > 0
    if tower == "image":
        assert_same(after.batch_stats[frozen], state.batch_stats[frozen])
    assert np.isfinite(float(metrics["loss"]))


def test_the_concat_critic_is_trained_on_the_pairs_of_the_bound():
    config = small_config(**{"model.critic": "concat", "model.prior_weight": 0.0})
    for view in ALL_TERMS[1:]:
        config.perspectives[view].weight = 0.0
    spatial = config.perspectives.spatial_global
    spatial.shifts, spatial.odds, spatial.learn_bias, spatial.init_bias = 2, 3.0, True, -1.5
    model, optimizer, step = parts(config)
    state = jax.jit(lambda: initial_state(model, optimizer, config))()
    assert not any(name.startswith(("log_scale", "image_heads")) for name in state.params)
    unbiased = state.params | {"bias_spatial_global": jnp.float32(0)}
    variables = {"params": unbiased, "batch_stats": state.batch_stats}

    @jax.jit
    def by_hand(variables, batch):
        pixels = Preprocessing.of(config).normalize(batch["image"])
        (embeddings, _, _), _ = model.apply(
            variables,
            pixels,
            batch["token_ids"],
            deterministic=False,
            rngs={"dropout": jax.random.fold_in(jax.random.key(config.seed + 1), 0)},
            mutable=["batch_stats"],
        )
        image, text = embeddings["spatial_global"], embeddings["text_global"]
        texts = jnp.stack([jnp.roll(text, -shift, axis=0) for shift in range(3)])
        scores = model.apply(variables, "spatial_global", image, texts, method="score_pairs")
        return contrastive.jsd_of_scores(scores - 1.5, 3.0)

    expected = by_hand(variables, one_view())
    after, metrics = jax.jit(step)(state, one_view())
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.params, state.params)
    assert all(change > 0 for change in jax.tree.leaves(moved["pair_critics_spatial_global"]))
    assert moved["bias_spatial_global"] > 0


def test_pairs_within_a_modality_have_critics_of_their_own():
    params = history()[0][0].params
    heads = {name for name in params if "heads" in name}
    assert heads == {
        "image_heads_spatial_global",
        "image_heads_augmented_image",
        "image_heads_augmented_image_2",
        "text_heads_text_global",
        "text_heads_other_caption",
        "text_heads_other_caption_2",
    }
    assert {name for name in params if name.startswith("log_scale")} == {
        f"log_scale_{view}" for view in ALL_TERMS
    }
    assert [term.view for term in perspectives.terms(small_config())] == list(ALL_TERMS)


REFUSED = [
    ({"model.image.merging.rate": 0.3}, r"merging.rate=0.3 does not go with a ResNet"),
    ({"model.image.frequency.depth": 1}, r"frequency.depth=1 does not go with a ResNet"),
    ({"model.image.depth": 20}, r"depth=20: a ResNet has 18, 34, 50, 101, 152 layers"),
    ({"model.image.stem": "conv"}, r"stem='conv' is not one of imagenet, small"),
    ({"perspectives.frequency_global.weight": 1.0}, "needs a Frequency Stage"),
    ({"model.embed_dim": 24}, r"embed_dim=24 must be at least the image encoder's width, 32"),
    ({"batch_size": 1}, r"batch_size=1 must be at least 2"),
    ({"perspectives.spatial_global.shifts": BATCH}, f"must be from 1 to {BATCH - 1}"),
    ({"perspectives.spatial_global.loss": "softmax", "model.critic": "concat"}, "all pairs"),
    ({"evaluation.retrieval": ("coco",), "model.critic": "concat"}, "no joint space to rank in"),
    ({"optimizer.ema": 0.9}, "both say what is evaluated"),
    ({"model.text.cleaning": "clip"}, "did you mean 'clip_lite'"),
    ({"model.text.tokenizer": "wordpeace"}, "did you mean 'wordpiece'"),
    ({"model.text.drop_path": 0.1}, "does not go with 'bert'"),
    ({f"optimizer.rates.{tower}": 0.0 for tower in ("image", "text", "heads")}, "nothing to train"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        small_config(**changes)


@pytest.fixture(scope="module")
def config_file(pairs, tmp_path_factory):
    """A config file: 8 steps of the tiny CLIP-Lite on `pairs` with a vocabulary of its own."""
    config = small_config()
    config.update_from_flattened_dict(
        {
            "name": "lite",
            "batch_size": 8,
            "samples": 64,
            "log_every": 2,
            "data.train": f"jsonl:{pairs}",
            "data.workers": 0,
            "model.text.tokenizer": "wordpiece",
            "model.text.vocab_size": 64,
            "model.text.cleaning": "clip_lite",
            "checkpoint.every_samples": 16,
            "evaluation.every_samples": 32,
            "evaluation.batch_size": 8,
        }
    )
    folder = tmp_path_factory.mktemp("lite")
    (folder / "lite.json").write_text(schema.to_json(config))
    (folder / "lite.py").write_text(
        "from pathlib import Path\nfrom mlip_jax.core.schema import from_json\n\n"
        f"def get_config(arg=None):\n"
        f"    return from_json(Path({str(folder / 'lite.json')!r}).read_text())\n"
    )
    return folder / "lite.py"


@pytest.fixture
def run(config_file, on_one_device, monkeypatch):
    def act(workdir, *flags):
        on_one_device(monkeypatch)
        return door.main(["mlip", f"--config={config_file}", f"--workdir={workdir}", *flags])

    return act


@pytest.fixture(scope="module")
def finished(config_file, on_one_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "lite"
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        assert door.main(["mlip", f"--config={config_file}", f"--workdir={workdir}"]) == 0
    return workdir


def test_it_goes_on_to_the_same_bits(run, finished, tmp_path):
    """The slow weights, the statistics and the vocabulary are the run's, not the process's."""
    copy = shutil.copytree(finished, tmp_path / "run")
    for step in (copy / "checkpoints").iterdir():
        if step.name.isdigit() and int(step.name) > 4:
            shutil.rmtree(step)
    assert run(copy) == 0
    fields = ("params", "batch_stats", "optimizer", "slow")
    one, other = (restore_fields(folder, fields)[0] for folder in (copy, finished))
    assert all(one[field] for field in fields)
    assert_same(one, other)
    assert (copy / "tokenizer.json").read_text() == (finished / "tokenizer.json").read_text()


def test_it_is_loaded_with_its_statistics_and_its_cleaning(finished):
    model = mlip_jax.load(finished)
    fields, _ = restore_fields(finished, ("slow", "batch_stats"))
    assert_same(model.with_variables({}).config.to_dict()["batch_size"], 8)
    image = np.full((20, 20, 3), 90, np.uint8)
    embedded = model.encode_image([image])
    assert embedded.shape == (1, 32) and np.isclose(np.linalg.norm(embedded), 1, rtol=1e-5)
    other = model.with_variables(
        {
            "params": fields["slow"],
            "batch_stats": jax.tree.map(lambda x: x + 1, fields["batch_stats"]),
        }
    )
    assert not np.allclose(embedded, other.encode_image([image]))
    token_ids = model.tokenize(["Picture-3!", "picture 3"])
    np.testing.assert_array_equal(token_ids[0], token_ids[1])


def test_pairs_are_scored_where_there_is_no_joint_space(run, tmp_path, capsys):
    flags = ["--config.model.critic=concat", "--config.samples=16"]
    flags += [f"--config.perspectives.{view}.weight=0" for view in ALL_TERMS[1:]]
    assert run(tmp_path / "run", *flags) == 0
    assert "accuracy" in capsys.readouterr().err
    model = mlip_jax.load(tmp_path / "run")
    image = np.full((20, 20, 3), 90, np.uint8)
    scores = model.score_pairs([image, image, image], ["picture 1", "picture 2", "picture 1"])
    assert scores[0] == scores[2] != scores[1]
    with pytest.raises(UserError, match="use score_pairs"):
        model.encode_image([image])
