"""The experiments in configs/: each parses, validates and describes a model at every size."""

import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mlip_jax.cli import command_line
from mlip_jax.core.errors import UserError
from mlip_jax.core.registry import LOSSES, PREDICTIONS
from mlip_jax.core.schema import PERSPECTIVES
from mlip_jax.core.validation import validate
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.models import building
from mlip_jax.recipes import sizes

ROOT = Path(__file__).parents[1]
BASELINES = "baselines.py"  # of runs, each of one size
FILES = sorted(path.name for path in (ROOT / "configs").glob("*.py") if path.name != BASELINES)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def parse(file, *overrides):
    return command_line.parse([f"--config=configs/{file}", *overrides]).config


def shapes(config):
    """The parameters of the config's model, without computing any."""
    tokenizer = load_tokenizer(config.model.text.tokenizer, captions=lambda: ["a few words"])
    network = building.build(
        config, vocab_size=tokenizer.vocab_size, start_id=tokenizer.sot, end_id=tokenizer.eot
    )
    size = config.model.image.image_size
    return jax.eval_shape(
        network.init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32),
        jax.ShapeDtypeStruct((2, config.model.text.context_length), jnp.int32),
    )["params"]


def test_the_systems_are_there():
    known = {"clip", "clip_lite", "clipa", "coca", "filip", "mlip", "siglip", "siglip2"}
    assert {f"{name}.py" for name in known} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_the_default_is_quick_and_ready(file):
    config = parse(file)
    assert config.name == file.removesuffix(".py")
    assert config.data.train == "emoji"
    assert config.to_dict() == parse(f"{file}:size=quick,data=emoji").to_dict()
    params = shapes(config)
    for view in PERSPECTIVES:
        assert (f"log_scale_{view}" in params) == (config.perspectives[view].weight > 0)
    for name in PREDICTIONS:
        assert (f"predictors_{name}" in params) == (config.perspectives[name].weight > 0)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 20e6


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("size", sizes.SIZES)
def test_every_size_is_valid_and_merges_as_asked(file, size):
    if file == "mlip.py" and size.startswith("RN"):
        with pytest.raises(UserError, match="does not go with a ResNet: it has no tokens to merge"):
            parse(f"{file}:size={size}")
        return
    config = parse(f"{file}:size={size},data=jsonl:pairs.jsonl")
    assert config.data.train == "jsonl:pairs.jsonl"
    image = config.model.image
    patches = building.grid(config) ** 2
    assert sum(building.merge_counts(config)) == round(image.merging.rate * patches)
    if size.startswith("RN"):
        assert (image.architecture, f"RN{image.depth}") == ("resnet", size)
        assert patches == 7 * 7
    elif size not in sizes.SMALL:
        assert image.patch_size == int(size.split("/")[1])


# Tracing a model of 24 blocks takes seconds; what differs between the sizes is numbers.
@pytest.mark.parametrize("file", FILES)
def test_a_large_size_is_a_model(file):
    config = parse(f"{file}:size=S/32")
    kernel = shapes(config)["image_encoder"]["patch_embedding"]
    assert config.model.image.width in jax.tree.leaves(kernel)[0].shape


@pytest.mark.parametrize("file", FILES)
def test_the_docstring_gives_the_command(file):
    text = runpy.run_path(f"configs/{file}")["__doc__"]
    commands = re.findall(r"^    (python -m mlip_jax\.main .*)$", text, re.MULTILINE)
    assert f"python -m mlip_jax.main --config=configs/{file}" in commands
    for command in commands:
        assert command_line.parse(command.split()[3:]).config.name


@pytest.mark.parametrize("objective", LOSSES)
def test_mlip_takes_every_objective(objective):
    config = parse(f"mlip.py:objective={objective}")
    assert config.perspectives.spatial_global.loss == objective
    assert config.perspectives.frequency_global.loss == objective
    assert config.model.image.frequency.depth > 0 and config.model.image.merging.rate > 0
    params = shapes(config)
    assert ("bias_spatial_global" in params) == (objective == "sigmoid")


def test_baselines_are_as_their_table_says():
    module = runpy.run_path(f"configs/{BASELINES}")
    table = re.findall(r"^\| (\w+_\w+) \| (.*) \|$", module["__doc__"], re.MULTILINE)
    assert [name for name, _ in table] == list(module["RUNS"])
    for name, cells in table:
        model, pairs, batch, epochs, numbers, *_ = cells.split(" | ")
        config = parse(f"{BASELINES}:run={name},data=jsonl:pairs.jsonl")
        validate(config)
        assert config.name == name
        described = building.image_encoder(config).describe(config)
        wanted = {"ResNet-50": "ResNet-50", "ViT-B/16": "patches of 16", "ViT-B/32": "of 32"}
        assert wanted[model] in described
        assert parse(f"{BASELINES}:run={name}").data.train == pairs.lower()
        assert config.batch_size == int(batch.replace(",", ""))
        assert config.epochs == int(epochs)
        rate, decay = map(float, numbers.split(", "))
        settings = config.optimizer
        assert (settings.learning_rate, settings.weight_decay) == (rate, decay)
        kernel = shapes(config)["text_encoder"]["block_0"]["attention"]["qkv"]["kernel"]
        assert kernel.shape == (512, 3 * 512)
    with pytest.raises(UserError, match="did you mean 'cc3m_rn50'"):
        parse(f"{BASELINES}:run=cc3m_rn51")
    commands = re.findall(r"^    python -m mlip_jax\.main (.*)$", module["__doc__"], re.MULTILINE)
    assert command_line.parse(commands[0].split()).config.name == "cc3m_vit_b16"
    (lit,) = commands[1:]  # test_image_towers.py has a folder for it
    assert lit == f"--config=configs/{BASELINES}:run={module['LIT']},image=VIT,text=BERT"


def test_clip_lite_takes_negatives_and_has_the_papers_recipe():
    assert parse("clip_lite.py").perspectives.spatial_global.shifts == 4
    assert parse("clip_lite.py:size=RN50,data=coco").perspectives.spatial_global.shifts == 1
    assert parse("clip_lite.py:negatives=31").perspectives.spatial_global.shifts == 31
    assert parse("clip_kd.py:teacher=a+b").teacher == ("a", "b")
    assert parse("clip_lite.py:odds=0").perspectives.spatial_global.odds == 0
    recipe = parse("clip_lite.py:size=RN50,data=coco")
    assert (recipe.batch_size, recipe.samples // recipe.batch_size) == (1024, 250_000)
    assert recipe.optimizer.name == "sgd" and recipe.optimizer.lookahead.period == 5
    rates = recipe.optimizer.rates
    assert [
        recipe.optimizer.learning_rate * rates[tower] for tower in ("image", "text", "heads")
    ] == [
        0.2,
        1e-3,
        1e-3,
    ]


MISTAKES = [
    ("clip_lite.py:negatives=many", "negatives='many': expected a whole number"),
    ("clip_lite.py:odds=all", "odds=.all.: expected a number"),
    ("clip_lite.py:negatives=32", "shifts=32 must be from 1 to 31"),
    ("clip_lite.py:text=nowhere", "nowhere: no such folder"),
    ("clip.py:size=B/15", "unknown size 'B/15'.* did you mean 'B/1?32|B/16'"),
    ("clip.py:sise=B/16", "did you mean 'size'"),
    ("clip.py:size", "expected name=value"),
    ("mlip.py:objective=softmx", "did you mean 'softmax'"),
    ("clip.py:objective=jsd", "expected name=value with a name of size, data"),
    ("clop.py", "did you mean 'configs/clip.py'"),
]


@pytest.mark.parametrize(("argument", "message"), MISTAKES)
def test_a_mistake_names_the_nearest(argument, message):
    with pytest.raises(UserError, match=message):
        parse(argument)


def test_a_rate_that_cannot_be_reached_names_the_largest():
    config = parse("mlip.py", "--config.model.image.merging.rate=0.95")
    config.model.image.frequency.depth = config.model.image.depth - 1
    with pytest.raises(UserError, match="largest rate here is") as caught:
        building.merge_counts(config)
    config.model.image.merging.rate = float(str(caught.value).rsplit(" ", 1)[1])
    assert sum(building.merge_counts(config)) > 0
