"""The evaluate subcommand: a workdir is scored again, perhaps by another config."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax.core import places, schema
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import check_writable, read_json, write_atomically
from mlip_jax.core.registry import EVALUATIONS
from mlip_jax.devices import cluster
from mlip_jax.evaluations import merging_rates
from mlip_jax.evaluations.compare import compare_workdirs
from mlip_jax.evaluations.prompts import several_templates
from mlip_jax.evaluations.results import FILE_NAME, Results, read_results, write_results
from mlip_jax.evaluations.sets import Sets
from mlip_jax.evaluations.sheets import html, markdown, sheet, table
from mlip_jax.evaluations.suites import apply_suite, check, evaluate
from mlip_jax.inference import Model, load
from mlip_jax.interop import model_folders

_MOVE_A_FIGURE = (
    "compute_dtype",
    "data.train",  # whose validation split may be what is evaluated on
    "data.validation",
    "evaluation.",
    "model.",
    "perspectives.",  # the first global one in use gives the embeddings
)
_LONGEST_NAME = 160  # bytes; file systems take 255 of a whole name


def evaluate_workdir(
    config: ConfigDict | None,
    workdir: str | Path | None,
    suite: str = "",
    rates: Sequence[float] = (),
    compare: Sequence[str] = (),
) -> int:
    """Evaluates a workdir's newest checkpoint, prints the table and writes the results.

    What the config changes about the model or the evaluation goes into the file's name, so that
    results.json stays that of the run as trained; figures of other datasets or families join those
    that the file has of the same checkpoint. Beside it lies the table in Markdown and HTML. What is
    found is kept dataset by dataset: an evaluation that was cut short goes on where it was.

    An exported model is evaluated likewise. The results of another library's are kept in
    runs/foreign/<its folder's name>: its folder is not ours to write in.

    Args:
      config: the workdir's config with the overrides of the command line.
      workdir: of a run; or any other folder that `load` takes.
      suite: see `apply_suite`; "" for what the config names.
      rates: of token merging: the model is scored and timed at each, and at 0.
      compare: workdirs, or patterns of them: nothing is evaluated, their results are laid side by
        side, see `compare_workdirs`; the config is not read then, and the workdir may be None.

    Returns:
      0.

    Raises:
      UserError: for a folder without a checkpoint, or a config that does not fit it.
    """
    if compare:
        return compare_workdirs(compare, workdir)
    assert config is not None and workdir is not None  # but for a comparison
    folder = places.local(workdir)
    return cluster.by_first(lambda: _evaluate(config, folder, suite, rates))


def _evaluate(config: ConfigDict, workdir: Path, suite: str, rates: Sequence[float]) -> int:
    if suite:
        apply_suite(config, suite)
    for templates in several_templates(config.evaluation.templates):
        one = copy.deepcopy(config)
        one.evaluation.templates = templates
        check(one)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    trained, _ = model_folders.settings(workdir)
    home = workdir
    if model_folders.kind(workdir) not in ("workdir", "exported"):
        home = Path("runs") / "foreign" / trained.name
        home.mkdir(parents=True, exist_ok=True)
    prompts = several_templates(config.evaluation.templates)
    if rates and len(prompts) > 1:
        raise UserError(
            "--rates goes with one name in config.evaluation.templates, not with several"
        )
    check_writable(home, "--workdir")
    if not rates:
        config.evaluation.templates = prompts[0]
        model = load(workdir, config=config)
        for sentence in model.about.get("lost", ()):
            console.print(f"note: lost when this model was exported: {sentence}")
        sets = Sets(model, config)
        for templates in prompts:
            config.evaluation.templates = templates
            results, path = _score(model, sets.under(config), trained, home, console)
            if len(prompts) > 1:
                console.print(f"templates: {templates}")
            console.print(table(results))
            console.print(f"results: {places.shown(path)} (also .md, .html)")
        if len(prompts) > 1:
            console.print(f"side by side: mlip evaluate --compare={places.shown(home)}")
        return 0

    def loaded(changed: ConfigDict) -> Model:
        return load(workdir, config=changed)

    def scored(model: Model, changed: ConfigDict) -> Results:
        console.print(f"merging rate {changed.model.image.merging.rate:g}")
        return _score(model, Sets(model, changed), trained, home, console)[0]

    wanted = sorted({0.0, *rates})
    path = merging_rates.report(console, home, merging_rates.sweep(config, wanted, loaded, scored))
    console.print(f"table: {places.shown(path)} (also .md)")
    return 0


def _score(
    model: Model, sets: Sets, trained: ConfigDict, home: Path, console: Console
) -> tuple[Results, Path]:
    """Evaluates and files a model; returns what was found, and where it is filed."""
    config = sets.config
    name = results_name(changes(trained, config))
    draft = home / f".{name}.partial"
    results = _read_draft(draft, model.step)
    if results.done:
        console.print(
            f"going on after {', '.join(results.done)}, kept from an evaluation cut short"
        )
    results = evaluate(
        model, config, done=results, keep=lambda results: _keep(draft, results), sets=sets
    )
    if not results.figures:
        raise UserError(
            f"{home} names no dataset to evaluate on: add --config.data.validation=jsonl:PATH or "
            "--config.evaluation.retrieval"
        )
    path = file_results(home, results, name)
    places.remove(draft)
    return results, path


def file_results(workdir: str | Path, results: Results, file_name: str = FILE_NAME) -> Path:
    """Puts results among those that the file has of the same checkpoint; tables lie beside it."""
    merged = _read_or_set_aside(places.local(workdir), file_name)
    # Files of older versions do not say which checkpoint they are of: the last one.
    if merged.step not in (None, results.step):
        merged = Results()
    merged.step = results.step
    merged.update(results)
    path = write_results(workdir, merged, file_name)
    results_sheet = sheet(merged, f"Results of {path.parent.resolve().name}")
    write_atomically(path.with_suffix(".md"), markdown(results_sheet))
    write_atomically(path.with_suffix(".html"), html(results_sheet))
    return path


def _read_or_set_aside(workdir: Path, file_name: str) -> Results:
    """The results in a file; a damaged one is renamed: what was computed just now is not lost."""
    try:
        return read_results(workdir, file_name)
    except UserError as error:
        aside = workdir / f"damaged-{file_name}"
        print(f"warning: {error}: set aside as {aside.name}", file=sys.stderr)
        places.move(workdir / file_name, aside)
        return Results()


def _keep(draft: Path, results: Results) -> None:
    write_atomically(draft, json.dumps(vars(results)))


def _read_draft(draft: Path, step: int | None) -> Results:
    """What an evaluation of the same checkpoint has kept; nothing where there is none."""
    try:
        results = Results(**read_json(draft))
        results.check()
    except (UserError, TypeError, ValueError):
        return Results(step=step)
    return results if results.step == step else Results(step=step)


def changes(trained: ConfigDict, config: ConfigDict) -> list[str]:
    """Every key that moves a figure and differs from how the run was trained: "key=value"."""
    # The families' keys name datasets, and figures carry the datasets' names.
    moves_none = {
        "evaluation.batch_size",
        "evaluation.actual_recall",
        *(f"evaluation.{family}" for family in EVALUATIONS),
    }
    before, now = schema.flatten(trained.to_dict()), schema.flatten(config.to_dict())
    return [
        f"{key}={now[key]}"
        for key in sorted(now)
        if key.startswith(_MOVE_A_FIGURE) and key not in moves_none and now[key] != before.get(key)
    ]


def results_name(changed: list[str]) -> str:
    """The file for the results under these changes; results.json when there are none."""
    if not changed:
        return FILE_NAME
    whole = ",".join(changed)
    name = re.sub(r"[^\w.,=+-]+", "_", whole)
    # What is cut, or written by other characters, may be like what another change comes to.
    if len(name.encode()) > _LONGEST_NAME or name != whole:
        digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
        name = f"{name.encode()[:_LONGEST_NAME].decode(errors='ignore')},{digest}"
    return f"results,{name}.json"
