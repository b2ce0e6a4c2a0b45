"""The report: one page with all its sections, whatever the run has or lacks."""

import html.parser
import io
import json

import numpy as np
import pytest
from PIL import Image

from mlip_jax.core.errors import UserError
from mlip_jax.core.history import read_history, series
from mlip_jax.core.schema import default
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.sets.records import Record
from mlip_jax.data.text.tokenizer import load_tokenizer
from mlip_jax.evaluations import Results, write_results
from mlip_jax.evaluations.interface import Outcome
from mlip_jax.reports import style, write_report
from mlip_jax.reports.curves import draw_curves
from mlip_jax.reports.filters import gain, radial_profile
from mlip_jax.reports.merged_tokens import draw_merging, is_merged
from mlip_jax.reports.retrieval_sheet import evenly_by_rank

SIZE, PATCH = 24, 6
GRID = SIZE // PATCH
SECTIONS = ("run", "results", "curves", "retrieval", "merging", "grounding", "filters")


class Drawings:
    """Noise under a caption with markup in it."""

    name, split, class_names, notes = "drawings", "validation", (), ()
    attribution = "Drawings by <somebody>"

    def __len__(self):
        return 14

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 255, (20, 30, 4), np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        return Record(out.getvalue(), (f"<b>drawing</b> $ {index} 絵",), (), -1, str(index))

    def name_of(self, index):
        return str(index)


class Model:
    """Random embeddings; merges pairs of patches."""

    preprocess = Preprocessing(SIZE)

    def __init__(self, merges=True, blocks=2):
        self.config = default()
        self.config.name = "tiny & new"
        self.config.model.image.image_size, self.config.model.image.patch_size = SIZE, PATCH
        self.config.model.image.frequency.depth = blocks
        self.merges, self.blocks = merges, blocks

    def encode_image_pixels(self, images):
        return np.random.default_rng(0).normal(size=(len(images), 8)).astype(np.float32)

    def encode_text(self, texts):
        return np.random.default_rng(1).normal(size=(len(texts), 8)).astype(np.float32)

    def tokenize(self, texts):
        return load_tokenizer("clip_8k").encode(texts, 16)

    def inspect(self, images):
        patches = np.arange(GRID * GRID, dtype=np.int32)
        source = np.tile(patches // 2 if self.merges else patches, (len(images), 1))
        importance = np.random.default_rng(2).random(source.shape, np.float32)
        return {
            "source": source,
            "sizes": np.full((len(images), GRID * GRID // 2), 2.0, np.float32),
            "importance": importance if self.merges else None,
        }

    def frequency_filters(self):
        rng = np.random.default_rng(3)
        shape = (GRID, GRID // 2 + 1, 5)
        return [
            (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)
            for _ in range(self.blocks)
        ]


class Page(html.parser.HTMLParser):
    """Collects ids, pictures and text, and checks that tags close."""

    void = ("meta", "img", "link", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.pictures, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "img":
            assert values["alt"]
            self.pictures.append(values["src"])
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def write_metrics(path):
    lines = []
    for step in range(10, 1000, 10):
        line = {"step": step, "samples": step * 8, "time": 1.0, "loss": 100 / step}
        line |= {"loss/spatial_global": 60 / step, "scale/spatial_global": 14.0 + step / 100}
        line |= {"learning_rate": 1e-3, "gradient_norm": 1.0, "data_wait": 0.1}
        lines.append(line | {"images_per_second": 100.0})
        if step % 500 == 0:
            figures = {f"retrieval/emoji/text_to_image_recall@{k}": step / 2000 for k in (1, 5, 10)}
            figures |= {"zero_shot/emoji/top1": 0.0}
            lines.append({"step": step, "samples": step * 8, "time": 1.0} | figures)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "sam')


def test_report_has_every_section_and_picture(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "environment.json").write_text(
        json.dumps({"device": "cpu", "versions": {"jax": "1.2"}, "hosts": ["a", "b"]})
    )
    results = Results()
    figure = "text_to_image_recall@1"
    results.add(
        "retrieval",
        Outcome("emoji", {figure: 0.25}, {figure: 0.001}, {figure: 952}, {figure: "x"}, "A note."),
    )
    write_results(tmp_path, results)
    path = write_report(tmp_path, Model(), Drawings())
    assert path == tmp_path / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert tuple(page.ids) == SECTIONS
    assert all(source.startswith("data:image/") for source in page.pictures)
    assert "<b>drawing" not in text and "<b>drawing</b> $ 0 絵" in page.text
    for expected in ("tiny & new", "25.00 %", "0.10 %", "952", "Drawings by <somebody>", "jax 1.2"):
        assert expected in page.text
    for name in ("curves", "merging", "filters"):
        with Image.open(tmp_path / "report" / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("L"))
        assert pixels.shape[1] > 1000 and pixels.std() > 5


def test_report_of_a_model_without_merging_filters_or_history(tmp_path):
    page = Page(write_report(tmp_path, Model(merges=False, blocks=0), Drawings()).read_text())
    assert tuple(page.ids) == SECTIONS
    for sentence in ("No results yet", "no curves", "merges no tokens", "no Frequency Stage"):
        assert sentence in page.text
    assert not list((tmp_path / "report").iterdir())
    page = Page(write_report(tmp_path, Model(), None).read_text())
    assert "no search is shown" in page.text


def test_history_takes_the_last_word_of_a_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "samples": step, "loss": 1.0} for step in (1, 2, 3, 4)]
    lines.insert(2, {"step": 2, "samples": 2, "retrieval/x/recall@1": 0.1})
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 5, "sampl'
    again = [{"step": 3, "samples": 3, "loss": 2.0}, {"step": 2, "samples": 2, "r": 0.5}]
    path.write_text(text + "\n[1]\n" + "\n".join(map(json.dumps, again)) + "\n")
    history = read_history(path)
    assert [(line["step"], line["loss"]) for line in history.training] == [(1, 1), (2, 1), (3, 2)]
    assert [line.get("r") for line in history.evaluation] == [0.5]
    assert series(history.training, "loss")[1].tolist() == [1, 1, 2]
    assert read_history(tmp_path / "absent.jsonl").training == []


def test_damaged_lines_of_a_history_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "samples": 8, "loss": 2.0, "images_per_second": 5}'
    odd = ["[]", "5", "null", '{"step": 2', "\0", '{"step": "2", "samples": 8, "loss": 1.0}']
    odd += ['{"step": 2, "samples": [8], "loss": 1.0}', '{"step": 2, "samples": 1e999, "loss": 1}']
    odd += ['{"step": null, "samples": 8}', "[" * 100_000]
    part = '{"step": 2, "samples": 16, "loss": null, "images_per_second": "fast", "lr": [1]}'
    path.write_text("\n".join([whole, *odd, part]) + "\n")
    history = read_history(path)
    assert [line["step"] for line in history.training] == [1, 2]
    assert history.training[1] == {"step": 2, "samples": 16, "loss": None}
    assert series(history.training, "images_per_second")[1].tolist() == [5]
    assert not history.evaluation


@pytest.mark.parametrize("height,width", [(4, 4), (5, 7), (6, 5)])
def test_gain_is_what_the_filter_does(height, width):
    rng = np.random.default_rng(0)
    shape = (height, width // 2 + 1, 2)
    kernel = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    actual = np.fft.ifftshift(gain(kernel, height, width), axes=(0, 1))
    x = rng.normal(size=(height, width, 2))
    spectrum = np.fft.rfft2(x, axes=(0, 1))
    y = np.fft.irfft2(kernel * spectrum, s=(height, width), axes=(0, 1))
    expected = np.abs(np.fft.fft2(y, axes=(0, 1)) / np.fft.fft2(x, axes=(0, 1)))
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_radial_profile_of_a_ring():
    gains = np.zeros((8, 8))
    gains[4, 6] = gains[6, 4] = gains[4, 2] = gains[2, 4] = 1  # two cycles, on the axes
    frequencies, means = radial_profile(gains)
    assert frequencies[np.argmax(means)] == 2 and means[0] == 0


def test_queries_are_spread_by_rank():
    ranks = np.array([5, 0, 1, 9, 3, 2])
    assert evenly_by_rank(ranks, 10) == [2, 5, 4, 0, 3]
    assert evenly_by_rank(ranks, 3) == [2, 4, 3]
    assert is_merged(np.array([[0, 1, 1]])) and not is_merged(np.array([[0, 1, 2]]))


def test_the_report_says_whose_run_it_is_what_it_started_from_and_how_long_it_took(tmp_path):
    workdir = tmp_path / "my_photos"
    workdir.mkdir()
    write_metrics(workdir / "metrics.jsonl")
    lines = ["starts from runs/a at step 8: weights and optimizer", "  samples: 64 -> 16"]
    (workdir / "start.json").write_text(json.dumps(lines))
    rows = [
        {"rate": rate, "images_per_second": 9.0, "results": {"zero_shot/a/top1": 0.5}}
        for rate in (0.0, 0.5)
    ]
    (workdir / "merging.json").write_text(json.dumps(rows))
    page = Page(write_report(workdir, Model(), Drawings(), Drawings()).read_text())
    assert tuple(page.ids) == (*SECTIONS[:2], "rates", *SECTIONS[2:])
    words = " ".join(page.text.split())
    assert words.startswith("my_photos: report")
    assert "It starts from runs/a at step 8: weights and optimizer. samples: 64 -> 16." in words
    # 990 steps of 8 samples at 100 a second, over 14 images.
    letters = words.replace(" ", "")
    assert "Trainingset14imagesofemojiPassesoverit566" in letters
    assert "Trainingsteps0:01:19" in letters and "Waitingfordata10%of" in letters
    assert "Evaluationsontheway1" in letters
    assert (workdir / "report/rates.png").exists()
    (workdir / "merging.json").write_text('[{"rate": 0.5}]')
    with pytest.raises(UserError, match="merging.json is damaged"):
        write_report(workdir, Model(), None)


def test_lines_of_shares_stand_apart_by_colour_and_name(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl")
    captions = {
        f"retrieval/photos/{direction}_recall@{k}": 0.001 * k
        for direction in ("text_to_image", "image_to_text")
        for k in (1, 5, 10)
    }
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"step": 1, "samples": 8, "time": 1.0} | captions) + "\n")
    with style.style():
        figure = draw_curves(read_history(tmp_path / "metrics.jsonl"))
    panels = [axes for axes in figure.axes if axes.lines]
    assert [axes.get_title(loc="left") for axes in panels] == [
        "Text to image, photos",
        "Image to text, photos",
    ]
    for axes in panels:
        assert axes.get_legend() is None
        assert len({line.get_color() for line in axes.lines}) == 3
        names = {text.get_text(): text.xy[1] for text in axes.texts}
        assert list(names) == ["R@1", "R@5", "R@10"]
        places = sorted(names.values())
        assert min(np.diff(places)) > 0.08 * 0.01  # of the panel, whose top is at 1 %


def test_a_fine_grid_is_drawn_large():
    rng = np.random.default_rng(0)
    for side, width in ((8, 150), (14, 350)):
        images = rng.integers(0, 255, (2, side * 4, side * 4, 3), np.uint8)
        source = rng.integers(0, side * side // 2, (2, side * side))
        with style.style():
            figure = draw_merging(images, source, rng.random(source.shape), (side, side))
            figure.canvas.draw()
        panel = figure.axes[0] if figure.axes else figure.subfigs[0].axes[0]
        assert panel.get_window_extent().width * 144 / figure.dpi > width
