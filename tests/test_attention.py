"""Attention in all its forms against the plain formula, and which of them a run takes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from mlip_jax import main as door
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.schema import ATTENTIONS
from mlip_jax.core.validation import validate
from mlip_jax.devices import parallel
from mlip_jax.models import building
from mlip_jax.models.layers import Attention, Dense
from mlip_jax.planning import estimates, machines
from mlip_jax.training import attention_choice, start

BATCH, TOKENS, HEADS, WIDTH = 3, 9, 4, 32


@pytest.fixture
def inputs():
    """Tokens, their sizes, and lengths as of texts with padding."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, TOKENS, WIDTH)), jnp.float32)
    size = jnp.asarray(rng.integers(1, 5, (BATCH, TOKENS)), jnp.float32)
    return x, size, jnp.array([3, 6, 9])


def plain(params, x, causal, lengths, size, heads=HEADS):
    """Attention by the book, its gradient JAX's own: output, mean keys, what each token gets."""
    place = jnp.arange(TOKENS)
    mask = None
    if causal or lengths is not None:
        mask = (place[:, None] >= place) | (not causal)
        mask = mask & (place < (TOKENS if lengths is None else lengths[:, None, None, None]))

    def dense(name, x, features):
        return Dense(features, x.dtype).apply({"params": params[name]}, x)

    qkv = dense("qkv", x, 3 * x.shape[-1])
    q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=heads)
    logits = jnp.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
    if size is not None:
        logits = logits + jnp.log(size)[:, None, None, :]
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    out = rearrange(jnp.einsum("bhqk,bhkd->bhqd", weights, v), "b h t d -> b t (h d)")
    received = jnp.mean(weights[:, :, 0], axis=1), jnp.mean(weights, axis=(1, 2))
    return dense("out", out, x.shape[-1]), jnp.mean(k, axis=1), *received


def gradient(function, params, x):
    """Value, the three outputs, and gradients to parameters and tokens, in float32."""

    def loss(params, x):
        outputs = [part.astype(jnp.float32) for part in function(params, x)]
        return sum(jnp.sum(jnp.sin(part)) for part in outputs), outputs

    results = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return jax.tree.map(lambda leaf: np.asarray(leaf.astype(jnp.float32)), results)


def ours(dtype, x, causal, lengths, size, form="plain"):
    """Attention as a function of its parameters and tokens, and parameters."""
    layer = Attention(HEADS, 0.0, jnp.dtype(dtype), form, causal)
    params = layer.init(jax.random.key(0), x, True)["params"]
    return lambda params, x: layer.apply({"params": params}, x, True, lengths, size), params


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_in_float32_it_is_the_plain_formula_bit_for_bit(inputs, causal, padded, sized):
    x, size, lengths = inputs
    lengths, size = lengths if padded else None, size if sized else None
    function, params = ours("float32", x, causal, lengths, size)
    actual = gradient(function, params, x)
    expected = gradient(lambda params, x: plain(params, x, causal, lengths, size), params, x)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_in_bfloat16_it_is_near_float32(inputs):
    x, size, lengths = inputs
    function, params = ours("bfloat16", x, True, lengths, size)
    actual = gradient(function, params, x.astype(jnp.bfloat16))
    expected = gradient(lambda params, x: plain(params, x, True, lengths, size), params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=0.1), actual, expected
    )


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_gpus_multiply_bfloat16_forth_and_back(inputs, platform):
    x, size, lengths = inputs
    function, params = ours("bfloat16", x, True, lengths, size)

    def loss(params, x):
        return jnp.sum(jnp.sin(function(params, x)[0].astype(jnp.float32)))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(params, x.astype(jnp.bfloat16))
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) == 12  # qkv, scores, values, out, and two for each in the gradient
    for line in products:
        operands, _ = line.rsplit(":", 1)[1].split("->")
        assert operands.count("bf16") == 2, line


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """cuDNN's place is taken by XLA's form, which then gets what cuDNN would, and its limits."""
    real = jax.nn.dot_product_attention

    def act(q, k, v, bias, *, implementation, **options):
        if implementation == "cudnn":
            assert q.shape[1] % 2 == 0
            assert bias is None or bias.shape == (len(q), 1, q.shape[1], q.shape[1])
            assert bias is None or bias.dtype == q.dtype
        assert options.keys() == {"is_causal", "key_value_seq_lengths"}  # and no mask
        return real(q, k, v, bias, **options, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", act)


@pytest.mark.usefixtures("cudnn_by_xla")
@pytest.mark.parametrize("form", ["xla", "cudnn"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_the_forms_are_equal_up_to_rounding(inputs, form, causal, padded, sized):
    x, size, lengths = inputs
    lengths, size = lengths if padded else None, size if sized else None
    function, params = ours("float32", x, causal, lengths, size, form)
    actual = gradient(function, params, x)
    expected = gradient(lambda params, x: plain(params, x, causal, lengths, size), params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected
    )


@pytest.fixture
def config():
    config = schema.default()
    image, text = config.model.image, config.model.text
    image.width, image.depth, image.heads, image.image_size, image.patch_size = 32, 4, 4, 24, 4
    image.frequency.depth = 1
    image.merging.rate = 0.5
    image.merging.proportional_attention = True
    text.width, text.depth, text.heads, text.context_length = 32, 2, 4, 9
    config.batch_size, config.samples = 8, 16
    validate(config)
    return config


def test_a_model_with_merging_is_the_same_in_another_form(config):
    network = building.build(config, vocab_size=32, start_id=30, end_id=31)
    other = building.with_attention(network, {"image": "xla", "text": "xla"})
    variables, same = (
        jax.jit(functools.partial(building.initialise, module, config))(jax.random.key(0))
        for module in (network, other)
    )
    jax.tree.map(np.testing.assert_array_equal, variables, same)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(4, 24, 24, 3)), jnp.float32)
    texts = jnp.asarray(rng.integers(0, 32, (4, 9)), jnp.int32)

    def loss(network, variables):
        embeddings, _, _ = network.apply(variables, images, texts)
        return sum(jnp.sum(jnp.sin(e)) for e in embeddings.values() if e.dtype == jnp.float32)

    one, two = (
        jax.jit(jax.value_and_grad(functools.partial(loss, module)))(variables)
        for module in (network, other)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, two)
    one, two = (
        jax.jit(functools.partial(module.apply, method="inspect_images"))(variables, images)
        for module in (network, other)
    )
    np.testing.assert_array_equal(one.source, two.source)
    np.testing.assert_array_equal(one.importance, two.importance)


def mesh_of(config):
    return parallel.make_mesh(config.mesh, config.batch_size, jax.devices()[:1])


def test_the_probe_takes_the_largest_attention_of_each_tower(config):
    mesh = mesh_of(config)
    assert attention_choice.shapes(config, mesh) == {
        "image": attention_choice.Shape(8, 37, 4, 8, sized=True, first=True),
        "text": attention_choice.Shape(8, 9, 4, 8, causal=True, padded=True),
    }
    config.perspectives.other_caption.weight = 1.0
    config.model.image.patch_dropout = 0.5
    config.accumulation = 2
    shapes = attention_choice.shapes(config, mesh)
    assert (shapes["image"].rows, shapes["image"].tokens, shapes["text"].rows) == (4, 19, 8)
    config.model.image.architecture, config.model.text.architecture = "resnet", "bert"
    assert attention_choice.shapes(config, mesh) == {}
    assert attention_choice.choose(config, mesh) == attention_choice.Choice({}, [])


def test_auto_is_plain_without_a_probe_where_there_is_no_gpu(config, monkeypatch, tmp_path):
    monkeypatch.setattr(attention_choice, "_Contest", None)
    chosen = attention_choice.choose(config, mesh_of(config), tmp_path)
    assert chosen.forms == {"image": "plain", "text": "plain"}
    assert chosen.lines == ["attention: plain"] and not list(tmp_path.iterdir())


def test_the_fastest_that_works_is_taken_and_kept(config, monkeypatch, tmp_path):
    mesh = mesh_of(config)
    monkeypatch.setattr(attention_choice, "_PROBED", ("cpu",))
    monkeypatch.setitem(attention_choice._PLATFORMS, "cudnn", "cpu")
    chosen = attention_choice.choose(config, mesh, tmp_path)
    assert set(chosen.forms.values()) <= {"plain", "xla"}
    assert chosen.lines[0].startswith("attention: image ") and len(chosen.lines) == 3
    for line in chosen.lines[1:]:
        assert "plain" in line and "xla" in line and "not cudnn: cuDNN is not detected" in line
        assert "pallas" not in line  # it is for TPUs
    record = json.loads((tmp_path / attention_choice.RECORD).read_text())
    assert record["forms"] == chosen.forms

    slowest = {"plain": 2.0, "xla": 1.0}
    monkeypatch.setattr(attention_choice._Contest, "seconds", lambda _: slowest)
    for form in ("plain", "xla"):  # what is kept counts
        record["forms"] = dict.fromkeys(chosen.forms, form)
        (tmp_path / attention_choice.RECORD).write_text(json.dumps(record))
        assert attention_choice.choose(config, mesh, tmp_path).forms == record["forms"]
    record["device"] = "another"
    record["forms"] = dict.fromkeys(chosen.forms, "plain")
    (tmp_path / attention_choice.RECORD).write_text(json.dumps(record))
    again = attention_choice.choose(config, mesh, tmp_path)
    assert again.forms == dict.fromkeys(chosen.forms, "xla")
    for content in ("{", '{"forms": []}'):
        (tmp_path / attention_choice.RECORD).write_text(content)
        with pytest.raises(UserError, match="attention.json: .*; mend it or remove it"):
            attention_choice.choose(config, mesh, tmp_path)


def test_a_form_whose_bits_vary_is_left_out(config, monkeypatch):
    monkeypatch.setattr(attention_choice, "_PROBED", ("cpu",))
    program, calls = attention_choice._Contest._program, iter(range(100))

    def vary(contest, form):
        if form != "xla":
            return program(contest, form)
        return lambda: jnp.float32(next(calls))

    monkeypatch.setattr(attention_choice._Contest, "_program", vary)
    chosen = attention_choice.choose(config, mesh_of(config))
    assert chosen.forms == {"image": "plain", "text": "plain"}
    assert "not xla: its bits differ" in chosen.lines[1]


def test_a_kernel_that_computes_something_else_is_left_out(config, monkeypatch):
    monkeypatch.setattr(attention_choice, "_PROBED", ("cpu",))
    monkeypatch.setattr(attention_choice, "_PLATFORMS", {"cudnn": "gpu", "xla": "cpu"})
    monkeypatch.setattr(attention_choice, "ATTENTIONS", ("plain", "xla"))
    chosen = attention_choice.choose(config, mesh_of(config))
    assert "not xla" not in chosen.lines[1]
    program = attention_choice._Contest._program

    def wrong(contest, form):
        call = program(contest, form)
        return lambda: jax.tree.map(lambda x: x * (1.1 if form == "xla" else 1.0), call())

    monkeypatch.setattr(attention_choice._Contest, "_program", wrong)
    chosen = attention_choice.choose(config, mesh_of(config))
    assert chosen.forms == {"image": "plain", "text": "plain"}
    assert "not xla: it differs from the plain form by 0.1 of its norm" in chosen.lines[1]


def test_with_nothing_that_works_it_is_plain(config, monkeypatch):
    monkeypatch.setattr(attention_choice, "_PROBED", ("cpu",))
    monkeypatch.setattr(attention_choice, "attend", None)
    chosen = attention_choice.choose(config, mesh_of(config))
    assert chosen.forms == {"image": "plain", "text": "plain"}


@pytest.mark.parametrize("form", ["plain", "xla"])
def test_a_form_that_is_named_is_taken(config, form):
    config.attention = form
    attention_choice.check(config, mesh_of(config))
    chosen = attention_choice.choose(config, mesh_of(config))
    assert chosen.forms == {"image": form, "text": form}
    assert chosen.lines == [f"attention: {form}"]


def test_what_cannot_be_had_is_one_line(config, monkeypatch):
    config.attention = "pallas"
    with pytest.raises(UserError, match="attention='pallas' is for TPUs, not for CPUs: set"):
        attention_choice.check(config, mesh_of(config))
    config.attention = "cudnn"
    with pytest.raises(UserError, match="attention='cudnn' is for GPUs, not for CPUs: set"):
        attention_choice.check(config, mesh_of(config))
    with pytest.raises(UserError, match="is for GPUs, not for CPUs"):
        estimates.estimate(config, machines.find("cpu:1"))
    monkeypatch.setattr(attention_choice, "named", lambda *_: "cudnn")
    with pytest.raises(UserError, match="image attention of 8 x 4 .*cuDNN is not detected; set"):
        attention_choice.check(config, mesh_of(config))
    config.mesh.tensor, config.mesh.data = 2, 4
    with pytest.raises(UserError, match="config.mesh.tensor=2, which may split a head"):
        attention_choice.check(config, parallel.make_mesh(config.mesh, config.batch_size))
    config.compute_dtype = "float32"
    with pytest.raises(UserError, match="'cudnn' computes in bfloat16 only"):
        validate(config)
    config.attention = "cuddn"
    with pytest.raises(
        UserError, match="not one of auto, plain, xla, cudnn, pallas; did you mean 'cudnn'"
    ):
        validate(config)


def test_a_run_goes_on_with_the_form_it_began_with(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(attention_choice, "_PROBED", ("cpu",))
    trained = []

    def no_step(network, *_):
        trained.append((network.image["attention_form"], network.text["attention_form"]))
        raise UserError("enough")

    monkeypatch.setattr(start, "make_train_step", no_step)

    def train(fastest, *flags):
        seconds = {form: float(form != fastest) for form in ATTENTIONS}
        monkeypatch.setattr(attention_choice._Contest, "seconds", lambda _: seconds)
        assert door.main(["mlip", f"--config={tiny}", f"--workdir={tmp_path}", *flags]) == 2
        assert "error: enough" in capfd.readouterr().err
        return trained[-1]

    assert train("xla") == ("xla", "xla")
    assert train("plain") == ("xla", "xla")
    assert train("xla", "--config.attention=plain") == ("plain", "plain")
    assert train("plain") == ("xla", "xla")
    (tmp_path / attention_choice.RECORD).unlink()
    assert train("plain") == ("plain", "plain")
