"""The training loop: from a config and a folder to a trained, evaluated, reported model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax import config as schema
from mlip_jax import parallel
from mlip_jax.config import EVALUATIONS, UserError
from mlip_jax.data.images import Preprocessing
from mlip_jax.data.pipeline import SkipCounter, train_batches
from mlip_jax.data.records import Source
from mlip_jax.data.sources import open_source, open_validation
from mlip_jax.data.text import Tokenizer, load_tokenizer
from mlip_jax.evaluations import Results, evaluate, table
from mlip_jax.evaluations import run as evaluations
from mlip_jax.evaluations.workdir import file_results
from mlip_jax.inference import Model
from mlip_jax.interop import pretrained
from mlip_jax.models import two_tower
from mlip_jax.reports import write_report
from mlip_jax.storage.checkpoint import Checkpoints, has_checkpoints
from mlip_jax.storage.workdir import TOKENIZER, open_workdir, write_atomically
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training import summary
from mlip_jax.training.log import Log
from mlip_jax.training.metrics import Clock, MetricWriter
from mlip_jax.training.signals import Stop, Stopped
from mlip_jax.training.state import TrainState, abstract_state, initial_state
from mlip_jax.training.step import Metrics, make_train_step

STOPPED = 75  # the exit code that asks a scheduler to start the job again
_SCORE = "score"  # what the best checkpoints are chosen by

Step = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the report."""

    config: ConfigDict
    folder: Path
    mesh: Mesh
    source: Source
    validation: Source | None
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    model: Model  # for evaluation; without parameters
    checkpoints: Checkpoints
    console: Console
    stop: Stop

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.samples // self.config.batch_size

    def due(self, done: int, every_samples: int) -> bool:
        """Whether the step that was just done is the first past a multiple of `every_samples`."""
        batch = self.config.batch_size
        return bool(every_samples) and (
            done * batch // every_samples > (done - 1) * batch // every_samples
        )

    def save(self, state: TrainState, done: int, figures: Mapping[str, float] | None) -> None:
        """Saves a checkpoint with all that a model needs to be used or trained further."""
        extras = {
            "config": schema.to_json(self.config),
            "tokenizer": self.tokenizer.to_json(),
            "preprocessing": self.preprocessing.to_dict(),
            "attribution": self.source.attribution,
        }
        try:
            score = {_SCORE: _score(self.config.checkpoint.best, figures)} if figures else {}
        except UserError:  # the steps up to here are not lost over it
            self.checkpoints.save(done, state, extras)
            raise
        self.checkpoints.save(done, state, extras, score)


def train(config: ConfigDict, workdir: str | Path) -> int:
    """Trains, or goes on training, then evaluates and writes the report.

    Args:
      config: validated.
      workdir: the run's folder; one that holds this run is resumed.

    Returns:
      0 when the run is finished; 75 when a signal stopped it early with everything saved.

    Raises:
      UserError: for a config, a data set or a workdir that cannot be used.
      RunError: when the loss is no longer finite, or the disk is full.
    """
    mesh = parallel.make_mesh(config.mesh, config.batch_size)
    # Before the workdir is taken: a mistake in a path leaves none behind.
    cleaning = config.model.text.cleaning
    source = open_source(
        config.data.train,
        "train",
        cache_dir=config.data.cache_dir,
        max_skipped_share=config.data.max_skipped_share,
        cleaning=cleaning,
    )
    validation = open_validation(config.data, cleaning)
    evaluations.check(config)
    tokenizer = _tokenizer(config, source, Path(workdir))
    network = two_tower.build(
        config, vocab_size=tokenizer.vocab_size, start_id=tokenizer.sot, end_id=tokenizer.eot
    )
    preprocessing = Preprocessing.of(config)
    model = Model(config, None, tokenizer, preprocessing, mesh)
    optimizer = optimizers.make(config)
    abstract = abstract_state(network, optimizer, config, mesh)
    # A run that goes on has its weights, and its files may be gone by then.
    taken = {} if has_checkpoints(workdir) else pretrained.read(config, abstract.evaluated)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(open_workdir(workdir, config))
        run = Run(
            config=config,
            folder=folder,
            mesh=mesh,
            source=source,
            validation=validation,
            tokenizer=tokenizer,
            preprocessing=preprocessing,
            model=model,
            checkpoints=stack.enter_context(
                Checkpoints(
                    folder,
                    keep_last=config.checkpoint.keep_last,
                    keep_best=config.checkpoint.keep_best,
                    best=_SCORE,
                )
            ),
            console=Console(stderr=True, highlight=False, markup=False, soft_wrap=True),
            stop=stack.enter_context(Stop().listening()),
        )
        summary.print_data(run.console, run.source, run.validation)
        if jax.process_index() == 0:
            write_atomically(folder / TOKENIZER, tokenizer.to_json())
            if run.source.attribution:
                write_atomically(folder / "attribution.txt", run.source.attribution + "\n")

        restored = run.checkpoints.restore(abstract)
        state = restored[0] if restored else None
        start = int(state.step) if state else 0
        if start:
            left = f"going on from step {start}" if start < run.steps else "it is finished"
            run.console.print(f"{folder} holds this run: {left}")
        results = None
        if start < run.steps:
            step = compile_step(
                make_train_step(network, optimizer, config, preprocessing, mesh), run, abstract
            )
            summary.print_compiled(run.console, network, abstract.evaluated, step, config, mesh)
            if state is None:
                shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
                # Pretrained arrays are arguments: captured, they would be constants of the program.
                init = jax.jit(
                    lambda taken: initial_state(network, optimizer, config, taken),
                    out_shardings=shardings,
                )
                state = init(taken)
            state, results = run_steps(run, step, state, start)
        try:
            with run.stop.interrupting():
                return finish(run, state, results)
        except Stopped:
            done = int(state.step)
            run.console.print(f"stopped by a signal; everything is saved at step {done}")
            return STOPPED


def _tokenizer(config: ConfigDict, source: Source, workdir: Path) -> Tokenizer:
    """The run's tokenizer; a vocabulary, trained or read, is the workdir's from then on."""
    text, saved = config.model.text, workdir / TOKENIZER
    if text.tokenizer.startswith("wordpiece") and saved.is_file():
        try:
            return Tokenizer.from_json(saved.read_text(encoding="utf-8"))
        except Exception as error:  # whatever the library raises
            raise UserError(f"{saved} is damaged ({error}): remove it or mend it") from error
    return load_tokenizer(
        text.tokenizer,
        cleaning=text.cleaning,
        vocab_size=text.vocab_size,
        captions=source.captions,
    )


def compile_step(
    train_step: Callable[..., Any], run: Run, abstract: TrainState
) -> jax.stages.Compiled:
    """Compiles the step before any data is read; the state is donated."""
    batch, model = run.config.batch_size, run.config.model
    size, rows = model.image.image_size, parallel.batch_sharding(run.mesh)
    image = jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8, sharding=rows)
    token_ids = jax.ShapeDtypeStruct((batch, model.text.context_length), np.int32, sharding=rows)
    abstract_batch = {"image": image, "token_ids": token_ids}
    if run.config.perspectives.augmented_image.weight > 0:
        abstract_batch["image_2"] = image
    if run.config.perspectives.other_caption.weight > 0:
        abstract_batch["token_ids_2"] = token_ids
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    compiled = jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, parallel.replicated(run.mesh)),
    )
    return compiled.lower(abstract, abstract_batch).compile()


def run_steps(
    run: Run, step: Step, state: TrainState, start: int
) -> tuple[TrainState, Results | None]:
    """Steps from `start` to the end of the run, or to a signal.

    Returns:
      The state, which is saved, and its results if the last thing done was to evaluate it.
    """
    config = run.config
    clock = Clock(config.batch_size)
    skipped = SkipCounter(run.source, config.data.max_skipped_share)
    batches = train_batches(
        config,
        run.source,
        run.tokenizer,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with (
        contextlib.closing(batches),
        MetricWriter(
            run.folder,
            batch_size=config.batch_size,
            total_steps=run.steps,
            start_step=start,
            active=jax.process_index() == 0,
            console=run.console,
        ) as writer,
    ):
        log = Log(writer)
        before: Metrics | None = None
        results: Results | None = None
        for done in range(start + 1, run.steps + 1):
            with clock.waiting():
                batch = next(batches)
            skipped.update(batch.pop("skipped"))
            state, metrics = step(state, parallel.global_batch(batch, run.mesh))
            # The host stays one step ahead of the devices, so that they never wait for it, and no
            # further, so that batches do not pile up.
            jax.block_until_ready(before)
            before = metrics
            log.add(metrics)
            writer.advance(done)

            evaluates = done == run.steps or run.due(done, config.evaluation.every_samples)
            saves = evaluates or run.due(done, config.checkpoint.every_samples)
            pauses = saves or run.stop.asked
            if pauses or done % config.log_every == 0:
                log.interval(done, clock.lap(log.pending))
            if pauses:
                log.flush()
                results = _evaluate_unless_stopped(run, state) if evaluates else None
                if results and results.figures:
                    writer.evaluation(done, results.figures)
                    writer.note(f"step {done}: {summary.headline(results.figures)}")
                run.save(state, done, results.figures if results else None)
                clock.lap(0)
                if run.stop.asked:
                    break
        if skipped.summary():
            writer.note(skipped.summary())
    run.checkpoints.wait()
    return state, results


def finish(run: Run, state: TrainState, results: Results | None) -> int:
    """Evaluates the finished model, writes the results and the report.

    `results` are what the last step has already given by the fast families.
    """
    if results is None:
        results = _evaluate(run, state)
    slow = [family for family in EVALUATIONS if family not in evaluations.AT_INTERVALS]
    results.update(_evaluate(run, state, slow, progress=jax.process_index() == 0))
    if jax.process_index():
        return 0
    results.step = int(state.step)
    path = file_results(run.folder, results)
    model = run.model.with_variables(state.evaluated)
    report = write_report(run.folder, model, run.validation or run.source)
    run.console.print(table(results))
    run.console.print(f"results: {path}\nreport:  {report}")
    return 0


def _evaluate(
    run: Run,
    state: TrainState,
    families: Sequence[str] = evaluations.AT_INTERVALS,
    progress: bool = False,
) -> Results:
    model = run.model.with_variables(state.evaluated)
    return evaluate(
        model, run.config, validation=run.validation, progress=progress, families=families
    )


def _evaluate_unless_stopped(run: Run, state: TrainState) -> Results | None:
    # An evaluation may take longer than a scheduler waits between its signal and the kill.
    try:
        with run.stop.interrupting():
            return _evaluate(run, state)
    except Stopped:
        return None


def _score(best: str, figures: Mapping[str, float]) -> float:
    """What checkpoints are compared by: the figure `best`, or the mean of all recall@1.

    Without captions to retrieve by it is the mean of all zero-shot top-1; for a model that scores
    pairs, its accuracy.
    """
    if best:
        if best not in figures:
            raise UserError(
                f"config.checkpoint.best={best!r} is no figure of the evaluation: "
                f"{', '.join(figures)}{schema.suggestion(best, figures)}"
            )
        return figures[best]
    for figure in ("_recall@1", "/top1", "/accuracy"):
        values = [value for key, value in figures.items() if key.endswith(figure)]
        if values:
            return float(np.mean(values))
    return -math.inf
