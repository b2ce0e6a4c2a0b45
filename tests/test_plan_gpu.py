"""Plans for GPUs: what the text of a program says, and programs that XLA compiles without a GPU."""

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mlip_jax import planning
from mlip_jax.core import schema
from mlip_jax.core.errors import UserError
from mlip_jax.planning import estimates, gpus, hlo, kernels, machines
from mlip_jax.training.step_cost import GIB, Memory

H100 = gpus.CARDS["h100"]
FOLDER = Path(__file__).parents[1] / "configs"
BASELINES = runpy.run_path(str(FOLDER / "baselines.py"))["RUNS"]
CONFIGS = sorted({file.stem for file in FOLDER.glob("*.py")} - {"baselines"})
WITH_COMPILER = pytest.mark.skipif(
    not gpus._has_compiler(), reason="needs XLA's compiler for GPUs: the extra plan-gpu"
)
PROGRAM = (Path(__file__).parent / "data" / "gpu_program.hlo").read_text()


def test_products_traffic_and_calls_of_a_program():
    by_name = {kernel.target or kernel.traffic: kernel for kernel in kernels.read(PROGRAM)}
    product = by_name[2 * 64 * 32 + 2 * 32 * 16 + 4 * 64 * 16]
    assert product.products == {"bf16": 2 * 64 * 16 * 32} and product.times == 1
    exact = by_name[3 * 4 * 8 * 8]
    assert exact.products == {"f32 highest": 2 * 8 * 8 * 8} and exact.times == 10
    # Of the ten rows one is read, with the place of the row and the copy that is made.
    row = by_name[2 * 4 * 8 * 8 + 4]
    assert not row.products and row.times == 10
    convolution = by_name["__cudnn$convForward"]
    assert convolution.products == {"bf16": 2 * 4 * 8 * 8 * 5 * 27} and not convolution.uncounted
    attention = by_name["__cudnn$fmhaSoftmax"]
    assert attention.is_attention and attention.uncounted and not convolution.is_attention
    assert len(by_name) == 5
    assert kernels.products(by_name.values()) == {
        "bf16": 2 * 64 * 16 * 32 + 2 * 4 * 8 * 8 * 5 * 27,
        "f32 highest": 10 * 2 * 8 * 8 * 8,
    }


def test_a_kernel_takes_the_longer_of_its_products_and_its_traffic():
    busy = kernels.Kernel({"bf16": H100.peak, "f32": H100.tf32}, 1, 3)
    assert busy.seconds(H100) == pytest.approx(3 * 2.0)
    exact = kernels.Kernel({"f32 highest": H100.float32}, 1, 1)
    assert exact.seconds(H100) == pytest.approx(1.0)
    waiting = kernels.Kernel({"bf16": 1.0}, int(H100.bandwidth), 2)
    assert waiting.seconds(H100) == pytest.approx(2.0)


def test_a_reduce_scatter_that_is_started_has_the_bytes_of_its_operand():
    (scatter,) = hlo.read(PROGRAM, 8).collectives
    assert (scatter.kind, scatter.payload, scatter.devices) == ("reduce-scatter", 4 * 64 * 16, 8)


def test_gpus_of_a_host_send_by_nvlink_and_several_hosts_by_the_network():
    machine = machines.Machine("h100:4x8", (), H100, host=8)
    assert machine.platform == "gpu"
    assert machine.bandwidth(8) == H100.interconnect > machine.bandwidth(32) == H100.network


@pytest.mark.parametrize("text, size", [("8", (1, 8)), ("4x8", (4, 8)), ("1", (1, 1))])
def test_shapes(text, size):
    assert gpus.shape(text) == size


@pytest.mark.parametrize("text", ["", "0", "9", "x8", "4x", "0x8", "4x8x1", "16", "-1", "8 "])
def test_other_shapes_are_none(text):
    assert gpus.shape(text) is None


def test_it_fits_what_jax_takes_of_the_memory(monkeypatch):
    machine = machines.Machine("h100:1", (), H100, host=1)
    small, large = (
        Memory(arguments=size * GIB, outputs=0, aliased=0, temporary=0, code=0) for size in (59, 60)
    )
    assert not estimates._beyond_the_pool(small, machine)
    assert estimates._beyond_the_pool(large, machine) == (
        "It needs 60.00 GiB a device, and JAX takes 59.33 of the 79.11 GiB of this GPU (75%; "
        "XLA_PYTHON_CLIENT_MEM_FRACTION); --largest-batch finds what fits"
    )
    monkeypatch.setenv(gpus.FRACTION, "0.9")
    assert not estimates._beyond_the_pool(large, machine)
    monkeypatch.setenv(gpus.FRACTION, "much")
    with pytest.raises(UserError, match="MEM_FRACTION='much' is no number"):
        estimates._beyond_the_pool(large, machine)


@pytest.mark.parametrize(
    "topology, message",
    [
        ("h101:8", "'h101:8' is not known: .*a100, h100, h200:GPUS.*did you mean 'h100:8'"),
        ("h100:9", "expected h100:GPUS, 1 to 8 of a host, or h100:HOSTSxGPUS"),
        ("h200", "'h200' is not known: expected h200:GPUS"),
    ],
)
def test_an_unknown_machine_names_the_nearest(topology, message):
    with pytest.raises(UserError, match=message):
        machines.find(topology)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mlip_jax\[plan-gpu\]' \(180 MB\)"):
        planning.plan(schema.default(), "nowhere", topology="h100:8")


@WITH_COMPILER
def test_a_target_that_the_compiler_does_not_take_is_one_line(monkeypatch):
    monkeypatch.setattr(gpus.Card, "target", lambda card: "a_field_of_tomorrow: 1")
    with pytest.raises(UserError, match="jaxlib .* cannot compile for --topology=h100:1") as caught:
        machines.find("h100:1")
    assert "\n" not in str(caught.value)


# A process of its own: where the compiler aborts, one test fails.
ESTIMATE = """
import json, sys
from mlip_jax import config
from mlip_jax.core import stages
from mlip_jax.planning import estimate, kernels, machines
name, topology, overrides = sys.argv[1:]
last = stages.of(config(name, json.loads(overrides)))[-1]
plan = estimate(last.config, machines.find(topology))
print(json.dumps({
    "memory": plan.memory.total,
    "fits": plan.fits,
    "products": kernels.products(plan.kernels),
    "model_flops": plan.model_flops / plan.mesh.size,
    "uncounted": sorted({kernel.target for kernel in plan.kernels if kernel.uncounted}),
    "collectives": sorted({one.kind for one in plan.program.collectives}),
    "milliseconds": 1000 * plan.compute_seconds,
}))
"""


def compiled(name, topology, **overrides):
    done = subprocess.run(
        [sys.executable, "-c", ESTIMATE, name, topology, json.dumps(overrides)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(plan, devices):
    assert not {dtype for dtype in plan["products"] if dtype.startswith(("f64", "c128"))}
    # Not more than recomputation adds; and the products of the model are all there.
    total = sum(plan["products"].values())
    assert 0.9 * plan["model_flops"] < total < 1.6 * plan["model_flops"]
    assert not plan["uncounted"]
    assert ("all-reduce" in plan["collectives"]) == (devices > 1)


@WITH_COMPILER
@pytest.mark.parametrize("name", CONFIGS)
def test_every_quick_config_compiles_for_a_gpu(name):
    plan = compiled(name, "h100:1", compute_dtype="bfloat16")
    check(plan, 1)
    assert plan["fits"]
    assert plan["products"]["bf16"] > 0.5 * sum(plan["products"].values())


LARGE = [
    "clip_lite:size=RN50,data=emoji",
    *(f"{name}:size=B/16,data=emoji" for name in CONFIGS if name != "clip_lite"),
    *(f"baselines:run={run},data=emoji" for run in BASELINES),
]


@WITH_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["h100:1", "h100:8"])
@pytest.mark.parametrize("name", LARGE)
def test_every_large_config_compiles_for_gpus(name, topology):
    devices = int(topology[-1])
    plan = compiled(name, topology, batch_size=64 * devices)
    check(plan, devices)
    assert plan["products"]["bf16"] > 0.9 * sum(plan["products"].values())
    assert plan["fits"]
