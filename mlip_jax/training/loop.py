"""The training loop: from a config and a folder to a trained, evaluated, reported model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax import versions
from mlip_jax.config import UserError
from mlip_jax.data.batches.training import SkipCounter, train_batches
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.sets.mixtures import samples_by_set
from mlip_jax.data.sets.opening import open_training, open_validation
from mlip_jax.data.sets.records import Source
from mlip_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from mlip_jax.devices import cluster, parallel, processes
from mlip_jax.evaluations import Results
from mlip_jax.evaluations import suites as evaluations
from mlip_jax.inference import Model
from mlip_jax.interop import pretrained
from mlip_jax.models import building
from mlip_jax.storage.checkpoint import Checkpoints, has_checkpoints
from mlip_jax.storage.compiled import keep_compiled
from mlip_jax.storage.workdir import TOKENIZER, open_workdir, write_atomically
from mlip_jax.training import attention_choice, summary
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training.channel import Channel, Step
from mlip_jax.training.evaluation import evaluate_unless_stopped, finish
from mlip_jax.training.log import Log
from mlip_jax.training.metrics import Clock, MetricWriter
from mlip_jax.training.run import SCORE, Run
from mlip_jax.training.signals import Stop
from mlip_jax.training.state import TrainState, abstract_state, initial_state
from mlip_jax.training.step import Metrics, lower_step, make_train_step


def train(config: ConfigDict, workdir: str | Path) -> int:
    """Trains, or goes on training, then evaluates and writes the report.

    Args:
      config: validated.
      workdir: the run's folder; one that holds this run is resumed.

    Returns:
      0 when the run is finished; 75 when a signal stopped it early with everything saved.

    Raises:
      UserError: for a config, a data set or a workdir that cannot be used.
      RunError: when the loss is no longer finite, the disk is full, or processes do not find each
        other.
    """
    cluster.start()
    with processes.together():
        return _train(config, workdir)


def _train(config: ConfigDict, workdir: str | Path) -> int:
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop().listening())
        with stop.leaving():
            run, state, step = _start(config, workdir, stop, stack)
        results = None
        if step:
            state, results = run_steps(run, step, state, int(state.step))
        return finish(run, state, results)


def _start(
    config: ConfigDict, workdir: str | Path, stop: Stop, stack: contextlib.ExitStack
) -> tuple[Run, TrainState, Step | None]:
    """Opens everything and compiles; no step for a run that is finished."""
    mesh = parallel.make_mesh(config.mesh, config.batch_size)
    if mesh.size == 1 or jax.default_backend() != "cpu":
        keep_compiled(config.data.cache_dir)
    # Before the workdir is taken: a mistake in a path leaves none behind.
    cleaning = config.model.text.cleaning
    source = open_training(config.data, cleaning)
    validation = open_validation(config.data, cleaning)
    evaluations.check(config)
    attention_choice.check(config, mesh)
    tokenizer = _tokenizer(config, source, Path(workdir))
    network = building.build_for(config, tokenizer)
    preprocessing = Preprocessing.of(config)
    home = parallel.home_mesh(mesh)
    model = Model(config, None, tokenizer, preprocessing, home)
    optimizer = optimizers.make(config)
    abstract = abstract_state(network, optimizer, config, mesh)
    # A run that goes on has its weights, and its files may be gone by then.
    taken = {} if has_checkpoints(workdir) else pretrained.read(config, abstract.evaluated)
    folder = stack.enter_context(open_workdir(workdir, config))
    run = Run(
        config=config,
        folder=folder,
        mesh=mesh,
        source=source,
        validation=validation,
        tokenizer=tokenizer,
        preprocessing=preprocessing,
        home=home,
        model=model,
        checkpoints=stack.enter_context(
            Checkpoints(
                folder,
                keep_last=config.checkpoint.keep_last,
                keep_best=config.checkpoint.keep_best,
                best=SCORE,
            )
        ),
        console=Console(
            stderr=True,
            highlight=False,
            markup=False,
            soft_wrap=True,
            quiet=jax.process_index() > 0,
        ),
        stop=stop,
        channel=Channel(mesh),
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
        changed = versions.changes(restored[1].get("versions", {}))
        if changed and start < run.steps:
            run.console.print(
                f"  saved with other versions ({', '.join(changed)}): what follows may differ in "
                "its last bits from a run of one version"
            )
    if start >= run.steps:
        return run, state, None
    chosen = attention_choice.choose(config, mesh, folder)
    trained = building.with_attention(network, chosen.forms)
    step = compile_step(
        make_train_step(trained, optimizer, config, preprocessing, mesh), run, abstract
    )
    summary.print_compiled(
        run.console, network, abstract.evaluated, step, config, mesh, chosen.lines
    )
    if state is None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        # Pretrained arrays are arguments: captured, they would be constants of the program.
        init = jax.jit(
            lambda taken: initial_state(network, optimizer, config, taken),
            out_shardings=shardings,
        )
        state = init(taken)
        for line in pretrained.summary(config, taken, abstract.evaluated):
            run.console.print(line)
    return run, state, step


def _tokenizer(config: ConfigDict, source: Source, workdir: Path) -> Tokenizer:
    """The run's tokenizer; a vocabulary, trained or read, is the workdir's from then on."""
    text, saved = config.model.text, workdir / TOKENIZER
    if text.tokenizer.startswith(("wordpiece", "folder:")) and saved.is_file():
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
    told = run.channel.shapes(run.config.batch_size)
    lowered = lower_step(run.channel.through(train_step), abstract, run.config, run.mesh, told)
    return lowered.compile()


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
        rows=parallel.local_rows(run.mesh, config.batch_size),
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
            told = run.channel.tell(batch.pop("skipped"), run.stop.asked)
            state, metrics = step(state, parallel.global_batch(batch, run.mesh) | told)
            # The host stays one step ahead of the devices, so that they never wait for it, and no
            # further, so that batches do not pile up.
            jax.block_until_ready(before)
            before = metrics
            unread, stops = run.channel.hear(metrics, run.stop.asked)
            skipped.update(unread)
            log.add(metrics)
            writer.advance(done)

            evaluates = done == run.steps or run.due(done, config.evaluation.every_samples)
            saves = evaluates or run.due(done, config.checkpoint.every_samples)
            if stops:
                run.stop.asked = True  # by a process that may be another one
            pauses = saves or stops
            if pauses or done % config.log_every == 0:
                counts = samples_by_set(run.source, done * config.batch_size)
                log.interval(done, clock.lap(log.pending) | counts)
            if pauses:
                log.flush()
                results = evaluate_unless_stopped(run, state) if evaluates else None
                if results and results.figures:
                    writer.evaluation(done, results.figures)
                    writer.note(f"step {done}: {summary.headline(results.figures)}")
                run.save(state, done, results.figures if results else None)
                clock.lap(0)
                if stops or processes.by_first(lambda: run.stop.asked):
                    break
        skipped.update(run.channel.last())
        if skipped.summary():
            writer.note(skipped.summary())
    run.checkpoints.wait()
    return state, results
