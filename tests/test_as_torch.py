"""Programs of the field on a model of ours: CLIP_benchmark, DataComp's evaluation."""

import importlib.util
import io
import json
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import mlip_jax
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.records import Record
from mlip_jax.evaluations import as_torch, clip_benchmark, datacomp, evaluate

# CLIP_benchmark, webdataset and open_clip are not ours to keep free of warnings.
OF_OTHERS = pytest.mark.filterwarnings("ignore")
WITH_OTHERS = pytest.mark.skipif(
    importlib.util.find_spec("clip_benchmark") is None, reason="needs the extra clip-benchmark"
)

CLASSES = ("red picture", "green picture", "blue picture", "dark picture", "bright picture")


class Source:
    """25 pictures, five a class, each with two captions of its own."""

    name, split, parts, class_names = "set", "validation", ("validation",), CLASSES
    attribution, notes = "", ()

    def __init__(self):
        rng = np.random.default_rng(3)
        self.records = []
        for index in range(25):
            # Neither square nor of the model's size.
            coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
            out = io.BytesIO()
            coarse.resize((31, 23)).save(out, "PNG")
            captions = (f"picture {index}", f"{CLASSES[index % 5]} {index}")
            self.records.append(Record(out.getvalue(), captions, (), index % 5, str(index)))

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def name_of(self, index):
        return str(index)


def write_tars(folder, source, kind):
    """The layout of CLIP_benchmark's datasets of the name wds/..."""
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text(kind)
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for index, record in enumerate(source.records):
            text = "\n".join(record.captions) if kind == "retrieval" else str(record.label)
            suffix = "txt" if kind == "retrieval" else "cls"
            for name, data in (("png", record.image), (suffix, text.encode())):
                entry = tarfile.TarInfo(f"{index:03}.{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


@pytest.fixture(scope="module")
def ours(trained):
    """The figures of our own evaluations."""
    config = schema.default()
    config.evaluation.batch_size = 8
    config.evaluation.templates = "a photo of a {}."
    return evaluate(mlip_jax.load(trained), config, validation=Source()).figures


def run_clip_benchmark(monkeypatch, trained, tmp_path, kind, task, *flags):
    """What its command writes."""
    write_tars(tmp_path / "set", Source(), kind)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    output = tmp_path / "{dataset}_{model}_{task}.json"
    named = ["--pretrained", trained, "--dataset", "wds/pictures", "--dataset_root"]
    rest = [tmp_path / "set", "--task", task, "--output", output, "--num_workers", "0", *flags]
    clip_benchmark.main(["eval", *map(str, named + rest), "--no_amp", "--batch_size", "10"])
    return json.loads((tmp_path / f"pictures_mlip_jax_{task}.json").read_text())["metrics"]


@OF_OTHERS
@WITH_OTHERS
def test_clip_benchmark_classifies_as_our_own_evaluation(monkeypatch, trained, tmp_path, ours):
    figures = run_clip_benchmark(
        *(monkeypatch, trained, tmp_path, "classification", "zeroshot_classification"),
        *("--save_clf", tmp_path / "classes.pt"),
    )
    assert figures["acc1"] == pytest.approx(ours["zero_shot/set/top1"])
    assert figures["acc5"] == 1
    prompts = [f"a photo of a {name}." for name in CLASSES]
    classes = importlib.import_module("torch").load(tmp_path / "classes.pt").numpy().T
    np.testing.assert_allclose(classes, mlip_jax.load(trained).encode_text(prompts), atol=1e-6)
    assert figures["mean_per_class_recall"] == pytest.approx(ours["zero_shot/set/mean_per_class"])


@OF_OTHERS
@WITH_OTHERS
def test_clip_benchmark_retrieves_as_our_own_evaluation(monkeypatch, trained, tmp_path, ours):
    figures = run_clip_benchmark(
        *(monkeypatch, trained, tmp_path, "retrieval", "zeroshot_retrieval"),
        *("--recall_k", "1", "5", "10"),
    )
    for k in (1, 5, 10):
        by_text = ours[f"retrieval/set/text_to_image_recall@{k}"]
        by_image = ours[f"retrieval/set/image_to_text_recall@{k}"]
        assert figures[f"image_retrieval_recall@{k}"] == pytest.approx(by_text)
        assert figures[f"text_retrieval_recall@{k}"] == pytest.approx(by_image)


EVALUATE = """\
import json, sys
import open_clip
import beside

flag, words, out = sys.argv[1:]
name, checkpoint = words.split(maxsplit=1)
model, _, transform = open_clip.create_model_and_transforms(name, pretrained=checkpoint)
model = model.eval().to("cpu")
images = transform(beside.image())[None]
embedded = model.encode_image(images, normalize=True), model.encode_text(
    open_clip.get_tokenizer(name)(beside.TEXTS)
)
plain = open_clip.get_tokenizer("ViT-B-32")("a")
with open(out, "w") as file:
    json.dump([*(each.tolist() for each in embedded), list(plain.shape)], file)
"""
BESIDE = """\
import numpy as np
from PIL import Image

TEXTS = ["a red picture", "picture 7"]


def image():
    return Image.fromarray(np.arange(30 * 20 * 3, dtype=np.uint8).reshape(30, 20, 3))
"""


@OF_OTHERS
@WITH_OTHERS
def test_a_program_like_datacomps_gets_our_embeddings(monkeypatch, trained, tmp_path):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    (tmp_path / "beside.py").write_text(BESIDE)
    out = tmp_path / "out.json"
    datacomp.main([str(tmp_path), "--use_model", f"mlip_jax {trained}", str(out)])
    by_image, by_text, plain = json.loads(out.read_text())
    model = mlip_jax.load(trained)
    import beside

    np.testing.assert_array_equal(model.encode_image(beside.image()), np.float32(by_image))
    np.testing.assert_array_equal(model.encode_text(beside.TEXTS), np.float32(by_text))
    assert plain == [1, 77]  # other names are open_clip's own

    import torch

    with pytest.raises(UserError, match=r"torch\.float32 were not prepared by this model's own"):
        as_torch.opened(str(trained))[0].encode_image(torch.zeros(1, 3, 16, 16))


def test_what_is_not_there_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path)])
    assert as_torch.run(datacomp.main) == 2
    assert "no evaluate.py there" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert as_torch.run(clip_benchmark.main) == 2
    assert "pip install 'mlip_jax[clip-benchmark]'" in capsys.readouterr().err
    (tmp_path / "evaluate.py").write_text("")
    assert as_torch.run(datacomp.main) == 2
    assert "open_clip is not installed" in capsys.readouterr().err


def test_a_model_without_a_joint_space_is_refused(monkeypatch):
    monkeypatch.setattr(as_torch, "load", lambda folder: SimpleNamespace(pairwise=True))
    with pytest.raises(UserError, match="scores pairs and has no joint space"):
        as_torch.opened("runs/pairs")
