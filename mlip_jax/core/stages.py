"""A run in stages: each is a plain config, with some keys replaced, from one sample to another.

`config.stages` holds a text a stage: its share of the run's samples, then KEY=VALUE for what it
changes, such as "0.9 image_size=32 context_length=16 batch_size=512".
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.registry import IMAGE_ENCODERS
from mlip_jax.core.schema import flatten, set_key

_RATE, _WARMUP = "optimizer.learning_rate", "optimizer.warmup_samples"
_IMAGE_SIZE, _CONTEXT = "model.image.image_size", "model.text.context_length"
# What a stage may change, by the names that it takes; the whole keys are taken as well.
KEYS = {
    key.rpartition(".")[2]: key
    for key in (
        "batch_size",
        "accumulation",
        _IMAGE_SIZE,
        "model.image.patch_dropout",
        _CONTEXT,
        "data.caption.word_dropout",
        _RATE,
        _WARMUP,
    )
}
_WARMUP_SHARE = 20
_EXAMPLE = "0.9 image_size=32 batch_size=512"


@dataclass(frozen=True)
class Place:
    """Where the steps of a plain config lie in its run.

    Attributes:
      first: steps of the run before it.
      samples: pairs of the run before it.
      schedule: pairs of the run before its learning rate's schedule.
    """

    first: int = 0
    samples: int = 0
    schedule: int = 0


WHOLE = Place()


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
      number: from 1.
      count: of the run's stages.
      config: plain: with the stage's keys, and no stages. Its samples are those of the learning
        rate's schedule, which several stages may share.
      place: where it begins.
      last: steps of the run when it ends.
      changes: what it changes, by the short names.
    """

    number: int
    count: int
    config: ConfigDict
    place: Place
    last: int
    changes: dict[str, Any]

    @property
    def steps(self) -> int:
        """Its steps."""
        return self.last - self.place.first

    def seen(self, done: int) -> int:
        """Pairs that the run has seen after `done` of its steps, of which some are the stage's."""
        return int(self.place.samples + (done - self.place.first) * self.config.batch_size)

    def __str__(self) -> str:
        changes = "".join(f", {name} {value}" for name, value in self.changes.items())
        return (
            f"stage {self.number} of {self.count}: samples {self.place.samples:,} to "
            f"{self.seen(self.last):,} in {self.steps:,} steps of {self.config.batch_size:,}"
            f"{changes}"
        )


def plain(config: ConfigDict) -> list[ConfigDict]:
    """A config for each stage, with its keys and no stages; [] for a config without stages.

    Raises:
      UserError: for what is no stage, a key that a stage cannot change, shares that do not add up
        to 1, or sizes that a stage cannot have.
    """
    tables = _tables(config)
    configs = []
    for number, (_, changes) in enumerate(tables, 1):
        _check_sizes(config, number, number == len(tables), changes)
        configs.append(_replaced(config, changes))
    return configs


def of(config: ConfigDict) -> tuple[Stage, ...]:
    """The stages of a run; one, all of it, of a config without any.

    A stage begins at a whole number of its own batches: up to one batch of pairs is passed over at
    a border. One that names a learning rate begins a schedule of its own, which lasts until the
    next such stage; its warm-up is what it names, none by default and a twentieth of the schedule
    by -1, and a cooldown has the same share of each schedule.

    Args:
      config: validated, with its length in samples.

    Raises:
      UserError: as `plain`, and for a share of less than a step.
    """
    tables = _tables(config) or [(1.0, {})]
    borders, steps, samples, share = [], 0, 0, 0.0
    for number, (part, changes) in enumerate(tables, 1):
        share += part
        batch = changes.get("batch_size", config.batch_size)
        target = config.samples if number == len(tables) else round(share * config.samples)
        begin = -(-samples // batch) * batch
        count = (target - begin) // batch
        if count < 1 and config.stages:
            raise UserError(
                f"config.stages: stage {number} has {part:g} of {config.samples:,} samples, which "
                f"is no step of {batch:,}"
            )
        borders.append((steps, begin, steps + count))
        steps, samples = steps + count, begin + count * batch
    stages = []
    for number, ((_, changes), (first, begin, last)) in enumerate(
        zip(tables, borders, strict=True), 1
    ):
        schedule, settings = _schedule(config, tables, borders, number - 1)
        stage = _replaced(config, settings | changes)
        if schedule.stop - schedule.start != config.samples:
            stage.samples = schedule.stop - schedule.start
            cooldown = config.optimizer.cooldown_samples
            if cooldown > 0:
                stage.optimizer.cooldown_samples = cooldown * stage.samples // config.samples
        if stage.optimizer.warmup_samples == -1:
            stage.optimizer.warmup_samples = stage.samples // _WARMUP_SHARE
        place = Place(first, begin, schedule.start)
        stages.append(Stage(number, len(tables), stage, place, last, changes))
    return tuple(stages)


@contextlib.contextmanager
def naming(number: int, count: int) -> Iterator[None]:
    """Names the stage in a UserError about its config, where a run has several."""
    try:
        yield
    except UserError as error:
        if count == 1:
            raise
        raise UserError(f"config.stages: in stage {number}, {error}") from None


def at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of a run's step, counted from 1; what is beyond belongs to the last."""
    return next((stage for stage in stages if step <= stage.last), stages[-1])


def _schedule(
    config: ConfigDict,
    tables: Sequence[tuple[float, dict[str, Any]]],
    borders: Sequence[tuple[int, int, int]],
    index: int,
) -> tuple[range, dict[str, Any]]:
    """The samples of the schedule that a stage is in, and the settings of its first stage."""
    starts = [
        0,
        *(number for number in range(1, len(tables)) if "learning_rate" in _of(tables, number)),
    ]
    start = max(number for number in starts if number <= index)
    following = [number for number in starts if number > index]
    settings = {
        name: value
        for name, value in _of(tables, start).items()
        if name in ("learning_rate", "warmup_samples")
    }
    if start:
        settings = {"warmup_samples": 0} | settings
    end = borders[following[0]][1] if following else config.samples
    return range(borders[start][1], end), settings


def _of(tables: Sequence[tuple[float, dict[str, Any]]], index: int) -> dict[str, Any]:
    return tables[index][1]


def _replaced(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    stage = copy.deepcopy(config)
    stage.stages = ()
    for name, value in changes.items():
        set_key(stage, KEYS[name], value)
    return stage


def _tables(config: ConfigDict) -> list[tuple[float, dict[str, Any]]]:
    """Each stage's share, and what it changes by the short names."""
    tables = [_read(config, number, text) for number, text in enumerate(config.stages, 1)]
    total = sum(share for share, _ in tables)
    if tables and not math.isclose(total, 1, abs_tol=1e-6):
        raise UserError(f"config.stages: the shares add up to {total:g}: they must be 1 in all")
    return tables


def _read(config: ConfigDict, number: int, text: str) -> tuple[float, dict[str, Any]]:
    share, *settings = text.split() or [""]
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise UserError(
            f"config.stages: stage {number}, {text!r}, must begin with its share of the run, above "
            f"0 and at most 1, such as {_EXAMPLE!r}"
        )
    flat = flatten(config.to_dict())
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, given = setting.partition("=")
        name = key.rpartition(".")[2]
        if not equals or key not in (name, KEYS.get(name)) or name not in KEYS:
            raise UserError(
                f"config.stages: stage {number} cannot change {key!r}: expected NAME=VALUE with a "
                f"name of {', '.join(KEYS)}{suggestion(name, KEYS)}"
            )
        if name in changes:
            raise UserError(f"config.stages: stage {number} gives {name} twice")
        kind = type(flat[KEYS[name]])
        try:
            changes[name] = kind(given)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise UserError(
                f"config.stages: stage {number}, {name}={given!r}: expected {expected}"
            ) from None
        least = -1 if name == "warmup_samples" else 1
        if kind is int and changes[name] < least:
            raise UserError(
                f"config.stages: stage {number}, {name}={given}: must be at least {least}"
            )
    if number > 1 and "warmup_samples" in changes and "learning_rate" not in changes:
        raise UserError(
            f"config.stages: stage {number} gives warmup_samples without a learning_rate, whose "
            "schedule it would begin: give both"
        )
    return value, changes


def _check_sizes(config: ConfigDict, number: int, last: bool, changes: dict[str, Any]) -> None:
    where = f"config.stages: stage {number}"
    shown = ("image_size", "context_length", "word_dropout")
    for name, value in changes.items():
        key = KEYS[name]
        own = flatten(config.to_dict())[key]
        if last and value != own and name in shown[:2]:
            raise UserError(
                f"{where} is the last, whose {name} is the model's: set config.{key}={value} "
                f"in place of {own}, and leave {name} out"
            )
        if value != own and name in shown and config.teacher:
            raise UserError(
                f"{where} changes {name}, and config.teacher looks at the run's own: leave one of "
                "them out"
            )
    length = changes.get("context_length", config.model.text.context_length)
    if length > config.model.text.context_length:
        raise UserError(
            f"{where}, context_length={length}: a stage's texts are at most as long as the "
            f"config's, {config.model.text.context_length}"
        )
    if length < config.model.text.context_length and config.model.text.embedded == "once":
        raise UserError(
            f"{where}, context_length={length}: config.model.text.embedded='once' has one length "
            "of texts; set it to 'each_step'"
        )
    encoder = IMAGE_ENCODERS[config.model.image.architecture]
    patch = config.model.image.patch_size
    if encoder.patch_tokens and changes.get("image_size", patch) % patch:
        raise UserError(
            f"{where}, image_size={changes['image_size']}: is no multiple of "
            f"config.model.image.patch_size={patch}"
        )
