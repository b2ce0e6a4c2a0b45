"""Token merging after the fact: what a model's figures and its speed become at several rates."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax.core.files import write_atomically
from mlip_jax.core.tables import make_table
from mlip_jax.core.validation import validate
from mlip_jax.evaluations.results import Results
from mlip_jax.inference import Model
from mlip_jax.models import building

FILE_NAME = "merging"
_HEADLINES = ("_recall@1", "/top1", "/accuracy")
_SECONDS = 3.0  # of each measurement, at least, after the one that compiles
_SHORTEST_RUNS = 3


class Row(NamedTuple):
    """One rate's."""

    rate: float
    tokens: int  # that leave the image encoder, of patches
    flops: float  # of one image
    images_per_second: float
    results: Results


def at_rate(config: ConfigDict, rate: float) -> ConfigDict:
    """The config of the same model with another merging rate.

    A model that was trained without merging gets proportional attention and, without a Frequency
    Stage, no guidance: ToMe's merging (arXiv 2210.09461), which asks no training.

    Raises:
      UserError: for a model that has no tokens to merge, or not as many.
    """
    config = copy.deepcopy(config)
    settings = config.model.image.merging
    if not settings.rate:
        settings.proportional_attention = True
        if not config.model.image.frequency.depth:
            settings.guidance = "none"
    settings.rate = rate
    validate(config)
    building.merge_counts(config)
    return config


def sweep(
    config: ConfigDict,
    rates: Sequence[float],
    loaded: Callable[[ConfigDict], Model],
    scored: Callable[[Model, ConfigDict], Results],
) -> list[Row]:
    """Scores and times a model at every rate.

    Args:
      config: the model's.
      rates: shares of the patch tokens that are gone at the end.
      loaded: gives the model of a config.
      scored: gives its results.

    Raises:
      UserError: for a rate that the model cannot reach, before anything is scored.
    """
    rows = []
    for changed in [at_rate(config, rate) for rate in rates]:
        model = loaded(changed)
        tokens = building.grid(changed) ** 2 - sum(building.merge_counts(changed))
        rate, speed = changed.model.image.merging.rate, images_per_second(model)
        rows.append(Row(rate, tokens, model.image_flops(), speed, scored(model, changed)))
    return rows


def images_per_second(model: Model) -> float:
    """How fast a model embeds pixels that are in memory, compiled and warm; the median of runs."""
    size, count = model.preprocess.image_size, model.config.evaluation.batch_size
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    model.encode_image_pixels(images)
    times: list[float] = []
    while sum(times) < _SECONDS or len(times) < _SHORTEST_RUNS:
        start = time.perf_counter()
        model.encode_image_pixels(images)
        times.append(time.perf_counter() - start)
    return count / float(np.median(times))


def report(console: Console, folder: Path, rows: Sequence[Row]) -> Path:
    """Prints the table, and keeps it as merging.md and merging.json."""
    keys = [key for key in rows[0].results.figures if key.endswith(_HEADLINES)]
    heads = ["Rate", "Tokens", "GFLOPs", "Images/s", "Speed", *map(_words, keys)]
    lines = [
        [
            f"{row.rate:g}",
            str(row.tokens),
            f"{row.flops / 1e9:.3g}",
            f"{row.images_per_second:,.0f}",
            f"x{row.images_per_second / rows[0].images_per_second:.2f}",
            *(f"{100 * row.results.figures[key]:.2f} %" for key in keys),
        ]
        for row in rows
    ]
    table = make_table(heads, words=0, title="Token merging after the fact", title_justify="left")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    note = (
        f"Images a second: pixels in memory, on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}; the median of repeated runs. GFLOPs: of one image."
    )
    console.print(note)
    head, rule = (f"| {' | '.join(cells)} |" for cells in (heads, ["---:"] * len(heads)))
    text = "\n".join([head, rule, *(f"| {' | '.join(line)} |" for line in lines), "", note, ""])
    write_atomically(folder / f"{FILE_NAME}.md", text)
    values = [row._asdict() | {"results": row.results.figures} for row in rows]
    path = folder / f"{FILE_NAME}.json"
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return path


def _words(key: str) -> str:
    _, name, figure = key.split("/", 2)
    short = figure.replace("_recall@1", " R@1").replace("text_to_image", "T>I")
    return f"{name} {short.replace('image_to_text', 'I>T').replace('_', ' ')}"
