"""The training loop: from a config and a folder to a trained, evaluated, reported model."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from ml_collections import ConfigDict

from mlip_jax.core import places
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.stages import at
from mlip_jax.core.stopping import STOPPED
from mlip_jax.data.batches.feed import Feed, input_seconds
from mlip_jax.data.batches.training import SkipCounter
from mlip_jax.data.sets.kinds import OBJECT_NAME
from mlip_jax.data.sets.mixtures import samples_by_set
from mlip_jax.data.sets.records import Source
from mlip_jax.data.sets.stored import brought
from mlip_jax.devices import cluster, parallel, processes
from mlip_jax.evaluations import Results
from mlip_jax.storage.saved import FOLDER
from mlip_jax.training import known_texts, stages, summary
from mlip_jax.training.callbacks import Callback, Callbacks
from mlip_jax.training.evaluation import evaluate_unless_stopped, finish
from mlip_jax.training.log import Log
from mlip_jax.training.metrics import Clock, MetricWriter
from mlip_jax.training.optimizer import last_step_before_cooldown
from mlip_jax.training.run import Run
from mlip_jax.training.signals import Stop
from mlip_jax.training.stages import Steps
from mlip_jax.training.start import start
from mlip_jax.training.state import TrainState
from mlip_jax.training.step import Metrics
from mlip_jax.training.watch import Watchdog

_GRACE = 2.0  # seconds that a batch may take once the run is asked to stop


@dataclass(frozen=True)
class Trained:
    """How a run stands when `train` returns.

    Attributes:
      workdir: the run's folder, a URL if that was given; `mlip_jax.load` opens it.
      step: steps done.
      code: the command line's exit code: 0 for a finished run, 75 for one that a signal stopped.
      figures: of the last evaluation by key, such as "retrieval/SET/text_to_image_recall@1"; empty
        for a run that was stopped, and in all processes but the first.
    """

    workdir: Path | str
    step: int
    code: int
    figures: Mapping[str, float]

    @property
    def finished(self) -> bool:
        """Whether the run is at its end."""
        return self.code == 0


def train(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    source: Source | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """Trains, or goes on training, then evaluates and writes the report.

    Args:
      config: validated.
      workdir: the run's folder, a path or a URL; one that holds this run is resumed.
      source: the training set, in place of what config.data.train names.
      callbacks: told of metrics, evaluations and checkpoints.

    Raises:
      UserError: for a config, a dataset or a workdir that cannot be used.
      RunError: when the loss is no longer finite, the disk is full, a callback raises, or processes
        do not find each other.
    """
    if source is not None:
        config = copy.deepcopy(config)
        config.data.train = f"{OBJECT_NAME}:{source.name}"
    cluster.start()
    with processes.together(), contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop().listening())
        with stop.leaving():
            run, state, steps = start(config, workdir, stop, stack, source, callbacks)
        results = None
        if steps:
            state, results = run_steps(run, steps, state, int(state.step))
        code, figures = finish(run, state, results)
        place = str(workdir) if places.is_url(workdir) else run.folder
        return Trained(place, int(state.step), code, figures)


def _save_without_input(
    run: Run, state: TrainState, done: int, start: int, error: Exception
) -> None:
    """Saves what was done before the input failed; returns where the run was asked to stop.

    Raises:
      RunError: that the input is lost, or cannot be had, where the run was not asked to stop.
      Exception: another error, as it was.
    """
    if jax.process_count() > 1:  # which save together, and the others wait in the next step
        if not run.stop.asked:
            raise error
        stopped = RunError(f"stopped by a signal, and {error}: the last checkpoint is good")
        stopped.code = STOPPED
        raise stopped from error
    saved = "nothing was done since the start"
    if done > start:
        run.save(state, done, None)
        run.checkpoints.wait()
        saved = f"everything is saved at step {done}"
    if run.stop.asked:
        return
    if isinstance(error, RunError):
        told = RunError(f"{error}; {saved}, and the same command goes on")
        told.code = error.code  # 75 where a server stays away
        raise told from error
    raise error


def _counts(run: Run, done: int) -> dict[str, float]:
    """Of a line of the log: the samples of each set, and the stage where there are several."""
    counts: dict[str, float] = dict(samples_by_set(run.source, run.seen(done)))
    if len(run.stages) > 1:
        counts["stage"] = at(run.stages, done).number
    return counts


def run_steps(
    run: Run, steps: Steps, state: TrainState, start: int
) -> tuple[TrainState, Results | None]:
    """Steps from `start` to the end of the run, or to a signal.

    Returns:
      The state, which is saved, and its results if the last thing done was to evaluate it.
    """
    config = run.config
    keep_step = last_step_before_cooldown(config)
    ends = {keep_step, *(stage.last for stage in run.stages)}
    clock = Clock(run.seen, start)
    skipped = SkipCounter(run.source, config.data.max_skipped_share)
    batches = stages.batches(run, start)
    known = known_texts.of_run(run, state)
    weights = run.teachers.placed(run.mesh)
    with (
        Watchdog().watching() as watchdog,
        Feed(batches, input_seconds(), _GRACE if jax.process_count() == 1 else 2 * _GRACE) as feed,
        MetricWriter(
            run.folder,
            seen=run.seen,
            work=steps.work,
            total_steps=run.steps,
            start_step=start,
            active=jax.process_index() == 0,
            console=run.console,
        ) as writer,
    ):
        callbacks = Callbacks([writer], run.callbacks, run.stop.ask)
        callbacks.tell("on_start", run, start)
        callbacks.check()
        log = Log(callbacks)
        before: Metrics | None = None
        results: Results | None = None
        for done in range(start + 1, run.steps + 1):
            if stage := run.begins(done, start):
                callbacks.tell("on_stage", stage)
            try:
                with clock.waiting():
                    batch = feed.next(lambda: run.stop.asked)
            except UserError:
                raise
            except Exception as error:
                done, results = done - 1, None
                if log.pending:
                    counts = _counts(run, done)
                    jax.block_until_ready(before)
                    log.interval(done, clock.lap(done, brought()) | counts)
                log.flush()
                _save_without_input(run, state, done, start, error)
                break
            messages = run.channel.tell(batch.pop("skipped"), run.stop.asked)
            arguments = parallel.global_batch(batch | known(batch), run.mesh) | messages | weights
            state, metrics = steps(done, state, arguments)
            # The host stays one step ahead of the devices, so that they never wait for it, and no
            # further, so that batches do not pile up.
            jax.block_until_ready(before)
            before = metrics
            unread, stops = run.channel.hear(metrics, run.stop.asked)
            skipped.update(unread)
            log.add(metrics)
            callbacks.tell("on_step", done)
            watchdog.alive()
            if done == start + 2 and log.pending == 2:
                # The first step is done, and the second one tells its speed.
                writer.begin(start + 1, log.first())

            evaluates = done == run.steps or run.due(done, config.evaluation.every_samples)
            saves = evaluates or run.due(done, config.checkpoint.every_samples) or done in ends
            if stops:
                run.stop.asked = True  # by a process that may be another one
            pauses = saves or stops
            if pauses or done % config.log_every == 0:
                counts = _counts(run, done)
                waits = pauses or done == start + 1  # and there is a step to tell of
                if waits:
                    jax.block_until_ready(metrics)
                # Else the last step is still under way.
                log.interval(done, clock.lap(done if waits else done - 1, brought()) | counts)
            if pauses:
                watchdog.rest()
                log.flush()
                results = evaluate_unless_stopped(run, state) if evaluates else None
                if results and results.figures:
                    callbacks.tell("on_evaluation", done, results.figures)
                    writer.note(f"step {done}: {summary.headline(results.figures)}")
                run.save(state, done, results.figures if results else None)
                callbacks.tell("on_checkpoint", done, run.folder / FOLDER / str(done))
                clock.rest(done, brought())
                if stops or processes.by_first(lambda: run.stop.asked):
                    break
        skipped.update(run.channel.last())
        if skipped.summary():
            writer.note(skipped.summary())
        callbacks.tell("on_end", done)
    run.checkpoints.wait()
    callbacks.check()
    return state, results
