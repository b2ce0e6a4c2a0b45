"""How a run starts: opened, restored or initialised, and compiled before any data is read."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax.core import places, schema, versions
from mlip_jax.core import stages as core_stages
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import write_atomically
from mlip_jax.core.waiting import announced
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
from mlip_jax.recipes import lengths
from mlip_jax.storage.checkpoint import Checkpoints
from mlip_jax.storage.compiled import keep_compiled
from mlip_jax.storage.saved import has_checkpoints
from mlip_jax.storage.workdir import TOKENIZER, open_workdir
from mlip_jax.training import attention_choice, going_on, pace, repeatability, stages, summary
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training.callbacks import Callback
from mlip_jax.training.channel import Channel
from mlip_jax.training.run import SCORE, Run, check_best
from mlip_jax.training.signals import Stop
from mlip_jax.training.stages import Part, Steps
from mlip_jax.training.state import TrainState, initial_state
from mlip_jax.training.step import Step, compile_lowered, lower_step, make_train_step
from mlip_jax.training.teachers import open_teachers


@dataclass(frozen=True)
class Opened:
    """A run, and what its state and its steps are made of."""

    run: Run
    parts: tuple[Part, ...]
    pretrained: Mapping[str, Any]  # variables to start from; {} where there are none


def start(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    stop: Stop,
    stack: contextlib.ExitStack,
    source: Source | None = None,
    callbacks: Sequence[Callback] = (),
) -> tuple[Run, TrainState, Steps | None]:
    """Opens everything and compiles; no steps for a run that is finished.

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
    first = opened.parts[0]
    steps = _compile(opened, 0 if state is None else int(state.step))
    if state is None:
        if repeatability.is_probed(opened.run.mesh):
            step = steps.left[0][1]
            line = repeatability.probe(opened.run, step, lambda: _fresh(opened, first))
            opened.run.console.print(line)
        if pace.is_worth_it(opened.run):
            with announced("timing the training step", _say(opened.run)):
                line = pace.forecast(opened.run, steps, lambda part: _fresh(opened, part))
            opened.run.console.print(line)
        state = _initialise(opened)
    return opened.run, state, steps


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
    mesh = stages.make_mesh(config)
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
    run_stages = core_stages.of(config)
    with announced("preparing the tokenizer", console.print):
        tokenizer = _tokenizer(config, source, places.local(workdir))
    parts = stages.parts(run_stages, tokenizer, mesh)
    teachers = open_teachers(config, parts[-1].network, tokenizer, console.print)
    parts = stages.taught(parts, teachers, mesh)
    abstract = parts[0].abstract
    preprocessing = Preprocessing.of(config)
    home = parallel.home_mesh(mesh)
    model = Model(config, None, tokenizer, preprocessing, home)
    # A run that goes on has its weights, and its files may be gone by then.
    if config.start_from and not goes_on:
        going_on.check_branch(config, abstract)
    starts_with_weights = not (goes_on or config.start_from)
    weights = (
        pretrained.read(parts[0].model_config, abstract.evaluated) if starts_with_weights else {}
    )

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
        stages=run_stages,
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
    summary.print_length(run.console, config, source, run_stages)
    if not quiet:
        write_atomically(folder / TOKENIZER, tokenizer.to_json())
        if source.attribution:
            write_atomically(folder / "attribution.txt", source.attribution + "\n")
    return Opened(run, parts, weights)


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
        restored = run.checkpoints.restore(
            lambda step: opened.parts[core_stages.at(run.stages, step).number - 1].abstract
        )
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


def _compile(opened: Opened, done: int) -> Steps:
    """The compiled steps of what is left after `done`; prints the model and its memory."""
    run = opened.run
    left = [part for part in opened.parts if part.stage.last > done]
    compiled = {part.stage.number: _compile_part(run, part, part is left[0]) for part in left}
    return Steps(opened.parts, compiled, run.teachers)


def _compile_part(run: Run, part: Part, first: bool) -> jax.stages.Compiled:
    """The step of a stage; prints its memory, and of the first how the model is sharded."""
    config = part.stage.config
    with announced("choosing a form of attention", _say(run)):
        chosen = attention_choice.choose(config, run.mesh, run.folder)
    network = building.with_attention(part.network, chosen.forms)
    train_step = make_train_step(
        network,
        part.optimizer,
        config,
        Preprocessing.of(config),
        run.mesh,
        run.teachers,
        part.stage.place,
    )
    own = dataclasses.replace(run, config=config)
    with announced("compiling the training step", _say(run)):
        step = compile_step(train_step, own, part.abstract)
    if part.stage.count > 1:
        run.console.print(str(part.stage))
    if not first:
        summary.print_step(run.console, step, config, chosen.lines)
        return step
    summary.print_compiled(
        run.console,
        part.network,
        part.abstract.evaluated,
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
    run, first, weights = opened.run, opened.parts[0], opened.pretrained
    if run.config.start_from:
        state, lines = going_on.branch(run.config, first.abstract)
    else:
        state = _fresh(opened, first)
        lines = pretrained.summary(run.config, weights, first.abstract.evaluated)
    lines += adapters.describe(first.abstract.params)
    for line in lines:
        run.console.print(line)
    if lines and not jax.process_index():
        going_on.record_start(run.folder, lines)
    return state


def _fresh(opened: Opened, part: Part) -> TrainState:
    """A state that a stage may start from; of the first, the one that the run starts from."""
    weights = opened.pretrained if part.stage.number == 1 else {}
    # Pretrained arrays are arguments: captured, they would be constants of the program.
    init = jax.jit(
        lambda weights: initial_state(part.network, part.optimizer, part.model_config, weights),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, part.abstract),
    )
    state: TrainState = init(weights)
    return state
