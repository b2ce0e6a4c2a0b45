"""The launch scripts: what a dry run tells, and what they do when gcloud and the like are fakes."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    str(path.relative_to(ROOT))
    for pattern in (".ci/*", "launch/*.sh")
    for path in sorted(ROOT.glob(pattern))
]
TPU = {
    "TPU_NAME": "slice",
    "PROJECT_ID": "project",
    "ZONE": "us-west4-a",
    "ACCELERATOR_TYPE": "v5litepod-16",
    "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
    "POLL": "0",
}
JOBSET = {"IMAGE": "registry/mlip:1", "CLAIM": "runs"}
JOB = ["--config=configs/mlip.py", "--workdir=/runs/a", '--config.name=a b\'s $(HOME) "&" \\n']

# Notes its call. Each kind of question has a file of answers; the last one stays.
GCLOUD = """
all=$*
case $all in
  *"queued-resources describe"*) kind=state ;;
  *"tpu-vm describe"*) kind=node ;;
  *"tpu_worker.sh "*) kind=${all##*tpu_worker.sh } kind=${kind%% *} ;;
  *) exit 0 ;;
esac
[[ -f $FAKES/$kind ]] || exit 0
answer=$(head -n 1 "$FAKES/$kind")
if (($(wc -l <"$FAKES/$kind") > 1)); then sed -i 1d "$FAKES/$kind"; fi
[[ $answer != fail ]] || exit 255
printf '%b\\n' "$answer"
"""


# What is asked of gcloud for a new slice and its job, up to the logs.
ANEW = ["delete", "create", "scp", "setup", "start", "look", "code", "ssh"]


class Checkout:
    """The launch folder in a place of its own, with fakes first on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.fakes = folder / "fakes"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        self.fakes.mkdir()

    def fake(self, name: str, body: str = "") -> None:
        path = self.fakes / name
        # One write a call: the fakes of a pipe run at a time.
        path.write_text(
            f'#!/bin/bash\nprintf -v call "%q " {name} "$@"\n'
            f'echo "$call" >>"$FAKES/calls"\n{body}\n'
        )
        path.chmod(0o755)

    def answers(self, **lines: list[str]) -> None:
        for kind, answers in lines.items():
            (self.fakes / kind).write_text("\n".join(answers) + "\n")

    def run(self, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{self.fakes}:/usr/bin:/bin",
            "HOME": str(self.root.parent),
            "FAKES": str(self.fakes),
        }
        return subprocess.run(
            command,
            cwd=self.root,
            env=environment | settings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
        )

    @property
    def calls(self) -> list[list[str]]:
        """What the fakes were called with; the first word is the fake's name."""
        path = self.fakes / "calls"
        if not path.exists():
            return []
        return [shlex.split(line) for line in path.read_text().splitlines()]

    def verbs(self) -> list[str]:
        """gcloud's calls in short: create, delete, scp, and what was asked of the workers."""
        short = []
        for call in self.calls:
            if call[0] == "gcloud" and call[4] != "describe":
                request = next((arg for arg in call if arg.startswith("--command=")), call[4])
                short.append(request.partition("tpu_worker.sh ")[2].split(" ")[0] or call[4])
        return short


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture
def cloud(checkout):
    """With a gcloud whose slice is there and whose job ends well."""
    checkout.fake("gcloud", GCLOUD)
    checkout.fake("git", "printf 'launch/tpu.sh\\0launch/tpu_worker.sh\\0'")
    checkout.answers(state=["ACTIVE"], node=["READY"], look=["ended"], code=["exit code 0"])
    return checkout


def commands(completed):
    """The commands that a dry run printed."""
    assert completed.returncode == 0, completed.stderr
    return [shlex.split(line) for line in completed.stdout.splitlines()]


def one_line(completed, code, *words):
    assert completed.returncode == code, completed.stdout + completed.stderr
    (line,) = completed.stderr.splitlines()
    assert all(word in line for word in words), line


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_scripts_pass_shellcheck():
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        [shellcheck, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        (["launch/tpu.sh", "all", *JOB], TPU),
        (["launch/tpu.sh", "delete", "--yes"], TPU),
        (["launch/slurm.sh", *JOB], {}),
        (["launch/jobset.sh", *JOB], JOBSET),
        (["launch/jobset.sh", *JOB], JOBSET | {"DEVICES": "gpu"}),
    ],
)
def test_a_dry_run_only_tells_and_can_be_pasted(checkout, command, settings):
    tools = ["gcloud", "git", "tar", "kubectl", "sbatch", "python3"]
    for tool in tools:
        checkout.fake(tool, "exit 1")
    before = sorted(checkout.root.rglob("*"))
    dry = checkout.run(command[0], "--dry-run", *command[1:], **settings)
    assert dry.returncode == 0, dry.stderr
    assert not checkout.calls
    assert sorted(checkout.root.rglob("*")) == before
    checkout.run("bash", "-c", dry.stdout)
    ran = [call for call in checkout.calls if call[0] not in ("git", "tar")]
    starts = tuple(f"{tool} " for tool in tools)
    lines = [line.partition("<<")[0] for line in dry.stdout.splitlines() if line.startswith(starts)]
    assert ran == [shlex.split(line) for line in lines]


@pytest.mark.parametrize(
    ("command", "settings", "words"),
    [
        (["tpu.sh"], TPU, ["usage: launch/tpu.sh"]),
        (["tpu.sh", "start"], TPU, ["usage: launch/tpu.sh"]),
        (["tpu.sh", "logs"], TPU | {"ZONE": ""}, ["ZONE is not set", "export ZONE=us-west4-a"]),
        (["tpu.sh", "create"], TPU | {"RUNTIME_VERSION": ""}, ["RUNTIME_VERSION is not set"]),
        (["tpu.sh", "logs"], TPU | {"SPOT": "yes"}, ["SPOT=yes", "true or false"]),
        (["tpu.sh", "logs"], TPU | {"POLL": "1m"}, ["POLL=1m", "whole number"]),
        (["tpu.sh", "run", "--config=x"], TPU, ["--workdir=gs://BUCKET/NAME", "all workers"]),
        (["tpu.sh", "logs", "--config=x"], TPU, ["logs takes no flags: --config=x"]),
        (["tpu.sh", "delete"], TPU, ["destroys slice", "--yes"]),
        (["slurm.sh"], {}, ["usage: launch/slurm.sh"]),
        (["slurm.sh", "--config=x"], {"NODES": "two"}, ["NODES=two", "whole number"]),
        (["slurm.sh", "--config=x"], {"LIMIT": "a day"}, ["LIMIT=a day", "24:00:00"]),
        (["slurm.sh", "--config=x"], {"JOB_NAME": "a b"}, ["JOB_NAME=a b"]),
        (["jobset.sh"], JOBSET, ["usage: launch/jobset.sh"]),
        (["jobset.sh", *JOB], {"CLAIM": "runs"}, ["IMAGE is not set"]),
        (["jobset.sh", *JOB], JOBSET | {"DEVICES": "cpu"}, ["DEVICES=cpu", "tpu or gpu"]),
        (["jobset.sh", *JOB], JOBSET | {"TOPOLOGY": "16"}, ["TOPOLOGY=16", "4x4"]),
        (["jobset.sh", *JOB], JOBSET | {"CHIPS": "3"}, ["4x4 has 16 chips", "CHIPS=3"]),
        (["jobset.sh", *JOB], JOBSET | {"JOB_NAME": "A"}, ["JOB_NAME=A", "lower-case"]),
        (["jobset.sh", "--workdir=here"], JOBSET, ["--workdir=gs://BUCKET/NAME", "/runs/NAME"]),
        (["jobset.sh", *JOB], {"IMAGE": "mlip"}, ["CLAIM is not set"]),
        (["jobset.sh", *JOB], JOBSET | {"CLAIM": "A"}, ["CLAIM=A", "lower-case"]),
    ],
)
def test_a_wrong_setting_is_one_clear_line(checkout, command, settings, words):
    for tool in ("gcloud", "kubectl", "sbatch"):
        checkout.fake(tool)
    one_line(checkout.run(f"launch/{command[0]}", *command[1:], **settings), 2, *words)
    assert not checkout.calls


def test_tpu_tells_everything_in_order(checkout):
    lines = commands(checkout.run("launch/tpu.sh", "--dry-run", "all", *JOB, **TPU, SPOT="true"))
    place = ["--project=project", "--zone=us-west4-a"]
    create = next(line for line in lines if "create" in line)
    assert create == [
        *["gcloud", "compute", "tpus", "queued-resources", "create", "slice"],
        *place,
        "--node-id=slice",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
    ]
    start = next(line for line in lines if "worker.sh start" in line[-1])
    assert start[:-1] == [
        *["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"],
        *place,
        "--worker=all",
    ]
    remote = shlex.split(start[-1].removeprefix("--command="))
    assert remote == ["mlip_jax/launch/tpu_worker.sh", "start", *JOB]
    assert [line[4] if line[0] == "gcloud" else line[0] for line in lines] == [
        *("describe", "create", "describe"),
        *("mkdir", "bash", "scp", "ssh"),
        *("ssh", "describe", "describe", "ssh", "ssh"),
        *("mkdir", "ssh"),
    ]
    on_demand = commands(checkout.run("launch/tpu.sh", "--dry-run", "create", **TPU))
    assert on_demand[1] == create[:-1]


def test_tpu_waits_until_the_slice_is_there(cloud):
    cloud.answers(state=["fail", "WAITING_FOR_RESOURCES", "fail", "PROVISIONING", "ACTIVE"])
    done = cloud.run("launch/tpu.sh", "create", **TPU)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create"]
    assert done.stderr.splitlines() == ["slice: WAITING_FOR_RESOURCES", "slice: PROVISIONING"]
    cloud.run("launch/tpu.sh", "create", **TPU)
    assert cloud.verbs() == ["create"], "it exists"


def test_tpu_asks_again_for_a_spot_slice_lost_before_it_was_there(cloud):
    cloud.answers(state=["", "PROVISIONING", "SUSPENDING", "ACTIVE"])
    assert cloud.run("launch/tpu.sh", "create", **TPU, SPOT="true").returncode == 0
    assert cloud.verbs() == ["create", "delete", "create"]
    cloud.answers(state=["", "SUSPENDED"])
    one_line(cloud.run("launch/tpu.sh", "create", **TPU), 1, "slice is SUSPENDED")
    cloud.answers(state=["FAILED"])
    one_line(cloud.run("launch/tpu.sh", "create", **TPU, SPOT="true"), 1, "request", "failed")


def test_tpu_setup_sends_the_checkout_to_all_workers(cloud):
    done = cloud.run("launch/tpu.sh", "setup", **TPU, PREPARE="mount -a")
    assert done.returncode == 0, done.stderr
    with tarfile.open(cloud.root / "runs/tpu/slice/checkout.tar.gz") as archive:
        modes = {member.name: member.mode & 0o111 for member in archive}
    assert modes == {"launch/tpu.sh": 0o111, "launch/tpu_worker.sh": 0o111}
    scp, ssh = cloud.calls[-2:]
    assert scp[4:7] == ["scp", "runs/tpu/slice/checkout.tar.gz", "slice:checkout.tar.gz"]
    assert scp[-1] == ssh[-2] == "--worker=all"
    assert ssh[-1].endswith("mlip_jax/launch/tpu_worker.sh setup && mount -a")


def test_tpu_makes_a_slice_anew_that_went_during_setup(cloud):
    cloud.answers(
        state=["fail", "ACTIVE", "SUSPENDED", "fail", "ACTIVE"], setup=["fail", ""], look=["ended"]
    )
    done = cloud.run("launch/tpu.sh", "all", *JOB, **TPU, SPOT="true")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["create", "scp", "setup", *ANEW]
    cloud.answers(setup=["fail"])
    one_line(cloud.run("launch/tpu.sh", "all", *JOB, **TPU), 1, "setup of slice failed")


def test_tpu_logs_of_every_worker(cloud):
    assert cloud.run("launch/tpu.sh", "logs", **TPU).returncode == 0
    (call,) = cloud.calls
    assert call[-3:] == [
        *("--worker=all", "--command=cat mlip_jax/.job/log", "--output-directory=runs/tpu/slice")
    ]
    assert (cloud.root / "runs/tpu/slice").is_dir(), "gcloud needs it"


def test_tpu_starts_again_after_75_and_only_then(cloud):
    cloud.answers(
        look=["step 1", "ended"],
        code=["exit code 75\\nexit code 75", "exit code 75", "exit code 3"],
    )
    done = cloud.run("launch/tpu.sh", "run", *JOB, **TPU)
    assert done.returncode == 3
    assert "slice: step 1" in done.stderr and "(2 of 100)" in done.stderr
    round_ = ["start", "look", "code", "ssh"]
    assert cloud.verbs() == ["start", "look", *round_[1:], *round_, *round_]


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ("exit code 0\\nexit code 0", 0),
        ("exit code 75\\nexit code 1", 1),
        ("exit code 0\\nexit code 75", 75),
        ("nothing", 1),
    ],
)
def test_tpu_takes_the_worst_of_all_workers(cloud, codes, code):
    cloud.answers(code=[codes])
    assert cloud.run("launch/tpu.sh", "run", *JOB, **TPU, RESTARTS="0").returncode == code


def test_tpu_makes_a_preempted_spot_slice_anew(cloud):
    cloud.answers(state=["ACTIVE", "SUSPENDED", "fail", "ACTIVE"], look=["step 1", "ended"])
    done = cloud.run("launch/tpu.sh", "run", *JOB, **TPU, SPOT="true")
    assert done.returncode == 0, done.stderr
    assert "taken away; asking for another (1 of 100)" in done.stderr
    assert cloud.verbs() == ["start", "look", *ANEW]


def test_tpu_sees_a_slice_go_in_the_ways_it_goes(cloud):
    # The request still reads ACTIVE, the workers ended with an error, the node tells.
    cloud.answers(
        state=["ACTIVE", "ACTIVE", "fail", "ACTIVE"],
        node=["READY", "PREEMPTED", "READY"],
        code=["exit code 1\\nexit code 137", "exit code 0"],
    )
    done = cloud.run("launch/tpu.sh", "run", *JOB, **TPU, SPOT="true")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["start", "look", "code", "ssh", *ANEW]


def test_tpu_leaves_a_lost_slice_that_is_not_spot_to_its_owner(cloud):
    cloud.answers(state=["SUSPENDED"])
    one_line(cloud.run("launch/tpu.sh", "run", *JOB, **TPU), 1, "slice is no longer there")
    assert cloud.verbs() == ["start"]


def test_tpu_bears_a_bad_connection_for_a_while(cloud):
    cloud.answers(start=["fail", ""], look=["fail", "step 1", "fail", "ended"], code=["fail"] * 5)
    done = cloud.run("launch/tpu.sh", "run", *JOB, **TPU)
    assert done.returncode == 1 and "no worker tells how the job ended" in done.stderr
    assert cloud.verbs() == [*["start"] * 2, *["look"] * 4, *["code"] * 5, "ssh"]
    cloud.answers(look=["fail"])
    done = cloud.run("launch/tpu.sh", "run", *JOB, **TPU)
    one_line(done, 1, "worker 0 of slice does not answer")


@pytest.fixture
def worker(checkout):
    """A worker whose main job waits for the file `go` and ends with the code in it."""
    python = checkout.root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/bash\nprintf "%s\\n" "$@"\nuntil [[ -s go ]]; do sleep 0.02; done\n'
        "sleep 0.1\nexit $(<go)\n"
    )
    python.chmod(0o755)
    yield checkout
    (checkout.root / "go").write_text("1")


def at_worker(checkout, *command, **settings):
    done = checkout.run("launch/tpu_worker.sh", *command, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_worker_runs_the_job_once_in_the_background(worker):
    assert at_worker(worker, "start", *JOB) == ""
    assert at_worker(worker, "start", *JOB) == "the job runs already"
    while not (log := worker.root / ".job/log").read_text().endswith(f"{JOB[-1]}\n"):
        time.sleep(0.01)
    assert log.read_text().splitlines() == ["-m", "mlip_jax.main", *JOB]
    assert at_worker(worker, "look") == JOB[-1]
    assert at_worker(worker, "code", PATIENCE="0") == "exit code 124"
    # A host that shuts down signals every process; the code is still the job's.
    os.kill(int((worker.root / ".job/pid").read_text()), signal.SIGTERM)
    assert at_worker(worker, "look") == JOB[-1]
    (worker.root / "go").write_text("75")
    assert at_worker(worker, "code") == "exit code 75"
    assert at_worker(worker, "look") == "ended"


def test_a_worker_that_went_down_counts_as_killed(worker):
    (worker.root / ".job").mkdir()
    gone = subprocess.run(["bash", "-c", "echo $$"], capture_output=True, text=True)
    (worker.root / ".job/pid").write_text(gone.stdout)
    assert at_worker(worker, "look") == "ended"
    assert at_worker(worker, "code") == "exit code 137"


def test_a_worker_makes_its_environment(checkout):
    checkout.fake("python3")
    at_worker(checkout, "setup")
    assert checkout.calls[-1][1:] == [
        *("-m", "uv", "pip", "install", "--quiet", "--python", ".venv/bin/python"),
        *("--editable", ".[tpu,gcs]"),
    ]


def slurm_script(checkout, **settings):
    done = checkout.run("launch/slurm.sh", "--dry-run", *JOB, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("sbatch <<'END'\n")[1].removesuffix("END\n")


def test_slurm_asks_for_a_process_for_each_gpu(checkout):
    script = slurm_script(checkout, NODES="2", GPUS="4", LIMIT="1-00:00:00", GRACE="240")
    options = {line.split(" ", 1)[1] for line in script.splitlines() if line.startswith("#SBATCH")}
    assert options >= {
        *("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=1-00:00:00"),
        *("--signal=TERM@240", "--requeue", "--open-mode=append"),
    }


def test_slurm_submits_what_the_dry_run_tells(checkout):
    for tool in ("python3", "sbatch"):
        checkout.fake(tool, f"cat >$FAKES/{tool}.in")
    python = checkout.root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/bin/true")
    assert checkout.run("launch/slurm.sh", *JOB).returncode == 0
    assert (checkout.fakes / "sbatch.in").read_text() == slurm_script(checkout)
    assert (checkout.root / "runs/slurm").is_dir()


@pytest.mark.parametrize(
    ("code", "count", "requeued"),
    [(75, "", True), (75, "2", False), (0, "", False), (1, "", False)],
)
def test_slurm_requeues_after_75_and_only_then(checkout, code, count, requeued):
    checkout.fake("srun", f"exit {code}")
    checkout.fake("scontrol")
    script = slurm_script(checkout, RESTARTS="2")
    restarts = {"SLURM_RESTART_COUNT": count} if count else {}
    done = checkout.run("bash", "-c", script, SLURM_JOB_ID="7", **restarts)
    assert done.returncode == code
    srun, *other_calls = checkout.calls
    assert srun[-len(JOB) - 3 :] == [".venv/bin/python", "-m", "mlip_jax.main", *JOB]
    # Without these a process that ends first would take down those that still save.
    assert {"--kill-on-bad-exit=0", "--wait=600", "--gpu-bind=none"} <= set(srun)
    assert other_calls == ([["scontrol", "requeue", "7"]] if requeued else [])


def manifests(checkout, **settings):
    done = checkout.run("launch/jobset.sh", "--dry-run", *JOB, **JOBSET, **settings)
    assert done.returncode == 0, done.stderr
    command, text = done.stdout.split("<<'END'\n")
    text = text.removesuffix("END\n")
    assert command.split() == ["kubectl", "apply", "--namespace=default", "--filename=-"]
    assert "${" not in text.replace("$${", "").replace("launch/jobset.sh fills in the ${...}", "")
    return text, list(yaml.safe_load_all(text))


def test_jobset_for_tpu_slices(checkout):
    _, (jobset,) = manifests(checkout, TOPOLOGY="4x8", SLICES="2", RESTARTS="5", JOB_NAME="on")
    assert jobset["metadata"]["name"] == "on", "a word, not YAML's truth"
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    assert (slices["replicas"], job["completions"], job["parallelism"]) == (2, 8, 8)
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert pod["terminationGracePeriodSeconds"] == 180
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}}


def test_jobset_for_a_workdir_in_a_bucket_mounts_no_claim(checkout):
    job = ["--config=mlip", "--workdir=gs://bucket/run"]
    settings = {"IMAGE": JOBSET["IMAGE"], "CLAIM": ""}
    done = checkout.run("launch/jobset.sh", "--dry-run", *job, **settings)
    (jobset,) = yaml.safe_load_all(done.stdout.split("<<'END'\n")[1].removesuffix("END\n"))
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["volumes"][0] == {"name": "runs", "emptyDir": {}}
    _, (jobset,) = manifests(checkout)
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    claim = {"claimName": JOBSET["CLAIM"]}
    assert pod["volumes"][0] == {"name": "runs", "persistentVolumeClaim": claim}


def test_jobset_for_gpu_nodes(checkout):
    _, documents = manifests(checkout, DEVICES="gpu", NODES="3", GPUS="4")
    assert [document["kind"] for document in documents] == [
        *("ServiceAccount", "Role", "RoleBinding", "JobSet")
    ]
    assert {document["metadata"]["name"] for document in documents} == {"mlip"}
    (nodes,) = documents[-1]["spec"]["replicatedJobs"]
    job = nodes["template"]["spec"]
    assert (nodes["replicas"], job["completions"], job["parallelism"]) == (1, 3, 3)
    pod = job["template"]["spec"]
    assert pod["serviceAccountName"] == "mlip"
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 4}}


@pytest.mark.parametrize("devices", ["tpu", "gpu"])
def test_jobset_starts_again_after_75_and_lost_pods_only(checkout, devices):
    text, documents = manifests(checkout, DEVICES=devices, RESTARTS="5")
    spec = documents[-1]["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 5
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    lost, exited = job["podFailurePolicy"]["rules"]
    assert lost == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget"}]}
    (container,) = pod["containers"]
    assert exited["action"] == "FailJob"
    assert exited["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "NotIn",
        "values": [75],
    }
    # Kubernetes refuses a policy for pods that are restarted in place.
    assert pod["restartPolicy"] == "Never"
    assert [argument.replace("$$", "$") for argument in container["args"]] == JOB
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    checkout.fake("kubectl", "cat >$FAKES/applied")
    done = checkout.run("launch/jobset.sh", *JOB, **JOBSET, DEVICES=devices, RESTARTS="5")
    assert done.returncode == 0, done.stderr
    assert (checkout.fakes / "applied").read_text() == text
