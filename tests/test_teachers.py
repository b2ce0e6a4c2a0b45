"""Teachers: their losses are the published ones, sharded, in parts and resumed the same."""

import functools
import itertools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from test_step import BATCH, END, START, VOCABULARY, assert_same, batch, small_config

import mlip_jax
from mlip_jax import main as door
from mlip_jax.benchmark import input_speed, verb
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.validation import validate
from mlip_jax.data.batches.teaching import TeacherInputs
from mlip_jax.data.batches.training import train_batches
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.sets.opening import open_training
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.devices import parallel
from mlip_jax.interop import artefact
from mlip_jax.models import building
from mlip_jax.objectives.distillation import Embedded, Where, features, relation
from mlip_jax.storage.saved import restore_fields, saved_steps
from mlip_jax.training import step_cost
from mlip_jax.training.state import abstract_state, initial_state
from mlip_jax.training.step import lower_step, make_train_step
from mlip_jax.training.teachers import open_teachers

SCALE, TEACHER_SCALE = 20.0, 50.0


def mesh_of(*shape):
    axes = ConfigDict(dict(zip(parallel.AXES, shape, strict=True)))
    return parallel.make_mesh(axes, BATCH, jax.devices()[: math.prod(shape)])


@functools.cache
def embedded():
    rng = np.random.default_rng(0)

    def rows(width):
        x = rng.normal(size=(BATCH, width))
        return np.float32(x / np.linalg.norm(x, axis=1, keepdims=True))

    return [rows(6), rows(6), rows(6), rows(6)]


def clip_kd_features(image, text, teacher_image, teacher_text):
    """F.mse_loss of images and of texts, added, as CLIP-KD's published code has it."""
    return np.mean((image - teacher_image) ** 2) + np.mean((text - teacher_text) ** 2)


def softmax(scores):
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def clip_kd_relation(image, text, teacher_image, teacher_text):
    """F.kl_div(log_softmax, softmax, "batchmean") both ways, in 64 bits, and its gradient."""
    scores = SCALE * np.float64(image) @ text.T
    right = TEACHER_SCALE * np.float64(teacher_image) @ teacher_text.T
    value, of_scores = 0.0, np.zeros_like(scores)
    for turned in (np.asarray, np.transpose):
        student, teacher = softmax(turned(scores)), softmax(turned(right))
        value += np.sum(teacher * (np.log(teacher) - np.log(student))) / len(scores) / 2
        of_scores += turned(student - teacher) / len(scores) / 2
    gradient = SCALE * of_scores @ text, SCALE * of_scores.T @ image, np.sum(of_scores * scores)
    return value, (*gradient[:2], gradient[2] / SCALE)


def test_features_are_clip_kds():
    image, text, teacher_image, teacher_text = embedded()
    loss = features(Embedded(image, text, SCALE), Embedded(teacher_image, teacher_text, 1.0))
    expected = clip_kd_features(*embedded())
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    # As many terms as the width: the mean is the squared distance over the width.
    distances = np.sum((image - teacher_image) ** 2, axis=1)
    assert np.mean(distances) / 6 + np.mean((text - teacher_text) ** 2) == pytest.approx(expected)


@pytest.mark.parametrize("blocks", ["never", "always"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 2, 1)], ids=["one", "ring"])
def test_relation_is_clip_kds_over_the_whole_batch(blocks, shape):
    where = Where(blocks, None if shape == (1, 1, 1) else mesh_of(*shape))
    *own, teacher_image, teacher_text = embedded()
    teacher = Embedded(teacher_image, teacher_text, jnp.float32(TEACHER_SCALE))

    def loss(image, text, scale, teacher):
        return relation(Embedded(image, text, scale), teacher, where)

    of_student = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    value, (*gradient, of_teacher) = of_student(*own, jnp.float32(SCALE), teacher)
    expected, expected_gradient = clip_kd_relation(*embedded())
    assert expected > 1
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for actual, wanted in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)
    if blocks == "always":
        assert not any(np.any(leaf) for leaf in of_teacher)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    image, text, *_ = embedded()
    same = Embedded(jnp.asarray(image), jnp.asarray(text), SCALE)
    assert features(same, same) == 0
    assert relation(same, same) == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An exported model of another size, width and tokenizer than the tests' runs."""
    config = schema.default()
    image, text = config.model.image, config.model.text
    image.image_size, image.patch_size, image.width, image.depth, image.heads = 24, 8, 32, 1, 2
    image.normalization = "siglip"
    text.context_length, text.width, text.depth, text.heads = 10, 32, 1, 2
    text.tokenizer = "clip_8k"
    config.model.embed_dim, config.compute_dtype = 24, "float32"
    tokenizer = load_tokenizer("clip_8k")
    network = building.build_for(config, tokenizer)
    variables = jax.jit(lambda: building.initialise(network, config, jax.random.key(7)))()
    folder = tmp_path_factory.mktemp("teacher")
    parts = config, variables, tokenizer, Preprocessing.of(config), None, {}
    artefact.write(folder, artefact.Artefact(*parts))
    return folder


def taught_config(folder, **changes):
    config = small_config()
    config.teacher = (str(folder), "ema")
    config.distillation.features.spatial_global = 2.0
    config.distillation.relation.update(spatial_global=0.5, frequency_global=0.25)
    config.perspectives.spatial_tokens.weight = 0.0
    config.model.image.merging.rate = config.model.image.dropout = 0.0  # compiles sooner
    config.update_from_flattened_dict(changes)
    validate(config)
    return config


@functools.cache
def step_of(folder, shape=(1, 1, 1), **changes):
    """The state's shapes, its start, a compiled step that subtracts the gradient, its batch."""
    config = taught_config(folder, **changes)
    mesh = mesh_of(*shape)
    network = building.build(config, vocab_size=VOCABULARY, start_id=START, end_id=END)
    teachers = open_teachers(config, network, None)
    network, optimizer = teachers.pupil(network), optax.scale(-1.0)
    abstract = abstract_state(network, optimizer, config, mesh)
    args = network, optimizer, config, Preprocessing.of(config), mesh, teachers
    more = teachers.shapes(BATCH, mesh)
    step = lower_step(make_train_step(*args), abstract, config, mesh, more).compile()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    start = jax.jit(lambda: initial_state(network, optimizer, config), out_shardings=shardings)
    rows = parallel.global_batch(batch() | teachers.random_rows(BATCH, 0), mesh)
    return start, step, rows | teachers.placed(mesh), teachers


@functools.cache
def loss_and_gradient(folder, shape=(1, 1, 1), **changes):
    start, step, rows, _ = step_of(folder, shape, **changes)
    state = start()
    before = jax.device_get(state.params)
    after, metrics = jax.device_get(step(state, rows))
    return metrics, jax.tree.map(np.subtract, before, after.params)


def test_a_step_adds_what_teachers_say(teacher):
    _, _, rows, teachers = step_of(teacher)
    metrics, gradient = loss_and_gradient(teacher)
    assert {key for key in metrics if key.startswith("loss/") and key.count("/") == 2} == {
        "loss/spatial_global/features",
        "loss/spatial_global/relation",
        "loss/frequency_global/relation",
    }
    own = metrics["loss/spatial_global"] + 0.5 * metrics["loss/frequency_global"]
    lessons = (
        2 * metrics["loss/spatial_global/features"]
        + 0.5 * metrics["loss/spatial_global/relation"]
        + 0.25 * metrics["loss/frequency_global/relation"]
    )
    np.testing.assert_allclose(metrics["loss"], own + lessons, rtol=1e-6)
    # The folder's space is 24 wide, the run's own 16.
    assert teachers.projections == {"0_spatial_global": 24, "0_text_global": 24}
    assert np.any(gradient["teacher_heads_0_spatial_global"]["projection"]["kernel"])
    # It is the model that `load` gives, on its own images and texts.
    model = mlip_jax.load(teacher)
    images, token_ids = np.asarray(rows["image_at_24"]), np.asarray(rows["token_ids_of_teacher_1"])
    says = teachers.all[0].embed(model.variables, rows)
    np.testing.assert_allclose(says["image"], model.encode_image_pixels(images), atol=1e-5)
    np.testing.assert_allclose(says["text"], model.encode_token_ids(token_ids), atol=1e-5)
    assert teachers.all[0].scale(model.variables) == pytest.approx(model.logit_scale)


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        pytest.param((4, 2, 1), {}, id="fsdp", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), {"accumulation": 2, "ring": "always"}, id="in parts"),
    ],
)
def test_sharded_and_in_parts_it_is_the_same_step(teacher, shape, changes):
    metrics, gradient = loss_and_gradient(teacher, shape, **changes)
    whole_metrics, whole_gradient = loss_and_gradient(teacher)
    assert_same(metrics, whole_metrics, rtol=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole_gradient))
    assert_same(gradient, whole_gradient, rtol=1e-4, atol=1e-5 * scale)


def test_a_plan_counts_the_teacher(teacher):
    plain = taught_config(teacher)
    plain.teacher = ()
    for way in plain.distillation:
        plain.distillation[way].update(spatial_global=0.0, frequency_global=0.0)
    flops = {}
    for name, config in (("plain", plain), ("taught", taught_config(teacher))):
        network = step_cost.network_of(config)
        teachers = step_cost.teachers_of(config, network)
        variables = jax.eval_shape(
            lambda network=network, config=config: building.initialise(
                network, config, jax.random.key(0)
            )
        )
        flops[name] = step_cost.step_flops(network, variables, config, teachers)
    model = mlip_jax.load(teacher)
    image = jax.make_jaxpr(model.programs()["encode_image"].function)(
        np.zeros((1, 24, 24, 3), np.uint8)
    )
    text = jax.make_jaxpr(model.programs()["encode_text"].function)(np.zeros((1, 10), np.int32))
    once = sum(step_cost.matrix_flops(program.jaxpr) for program in (image, text))
    scores = 2 * 2 * BATCH**2 * (2 * 3 * 16 + 24 + 16)  # of two relations and two teachers
    own = 2 * 3 * 2 * BATCH**2 * 16  # of the perspectives, three products each
    itself = (flops["plain"] - own) / 3  # the run's own model, once
    assert flops["taught"] - flops["plain"] == pytest.approx(BATCH * once + itself + scores)


def test_a_teacher_sees_the_same_view_and_reads_the_same_caption(pairs):
    config = schema.default()
    config.batch_size, config.data.workers, config.data.train = 8, 0, f"jsonl:{pairs}"
    config.model.image.image_size, config.model.text.context_length = 16, 12
    config.data.augment.update(flip=True, color=0.5)
    source, own = open_training(config.data), load_tokenizer("clip")
    other = load_tokenizer("clip_8k")
    inputs = TeacherInputs({"image_at_32": 32}, {"token_ids_of_teacher_1": (other, 9)})

    def first(**options):
        stream = train_batches(config, source, own, start_step=0, **options)
        copies = [dict(each) for each in itertools.islice(stream, 2)]
        stream.close()
        return copies

    for plain, taught in zip(first(), first(teachers=inputs), strict=True):
        assert plain.keys() == taught.keys() - {"image_at_32", "token_ids_of_teacher_1"}
        for key in plain:  # the student's own stream is what it would be alone
            np.testing.assert_array_equal(plain[key], taught[key])
        halved = taught["image_at_32"].reshape(8, 16, 2, 16, 2, 3).mean((2, 4))
        views = np.float64(taught["image"]).reshape(8, -1), halved.reshape(8, -1)
        for one, same in zip(*views, strict=True):
            assert np.corrcoef(one, same)[0, 1] > 0.98
        captions = [own.decode(ids) for ids in taught["token_ids"]]
        np.testing.assert_array_equal(taught["token_ids_of_teacher_1"], other.encode(captions, 9))


BY_BOTH = (
    "--config.distillation.features.spatial_global=1",
    "--config.distillation.relation.frequency_global=1",
    "--config.perspectives.spatial_global.weight=0",
)


@pytest.mark.slow  # the pieces are tested above
def test_a_taught_run_resumes_bit_for_bit_and_knows_its_teacher(
    teacher, tiny, on_one_device, tmp_path, monkeypatch, capfd
):
    on_one_device(monkeypatch)
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)

    def train(workdir, name=folder):
        flags = (f"--workdir={workdir}", f"--config.teacher={name},ema", *BY_BOTH)
        code = door.main(["mlip", f"--config={tiny}", *flags])
        return code, " ".join(capfd.readouterr().err.split())

    code, words = train(tmp_path / "run")
    assert code == 0
    assert f"teacher {folder}: vit of 1 layers" in words and "24 pixels, the run 16" in words
    assert "reads 10 tokens by its own tokenizer" in words
    assert "teacher: the average of the run's own parameters" in words
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in saved_steps(tmp_path / "again"):
        if step > 6:
            shutil.rmtree(tmp_path / "again" / "checkpoints" / str(step))
    # The place may change, the model may not.
    moved = folder.rename(tmp_path / "moved")
    code, words = train(tmp_path / "again", moved)
    assert code == 0 and "going on from step 6" in words
    fields = ("params", "optimizer", "ema")
    ends = [restore_fields(tmp_path / name, fields, 8)[0] for name in ("run", "again")]
    assert_same(*ends)
    model = mlip_jax.load(tmp_path / "run")
    assert not any(name.startswith("teacher") for name in model.variables["params"])
    assert model.encode_text("a text").shape == (1, 16)
    config, variables, *rest = artefact.read(moved)
    changed = jax.tree.map(lambda leaf: leaf + 0.01, dict(variables))
    artefact.write(moved, artefact.Artefact(config, changed, *rest))
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
    code, words = train(tmp_path / "again", moved)
    assert code == 2 and "is another model than the run has learned from so far" in words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": ()}, "features.spatial_global=2 without a teacher: set config.teacher"),
        ({"teacher": ("a", "a")}, "names a model twice"),
        ({"optimizer.ema": 0.0}, "config.teacher='ema' is the average .* set config.optimizer.ema"),
        ({"model.critic": "concat"}, "has no joint space, and a teacher needs one"),
        ({"distillation.features.spatial_global": -1.0}, "must be at least 0"),
        ({"distillation.relation.frequency_global": math.nan}, "must be finite"),
        (
            {"model.image.frequency.depth": 0, "perspectives.frequency_global.weight": 0.0},
            "relation.frequency_global needs a Frequency Stage",
        ),
        (
            {
                "distillation.features.spatial_global": 0.0,
                "distillation.relation.spatial_global": 0.0,
                "distillation.relation.frequency_global": 0.0,
            },
            "config.teacher='folder,ema' teaches nothing: give one of .*features.spatial_global",
        ),
    ],
)
def test_a_config_that_cannot_be_taught_is_refused(changes, message):
    config = taught_config("folder")
    config.model.image.merging.guidance = "spatial"
    config.perspectives.frequency_global.loss = config.perspectives.spatial_global.loss = "jsd"
    config.perspectives.frequency_global.init_bias = 0.0
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_lessons_alone_are_something_to_train_on():
    weights = dict.fromkeys((f"perspectives.{view}.weight" for view in schema.IMAGE_VIEWS), 0.0)
    config = taught_config("folder", **weights)
    network = building.build(config, vocab_size=VOCABULARY, start_id=START, end_id=END)
    assert set(network.critics) == {"spatial_global", "frequency_global"}


def test_a_folder_that_cannot_teach_is_named(teacher, tmp_path):
    def opened(folder):
        config = taught_config(folder)
        network = building.build(config, vocab_size=VOCABULARY, start_id=START, end_id=END)
        return open_teachers(config, network, None)

    with pytest.raises(UserError, match=r"config.teacher: .*nothing is not a folder"):
        opened(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"config.teacher: .* holds no config.json"):
        opened(tmp_path)
    config, variables, *rest = artefact.read(teacher)
    variables["params"]["log_scale_spatial_global"] = np.float32(np.nan)
    artefact.write(tmp_path, artefact.Artefact(config, variables, *rest))
    with pytest.raises(UserError, match=r"config.teacher: .*log_scale_spatial_global holds NaN"):
        opened(tmp_path)


def test_the_input_is_timed_with_what_teachers_see(teacher, monkeypatch, tmp_path):
    class Begun(Exception):
        pass

    def batches(*arguments, teachers, **options):
        raise Begun(dict(teachers.sizes), [length for _, length in teachers.tokenizers.values()])

    monkeypatch.setattr(input_speed, "train_batches", batches)
    monkeypatch.setattr(verb, "open_input", lambda config: (None, None))
    with pytest.raises(Begun) as begun:
        verb.benchmark(taught_config(teacher), tmp_path, only="data")
    assert begun.value.args == ({"image_at_24": 24}, [10])
