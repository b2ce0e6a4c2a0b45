"""Several processes on this host are one run: the same curve, one writer, one end."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from devices import with_devices
from ml_collections import ConfigDict

from mlip_jax import main as door
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.devices import cluster, parallel, processes

HERE = Path(__file__).parent
STEPS = 8
BOUND = 8  # seconds without a heartbeat, after which a process counts as dead
# Not bit for bit: sums over several processes are made in another order.
TOLERANCE = 1e-5
FLAGS = {
    "log_every": 1,
    "data.max_skipped_share": 0.3,
    "checkpoint.every_samples": 0,
    "evaluation.every_samples": 0,
    "evaluation.batch_size": 6,  # the seven images are no multiple
    "model.image.depth": 1,
    "model.image.frequency.depth": 0,
    "model.image.merging.rate": 0.0,
    "perspectives.frequency_tokens.weight": 0.0,
    "model.text.tokenizer": "wordpiece",
    "optimizer.name": "adamw",
}


@pytest.fixture(scope="module")
def data(pairs, tmp_path_factory) -> Path:
    """The pairs, seven of them for validation, with every fourth picture to train on missing."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()][:39]
    for row in rows:
        row["file"] = str(pairs.parent / row["file"])
    folder = tmp_path_factory.mktemp("torn")
    for number, row in enumerate(rows[:32:4]):
        row["file"] = f"absent{number}.png"
    path = folder / "torn.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


class Run:
    """The processes of one start of a run."""

    def __init__(
        self, count: int, config: Path, workdir: Path, pause: float = 0.0, verb: str = "", **flags
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs = [
            workdir.with_name(f"{workdir.name}.{verb}{count}.{i}.log") for i in range(count)
        ]
        self.records = [log.with_suffix(".record") for log in self.logs]
        arguments = [f"--config.{key}={value}" for key, value in (FLAGS | flags).items()]
        command = [sys.executable, str(HERE / "process_run.py")]
        command += [verb] if verb else [f"--config={config}", *arguments]
        command.append(f"--workdir={workdir}")
        self.processes = []
        for index, (log, record) in enumerate(zip(self.logs, self.records, strict=True)):
            environment = {
                **with_devices(1),
                "PYTHONPATH": str(HERE.parent),
                "RECORD": str(record),
                "PAUSE": str(pause),
                cluster.HEARTBEAT_SECONDS: str(BOUND),
            }
            if count > 1:
                environment[cluster.COORDINATOR] = self.address
                environment[cluster.PROCESSES] = str(count)
                environment[cluster.PROCESS_ID] = str(index)
            with log.open("w") as output:
                process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            self.processes.append(process)

    def output(self, index: int = 0) -> str:
        return self.logs[index].read_text()

    def lines(self, index: int = 0) -> list[dict[str, list[int]]]:
        """What a process was fed, by step."""
        record = self.records[index]
        text = record.read_text() if record.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def at_step(self, step: int) -> None:
        """Returns when every process has begun a step."""
        while any(len(self.lines(index)) < step for index in range(len(self.processes))):
            assert all(process.poll() is None for process in self.processes), self.output()
            time.sleep(0.02)

    def codes(self, timeout: float = 300) -> list[int]:
        """The exit codes; all processes have ended."""
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def start(tiny, data, tmp_path_factory):
    """Starts processes that train in a workdir of the given name."""
    folder = tmp_path_factory.mktemp("runs")
    runs = []

    def act(count, name, **options):
        flags = {"data.train": f"jsonl:{data}"}
        runs.append(Run(count, tiny, folder / name, **flags, **options))
        return runs[-1]

    act.folder = folder
    yield act
    for run in runs:
        run.codes(0)


@pytest.fixture(scope="module")
def alone(start):
    """One process, from the first step to the last."""
    return start(1, "alone")


@pytest.fixture(scope="module")
def chain(start, alone):
    """The same run by two processes, by one and by four, stopped before the next; one state,
    whole in each process or in parts.
    """
    two = start(2, "chain", pause=0.2, **{"mesh.fsdp": 2})
    two.at_step(2)
    two.processes[1].send_signal(signal.SIGTERM)  # one hears it, all stop
    assert two.codes() == [75, 75], two.output(0) + two.output(1)
    one = start(1, "chain", pause=0.2)
    one.at_step(1)
    one.processes[0].send_signal(signal.SIGTERM)
    assert one.codes() == [75], one.output()
    four = start(4, "chain", **{"mesh.fsdp": 2})
    assert four.codes() == [0] * 4, "".join(map(four.output, range(4)))
    assert alone.codes() == [0], alone.output()
    return two, one, four


def metrics(start, name):
    lines = (start.folder / name / "metrics.jsonl").read_text().splitlines()
    return list(map(json.loads, lines))


def test_the_curve_is_that_of_one_process(start, alone, chain):
    expected, actual = metrics(start, "alone"), metrics(start, "chain")
    assert [line["step"] for line in actual] == [*range(1, STEPS + 1), STEPS]
    for one, other in zip(expected, actual, strict=True):
        assert one.keys() == other.keys() and one["step"] == other["step"]
        for key in one.keys() - {"time", "images_per_second", "data_wait"}:
            assert other[key] == pytest.approx(one[key], rel=TOLERANCE), (one["step"], key)


def stopped_at(run):
    return int(re.search(r"everything is saved at step (\d+)", run.output())[1])


def steps_done(run, chain):
    """How many steps a start of a run has done."""
    two, one, four = chain
    return {
        two: stopped_at(two),
        one: stopped_at(one) - stopped_at(two),
        four: STEPS - stopped_at(one),
    }.get(run, STEPS)


def test_each_process_is_fed_its_own_part_in_the_order_of_one(alone, chain):
    fed_images = []
    for run in chain:
        parts = [run.lines(index) for index in range(len(run.processes))]
        for step in range(steps_done(run, chain)):
            fed_images.append(sum((part[step]["images"] for part in parts), []))
    assert fed_images == [line["images"] for line in alone.lines()[:STEPS]]


def test_they_stop_together_and_save(start, chain):
    two, one, four = chain
    assert 2 <= stopped_at(two) < stopped_at(one) < STEPS
    assert two.output().count("SIGTERM: saving, then stopping") == 1
    assert f"going on from step {stopped_at(two)}" in one.output()
    assert f"going on from step {stopped_at(one)}" in four.output()


def test_an_uneven_set_is_counted_once(start, alone, chain):
    one, other = (
        json.loads((start.folder / name / "results.json").read_text())
        for name in ("alone", "chain")
    )
    assert other == one
    figures = [key for key in one if key.startswith("examples/retrieval/")]
    assert figures and all(one[key] == 7 for key in figures)


@pytest.mark.parametrize("verb", ["evaluate", "report"])
def test_process_0_alone_looks_at_a_run_again(start, chain, verb):
    before = json.loads((start.folder / "chain" / "results.json").read_text())
    run = start(2, "chain", verb=verb)
    assert run.codes() == [0, 0], run.output(0) + run.output(1)
    assert {"evaluate": "results: ", "report": "report: "}[verb] in run.output()
    assert "results: " not in run.output(1) and "report: " not in run.output(1)
    assert json.loads((start.folder / "chain" / "results.json").read_text()) == before


def test_process_0_alone_writes_and_speaks(start, chain):
    folder = start.folder / "chain"
    assert {"config.json", "environment.json", "tokenizer.json", "results.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert len(list((folder / "tensorboard").iterdir())) == 3  # one a start
    assert json.loads((folder / "environment.json").read_text())["processes"] == 4
    _, _, four = chain
    assert "step 8/8" in four.output() and "results: " in four.output()
    for index in (1, 2, 3):
        lines = [line for line in four.output(index).splitlines() if not line.startswith("[Gloo]")]
        assert not lines


def test_unreadable_images_are_counted_over_all_processes(alone, chain):
    for run in (alone, *chain):
        torn = {
            index
            for process in range(len(run.processes))
            for line in run.lines(process)[: steps_done(run, chain)]
            for index in line["skipped"]
        }
        match = re.search(r"(\d+) of 32 images \(.*?\) cannot be read: ", run.output())
        assert torn and int(match[1]) == len(torn)


@pytest.fixture(scope="module")
def broken(start, chain):
    """Runs that come to a bad end, all at a time: most of it is waiting."""
    (start.folder / "unwritable" / "metrics.jsonl").mkdir(parents=True)
    runs = {name: start(2, name, pause=0.2) for name in ("killed-0", "killed-1", "unwritable")}
    runs["mistaken"] = start(2, "chain", batch_size=16)
    for victim in (0, 1):
        run = runs[f"killed-{victim}"]
        run.at_step(2)
        run.processes[victim].kill()
    return runs


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_others_end(broken, victim):
    run = broken[f"killed-{victim}"]
    assert run.processes[1 - victim].wait(10 * BOUND) == 1
    assert run.processes[victim].wait() == -signal.SIGKILL
    output = run.output(1 - victim)
    # JAX's own pages may end after this line: they come from another thread.
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if not errors and "Terminating process because the JAX" in output:
        return  # JAX's client was the first and ended the process by exit: no signal to hear of
    (error,) = errors
    assert error.startswith("error: another process of this run has ended or cannot be reached")
    assert "they go on from the last checkpoint" in error


def test_a_process_that_cannot_go_on_ends_the_others_with_its_error(start, broken):
    run = broken["unwritable"]
    assert run.codes() == [1, 1], run.output()
    errors = [run.output(index).splitlines()[-1] for index in (0, 1)]
    assert errors[0].startswith("error: cannot write ")
    assert errors[1] == errors[0].replace("error: ", "error: process 0: ")


def test_a_mistake_has_its_own_code_in_all(broken):
    run = broken["mistaken"]
    assert run.codes() == [2, 2]
    for index in (0, 1):
        error = run.output(index).splitlines()[-1]
        assert error.startswith("error: ") and "holds a run of another config" in error


def environment(**changes):
    variables = {
        cluster.COORDINATOR: "127.0.0.1:9",
        cluster.PROCESSES: "2",
        cluster.PROCESS_ID: "1",
        cluster.START_SECONDS: "1",
    }
    return {name: value for name, value in (variables | changes).items() if value}


def test_a_missing_coordinator_is_named(tiny, tmp_path, capfd, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    command = ["mlip", f"--config={tiny}", f"--workdir={tmp_path / 'run'}"]
    assert door.main(command) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: no coordinator at 127.0.0.1:9 within 1 s (")
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_flags_stand_for_the_variables(tiny, tmp_path, capfd, monkeypatch):
    for name in environment():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", {**os.environ, cluster.START_SECONDS: "1"})
    monkeypatch.setattr(cluster.start, "__defaults__", (os.environ,))
    flags = ["--coordinator=127.0.0.1:9", "--processes=2", "--process-id=1"]
    command = ["mlip", f"--config={tiny}", f"--workdir={tmp_path / 'run'}", *flags]
    assert door.main(command) == 1
    assert "no coordinator at 127.0.0.1:9 within 1 s (" in capfd.readouterr().err
    assert door.main([*command, "--process-id=two"]) == 2
    assert "--process-id=two: expected a whole number from 0 to " in capfd.readouterr().err
    assert door.main(["mlip", "plan", *command[1:], "--topology=cpu:8"]) == 2
    assert (
        "--coordinator goes with the subcommands train, evaluate, report or search"
        in capfd.readouterr().err
    )


MISTAKES = [
    ({cluster.PROCESSES: ""}, "MLIP_COORDINATOR, MLIP_PROCESS_ID without MLIP_PROCESSES: set all"),
    ({cluster.COORDINATOR: "127.0.0.1:99999"}, "='127.0.0.1:99999': expected host:port"),
    ({cluster.COORDINATOR: "127.0.0.1"}, "MLIP_COORDINATOR='127.0.0.1': expected host:port"),
    ({cluster.PROCESSES: "two"}, "MLIP_PROCESSES='two': expected a whole number"),
    ({cluster.PROCESS_ID: "2"}, "MLIP_PROCESS_ID=2 of MLIP_PROCESSES=2: the processes are 0 to 1"),
    ({cluster.START_SECONDS: "0"}, "MLIP_START_SECONDS=0 must be at least 1 second"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_in_the_variables_is_named(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        cluster.start(environment(**changes))


SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
CLUSTERS = [
    ({}, None),
    ({"SLURM_NTASKS": "1", **SLURM}, None),
    ({"SLURM_NTASKS": "2", **SLURM}, "slurm"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),
    ({"TPU_WORKER_HOSTNAMES": "a"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b", **KUBERNETES}, "gketpu"),
    ({"JAX_PLATFORMS": "cpu"}, None),
    ({"TPU_TYPE": "v5e"}, "gcetpu"),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JAX_PLATFORMS": "cpu"}, None),
    ({**KUBERNETES, "JAX_PLATFORMS": "cpu"}, "k8s"),
    (environment(**{cluster.PROCESSES: "1", cluster.PROCESS_ID: "0"}), None),
    (environment(**{cluster.PROCESS_ID: "0"}), "deactivate"),
]


@pytest.mark.parametrize(("variables", "method"), CLUSTERS)
def test_processes_are_found_by_the_environment(variables, method, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    monkeypatch.setattr(processes, "end_aborts_with", lambda line: None)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    monkeypatch.setenv("PJRT_NPROC", "1")
    monkeypatch.setattr(
        cluster, "_has_tpu", lambda: not {"TPU_TYPE", "TPU_WORKER_HOSTNAMES"}.isdisjoint(variables)
    )
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
    cluster.start(variables)
    assert [options["cluster_detection_method"] for options in calls] == [method] * bool(method)
    if variables.get(cluster.PROCESSES) == "2":
        assert calls[0]["num_processes"] == 2 and calls[0]["initialization_timeout"] == 1


def test_cpus_that_would_mix_up_messages_are_refused(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    monkeypatch.setattr(processes, "end_aborts_with", lambda line: None)
    monkeypatch.setenv("PJRT_NPROC", "")
    with pytest.raises(UserError, match="one process a core"):  # there are 8 devices here
        cluster.start(environment(**{cluster.PROCESS_ID: "0"}))


def test_a_job_of_kubernetes_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="jax\\[k8s\\]"):
        cluster.start(KUBERNETES)


def test_what_jax_cannot_join_is_one_line(monkeypatch):
    def refuse(**_):
        raise RuntimeError("Failed to recognize coordinator address node1")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setattr(processes, "end_aborts_with", lambda line: None)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    monkeypatch.setenv("PJRT_NPROC", "1")
    with pytest.raises(RunError, match="cannot join .* as slurm names it: Failed to recognize"):
        cluster.start({"SLURM_NTASKS": "2", **SLURM})


def test_a_broken_connection_ends_a_process_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "hearing", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(processes, "_on_abort", ended.append)
    monkeypatch.setattr(processes, "announce", lambda *_: None)
    monkeypatch.setattr(processes.atexit, "register", lambda *_: None)
    with pytest.raises(RuntimeError), processes.together():
        try:
            raise jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection closed by peer")
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError("the step failed") from error
    assert ended == [signal.SIGABRT]
    with pytest.raises(jax.errors.JaxRuntimeError), processes.together():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    assert len(ended) == 1


def test_a_process_feeds_the_rows_of_its_devices():
    mesh = parallel.make_mesh(ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}), 8)
    assert list(parallel.local_rows(mesh, 8)) == list(range(8))
    assert parallel.home_mesh(mesh) is mesh


def test_jaxs_private_state_is_where_it_is_looked_for(monkeypatch):
    state = processes._state()
    assert state.process_id == 0 and state.client is None  # one process: nothing was started
    monkeypatch.setattr("jax._src.distributed.global_state", object())
    with pytest.raises(RunError, match="several processes cannot run with JAX .*no client or pro"):
        processes._state()


def test_a_peer_that_is_gone_while_this_one_compiles_is_lost():
    error = ValueError("UNKNOWN: Gloo context initialization failed: Connect timeout [127.0.0.1]")
    assert processes._is_lost(error) and not processes._is_lost(ValueError("a bug"))
