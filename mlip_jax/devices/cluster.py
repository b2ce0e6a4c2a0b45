"""How the processes of one run find each other: explicit addresses, or the cluster's own."""

from __future__ import annotations

import glob
import importlib.util
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.schema import ADDRESS, PROCESS_VARIABLES, is_address
from mlip_jax.devices import processes

COORDINATOR, PROCESSES, PROCESS_ID = PROCESS_VARIABLES.values()
START_SECONDS, HEARTBEAT_SECONDS = "MLIP_START_SECONDS", "MLIP_HEARTBEAT_SECONDS"
_THREADS = "PJRT_NPROC"  # how many threads XLA starts on CPUs
_START, _HEARTBEAT = 300, 60  # seconds
_T = TypeVar("_T")


def start(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of this run; call it before any device is used.

    Without several processes in the environment nothing is done. They are described by
    MLIP_COORDINATOR ("host:port" of process 0), MLIP_PROCESSES and MLIP_PROCESS_ID, which the flags
    --coordinator, --processes and --process-id set; without these as JAX finds them under SLURM and
    Open MPI, on TPU slices and in indexed jobs of Kubernetes. MLIP_START_SECONDS (300) is how long
    they wait for each other, MLIP_HEARTBEAT_SECONDS (60) how long one may be silent before the
    others end.

    Raises:
      UserError: for variables that are missing or make no sense.
      RunError: when the coordinator does not answer in time.
    """
    explicit = _explicit_processes(environment)
    cluster = None if explicit else _cluster(environment)
    if jax.distributed.is_initialized() or not (explicit or cluster):
        return
    limit = _seconds(environment, START_SECONDS, _START)
    heartbeat = _seconds(environment, HEARTBEAT_SECONDS, _HEARTBEAT)
    if str(jax.config.values["jax_platforms"]).startswith("cpu"):
        os.environ[_THREADS] = "1"
        # A program out of the cache has lost the order of its messages (jaxlib 0.10).
        jax.config.update("jax_enable_compilation_cache", False)
    # It takes SIGTERM away from whoever listens.
    jax.config.update("jax_enable_preemption_service", False)
    if explicit and explicit["process_id"]:
        _wait_for(explicit["coordinator_address"], limit)
    where = explicit.get("coordinator_address", f"as {cluster} names it")
    processes.end_aborts_with(f"not all processes of this run came to {where} within {limit} s")
    try:
        jax.distributed.initialize(
            **explicit,
            cluster_detection_method="deactivate" if explicit else cluster,
            initialization_timeout=limit,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, OSError) as error:
        raise RunError(f"cannot join the processes of this run at {where}: {error}") from error
    processes.end_aborts_with(processes.LOST)
    _check_cpus()


def by_first(function: Callable[[], _T]) -> _T:
    """Joins the other processes of this run and lets process 0 do what one process does alone.

    Raises:
      UserError, RunError: in every process, those of the function and of `start`.
    """
    start()
    with processes.together():
        return processes.by_first(function)


def _check_cpus() -> None:
    """Refuses what would mix up messages between CPUs.

    They are matched by their order alone (gloo in jaxlib 0.10), and XLA sends those of a program
    that do not depend on each other from any of its threads. With one thread a process their order
    is the program's; with more, runs here broke off or summed the wrong arrays.
    """
    if jax.default_backend() != "cpu":
        return
    if jax.local_device_count() > 1 or os.environ.get(_THREADS) != "1":
        raise UserError(
            "several processes on CPUs need JAX_PLATFORMS=cpu and one device each: start one "
            "process a core, without --xla_force_host_platform_device_count"
        )


def _explicit_processes(environment: Mapping[str, str]) -> dict[str, Any]:
    """What MLIP_* variables say, as JAX takes it; {} where they say nothing or "one process"."""
    names = (COORDINATOR, PROCESSES, PROCESS_ID)
    values = {name: environment[name] for name in names if environment.get(name)}
    if not values:
        return {}
    if missing := [name for name in names if name not in values]:
        raise UserError(f"{', '.join(values)} without {', '.join(missing)}: set all three or none")
    address = values[COORDINATOR]
    if not is_address(address):
        raise UserError(f"{COORDINATOR}={address!r}: expected {ADDRESS}")
    count, index = (_whole_number(name, values[name]) for name in (PROCESSES, PROCESS_ID))
    if not 0 <= index < count:
        raise UserError(
            f"{PROCESS_ID}={index} of {PROCESSES}={count}: the processes are 0 to {count - 1}"
        )
    if count == 1:
        return {}
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _cluster(environment: Mapping[str, str]) -> str | None:
    """JAX's name of the cluster that runs several processes of this job; None: one process."""
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return "slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "ompi"
    if _has_tpu() and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
        if hosts:
            return "gketpu" if "," in hosts else None
        return None if environment.get("TPU_SKIP_MDS_QUERY") else "gcetpu"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "an indexed job of Kubernetes: pip install 'jax[k8s]', or set "
                f"{COORDINATOR}, {PROCESSES} and {PROCESS_ID}"
            )
        return "k8s"
    return None


def _has_tpu() -> bool:
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _whole_number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r}: expected a whole number") from None


def _seconds(environment: Mapping[str, str], name: str, default: int) -> int:
    seconds = _whole_number(name, environment.get(name) or str(default))
    if seconds < 1:
        raise UserError(f"{name}={seconds} must be at least 1 second")
    return seconds


def _wait_for(address: str, limit: int) -> None:
    """Returns when something listens at an address: JAX aborts the process where nothing does."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + limit
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=limit).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"no coordinator at {address} within {limit} s ({error}): start process 0 "
                    f"there, or correct {COORDINATOR}"
                ) from error
        time.sleep(0.2)
