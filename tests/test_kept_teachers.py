"""What a teacher says of a prepared dataset, kept: what it would say in the run, or refused."""

import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_teachers import teacher  # noqa: F401  (a fixture)

import mlip_jax
from mlip_jax import main as door
from mlip_jax.cli import command_line
from mlip_jax.core.errors import UserError
from mlip_jax.data.batches.teaching import TeacherInputs
from mlip_jax.data.batches.training import train_batches
from mlip_jax.data.sets import kept
from mlip_jax.data.sets.opening import open_training
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.interop import artefact
from mlip_jax.objectives.distillation import Embedded, features, relation
from mlip_jax.training import keeping
from mlip_jax.training.teachers import open_teachers, view_settings

WIDTH, VIEWS = 24, 3
RUN = (
    "--config.batch_size=8",
    "--config.data.workers=0",
    "--config.data.augment.flip=True",
    "--config.data.augment.color=0.5",
    "--config.data.caption.tags=0",
    "--config.distillation.relation.spatial_global=1",
)


@pytest.fixture(scope="module")
def dataset(pairs, tiny, teacher, tmp_path_factory):  # noqa: F811
    """A prepared dataset of two shards for training, with what the teacher says of it."""
    folder = tmp_path_factory.mktemp("kept") / "pairs"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["caption"] = f"picture {number} on the left"
    listed = pairs.parent / "sided.jsonl"
    listed.write_text("\n".join(map(json.dumps, rows)) + "\n")
    source, out = f"--source=jsonl:{listed}", f"--out={folder}"
    sizes = ("--shard-records=20", "--workers=1")
    assert door.main(["mlip", "prepare", source, out, *sizes]) == 0
    assert keep(tiny, folder, teacher) == 0
    return folder


def keep(tiny, folder, model):
    flags = (f"--views={VIEWS}", f"--config={tiny}", "--config.teacher=kept", *RUN)
    return door.main(["mlip", "prepare", f"--out={folder}", f"--teacher={model}", *flags])


def config_of(tiny, folder, name="kept", **changes):
    flags = (f"--config.data.train=prepared:{folder}", f"--config.teacher={name}")
    config = command_line.parse([f"--config={tiny}", *RUN, *flags]).config
    config.update_from_flattened_dict(changes)
    return config


def batches(config, count, inputs):
    source = open_training(config.data, config.model.text.cleaning)
    stream = train_batches(config, source, load_tokenizer("clip"), start_step=0, teachers=inputs)
    copies = [dict(each) for each in itertools.islice(stream, count)]
    stream.close()
    return copies


def test_it_is_what_the_teacher_says_of_the_same_view_and_caption(dataset, tiny, teacher):  # noqa: F811
    config = config_of(tiny, dataset)
    said = kept.open_kept(dataset, view_settings(config))
    assert (said.views, said.width, said.image_size) == (VIEWS, WIDTH, 24)
    model = mlip_jax.load(teacher)
    assert said.scale == pytest.approx(model.logit_scale)
    inputs = TeacherInputs({"image_at_24": 24}, {"token_ids_x": (model.tokenizer, 10)}, {"k": said})
    views, texts = set(), set()
    for batch in batches(config, 9, inputs):
        image = model.encode_image_pixels(batch["image_at_24"])
        text = model.encode_token_ids(batch["token_ids_x"])
        assert batch["k_image"].dtype == batch["k_text"].dtype == np.float16
        np.testing.assert_allclose(batch["k_image"], image, atol=2e-3)
        np.testing.assert_allclose(batch["k_text"], text, atol=2e-3)
        # So are the losses, up to float16.
        student = Embedded(jnp.asarray(image[::-1]), jnp.asarray(text), 20.0)
        live, stored = (
            Embedded(*(jnp.asarray(rows, jnp.float32) for rows in both), said.scale)
            for both in ((image, text), (batch["k_image"], batch["k_text"]))
        )
        for loss in (features, relation):
            np.testing.assert_allclose(loss(student, stored), loss(student, live), rtol=0.01)
        for row, record in enumerate(batch["record"].tolist()):
            views.add((record, batch["k_image"][row].tobytes()))
            texts.add((record, batch["k_text"][row].tobytes()))
    by_record = [sum(record == other for other, _ in views) for record in range(32)]
    assert max(by_record) > 1 and max(by_record) <= VIEWS
    # Left and right change places with the image.
    assert any(sum(record == other for other, _ in texts) == 2 for record in range(32))


def test_a_run_learns_from_it_without_the_model(dataset, tiny):
    config = config_of(tiny, dataset)
    teachers = open_teachers(config, None, None)
    (said,) = teachers.all
    assert said.width == WIDTH and said.identity.startswith("kept ")
    assert f"{VIEWS} views of each image at 24 pixels" in said.line(config)
    rows = batches(config, 1, teachers.inputs)[0]
    assert rows.keys() == {"image", "token_ids", "record", "skipped", "kept_0_image", "kept_0_text"}
    embedded = said.embed({}, rows)
    np.testing.assert_array_equal(embedded["image"], np.float32(rows["kept_0_image"]))


def test_going_on_looks_only_at_what_has_changed(dataset, tiny, teacher, tmp_path, monkeypatch):  # noqa: F811
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    first = sorted(copy.glob("*.images.npy"))[0]
    before = {path.name: path.read_bytes() for path in copy.glob("*.npy")}
    first.write_bytes(first.read_bytes()[:-2])
    with pytest.raises(UserError, match="kept embeddings of the shard train-00000 are damaged"):
        open_teachers(config_of(tiny, copy), None, None)
    spans = []
    look = keeping._Looker.look

    def noted(self, span, pool):
        spans.append(span)
        return look(self, span, pool)

    monkeypatch.setattr(keeping._Looker, "look", noted)
    assert keep(tiny, copy, teacher) == 0
    assert spans == [range(20)]
    assert {path.name: path.read_bytes() for path in copy.glob("*.npy")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.augment.flip": False}, "augment.flip=False, and the embeddings .* True"),
        ({"model.text.cleaning": "siglip"}, "cleaning='siglip', and the embeddings .* 'none'"),
        ({"data.caption.tags": 0.3}, "caption.tags=0.3 changes captions"),
        ({"data.train": "emoji"}, "config.data.train='emoji' is none"),
        ({"data.train": "prepared:gs://bucket/set"}, "dataset on this machine"),
    ],
)
def test_other_views_captions_or_sets_are_refused(dataset, tiny, changes, message):
    config = config_of(tiny, dataset, **changes)
    with pytest.raises(UserError, match=message):
        open_teachers(config, None, None)


def test_another_model_and_other_shards_are_refused(dataset, tiny, teacher, tmp_path, capfd):  # noqa: F811
    other = tmp_path / "other"
    other.mkdir()
    config, variables, *rest = artefact.read(teacher)
    changed = jax.tree.map(lambda leaf: leaf + 0.01, dict(variables))
    artefact.write(other, artefact.Artefact(config, changed, *rest))
    config = config_of(tiny, dataset, f"kept:{other}")
    with pytest.raises(UserError, match="keeps no embeddings of the model"):
        open_teachers(config, None, None)
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    index = json.loads((copy / "index.json").read_text())
    entry = next(shard for shard in index["shards"] if shard["split"] == "train")
    entry["sums"][0] = "0" * 64
    (copy / "index.json").write_text(json.dumps(index))
    config = config_of(tiny, copy)
    with pytest.raises(UserError, match="the shard train-00000 of .* is another than the one"):
        open_teachers(config, None, None)
    (file,) = copy.glob("teacher-*.json")
    file.write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        open_teachers(config, None, None)
    file.unlink()
    with pytest.raises(UserError, match="keeps none; mlip prepare --teacher=FOLDER makes them"):
        open_teachers(config, None, None)
    for arguments, message in [
        (["--views=2"], "prepare takes --views with --teacher alone"),
        ([f"--teacher={other}"], "needs the config of the runs that will learn from it"),
        (
            [f"--teacher={other}", f"--config={tiny}", "--resize=8"],
            "finished dataset: no --resize",
        ),
        ([f"--teacher={tmp_path}", f"--config={tiny}"], "--teacher: .* holds no config.json"),
    ]:
        assert door.main(["mlip", "prepare", f"--out={copy}", *arguments]) == 2
        error = capfd.readouterr().err
        assert re.search(message, error) and "Traceback" not in error


@pytest.mark.slow  # a whole run
def test_a_run_trains_on_what_is_kept(dataset, tiny, on_one_device, tmp_path, monkeypatch, capfd):
    on_one_device(monkeypatch)
    train = (f"--config.data.train=prepared:{dataset}", "--config.teacher=kept")
    lessons = "--config.distillation.features.spatial_global=10"
    command = [f"--config={tiny}", f"--workdir={tmp_path}", *RUN, *train, lessons]
    assert door.main(["mlip", *command]) == 0
    assert "teacher kept: embeddings of 24" in " ".join(capfd.readouterr().err.split())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for way in ("features", "relation"):
        assert all(line[f"loss/spatial_global/{way}"] > 0 for line in lines if "loss" in line)
