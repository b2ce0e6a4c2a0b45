"""A config made ready to be timed: compiled, its state on the devices, its input at hand."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mlip_jax.benchmark.results import Result, Timing, summarize
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.data.batches.teaching import TEXT_FEATURES, TeacherInputs
from mlip_jax.data.batches.training import train_batches
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.sets.opening import open_training
from mlip_jax.data.sets.records import Source
from mlip_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from mlip_jax.devices import parallel
from mlip_jax.models import building
from mlip_jax.training import attention_choice
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training.state import abstract_state, initial_state
from mlip_jax.training.step import compile_lowered, lower_step, make_train_step, random_rows
from mlip_jax.training.step_cost import GIB, Memory, network_of, step_flops, teachers_of
from mlip_jax.training.teachers import Teachers


class Contender:
    """The training step of a config, on the devices of this host."""

    def __init__(self, name: str, config: ConfigDict, real_input: bool) -> None:
        """Compiles the step and makes its state and its first batch.

        Args:
          name: what the table calls it.
          config: validated.
          real_input: whether batches come from config.data, not from one random batch.

        Raises:
          UserError: when the step does not fit the memory; it names a batch that does.
        """
        self.name = name
        self.config = config
        self._mesh = parallel.make_mesh(config.mesh, config.batch_size)
        self._real_input = real_input
        network, optimizer = network_of(config), optimizers.make(config)
        teachers = teachers_of(config, network)
        network = teachers.pupil(network)
        abstract = abstract_state(network, optimizer, config, self._mesh)
        self.model_flops = step_flops(network, abstract.evaluated, config, teachers)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
        attention_choice.check(config, self._mesh)
        self.attention = attention_choice.choose(config, self._mesh).forms
        network = building.with_attention(network, self.attention)
        start = time.perf_counter()
        self._step, self.memory = _compile(
            network, optimizer, config, self._mesh, abstract, teachers
        )
        self.compile_seconds = time.perf_counter() - start
        init = jax.jit(
            lambda: initial_state(network, optimizer, config),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
        )
        self._state = init()
        vocab_size = network.text["vocab_size"]
        self._batches = (
            _real(config, self._mesh, teachers.inputs)
            if real_input
            else _random(config, self._mesh, vocab_size, teachers)
        )
        self._teachers = teachers.placed(self._mesh)

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self._batches.close()

    def run(self, steps: int) -> list[Timing]:
        """Trains some steps. As in a run, the host is one step ahead of the devices.

        Raises:
          RunError: when a device has no more memory.
        """
        timings, before = [], None
        jax.block_until_ready(self._state)
        last = time.perf_counter()
        try:
            for index in range(steps + 1):
                waited = 0.0
                after = None
                if index < steps:
                    start = time.perf_counter()
                    batch = parallel.global_batch(next(self._batches), self._mesh)
                    waited = time.perf_counter() - start
                    self._state, after = self._step(self._state, batch | self._teachers)
                if before is not None:
                    jax.block_until_ready(before)
                    now = time.perf_counter()
                    timings.append(Timing(now - last, waited))
                    last = now
                before = after
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise RunError(
                f"{self.name}: out of memory at batch {self.config.batch_size}: halve "
                "--config.batch_size, or --config.model.image.remat=True"
            ) from error
        return timings

    def result(self, timings: list[Timing], peak: float) -> Result:
        """What the timed steps come to.

        Args:
          timings: of the timed steps.
          peak: FLOP/s of this host's devices together, measured.
        """
        return summarize(
            timings,
            name=self.name,
            batch_size=self.config.batch_size,
            dtype=building.compute_dtype(self.config).name,
            parameters=self.parameters,
            input="data" if self._real_input else "random",
            attention=self.attention,
            model_flops=self.model_flops,
            matrix_peak=peak,
            compile_seconds=self.compile_seconds,
            memory=self.memory.total,
            peak_memory=_peak_memory(),
        )


def _compile(
    network: Any,
    optimizer: Any,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    abstract: Any,
    teachers: Teachers,
) -> tuple[jax.stages.Compiled, Memory]:
    program: tuple[jax.stages.Compiled, Memory] | None
    try:
        program = _program(network, optimizer, config, mesh, abstract, teachers)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        program = None
    limit = device_memory()
    need = program[1].total if program else 0
    if program and need <= limit:
        return program
    fitting_batch = _fitting(network, optimizer, config, mesh, abstract, teachers, limit)
    needs = f"{need / GIB:.1f} GiB a device" if need else "more memory a device than there is"
    raise UserError(
        f"the step at config.batch_size={config.batch_size} needs {needs}, and there are "
        f"{limit / GIB:.1f} GiB: "
        + (f"--config.batch_size={fitting_batch} fits" if fitting_batch else "no batch fits")
        + "; --config.accumulation and --config.model.image.remat=True need less"
    )


def _fitting(
    network: Any,
    optimizer: Any,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    abstract: Any,
    teachers: Teachers,
    limit: float,
) -> int:
    """The largest halving of the batch that fits; 0 when none does."""
    unit = parallel.batch_shards(mesh, config.accumulation)
    smaller = copy.deepcopy(config)
    while smaller.batch_size // 2 >= max(unit, 2):
        smaller.batch_size = smaller.batch_size // 2 // unit * unit
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _, memory = _program(network, optimizer, smaller, mesh, abstract, teachers)
            if memory.total <= limit:
                return smaller.batch_size
    return 0


def _program(
    network: Any,
    optimizer: Any,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    abstract: Any,
    teachers: Teachers,
) -> tuple[jax.stages.Compiled, Memory]:
    """The compiled step, and the memory that it takes."""
    step = make_train_step(network, optimizer, config, Preprocessing.of(config), mesh, teachers)
    more = teachers.shapes(config.batch_size, mesh)
    compiled = compile_lowered(lower_step(step, abstract, config, mesh, more), mesh)
    return compiled, Memory.of(compiled)


def device_memory() -> float:
    """Bytes that a device of this host has; virtual CPU devices share the host's."""
    if limit := parallel.memory_limit():
        return float(limit)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory / jax.local_device_count()


def _peak_memory() -> int | None:
    """The most bytes that the first device has held; None where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def _random(
    config: ConfigDict, mesh: jax.sharding.Mesh, vocab_size: int, teachers: Teachers
) -> Generator[dict[str, np.ndarray]]:
    """One random batch of this process's rows, again and again."""
    batch = random_rows(config, mesh, vocab_size, config.seed)
    batch |= teachers.random_rows(len(batch["record"]), config.seed)
    while True:
        yield batch


def _real(
    config: ConfigDict, mesh: jax.sharding.Mesh, teachers: TeacherInputs
) -> Generator[dict[str, np.ndarray]]:
    """The batches of a run of the config."""
    rows = parallel.local_rows(mesh, config.batch_size)
    source, tokenizer = open_input(config)
    batches = train_batches(config, source, tokenizer, start_step=0, rows=rows, teachers=teachers)
    # In their place a run has looked up what it knows of its captions before.
    known = random_rows(config, mesh, tokenizer.vocab_size, config.seed)
    known = {key: known[key] for key in (TEXT_FEATURES,) if key in known}
    with contextlib.closing(batches):
        for batch in batches:
            del batch["skipped"]
            yield batch | known


def open_input(config: ConfigDict) -> tuple[Source, Tokenizer]:
    """The dataset to train on, and the tokenizer of a run of the config."""
    text = config.model.text
    source = open_training(config.data, text.cleaning)
    tokenizer = load_tokenizer(
        text.tokenizer,
        cleaning=text.cleaning,
        vocab_size=text.vocab_size,
        captions=source.captions,
    )
    return source, tokenizer
