"""The training loop: from a config and a folder to a trained, evaluated, reported model."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
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
from mlip_jax.config import RunError, UserError
from mlip_jax.data.images import Preprocessing
from mlip_jax.data.pipeline import SkipCounter, train_batches
from mlip_jax.data.sources import Source, open_source, open_validation
from mlip_jax.data.text import Tokenizer, load_tokenizer
from mlip_jax.evaluations import Results, evaluate, table, write_results
from mlip_jax.inference import Model
from mlip_jax.models import two_tower
from mlip_jax.reports import write_report
from mlip_jax.storage.checkpoint import Checkpoints
from mlip_jax.storage.workdir import open_workdir, write_atomically
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training import summary
from mlip_jax.training.metrics import Clock, MetricWriter
from mlip_jax.training.state import TrainState, abstract_state, initial_state
from mlip_jax.training.step import Metrics, make_train_step

STOPPED = 75  # the exit code that asks a scheduler to start the job again
_SCORE = "score"  # what the best checkpoints are chosen by

Step = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]


class Stop:
    """Set by SIGTERM or the first Ctrl-C; the second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Listens while inside."""
        former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def ask(number: int, _: Any) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, former[signal.SIGINT])
            print(f"\n{signal.Signals(number).name}: saving, then stopping", file=sys.stderr)

        for number in former:
            signal.signal(number, ask)
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


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
        score = {} if not figures else {_SCORE: _score(self.config.checkpoint.best, figures)}
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
    tokenizer = load_tokenizer(config.model.text.tokenizer)
    network = two_tower.build(
        config, vocab_size=tokenizer.vocab_size, start_id=tokenizer.sot, end_id=tokenizer.eot
    )
    optimizer = optimizers.make(config)
    abstract = abstract_state(network, optimizer, config, mesh)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(open_workdir(workdir, config))
        run = Run(
            config=config,
            folder=folder,
            mesh=mesh,
            source=open_source(
                config.data.train,
                "train",
                cache_dir=config.data.cache_dir,
                max_skipped_share=config.data.max_skipped_share,
            ),
            validation=open_validation(config.data),
            tokenizer=tokenizer,
            preprocessing=Preprocessing.of(config),
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
        if run.source.attribution:
            write_atomically(folder / "attribution.txt", run.source.attribution + "\n")

        restored = run.checkpoints.restore(abstract)
        state = restored[0] if restored else None
        start = int(state.step) if state else 0
        if start:
            left = f"going on from step {start}" if start < run.steps else "it is finished"
            run.console.print(f"{folder} holds this run: {left}")
        if start < run.steps:
            step = compile_step(
                make_train_step(network, optimizer, config, run.preprocessing), run, abstract
            )
            summary.print_compiled(run.console, network, abstract.params, step, config, mesh)
            if state is None:
                shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
                init = jax.jit(
                    lambda: initial_state(network, optimizer, config), out_shardings=shardings
                )
                state = init()
            state, done = run_steps(run, step, state, start)
            if done < run.steps:
                run.console.print(f"stopped by a signal; everything is saved at step {done}")
                return STOPPED
        return finish(run, state)


def compile_step(
    train_step: Callable[..., Any], run: Run, abstract: TrainState
) -> jax.stages.Compiled:
    """Compiles the step before any data is read; the state is donated."""
    batch, model = run.config.batch_size, run.config.model
    size, rows = model.image.image_size, parallel.batch_sharding(run.mesh)
    abstract_batch = {
        "image": jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8, sharding=rows),
        "token_ids": jax.ShapeDtypeStruct(
            (batch, model.text.context_length), np.int32, sharding=rows
        ),
    }
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    compiled = jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, parallel.replicated(run.mesh)),
    )
    return compiled.lower(abstract, abstract_batch).compile()


def run_steps(run: Run, step: Step, state: TrainState, start: int) -> tuple[TrainState, int]:
    """Steps from `start` to the end of the run, or to a signal.

    Returns:
      The state, and how many steps of the run are done; that state is saved.
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

            last = done == run.steps or run.stop.asked
            evaluates = done == run.steps or run.due(done, config.evaluation.every_samples)
            pauses = evaluates or last or run.due(done, config.checkpoint.every_samples)
            if pauses or done % config.log_every == 0:
                log.interval(done, clock.lap(log.pending))
            if pauses:
                log.flush()
                figures = None
                if evaluates:
                    figures = _evaluate(run, state).figures
                    writer.evaluation(done, figures)
                    writer.note(f"step {done}: {summary.headline(figures)}")
                run.save(state, done, figures)
                clock.lap(0)
            if last:
                break
        if skipped.summary():
            writer.note(skipped.summary())
    run.checkpoints.wait()
    return state, done


class Log:
    """Training metrics on their way to the writer: fetched an interval late, so never waited for.

    What is written is the mean over an interval.
    """

    def __init__(self, writer: MetricWriter) -> None:
        self._writer = writer
        self._steps: list[Metrics] = []
        self._late: tuple[int, list[Metrics], dict[str, float]] | None = None

    @property
    def pending(self) -> int:
        """Steps since the last interval."""
        return len(self._steps)

    def add(self, metrics: Metrics) -> None:
        """Takes the metrics of one step, on the devices."""
        self._steps.append(metrics)

    def interval(self, done: int, speed: dict[str, float]) -> None:
        """Ends an interval at step `done` and writes the one before.

        Raises:
          RunError: for a step whose loss or gradient was not finite.
        """
        self.flush()
        self._late = (done, self._steps, speed)
        self._steps = []

    def flush(self) -> None:
        """Writes the last interval, if it is not written yet; waits for the devices.

        Raises:
          RunError: for a step whose loss or gradient was not finite.
        """
        if self._late is None:
            return
        done, on_devices, speed = self._late
        self._late = None
        steps = jax.device_get(on_devices)
        for number, metrics in enumerate(steps, done - len(steps) + 1):
            _check_finite(number, metrics)
        mean = {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}
        self._writer.train(done, mean | speed)


def _check_finite(number: int, metrics: Mapping[str, Any]) -> None:
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]):
        return
    terms = [
        key.removeprefix("loss/")
        for key, value in metrics.items()
        if key.startswith("loss/") and not math.isfinite(value)
    ]
    if terms:
        what = f"the loss of {' and '.join(terms)} is {metrics['loss/' + terms[0]]}"
    elif not math.isfinite(metrics["loss"]):
        what = f"the sum of the losses is {metrics['loss']}"
    else:
        what = f"the losses are finite, but the gradient's norm is {metrics['gradient_norm']}"
    raise RunError(
        f"step {number}: {what}; stopped, the checkpoints hold finite parameters. Lower "
        "config.optimizer.learning_rate or raise its warmup_samples, with a new --workdir"
    )


def finish(run: Run, state: TrainState) -> int:
    """Evaluates the finished model, writes results and report, and prints where they are."""
    results = _evaluate(run, state)
    if jax.process_index():
        return 0
    path = write_results(run.folder, results)
    model = _model(run, state)
    report = write_report(run.folder, model, run.validation or run.source)
    run.console.print(table(results))
    run.console.print(f"results: {path}\nreport:  {report}")
    return 0


def _model(run: Run, state: TrainState) -> Model:
    return Model(run.config, state.evaluated, run.tokenizer, run.preprocessing, run.mesh)


def _evaluate(run: Run, state: TrainState) -> Results:
    return evaluate(_model(run, state), run.config, validation=run.validation, progress=False)


def _score(best: str, figures: Mapping[str, float]) -> float:
    """What checkpoints are compared by: the figure `best`, or the mean of all recall@1."""
    if best:
        if best not in figures:
            raise UserError(
                f"config.checkpoint.best={best!r} is no figure of the evaluation: "
                f"{', '.join(figures)}{schema.suggestion(best, figures)}"
            )
        return figures[best]
    recalls = [value for key, value in figures.items() if key.endswith("_recall@1")]
    return float(np.mean(recalls)) if recalls else -math.inf
