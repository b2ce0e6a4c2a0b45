"""A run in Weights & Biases and in MLflow, by a callback each (extras wandb and mlflow)."""

from __future__ import annotations

import abc
import contextlib
import importlib
import json
import logging
import netrc
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from mlip_jax.core import places, schema
from mlip_jax.core.errors import UserError, first_line
from mlip_jax.core.files import read_json, write_atomically
from mlip_jax.training.callbacks import Callback
from mlip_jax.training.run import Run

FILE = "trackers.json"  # in the workdir: by tracker, the name that it knows the run by
_WANDB = "https://api.wandb.ai"  # unless WANDB_BASE_URL says another
_MOST_FAILURES = 3
_LONGEST_PARAMETER = 500  # characters; MLflow refuses more


class Tracker(Callback, abc.ABC):
    """Config, metrics and evaluations of a run for a service outside.

    What fails there never ends the run. A tracker that cannot open the run, or that fails three
    times in a row, is left alone from then on: each time may have cost minutes. A run that is
    resumed goes on there as well.
    """

    name: str  # of the module and of the extra
    title: str

    def __init__(self) -> None:
        """Finds the tracker's own package.

        Raises:
          UserError: when it is not installed.
        """
        self._module = _installed(self.name)
        self._run: Run | None = None
        self._failures = 0  # in a row
        self._is_open = False

    @abc.abstractmethod
    def open(self, run: Run, known: str | None) -> tuple[str, str]:
        """Begins, or goes on with, the run there.

        Args:
          run: the run.
          known: what an earlier start of it returned as the first value.

        Returns:
          What the tracker knows the run by, and where it can be seen.
        """

    @abc.abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values at a step."""

    @abc.abstractmethod
    def close(self, finished: bool) -> None:
        """Ends the run there, or for now; what is under way is sent first."""

    def on_start(self, run: Run, step: int) -> None:
        """Opens the run there."""
        del step
        self._run = run
        with self._guarded(run):
            file = run.folder / FILE
            names = read_json(file, missing={})
            names[self.name], place = self.open(run, names.get(self.name))
            write_atomically(file, json.dumps(names, indent=2) + "\n")
            run.console.print(f"{self.title}: {place}")
            self._is_open = True

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the means over an interval."""
        self._log(step, metrics)

    def on_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Sends an evaluation's figures."""
        self._log(step, figures)

    def on_end(self, step: int) -> None:
        """Closes the run there."""
        if self._run is not None and self._is_open:
            with self._guarded(self._run):
                self.close(step == self._run.steps)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        if self._run is not None and self._is_open and self._failures < _MOST_FAILURES:
            with self._guarded(self._run):
                self.log(step, values)
                self._failures = 0

    @contextlib.contextmanager
    def _guarded(self, run: Run) -> Iterator[None]:
        """Tells what its body raises."""
        try:
            yield
        except Exception as error:
            self._failures += 1
            run.console.print(
                f"warning: {self.title} failed ({type(error).__name__}: {first_line(error)}); "
                "the run goes on, and figures may be missing there"
            )


class Wandb(Tracker):
    """Weights & Biases.

    Without a key, and without WANDB_MODE, it keeps the run offline in the workdir.
    """

    name, title = "wandb", "Weights & Biases"

    def __init__(self, project: str = "mlip_jax", **options: Any) -> None:
        """Takes the project, and options of `wandb.init`.

        Raises:
          UserError: when wandb is not installed.
        """
        super().__init__()
        self._options = {"project": project, **options}
        self._tracked: Any = None

    def open(self, run: Run, known: str | None) -> tuple[str, str]:
        """See `Tracker.open`."""
        wandb = self._module
        options: dict[str, Any] = {"settings": wandb.Settings(silent=True, console="off")}
        if not (os.environ.get("WANDB_MODE") or _has_wandb_key()):
            options["mode"] = "offline"
        options |= self._options
        self._tracked = wandb.init(
            id=known,
            resume="allow",
            name=run.folder.resolve().name,
            dir=str(run.folder),
            config=schema.flatten(run.config.to_dict()),
            **options,
        )
        self._tracked.define_metric("*", step_metric="samples")
        self._seen = run.seen
        if options.get("mode", os.environ.get("WANDB_MODE")) == "offline":
            folder = places.shown(run.folder / "wandb")
            place = f"offline in {folder}; wandb login, then wandb sync {folder}/offline-run-*"
        else:
            place = str(self._tracked.url)
        return self._tracked.id, place

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._tracked.log({**values, "samples": self._seen(step)}, step=step)

    def close(self, finished: bool) -> None:
        """See `Tracker.close`."""
        del finished
        self._tracked.finish()


class MLflow(Tracker):
    """MLflow: the server of MLFLOW_TRACKING_URI, else an SQLite file in the workdir."""

    name, title = "mlflow", "MLflow"

    def __init__(self, experiment: str = "mlip_jax", uri: str = "") -> None:
        """Takes the experiment, and a server in place of MLFLOW_TRACKING_URI.

        Raises:
          UserError: when mlflow is not installed.
        """
        super().__init__()
        self._experiment = experiment
        self._uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        self._client: Any = None
        self._id = ""

    def open(self, run: Run, known: str | None) -> tuple[str, str]:
        """See `Tracker.open`."""
        uri, artifacts = self._uri, None
        if not uri:
            uri = f"sqlite:///{run.folder.resolve() / 'mlflow.db'}"
            artifacts = (run.folder.resolve() / "mlartifacts").as_uri()
            logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every table
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        self._client = self._module.MlflowClient(tracking_uri=uri)
        if known:
            self._client.update_run(known, status="RUNNING")
            self._id = known
        else:
            self._id = self._begun(run, artifacts)
        return self._id, uri if self._uri else f"mlflow ui --backend-store-uri={uri}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        now = int(time.time() * 1000)
        metric = self._module.entities.Metric
        self._client.log_batch(
            self._id,
            metrics=[metric(_allowed(key), float(v), now, step) for key, v in values.items()],
        )

    def close(self, finished: bool) -> None:
        """See `Tracker.close`."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

    def _begun(self, run: Run, artifacts: str | None) -> str:
        experiment = self._client.get_experiment_by_name(self._experiment)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(self._experiment, artifact_location=artifacts)
        )
        begun = self._client.create_run(experiment_id, run_name=run.folder.resolve().name)
        for key, value in schema.flatten(run.config.to_dict()).items():
            text = str(value)[:_LONGEST_PARAMETER] or "-"  # an empty text is no value there
            self._client.log_param(begun.info.run_id, _allowed(key), text)
        run_id: str = begun.info.run_id
        return run_id


TRACKERS: dict[str, type[Tracker]] = {tracker.name: tracker for tracker in (Wandb, MLflow)}


def trackers(names: str) -> list[Tracker]:
    """The trackers of these names, with commas between them.

    Raises:
      UserError: when one is not installed.
    """
    return [TRACKERS[name]() for name in dict.fromkeys(filter(None, names.split(",")))]


def _has_wandb_key() -> bool:
    """Whether wandb would find a key without asking: of its own API each version has another."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _WANDB).hostname or ""
    files = [Path(os.environ[name]) for name in ("NETRC",) if name in os.environ]
    for file in files or [Path.home() / name for name in (".netrc", "_netrc")]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(file)).authenticators(host):
                return True
    return False


def _allowed(name: str) -> str:
    """A name as MLflow takes it; "recall@1" becomes "recall_at_1"."""
    return re.sub(r"[^\w./ :-]", "_", name.replace("@", "_at_"))


def _installed(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise UserError(f"{name} is not installed: pip install 'mlip_jax[{name}]'") from None
