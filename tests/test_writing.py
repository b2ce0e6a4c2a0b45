"""Captions: how they are written, scored, evaluated, exported and shown."""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlip_jax
from mlip_jax import main as door
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.validation import validate
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.sets.opening import open_evaluation
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.evaluations import read_results, suites
from mlip_jax.evaluations.caption_scores import bleu_4, cider_d, words
from mlip_jax.export import open_clip, own
from mlip_jax.inference import Model
from mlip_jax.models import building
from mlip_jax.models.writing import write_captions
from mlip_jax.objectives.perspectives import mean_of_all
from mlip_jax.reports import write_report

WRITTEN = [
    "a red car on a street",
    "a dog runs over the grass with a ball",
    "two people in a boat on the water",
    "a cat",
]
REFERENCES = [
    ["a red car drives down the street", "a red car on a busy street in town"],
    ["a brown dog runs over the grass", "the dog runs after a ball over the green grass"],
    ["two men sit in a boat", "a boat on the water with two people in it", "people on water"],
    ["a cat sleeps on a sofa", "the cat lies on the couch"],
]


def test_the_scores_are_those_of_cocos_code():
    # pycocoevalcap 1.2, CiderScorer(n=4, sigma=6.0) and BleuScorer(n=4), option "closest".
    assert cider_d(WRITTEN, REFERENCES) == pytest.approx(3.3004465231815643, abs=1e-12)
    assert bleu_4(WRITTEN, REFERENCES) == pytest.approx(0.5744589379517133, abs=1e-8)
    first = [texts[0] for texts in REFERENCES]
    assert cider_d(first, [[text] for text in first]) == pytest.approx(10.0)
    assert bleu_4(first, [[text] for text in first]) == pytest.approx(1.0)
    assert bleu_4(["a cat"], [["the dog"]]) == cider_d(["x"], [["y"]]) == 0.0
    assert words("A dog's ball, 2 cats!") == ["a", "dog's", "ball", "2", "cats"]


def small_config():
    config = schema.default()
    image, text, caption = config.model.image, config.model.text, config.model.caption
    image.update({"image_size": 8, "patch_size": 4, "width": 8, "depth": 1, "heads": 1})
    text.update({"context_length": 6, "width": 8, "depth": 1, "heads": 1, "tokenizer": "clip_8k"})
    caption.update({"width": 8, "depth": 1, "heads": 2})
    config.model.embed_dim = 8
    config.perspectives.caption.weight = 1.0
    config.evaluation.batch_size = 4
    validate(config)
    return config


@functools.cache
def tokenizer():
    return load_tokenizer("clip_8k")


@functools.cache
def model():
    """One that has learned nothing, with weights that make it choose."""
    config = small_config()
    network = building.build_for(config, tokenizer())
    shapes = jax.eval_shape(lambda: building.initialise(network, config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: (0.4 * rng.normal(size=s.shape)).astype(np.float32), shapes)
    return Model(config, variables, tokenizer(), Preprocessing.of(config))


@functools.cache
def pixels():
    return np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), np.uint8)


START, END, VOCABULARY, PLACES = 6, 7, 8, 3


@functools.cache
def of_few_words():
    """A network of 8 tokens and captions of 3, its variables and images, and its logits by hand."""
    config = small_config()
    config.model.text.context_length = PLACES + 1
    network = building.build(config, vocab_size=VOCABULARY, start_id=START, end_id=END)
    shapes = jax.eval_shape(lambda: building.initialise(network, config, jax.random.key(0)))
    rng = np.random.default_rng(15)  # some captions end, and the greedy ones are not all the best
    variables = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    decoder = variables["params"]["predictors_caption"]
    for leaf, factor in (
        (decoder["embedding"], 0.3),
        (decoder["position"], 0.3),
        (decoder["norm_image"]["scale"], 3.0),
        (decoder["block_0"]["image"]["out"]["kernel"], 6.0),  # what the image has to say
    ):
        leaf *= factor
    images = rng.normal(size=(5, 8, 8, 3)).astype(np.float32)

    def plain(module, views, ids):
        """Of all places at once, without what was kept of those before."""
        decoder = module.predictors["caption"]
        tokens, size = decoder._image_tokens(views)
        x = jnp.take(decoder.embedding, ids, axis=0) + decoder.position[: ids.shape[1]]
        mask = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))[None, None]
        for block in decoder.blocks:
            x = block(x, tokens, size, mask, True)
        return jax.nn.log_softmax(decoder._logits(x))

    @jax.jit
    def logs(images, ids):
        """Of the tokens that may stand at each place of captions, ids [captions, places]."""
        views = network.apply(variables, images, method="inspect_images")
        inputs = jnp.concatenate([jnp.full_like(ids[:, :1], START), ids[:, :-1]], axis=1)
        return network.apply(variables, views, inputs, method=plain)

    def written(beams):
        write = jax.jit(lambda images: write_captions(network, variables, images, beams))
        return np.asarray(write(images))

    return images, logs, written


def test_greedily_each_token_is_the_likeliest_after_those_before():
    images, logs, written = of_few_words()
    ids = written(1)
    best = np.asarray(logs(images, jnp.asarray(ids))).argmax(-1)
    before_end = np.cumsum(ids == END, axis=1) - (ids == END) == 0
    np.testing.assert_array_equal(ids[before_end], best[before_end])
    assert (ids[~before_end] == END).all() and not before_end.all()
    assert len({tuple(row) for row in ids}) > 1  # it looks at the images


def test_with_beams_enough_the_best_of_all_captions_is_found():
    images, logs, written = of_few_words()
    found = written(VOCABULARY**2)
    captions = np.stack(np.meshgrid(*[np.arange(VOCABULARY)] * PLACES, indexing="ij"), -1)
    captions = captions.reshape(-1, PLACES).astype(np.int32)
    counted = np.cumsum(captions == END, axis=1) - (captions == END) == 0
    captions = np.where(counted, captions, END)
    for image, best in zip(images, found, strict=True):
        rows = np.repeat(image[None], len(captions), axis=0)
        of_tokens = np.asarray(logs(rows, jnp.asarray(captions)))
        of_tokens = np.take_along_axis(of_tokens, captions[..., None], axis=2)[..., 0]
        means = (of_tokens * counted).sum(axis=1) / counted.sum(axis=1)
        np.testing.assert_array_equal(best, captions[means.argmax()])
    assert (found != written(1)).any()


@pytest.mark.slow
def test_what_is_learned_by_heart_is_written():
    config = small_config()
    texts = ["a red car", "two dogs run", "a cat", "the sea", "birds"]
    network = building.build_for(config, tokenizer())
    images = model().preprocess.normalize(jnp.asarray(pixels()))
    ids = jnp.asarray(tokenizer().encode(texts, config.model.text.context_length))
    optimizer = optax.adam(0.01)

    @jax.jit
    def learned(params):
        def loss(params):
            embeddings, _, _ = network.apply({"params": params}, images, ids)
            return mean_of_all(embeddings["caption"], embeddings["caption_count"])

        def step(_, state):
            params, moments = state
            updates, moments = optimizer.update(jax.grad(loss)(params), moments)
            return optax.apply_updates(params, updates), moments

        params, _ = jax.lax.fori_loop(0, 150, step, (params, optimizer.init(params)))
        return params, loss(params)

    start = jax.jit(lambda: building.initialise(network, config, jax.random.key(0)))()
    params, loss = learned(start["params"])
    assert loss < 0.1
    writer = Model(config, {"params": params}, tokenizer(), model().preprocess)
    assert writer.caption(list(pixels())) == writer.caption(list(pixels()), beams=3) == texts


def test_captions_of_any_number_of_images_are_the_same_and_compiled_once():
    texts = model().caption(list(pixels()))
    assert texts == model().caption_pixels(pixels()) and len(texts) == 5
    compiled = model()._programs.captions._cache_size()
    assert model().caption_pixels(pixels()[:4]) == texts[:4]
    assert model().caption_pixels(np.repeat(pixels(), 3, axis=0))[::3] == texts
    assert model()._programs.captions._cache_size() == compiled
    assert model().caption(pixels()[0:0]) == []


def test_drawn_captions_follow_the_seed_and_the_place():
    drawn = model().caption_pixels(pixels(), temperature=2.0, seed=3)
    assert drawn == model().caption_pixels(pixels(), temperature=2.0, seed=3)
    assert drawn[:4] == model().caption_pixels(pixels()[:4], temperature=2.0, seed=3)
    assert drawn != model().caption_pixels(pixels(), temperature=2.0, seed=4)
    assert model().caption_pixels(pixels(), temperature=1e-6) == model().caption_pixels(pixels())


def without_decoder():
    config = small_config()
    config.perspectives.caption.weight = 0.0
    variables = {"params": dict(model().variables["params"])}
    del variables["params"]["predictors_caption"]
    return Model(config, variables, tokenizer(), Preprocessing.of(config))


def test_what_cannot_be_asked_is_said():
    with pytest.raises(UserError, match="this model has no caption decoder: config.persp"):
        without_decoder().caption(list(pixels()))
    with pytest.raises(UserError, match="beams=3 find likely captions, temperature=1.0 draws"):
        model().caption(list(pixels()), beams=3, temperature=1.0)
    with pytest.raises(UserError, match="beams=0"):
        model().caption(list(pixels()), beams=0)
    config = small_config()
    config.perspectives.caption.weight, config.evaluation.captioning = 0.0, ("emoji",)
    with pytest.raises(UserError, match="captioning: 'emoji': the model has no caption decoder"):
        suites.check(config)


def test_exports_keep_the_decoder_or_say_that_they_leave_it_out(tmp_path):
    (tmp_path / "own").mkdir()
    own.write(tmp_path / "own", model())
    loaded = mlip_jax.load(tmp_path / "own")
    assert loaded.caption_pixels(pixels()) == model().caption_pixels(pixels())
    (tmp_path / "weights").mkdir()
    notes = open_clip.write(tmp_path / "weights", model())
    left_out = "its caption decoder is left out; --format=mlip keeps it"
    assert left_out in notes and not any("predictors" in note for note in notes)


def test_an_evaluation_writes_captions_and_compares(pairs):
    config = small_config()
    config.data.train = f"jsonl:{pairs}"
    config.evaluation.retrieval = config.evaluation.zero_shot = ()
    config.evaluation.captioning = ("validation",)
    results = suites.evaluate(model(), config, progress=False)
    assert set(results.figures) == {
        f"captioning/pairs/{figure}" for figure in ("caption_loss", "cider_d", "bleu_4")
    }
    assert results.examples["captioning/pairs/cider_d"] == 8
    loss, chance = (
        values["captioning/pairs/caption_loss"] for values in (results.figures, results.chance)
    )
    assert 0 < loss < 100 and loss != chance
    assert "Written of the first: " in results.notes["captioning/pairs"]


def test_the_report_shows_some_captions(pairs, tmp_path):
    source = open_evaluation(f"jsonl:{pairs}", cache_dir="", cleaning="none")
    page = write_report(tmp_path, model(), source).read_text("utf-8")
    assert page.count("in the dataset: picture") == 8
    assert f"<b>{model().caption([source[0].image])[0]}</b>" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coca", "siglip2"])
def test_the_quick_configs_train_resume_with_the_same_bits_and_write(
    name, tmp_path, monkeypatch, on_one_device
):
    on_one_device(monkeypatch)
    monkeypatch.chdir(Path(__file__).parents[1])
    command = ["mlip", f"--config=configs/{name}.py", f"--workdir={tmp_path / name}"]
    command += ["--config.samples=512", "--config.checkpoint.every_samples=256"]
    command += ["--config.data.workers=0", "--config.optimizer.name=adamw"]
    assert door.main(command) == 0
    whole = mlip_jax.load(tmp_path / name)
    assert whole.step == 4 and len(whole.caption([np.zeros((1, 32, 32, 3), np.uint8)[0]])) == 1
    assert "captioning/emoji/cider_d" in read_results(tmp_path / name).figures
    shutil.rmtree(tmp_path / name / "checkpoints" / "4")
    assert mlip_jax.load(tmp_path / name).step == 2
    assert door.main(command) == 0
    resumed = mlip_jax.load(tmp_path / name)
    assert resumed.step == 4
    jax.tree.map(np.testing.assert_array_equal, resumed.variables, whole.variables)
