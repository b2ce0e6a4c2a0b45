"""The checkpoints of a run.

A checkpoint is one folder `checkpoints/STEP`, committed by Orbax in one rename:
  state/       the training state, an array a tensor, restorable on any mesh
  extras/      JSON: the step, the config, the tokenizer, versions, the commit
  metrics/     JSON: what the best checkpoints are chosen by
  files.json   size and CRC-32 of the files above: Orbax alone reads a flipped bit as a weight

In a bucket files.json is written last: a folder without it is no checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mlip_jax.core import places
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.files import read_json
from mlip_jax.devices import processes
from mlip_jax.storage import seal, trees
from mlip_jax.storage.saved import FOLDER, NUMBER, STATE, fetch_all_but_states, saved_steps, warn
from mlip_jax.storage.workdir import origin
from mlip_jax.storage.writes import cannot_write, is_no_matter_of_course, leave_late_writes_alone

_ASIDE = "damaged-"
_LARGE = "state/"
_ORBAX_FILE = "_CHECKPOINT_METADATA"
# What Orbax expects of that file; it writes it after the seal, and can do without.
_ORBAX_KINDS = {
    "item_handlers": dict,
    "metrics": dict,
    "performance_metrics": dict,
    "init_timestamp_nsecs": int,
    "commit_timestamp_nsecs": int,
    "custom_metadata": dict,
}


class Checkpoints:
    """The checkpoints of one run: saved while training goes on, restored bit for bit.

    All processes of a run construct it and call it together. Close it, or use it in a `with`.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        best: str = "",
        keep_step: int = 0,
    ) -> None:
        """Opens or makes `workdir/checkpoints`; clears what an interrupted save left there.

        Args:
          workdir: the run's folder.
          keep_last: how many of the newest checkpoints stay.
          keep_best: how many of the best stay besides, of those saved with the metric `best`.
          best: name of a metric of which more is better; "": none.
          keep_step: a step whose checkpoint stays too; 0: none.

        Raises:
          UserError: if keep_last is less than 1, or the folder cannot be used.
        """
        if keep_last < 1:
            raise UserError(f"config.checkpoint.keep_last={keep_last} must be at least 1")
        self._folder = places.local(workdir).absolute() / FOLDER
        self._best = best
        self._saving = 0
        # Of a place in a bucket each process has a copy of its own, and writes what it holds.
        in_bucket = places.mirror_of(self._folder) is not None
        self._apart = jax.process_count() > 1 and in_bucket
        fetch_all_but_states(self._folder)
        # Before Orbax reads the small files of all checkpoints: one that is damaged would end it.
        processes.by_first(self._make_readable)
        fetch_all_but_states(self._folder)
        processes.by_first(self._remove_dropped)
        leave_late_writes_alone()
        if in_bucket:
            logging.getLogger("absl").addFilter(is_no_matter_of_course)
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep_last)]
        if best and keep_best > 0:
            policies.append(ocp.checkpoint_managers.BestN(get_metric_fn=self._score, n=keep_best))
        if keep_step:
            policies.append(ocp.checkpoint_managers.CustomSteps([keep_step]))
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        together = ocp.options.MultiprocessingOptions(primary_host=None if self._apart else 0)
        # Files of OCDBT hold parts of several processes, which have to see each other's.
        state = ocp.StandardCheckpointHandler(
            multiprocessing_options=together, use_ocdbt=not self._apart
        )
        extras = ocp.JsonCheckpointHandler(multiprocessing_options=together)
        registry.add(STATE, ocp.args.StandardSave, state)
        registry.add(STATE, ocp.args.StandardRestore, state)
        registry.add("extras", ocp.args.JsonSave, extras)
        registry.add("extras", ocp.args.JsonRestore, extras)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                best_fn=self._score,  # without it Orbax keeps no metrics
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                multiprocessing_options=together,
                async_options=ocp.AsyncOptions(
                    # One process's word that they are made would be taken for that of all.
                    create_directories_asynchronously=not self._apart,
                    post_finalization_callback=self._seal,
                ),
            ),
            handler_registry=registry,
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: Any,
        extras: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves; returns when the state is copied, so that it may be donated to the next step.

        A step that is already saved is left as it is.

        Args:
          step: the number of steps done.
          state: a pytree of arrays.
          extras: what JSON can hold. The step, versions and the commit are added.
          metrics: figures of an evaluation at this step, if there was one.

        Raises:
          RunError: if this save or the one before it could not be written. The checkpoints
            before them are good.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        self._saving = step
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    extras=ocp.args.JsonSave({**extras, "step": step, **origin()}),
                ),
                metrics={key: float(value) for key, value in (metrics or {}).items()},
                force=True,
            )

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest good checkpoint; a damaged one is set aside with a warning.

        Args:
          abstract_state: the state as `jax.ShapeDtypeStruct`s with shardings, or a function that
            gives that of a step.

        Returns:
          The state, placed as asked, and the extras; None where nothing was saved.

        Raises:
          UserError: if the checkpoint is of another model.
          RunError: if there are checkpoints and none can be read.
        """
        self.wait()
        for step in sorted(self._manager.all_steps(), reverse=True):
            if self._put_aside_if_damaged(step):
                continue
            tree = self._manager.item_metadata(step)["state"].tree
            wanted = abstract_state(step) if callable(abstract_state) else abstract_state
            trees.check_tensors(self._folder / str(step), tree, wanted)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(trees.as_saved(tree, wanted)),
                    extras=ocp.args.JsonRestore(),
                ),
            )
            return trees.as_wanted(restored.state, wanted), restored.extras
        if any(self._folder.glob(f"{_ASIDE}*")):
            raise RunError(f"every checkpoint in {self._folder} is damaged: give a new --workdir")
        return None

    def wait(self) -> None:
        """Returns when the save under way is on disk.

        Raises:
          RunError: if it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()
            processes.by_first(self._remove_dropped)

    def close(self) -> None:
        """Finishes the save under way and frees the threads.

        Raises:
          RunError: if the save could not be written.
        """
        with self._writing():
            self._manager.close()

    def _make_readable(self) -> None:
        """Makes the folder; sets aside checkpoints whose small files are damaged."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot use {self._folder}: {error.strerror}") from error
        for step in saved_steps(self._folder.parent):
            path = self._folder / str(step)
            if problem := seal.damage(path, unread=_LARGE):
                _set_aside(path, problem)
            elif not _is_readable(path / _ORBAX_FILE):
                places.remove(path / _ORBAX_FILE)

    def _score(self, metrics: Mapping[str, float]) -> float:
        value = metrics.get(self._best, -math.inf)
        return -math.inf if math.isnan(value) else value

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = cannot_write(error)
            if not reason:
                raise
            raise RunError(
                f"cannot write the checkpoint of step {self._saving} to {self._folder}: {reason}; "
                "the checkpoints before it are good, and the same command goes on from them"
            ) from error

    def _seal(self) -> None:
        """Records the files of the save under way, just before Orbax commits it.

        In a bucket the record is the commit: the files are there before it, of all processes.
        """
        drafts = [
            path
            for path in self._folder.iterdir()
            if path.name == str(self._saving) or path.name.startswith(f"{self._saving}.")
        ]
        if len(drafts) != 1:
            raise RunError(f"cannot find the draft of checkpoint {self._saving}: {drafts}")
        draft, target = drafts[0], self._folder / str(self._saving)
        places.flush(self._folder)  # what was logged until this step
        places.publish(draft, target)
        files = seal.files_of(draft)
        everyones = processes.to_zero(files) if self._apart else [files]
        if not everyones:
            return
        for others in everyones[1:]:
            # What several have written, such as the shapes, is as this process has it.
            for name in sorted(name for name in others if others[name] != files.get(name)):
                if name in files:
                    places.publish(draft / name, target / name, anew=True)
            files = others | files
        seal.write(draft, files)
        places.publish(draft / seal.NAME, target / seal.NAME)

    def _put_aside_if_damaged(self, step: int) -> bool:
        path = self._folder / str(step)
        places.fetch(path)

        def put_aside() -> bool:
            problem = seal.damage(path)
            if problem:
                _set_aside(path, problem)
            return bool(problem)

        damaged = processes.by_first(put_aside)
        if damaged:
            fetch_all_but_states(self._folder)
            self._manager.reload()
        return damaged

    def _remove_dropped(self) -> None:
        """Removes checkpoints from a bucket that are not kept here, or that have no seal there."""
        for name in places.names(self._folder):
            if NUMBER.fullmatch(name) and not (self._folder / name).exists():
                places.remove(self._folder / name)


def _set_aside(path: Path, problem: str) -> None:
    """Renames a damaged checkpoint: the way is free for its step to be saved again."""
    aside = path.with_name(f"{_ASIDE}{path.name}")
    warn(f"checkpoint {path} is damaged ({problem}): set aside as {aside.name}, not used")
    places.remove(aside)
    places.move(path, aside)


def _is_readable(path: Path) -> bool:
    """Whether Orbax can read its own file of a checkpoint, or finds none."""
    try:
        values = read_json(path, missing={})
    except UserError:
        return False
    return all(isinstance(values.get(key, kind()), kind) for key, kind in _ORBAX_KINDS.items())
