"""report.html: what was trained, how well it does, and what it looks like from inside."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from jaxtyping import Complex, UInt8
from ml_collections import ConfigDict

from mlip_jax.core import places, stages, versions
from mlip_jax.core.files import check_writable, read_json, write_atomically
from mlip_jax.core.history import History, read_history, series, training_seconds
from mlip_jax.core.registry import LOSSES, PREDICTIONS, TEXT_ENCODERS
from mlip_jax.core.schema import lessons
from mlip_jax.core.trained import START
from mlip_jax.data.sets.opening import open_training, open_validation
from mlip_jax.data.sets.records import Source
from mlip_jax.devices import cluster
from mlip_jax.evaluations import captioning, grounding
from mlip_jax.evaluations.interface import Encoder
from mlip_jax.evaluations.results import read_results
from mlip_jax.evaluations.sets import EmbeddedSet, embed_source, short_name
from mlip_jax.evaluations.sheets import page_template, sheet
from mlip_jax.evaluations.suites import WITHOUT_VALIDATION
from mlip_jax.inference import load
from mlip_jax.models import building
from mlip_jax.reports import style
from mlip_jax.reports.captions_sheet import Captioned, make_captions
from mlip_jax.reports.curves import draw_curves
from mlip_jax.reports.filters import draw_filters
from mlip_jax.reports.grounding import draw_grounding
from mlip_jax.reports.merged_tokens import COARSE_GRID, draw_merging, is_merged
from mlip_jax.reports.rates import draw_rates, read_rates
from mlip_jax.reports.retrieval_sheet import make_sheet

FILE_NAME = "report.html"
PICTURE_FOLDER = "report"
IMAGES_AT_MOST = 5000  # candidates of the retrieval sheet; more would not change what it shows
MERGED_IMAGES = 12
FINE_MERGED_IMAGES = 6  # of grids with many patches, which are drawn larger
GROUNDED_QUERIES = 18


class Inspectable(Encoder, Protocol):
    """An encoder that can be looked into."""

    config: ConfigDict

    def inspect(
        self, images: UInt8[np.ndarray, "images size size 3"]
    ) -> dict[str, np.ndarray | None]:
        """ "source": int32 [n, N], each patch's token at the end; "importance": [n, N] or None."""

    def frequency_filters(self) -> Sequence[Complex[np.ndarray, "height half channels"]]:
        """The filters of the Frequency Stage, one half spectrum a block."""


@dataclass(frozen=True)
class Picture:
    """A figure on the page."""

    uri: str
    alt: str


def write_report(
    workdir: str | os.PathLike[str],
    model: Inspectable,
    source: Source | None,
    training: Source | None = None,
) -> Path:
    """Writes workdir/report.html, a page that needs no other file, and workdir/report/*.png.

    Reads results.json, metrics.jsonl and environment.json of the workdir where they exist. Where a
    model or a run does not have something (merging, filters, curves), the page says so.

    Args:
      workdir: of a run.
      model: the run's model.
      source: the images and captions to show; None leaves those sections out.
      training: the training set; None leaves out what there is to say of its size.

    Returns:
      The page's path.

    Raises:
      UserError: when the source is empty or none of its images can be read.
      RunError: for NaN or infinity among the embeddings.
    """
    workdir = places.local(workdir)
    pictures = workdir / PICTURE_FOLDER
    pictures.mkdir(parents=True, exist_ok=True)
    config = model.config
    history = read_history(workdir / "metrics.jsonl")
    results = read_results(workdir)
    embedded = None
    if source is not None and config.model.critic == "dot":  # others have nothing to rank by
        embedded = embed_source(
            model,
            source,
            short_name(source.name),
            config.evaluation.batch_size,
            limit=IMAGES_AT_MOST,
        )
    with style.style():
        curves = _curves(history, pictures)
        merging = None if embedded is None else _merging(model, embedded, pictures)
        filters = _filters(model, pictures)
        rates = _rates(workdir, pictures)
        grounded = _grounding(model, source, pictures)
    page = page_template(Path(__file__).with_name("page.html")).render(
        name=workdir.resolve().name,
        method=config.name,
        written=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        headline=_headline(results.figures, results.chance),
        facts=_facts(config, history),
        data=[*_data(config, source, training, history), *_time(history)],
        start=read_json(workdir / START, list, missing=[]),
        environment=_environment(workdir),
        config_json=json.dumps(config.to_dict(), indent=2),
        results=sheet(results, "Results"),
        without_results=WITHOUT_VALIDATION if results.step else "No results yet: evaluate the run.",
        curves=curves,
        retrieval=None if embedded is None else make_sheet(model, embedded),
        captions=_captions(model, embedded),
        merging=merging,
        filters=filters,
        rates=rates,
        grounding=grounded,
        set_name="" if embedded is None else embedded.name,
        attribution="" if source is None else source.attribution,
    )
    path = workdir / FILE_NAME
    write_atomically(path, page)
    return path


def report_workdir(config: ConfigDict, workdir: str | os.PathLike[str]) -> int:
    """The report subcommand: writes the report of a workdir's newest checkpoint, prints its place.

    Raises:
      UserError: for a folder without a checkpoint, or a config that does not fit it.
    """
    return cluster.by_first(lambda: _report(config, workdir))


def _report(config: ConfigDict, workdir: str | os.PathLike[str]) -> int:
    folder = places.local(workdir)
    check_writable(folder, "--workdir")
    model = load(folder, config=config)
    cleaning = config.model.text.cleaning
    training = open_training(config.data, cleaning)
    source = open_validation(config.data, cleaning) or training
    print(f"report: {places.shown(write_report(folder, model, source, training))}")
    return 0


def _curves(history: History, folder: Path) -> Picture | None:
    figure = draw_curves(history)
    if figure is None:
        return None
    return Picture(style.save(figure, folder / "curves.png"), "Curves of the run over samples seen")


def _captions(model: Inspectable, embedded: EmbeddedSet | None) -> tuple[Captioned, ...]:
    """What the model's decoder writes; nothing without one."""
    if embedded is None or not captioning.writes(model.config):
        return ()
    return make_captions(cast(captioning.Captioner, model), embedded)


def _merging(model: Inspectable, embedded: EmbeddedSet, folder: Path) -> Picture | None:
    side, seen = building.grid(model.config), building.seen(model.config)
    shown = MERGED_IMAGES if side <= COARSE_GRID else FINE_MERGED_IMAGES
    chosen = np.linspace(0, len(embedded.indices) - 1, min(shown, len(embedded.indices)))
    records = [embedded.source[int(embedded.indices[i])] for i in chosen.round().astype(int)]
    images = np.stack([model.preprocess(record.image) for record in records])
    inside = model.inspect(images)
    source, importance = inside["source"], inside.get("importance")
    if source is None or not is_merged(source):
        return None
    figure = draw_merging(images[:, :seen, :seen], source, importance, (side, side))
    return Picture(
        style.save(figure, folder / "merging.png"),
        "Images beside the patches that became one token each",
    )


def _filters(model: Inspectable, folder: Path) -> Picture | None:
    kernels = [np.asarray(kernel) for kernel in model.frequency_filters()]
    if not kernels:
        return None
    image = model.config.model.image
    figure = draw_filters(kernels, width=image.image_size // image.patch_size)
    return Picture(
        style.save(figure, folder / "filters.png"),
        "Gain of the learned filters over spatial frequency",
    )


def _grounding(model: Inspectable, source: Source | None, folder: Path) -> Picture | None:
    """Queries of the first dataset with boxes that the config names, of the emoji's by default."""
    config = model.config
    specs = config.evaluation.grounding
    if not specs and source is not None and source.name == "emoji":
        specs = ("compositions",)
    if not specs or building.image_encoder(config).evidence is None:
        return None
    regions = grounding.open_set(specs[0], config)
    figure = draw_grounding(grounding.examples(model, regions, config, GROUNDED_QUERIES))
    return Picture(
        style.save(figure, folder / "grounding.png"),
        "Images under their saliency maps, with true and predicted boxes",
    )


def _headline(figures: dict[str, float], chance: dict[str, float]) -> list[tuple[str, str, str]]:
    """At most four figures that say most: (value, what, chance)."""
    names = {
        "text_to_image_recall@1": "text to image, R@1",
        "image_to_text_recall@1": "image to text, R@1",
        "top1": "zero-shot, top-1",
    }
    chosen = []
    for key, value in figures.items():
        _, name, figure = key.split("/", 2)
        if figure in names:
            expected = f"chance {100 * chance[key]:.1f} %" if key in chance else ""
            chosen.append((f"{100 * value:.1f} %", f"{names[figure]} on {name}", expected))
    return chosen[:4]


def _facts(config: ConfigDict, history: History) -> list[tuple[str, str]]:
    """The config in a dozen lines."""
    image = config.model.image
    samples_seen = max([line["samples"] for line in history.training], default=0)
    frequency = (
        f"first {image.frequency.depth} of {image.depth} blocks"
        if image.frequency.depth
        else "none"
    )
    merging = "none"
    if image.merging.rate:
        merging = f"{100 * image.merging.rate:.0f} % of the patch tokens, guidance "
        merging += f"{image.merging.guidance!r}"
    perspectives = [
        f"{name.replace('_', ' ')} ({_loss(config, name)}, weight {perspective.weight:g})"
        for name, perspective in config.perspectives.items()
        if perspective.weight > 0
    ]
    return [
        ("Method", config.name),
        (
            "Samples seen",
            f"{samples_seen:,.0f} of {config.samples:,}" if samples_seen else "not recorded",
        ),
        ("Batch", f"{config.batch_size:,}"),
        *_stages(config),
        ("Image encoder", building.image_encoder(config).describe(config)),
        ("Frequency Stage", frequency),
        ("Token merging", merging),
        ("Text encoder", TEXT_ENCODERS[config.model.text.architecture].describe(config)),
        ("Embedding", f"{config.model.embed_dim} wide, {config.model.head.replace('_', ' ')}"),
        ("Perspectives", "; ".join(perspectives)),
        *_teachers(config),
        ("Optimizer", config.optimizer.name),
        ("Learning rate", f"{config.optimizer.learning_rate:g}, {config.optimizer.schedule}"),
        ("Weight decay", f"{config.optimizer.weight_decay:g}"),
        ("Seed", str(config.seed)),
    ]


def _stages(config: ConfigDict) -> list[tuple[str, str]]:
    """What each stage is; nothing of a run without stages."""
    return [("Stages", "; ".join(map(str, stages.of(config))))] if config.stages else []


def _teachers(config: ConfigDict) -> list[tuple[str, str]]:
    """Whom the run learns from, and what; nothing without teachers."""
    if not config.teacher:
        return []
    taught = [
        f"{way} of {view.replace('_', ' ')} (weight {weight:g})"
        for (way, view), weight in lessons(config).items()
    ]
    return [("Teachers", f"{', '.join(config.teacher)}: {'; '.join(taught)}")]


def _data(
    config: ConfigDict, source: Source | None, training: Source | None, history: History
) -> list[tuple[str, str]]:
    """The sets: how many images, how often each was seen."""
    if training is None:
        rows = [("Training set", config.data.train)]
    else:
        seen = max([line["samples"] for line in history.training], default=0)
        rows = [
            ("Training set", f"{len(training):,} images of {config.data.train}"),
            ("Passes over it", f"{seen / len(training):,.3g}"),
        ]
    validation = "none"
    if source is not None and source is not training:
        validation = f"{len(source):,} images of {source.name}"
    return [*rows, ("Validation set", validation)]


def _time(history: History) -> list[tuple[str, str]]:
    """How long it took, and on what."""
    seconds = training_seconds(history)
    if seconds is None:
        return []
    lines = history.training
    rates, waits = series(lines, "images_per_second")[1], series(lines, "data_wait")[1]
    moments = [line["time"] for line in (*lines, *history.evaluation) if "time" in line]
    rows = [("Training steps", _duration(seconds))]
    if moments:
        rows.append(
            ("First to last line", f"{_duration(max(moments) - min(moments))}, with pauses")
        )
    rows.append(("Throughput", f"{np.median(rates):,.0f} images a second (median)"))
    if waits.size:
        rows.append(("Waiting for data", f"{100 * np.mean(waits):.0f} % of the steps' time"))
    return [*rows, ("Evaluations on the way", f"{len(history.evaluation):,}")]


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _rates(workdir: Path, folder: Path) -> Picture | None:
    figure = draw_rates(read_rates(workdir))
    if figure is None:
        return None
    return Picture(
        style.save(figure, folder / "rates.png"), "Results and speed over the rate of merging"
    )


def _loss(config: ConfigDict, name: str) -> str:
    if name in PREDICTIONS:
        return PREDICTIONS[name].describe(config)
    perspective = config.perspectives[name]
    if LOSSES[perspective.loss].of_pairs is None:
        return perspective.loss
    plural = "s" if perspective.shifts > 1 else ""
    words = f"{perspective.loss} with {perspective.shifts} negative{plural}"
    if perspective.odds == 1:
        return words
    return f"{words} at odds of {perspective.odds or 'all other rows'}"


def _environment(workdir: Path) -> list[tuple[str, str]]:
    """What the run recorded of its machine; else the versions that write this page."""
    path = workdir / "environment.json"
    recorded = read_json(path, missing=None)
    if recorded is None:
        return list(versions.installed().items())
    return [(key.replace("_", " "), _plain(value)) for key, value in recorded.items()]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
