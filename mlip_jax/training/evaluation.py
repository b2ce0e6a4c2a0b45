"""What a run finds about its model: at intervals, and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from mlip_jax.core import places
from mlip_jax.core.stopping import STOPPED, leave_at_end, owns_process
from mlip_jax.core.waiting import announced
from mlip_jax.devices import processes
from mlip_jax.evaluations import Results, evaluate, suites, table
from mlip_jax.evaluations.verb import file_results
from mlip_jax.interop import positions
from mlip_jax.models import building
from mlip_jax.reports import write_report
from mlip_jax.training.run import Run
from mlip_jax.training.signals import Stopped, in_thread
from mlip_jax.training.state import TrainState


def finish(run: Run, state: TrainState, results: Results | None) -> tuple[int, dict[str, float]]:
    """Evaluates the finished model, writes the results and the report, in process 0.

    `results` are what the last step has already given by the fast families.

    Returns:
      The exit code, 0, or 75 when a signal came before the end; and the figures, in process 0.
    """
    variables, done = _variables(run, state), int(state.step)
    figures: dict[str, float] = {}

    def unless_stopped() -> int:
        try:
            with run.stop.interrupting(saved=True):
                figures.update(_finish(run, variables, done, results).figures)
        except Stopped:
            run.console.print(f"stopped by a signal; everything is saved at step {done}")
            if jax.process_count() == 1:
                leave_at_end()
            return STOPPED
        return 0

    return processes.by_first(unless_stopped), figures


def _finish(run: Run, variables: Any, done: int, results: Results | None) -> Results:
    if results is None:
        results = _evaluate(run, variables)
    results.update(_evaluate(run, variables, suites.the_others(), progress=True))
    results.step = done
    path = file_results(run.folder, results)
    model = run.model.with_variables(variables)
    with announced("writing the report", run.console.print):
        report = write_report(run.folder, model, run.validation or run.source, run.source)
    run.console.print(table(results))
    if not results.figures:
        run.console.print(suites.WITHOUT_VALIDATION)
    run.console.print(f"results: {places.shown(path)}\nreport:  {places.shown(report)}")
    return results


def _evaluate(
    run: Run,
    variables: Any,
    families: Sequence[str] | None = None,
    progress: bool = False,
) -> Results:
    """By some families; None: by those that are fast enough to be repeated."""
    families = suites.at_intervals() if families is None else families
    model = run.model.with_variables(variables)
    return evaluate(
        model, run.config, validation=run.validation, progress=progress, families=families
    )


def evaluate_unless_stopped(run: Run, state: TrainState) -> Results | None:
    """What process 0 finds with its own devices, in every process; None if a signal comes."""
    variables = _variables(run, state)

    def unless_stopped() -> Results | None:
        # An evaluation may take longer than a scheduler waits between its signal and the kill.
        try:
            with run.stop.interrupting():
                if not _may_leave_threads():
                    return _evaluate(run, variables)
                return in_thread(lambda: _evaluate(run, variables))
        except Stopped:
            if _may_leave_threads():
                leave_at_end()
            return None

    return processes.by_first(unless_stopped)


def _variables(run: Run, state: TrainState) -> Any:
    """What process 0 evaluates, of the size that the run ends with; as it is in the others."""
    variables = processes.to_first(state.evaluated, run.home)
    here = not jax.process_index()  # the others hold nothing
    if here and building.image_encoder(run.config).patch_tokens:
        variables["params"] = positions.fit(variables["params"], building.grid(run.config))
    return variables


def _may_leave_threads() -> bool:
    """Whether the process can end while one of its threads is in a compiler."""
    return owns_process() and jax.process_count() == 1
