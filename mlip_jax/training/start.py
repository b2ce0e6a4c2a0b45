"""How a run starts: opened, restored or initialised, and compiled before any data is read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax.core import places, schema, versions
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import write_atomically
from mlip_jax.core.waiting import announced
from mlip_jax.data.batches.training import workers_for
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.sets.held_out import Share, take
from mlip_jax.data.sets.opening import held_out_share, open_training, open_validation
from mlip_jax.data.sets.records import Source
from mlip_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from mlip_jax.devices import parallel
from mlip_jax.evaluations import suites
from mlip_jax.inference import Model
from mlip_jax.interop import pretrained
from mlip_jax.models import adapters, building
from mlip_jax.models.two_tower import TwoTower
from mlip_jax.recipes import lengths
from mlip_jax.storage.checkpoint import Checkpoints, has_checkpoints
from mlip_jax.storage.compiled import keep_compiled
from mlip_jax.storage.workdir import TOKENIZER, open_workdir
from mlip_jax.training import (
    accumulation,
    attention_choice,
    going_on,
    pace,
    repeatability,
    summary,
)
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training.callbacks import Callback
from mlip_jax.training.channel import Channel
from mlip_jax.training.run import SCORE, Run, check_best
from mlip_jax.training.signals import Stop
from mlip_jax.training.state import TrainState, abstract_state, initial_state
from mlip_jax.training.step import Step, compile_lowered, lower_step, make_train_step
from mlip_jax.training.teachers import open_teachers


@dataclass(frozen=True)
class Opened:
    """A run, and what its state and its step are made of."""

    run: Run
    network: TwoTower
    optimizer: optax.GradientTransformation
    abstract: TrainState
    pretrained: Mapping[str, Any]  # variables to start from; {} where there are none


def start(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    stop: Stop,
    stack: contextlib.ExitStack,
    source: Source | None = None,
    callbacks: Sequence[Callback] = (),
) -> tuple[Run, TrainState, Step | None]:
    """Opens everything and compiles; no step for a run that is finished.

    Args:
      config: validated.
      workdir: the run's folder.
      stop: listens for signals.
      stack: what is opened is closed with it.
      source: the training set, in place of what config.data.train names.
      callbacks: the user's.
    """
    opened = _open(config, workdir, stop, stack, source, callbacks)
    state = _restore(opened)
    if state is not None and int(state.step) >= opened.run.steps:
        return opened.run, state, None
    step = _compile(opened)
    if state is None:
        if repeatability.is_probed(opened.run.mesh):
            line = repeatability.probe(opened.run, step, lambda: _fresh(opened))
            opened.run.console.print(line)
        if pace.is_worth_it(opened.run):
            with announced("timing the training step", _say(opened.run)):
                line = pace.forecast(opened.run, step, lambda: _fresh(opened))
            opened.run.console.print(line)
        state = _initialise(opened)
    return opened.run, state, step


def _open(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    stop: Stop,
    stack: contextlib.ExitStack,
    source: Source | None,
    callbacks: Sequence[Callback],
) -> Opened:
    quiet = jax.process_index() > 0
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=quiet)
    mesh = parallel.make_mesh(config.mesh, config.batch_size)
    if mesh.size == 1 or jax.default_backend() != "cpu":
        keep_compiled(config.data.cache_dir)
    # Before the workdir is taken: a mistake in a path leaves none behind.
    cleaning = config.model.text.cleaning
    with announced(f"reading {config.data.train}", console.print):
        source, validation = _data(config.data, cleaning, source)
    goes_on = has_checkpoints(workdir)
    before = places.local(workdir) / "config.json"
    is_kept = goes_on and before.is_file()
    config = lengths.resolve(config, len(source), schema.from_file(before) if is_kept else None)
    suites.check(config)
    check_best(config)
    accumulation.check(config.batch_size, config.accumulation, mesh)
    attention_choice.check(config, mesh)
    with announced("preparing the tokenizer", console.print):
        tokenizer = _tokenizer(config, source, places.local(workdir))
    network = building.build_for(config, tokenizer)
    teachers = open_teachers(config, network, tokenizer, console.print)
    network = teachers.pupil(network)
    workers_for(config, len(parallel.local_rows(mesh, config.batch_size)), teachers.inputs)
    preprocessing = Preprocessing.of(config)
    home = parallel.home_mesh(mesh)
    model = Model(config, None, tokenizer, preprocessing, home)
    optimizer = optimizers.make(config)
    abstract = abstract_state(network, optimizer, config, mesh)
    # A run that goes on has its weights, and its files may be gone by then.
    if config.start_from and not goes_on:
        going_on.check_branch(config, abstract)
    starts_with_weights = not (goes_on or config.start_from)
    weights = pretrained.read(config, abstract.evaluated) if starts_with_weights else {}

    def accept(folder: Path, old: ConfigDict, new: ConfigDict) -> None:
        going_on.accept(folder, old, new, console)

    folder = stack.enter_context(open_workdir(workdir, config, accept))
    keep = config.checkpoint
    checkpoints = Checkpoints(
        folder,
        keep_last=keep.keep_last,
        keep_best=keep.keep_best,
        best=SCORE,
        keep_step=optimizers.last_step_before_cooldown(config),
    )
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
        checkpoints=stack.enter_context(checkpoints),
        console=console,
        stop=stop,
        channel=Channel(mesh),
        teachers=teachers,
        callbacks=() if quiet else tuple(callbacks),
    )
    summary.print_data(run.console, source, validation, jax.process_count())
    summary.print_length(run.console, config, source)
    if not quiet:
        write_atomically(folder / TOKENIZER, tokenizer.to_json())
        if source.attribution:
            write_atomically(folder / "attribution.txt", source.attribution + "\n")
    return Opened(run, network, optimizer, abstract, weights)


def _data(data: ConfigDict, cleaning: str, given: Source | None) -> tuple[Source, Source | None]:
    """The training set, or what of the given one is not held out, and the validation set."""
    if given is None:
        return open_training(data, cleaning), open_validation(data, cleaning)
    share = held_out_share(data)
    if not share:
        return given, open_validation(data, cleaning)
    return take(given, Share().without_last(share)), take(given, Share().last(share))


def _tokenizer(config: ConfigDict, source: Source, workdir: Path) -> Tokenizer:
    """The run's tokenizer; a vocabulary, trained or read, is the workdir's from then on."""
    text = config.model.text
    before = [places.local(config.start_from).expanduser()] if config.start_from else []
    for folder in (workdir, *before):
        saved = folder / TOKENIZER
        if not (text.tokenizer.startswith(("wordpiece", "folder:")) and saved.is_file()):
            continue
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


def _restore(opened: Opened) -> TrainState | None:
    """The state of the newest checkpoint, or None; says where the run stands."""
    run = opened.run
    with announced("reading the checkpoint", _say(run)):
        restored = run.checkpoints.restore(opened.abstract)
    if restored is None:
        return None
    state: TrainState
    state, extras = restored
    run.teachers.check_same(extras.get("teachers", []))
    done = int(state.step)
    goes_on = done < run.steps
    left = f"going on from step {done}" if goes_on else "it is finished"
    run.console.print(f"{places.shown(run.folder)} holds this run: {left}")
    changed = versions.changes(extras.get("versions", {}))
    if changed and goes_on:
        run.console.print(
            f"  saved with other versions ({', '.join(changed)}): what follows may differ in its "
            "last bits from a run of one version"
        )
    return state


def _compile(opened: Opened) -> Step:
    """The compiled step; prints the model, its memory and how it is sharded."""
    run, config = opened.run, opened.run.config
    with announced("choosing a form of attention", _say(run)):
        chosen = attention_choice.choose(config, run.mesh, run.folder)
    network = building.with_attention(opened.network, chosen.forms)
    train_step = make_train_step(
        network, opened.optimizer, config, run.preprocessing, run.mesh, run.teachers
    )
    with announced("compiling the training step", _say(run)):
        step = compile_step(train_step, run, opened.abstract)
    summary.print_compiled(
        run.console,
        opened.network,
        opened.abstract.evaluated,
        step,
        config,
        run.mesh,
        chosen.lines,
    )
    return step


def _say(run: Run) -> Callable[[str], None]:
    return run.console.print


def compile_step(train_step: Step, run: Run, abstract: TrainState) -> jax.stages.Compiled:
    """Compiles the step before any data is read; the state is donated."""
    batch_size = run.config.batch_size
    more = run.channel.shapes(batch_size) | run.teachers.shapes(batch_size, run.mesh)
    lowered = lower_step(run.channel.through(train_step), abstract, run.config, run.mesh, more)
    return compile_lowered(lowered, run.mesh)


def _initialise(opened: Opened) -> TrainState:
    """A fresh state on the run's devices; says what it starts from."""
    run, weights = opened.run, opened.pretrained
    if run.config.start_from:
        state, lines = going_on.branch(run.config, opened.abstract)
    else:
        state = _fresh(opened)
        lines = pretrained.summary(run.config, weights, opened.abstract.evaluated)
    lines += adapters.describe(opened.abstract.params)
    for line in lines:
        run.console.print(line)
    if lines and not jax.process_index():
        going_on.record_start(run.folder, lines)
    return state


def _fresh(opened: Opened) -> TrainState:
    run = opened.run
    # Pretrained arrays are arguments: captured, they would be constants of the program.
    init = jax.jit(
        lambda weights: initial_state(opened.network, opened.optimizer, run.config, weights),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, opened.abstract),
    )
    state: TrainState = init(opened.pretrained)
    return state
