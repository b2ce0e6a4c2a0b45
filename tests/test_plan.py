"""Planning: what a compiled step tells, a user's mistakes, and programs for TPUs."""

import dataclasses
import importlib.util
import math
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from mlip_jax import planning
from mlip_jax.cli import command_line
from mlip_jax.core import stages
from mlip_jax.core.errors import UserError
from mlip_jax.models import building
from mlip_jax.planning import estimates, hlo, machines, printing, verb
from mlip_jax.training import optimizer as optimizers
from mlip_jax.training import step_cost
from mlip_jax.training.state import abstract_state
from mlip_jax.training.step_cost import Memory

FOLDER = Path(__file__).parents[1] / "configs"
BASELINES = runpy.run_path(str(FOLDER / "baselines.py"))["RUNS"]
CONFIGS = sorted({file.name for file in FOLDER.glob("*.py")} - {"baselines.py"})


@pytest.fixture(scope="module")
def config(tiny):
    # Muon's products take long to compile when they are sharded.
    return command_line.parse([f"--config={tiny}", "--config.optimizer.name=adamw"]).config


def with_mesh(config, mesh):
    config = ConfigDict(config.to_dict())
    config.mesh = verb.read_mesh(mesh)
    return config


def test_the_plan_says_what_each_stage_costs(config, capfd):
    config = ConfigDict(config.to_dict())
    config.model.image.merging.rate = 0.0
    config.stages = ("0.5 image_size=8", "0.5 batch_size=4")
    assert verb.plan(config, "", topology="cpu:1") == 0
    output = capfd.readouterr().out
    assert "stage 1 of 2: samples 0 to 32 in 4 steps of 8, image_size 8" in output
    assert "stage 2 of 2: samples 32 to 64 in 8 steps of 4, batch_size 4" in output
    assert output.count("fits: ") == 2 and "Share of the FLOPs" in output
    share = re.search(r"the whole run: .* ([\d.]+) % of what the last stage's steps", output)
    assert 20 < float(share[1]) < 95


# A program as the TPU compiler prints it, without layouts.
TEXT = """\
HloModule jit_step, is_scheduled=true

%body (param: (s32[], f32[8])) -> (s32[], f32[8]) {
  %param = (s32[], f32[8]) parameter(0)
  %gathered = f32[64]{0} all-gather(%x), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}
  %fusion.1 = f32[8]{0} fusion(%x), calls=%work, backend_config={"estimated_cycles":"100"}
}

%condition (param: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%cheap (param: f32[8]) -> f32[8] {
  %copy.1 = f32[8]{0} copy(%param), backend_config={"estimated_cycles":"7"}
}

%dear (param: f32[8]) -> f32[8] {
  %copy.2 = f32[8]{0} copy(%param), backend_config={"estimated_cycles":"11"}
}

%spread (param: f32[8]) -> f32[8] {
  %again = bf16[32,2]{1,0} all-gather(%x), channel_id=9, replica_groups={{0,1},{2,3}}
  %inner = f32[8]{0} convolution(%x, %y), backend_config={"estimated_cycles":"999"}
}

%all-reduce-scatter.3 (input: f32[16]) -> f32[4] {
  %sum = f32[16]{0} all-reduce(%input), channel_id=12, replica_groups={{0,1,2,3},{4,5,6,7}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %loop = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %either = f32[8]{0} conditional(%i, %a, %b), branch_computations={%cheap, %dear}
  %fusion.2 = f32[8]{0} fusion(%p), calls=%spread, backend_config={"estimated_cycles":"1000"}
  %fusion.3 = f32[8]{0} fusion(%p), calls=%spread
  %fusion.4 = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3
  %all = (f32[10]{0}, pred[6]{0}) all-reduce(%p, %q), channel_id=1, replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, to_apply=%add
  %next = (s8[10]{0}, s8[10]{0}, u32[], u32[]) collective-permute-start(%p), channel_id=2
  %after = (s8[10]{0}, s8[10]{0}, u32[], u32[]) collective-permute-start(%q), channel_id=2
  %sort.1 = f32[8]{0} sort(%p), to_apply=%less
  ROOT %negate.1 = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"3"}
}
"""  # noqa: E501


def test_cycles_are_those_of_the_schedule_loops_times_their_trips():
    program = hlo.read(TEXT, 8)
    assert program.cycles == 5 * 100 + 11 + 1000 + 3
    assert program.unestimated == 1  # the sort; the other fusions without are collectives
    assert program.unknown_loops == 0
    lines = [line for line in TEXT.splitlines() if "constant(5)" not in line]
    unknown = hlo.read("\n".join(lines), 8)
    assert (unknown.unknown_loops, unknown.cycles) == (1, 100 + 11 + 1000 + 3)


def test_each_collective_counts_once_with_its_group_and_its_repetitions():
    collectives = [(c.kind, c.payload, c.devices, c.times) for c in hlo.read(TEXT, 8).collectives]
    assert sorted(collectives) == [
        ("all-gather", 64 * 2, 2, 1),  # spread over two fusions
        ("all-gather", 64 * 4, 4, 5),  # in the loop
        ("all-reduce", 10 * 4 + 6, 4, 1),
        ("collective-permute", 10, 8, 1),
        ("collective-permute", 10, 8, 1),  # another on the same channel, as of a shard_map
        ("reduce-scatter", 16 * 4, 4, 1),
    ]
    assert hlo.Collective("all-reduce", 80, 4, 2).sent == 2 * 2 * 80 * 3 / 4
    assert hlo.Collective("all-gather", 80, 4, 1).sent == 80 * 3 / 4
    assert hlo.Collective("collective-permute", 80, 8, 3).sent == 240


KERNEL = """\
ENTRY %main (p: bf16[8,17,768]) -> bf16[8,17,256] {
  %p = bf16[8,17,768]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[8,1,17]{2,1,0} fusion(%p), calls=%work, backend_config={"estimated_cycles":"100"}
  ROOT %forward_kernel.1 = bf16[8,17,256]{2,1,0} custom-call(%p, %b), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501


def test_a_kernel_without_an_estimate_is_bounded_by_what_it_moves(on_cpus, capsys):
    program = hlo.read(KERNEL, 1)
    traffic = 2 * 8 * 17 * (768 + 256) + 4 * 8 * 17
    assert program.calls == [hlo.Call("forward_kernel", traffic, 1)]
    assert (program.cycles, program.work, program.unestimated) == (100, 2, 1)
    plan = dataclasses.replace(a_chips_plan(on_cpus), program=program)
    chip = plan.machine.chip
    assert plan.compute_seconds == pytest.approx(100 / chip.clock + traffic / chip.bandwidth)
    printing.print_estimate(printing.Console(soft_wrap=True), plan)
    output = " ".join(capsys.readouterr().out.split())
    assert "1 x forward_kernel: no estimate; at least 0.00 ms for 0.00 GiB at 819 GB/s" in output


def test_matrix_products_are_counted_through_loops_and_branches():
    def program(x, kernel):
        jax.debug.callback(lambda: None)  # an equation that gives nothing
        x = jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=3)[0]
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)
        x = jax.lax.platform_dependent(x, cuda=lambda x: x @ x, default=lambda x: x)
        return jax.lax.conv_general_dilated(x[None, None], kernel, (1, 1), "SAME")

    x, kernel = jnp.ones((8, 8)), jnp.ones((5, 1, 3, 3))
    counted = step_cost.matrix_flops(jax.make_jaxpr(program)(x, kernel).jaxpr)
    assert counted == (3 + 2) * 2 * 8**3 + 2 * 64 * 5 * 9


def test_model_flops_are_the_formula_of_a_transformer():
    """CLIP B/16: 12 blocks of 24 w^2 + 4 n w a token, the patches, the heads, all pairs."""
    argument = "--config=configs/clip.py:size=B/16,data=jsonl:pairs.jsonl"
    config = command_line.parse([argument]).config

    def tower(tokens, width):
        return 12 * tokens * (24 * width**2 + 4 * tokens * width)

    image = tower(197, 768) + 2 * 196 * 768 * 768 + 2 * 768 * 512
    text = tower(77, 512) + 2 * 512 * 512
    pairs = 2 * config.batch_size * 512
    network = building.build(config, vocab_size=49_408, start_id=49_406, end_id=49_407)
    variables = jax.eval_shape(lambda: building.initialise(network, config, jax.random.key(0)))
    counted = step_cost.step_flops(network, variables, config)
    assert counted == pytest.approx(3 * config.batch_size * (image + text + pairs), rel=1e-6)


@pytest.fixture(scope="module")
def on_cpus(config):
    return planning.estimate(with_mesh(config, "data:4,fsdp:2"), machines.find("cpu:8"))


def test_memory_of_a_device_is_its_share_of_state_and_batch(config, on_cpus):
    network = building.build(config, vocab_size=49_408, start_id=49_406, end_id=49_407)
    state = abstract_state(network, optimizers.make(config), config, on_cpus.mesh)

    def share(leaf):
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    state_bytes = sum(map(share, jax.tree.leaves(state)))
    batch = 8 // 8 * (16 * 16 * 3 + 4 * 8 + 4)  # pixels, token ids, the record's number
    memory = on_cpus.memory
    assert memory.arguments == state_bytes + batch
    assert memory.aliased == state_bytes  # donated
    assert memory.temporary > 0
    parts = memory.arguments + memory.outputs - memory.aliased + memory.temporary + memory.code
    assert memory.total == parts
    assert on_cpus.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_a_plan_for_cpus_has_flops_and_collectives_and_no_time(on_cpus):
    assert (on_cpus.dtype, on_cpus.fits) == ("float32", True)
    assert on_cpus.flops > on_cpus.model_flops / 8
    assert {collective.kind for collective in on_cpus.program.collectives} >= {"all-reduce"}
    assert math.isnan(on_cpus.compute_seconds)
    assert math.isnan(on_cpus.utilisation(1.0))


def test_the_verb_prints_the_plan(config, on_cpus, monkeypatch, capsys):
    monkeypatch.setattr(estimates, "estimate", lambda *_: on_cpus)
    assert planning.plan(config, "nowhere", topology="cpu:8", mesh="fsdp:2") == 0
    output = capsys.readouterr().out
    assert "cpu:8: 8 devices as data 4, fsdp 2, tensor 1; global batch 8" in output
    assert "aliased" in output and "all-reduce" in output and "GHz" not in output


def a_chips_plan(on_cpus, **changes):
    chips = machines.Machine("v5e:2x4", (), machines.CHIPS["v5e"])
    program = hlo.Program(cycles=1_503_000, work=9, unestimated=1)
    program.collectives.append(hlo.Collective("all-gather", 10**8, 2, 1))
    return dataclasses.replace(on_cpus, machine=chips, program=program, **changes)


def test_time_and_utilisation_follow_from_the_cycles(on_cpus, capsys):
    plan = a_chips_plan(on_cpus, model_flops=8 * 197e12 * 0.5e-3)
    assert plan.compute_seconds == pytest.approx(1e-3, rel=1e-3)
    assert plan.collective_seconds == pytest.approx(10**8 / 2 / 200e9)
    assert plan.utilisation(1e-3) == pytest.approx(0.5)
    printing.print_estimate(printing.Console(soft_wrap=True), plan)
    output = " ".join(capsys.readouterr().out.split())
    assert "estimated step: 1.00 ms if the arithmetic hides the collectives, 1.25 ms" in output
    assert "40.0 to 50.0 % of 197 TFLOP/s a chip" in output
    assert "1 of 9 instructions have none" in output


def test_a_program_without_room_says_what_it_needs(config, on_cpus, monkeypatch, capsys):
    message = (
        "RESOURCE_EXHAUSTED: E1: Ran out of memory in hbm. Used 20.5G of 15.75G.\n\nLargest: 1"
    )
    refusal = estimates._refusal(message)
    refused = a_chips_plan(on_cpus, memory=None, refusal=refusal)
    monkeypatch.setattr(estimates, "estimate", lambda *_: refused)
    assert planning.plan(config, "nowhere", topology="cpu:8") == 1
    assert (
        "fits: no. Ran out of memory in hbm. Used 20.5 GiB of 15.75 GiB.\n"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("limit", [3, 8, 40, 41, 63, 64])
def test_the_largest_batch_is_found_from_below_and_from_above(config, on_cpus, monkeypatch, limit):
    """Rows come in eights: 4 x 2 devices hold them."""
    tries = []

    def pretend(config, machine):
        tries.append(config.batch_size)
        memory = Memory(*[config.batch_size] * 5) if config.batch_size <= limit else None
        return dataclasses.replace(on_cpus, batch_size=config.batch_size, memory=memory)

    monkeypatch.setattr(estimates, "estimate", pretend)
    for start in (8, 48, 512):
        config = with_mesh(config, "data:4,fsdp:2")
        config.batch_size = start
        tries.clear()
        largest = planning.largest_batch(config, on_cpus.machine)
        assert (largest.batch_size if largest else 0) == limit // 8 * 8
        assert len(set(tries)) == len(tries) <= 9


def test_a_search_for_the_largest_batch_is_told(config, on_cpus, monkeypatch, capsys):
    plan = a_chips_plan(on_cpus)
    monkeypatch.setattr(machines, "find", lambda _: plan.machine)
    monkeypatch.setattr(estimates, "estimate", lambda *_: plan)
    for largest, words in [(plan, "fits: 8 (1 rows a device"), (None, "fits: none")]:
        monkeypatch.setattr(estimates, "largest_batch", lambda *_, largest=largest: largest)
        assert planning.plan(config, "nowhere", topology="v5e:2x4", largest_batch=True) == 0
        assert f"largest global batch that {words}" in capsys.readouterr().out


def test_auto_computes_in_what_the_machine_is_good_at(config):
    chips = machines.Machine("v5e:2x4", (), machines.CHIPS["v5e"])
    assert estimates._compute_dtype(config, chips) == "bfloat16"
    assert estimates._compute_dtype(config, machines.find("cpu:8")) == "float32"
    float32_config = ConfigDict(config.to_dict())
    float32_config.compute_dtype = "float32"
    assert estimates._compute_dtype(float32_config, chips) == "float32"


def test_clocks_follow_from_peaks():
    clocks = {name: round(chip.clock / 1e9, 2) for name, chip in machines.CHIPS.items()}
    assert clocks == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "v5e:2x5"}, r"'v5e:2x5' is not known: expected v5e:1x1, .*did you mean"),
        ({"topology": "v9:2x4"}, r"'v9:2x4' is not known: .*v4:.*v5e:.*v5p:.*v6e:.*cpu:N"),
        ({"topology": "cpu:0"}, "'cpu:0' is not known"),
        ({"topology": "cpu:100000000"}, "is not known: .*cpu:N, N at most 1,024"),
        ({"topology": "cpu:999"}, "XLA_FLAGS=--xla_force_host_platform_device_count=999"),
        ({"topology": "cpu:8", "mesh": "data:4,model:2"}, "'model' is none of the axes data"),
        ({"topology": "cpu:8", "mesh": "data:x"}, "'data:x' is not AXIS:SIZE"),
        ({"topology": "cpu:8", "mesh": "data:3"}, "data=3, .*does not fit the 8 devices"),
        ({"topology": "cpu:2", "mesh": "data:8"}, "data=8, .*does not fit the 2 devices"),
        ({"topology": "cpu:6"}, "batch_size=8 is not divided by data.fsdp=6 .*nearest: 6 or 12"),
        ({"topology": "cpu:8", "largest_batch": True}, "needs a chip whose memory"),
    ],
)
def test_a_mistake_is_one_line(config, options, message):
    with pytest.raises(UserError, match=message) as caught:
        planning.plan(config, "nowhere", **options)
    assert "\n" not in str(caught.value)


def test_the_command_line_brings_the_flags_of_plan():
    flags = ["--config=configs/clip.py", "--topology=cpu:8", "--mesh=fsdp:2", "--largest-batch"]
    command = command_line.parse(["plan", *flags])
    assert command.options == {"topology": "cpu:8", "mesh": "fsdp:2", "largest_batch": True}
    for arguments, message in [
        (["plan", flags[0]], "plan needs a machine: add --topology="),
        (["train", *flags[:2]], "--topology goes with the subcommand plan, not with train"),
    ]:
        with pytest.raises(UserError, match=message):
            command_line.parse(arguments)


def test_without_the_tpu_compiler_the_extra_is_named(config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu.*pip install 'mlip_jax\[tpu\]'.*cpu:8"):
        planning.plan(config, "nowhere", topology="v5e:2x4")


def test_a_vocabulary_to_be_trained_needs_no_data():
    config = command_line.parse(["--config=configs/clip_lite.py"]).config
    assert config.model.text.tokenizer == "wordpiece"
    assert estimates.network_of(config).text["vocab_size"] == config.model.text.vocab_size


WITH_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"
)


@pytest.mark.slow
@WITH_LIBTPU
@pytest.mark.parametrize("name", machines.CHIPS)
def test_every_slice_that_is_listed_has_its_chips_as_devices(name):
    for shape in machines.CHIPS[name].slices:
        devices = machines.find(f"{name}:{shape}").devices
        assert len(devices) == math.prod(map(int, shape.split("x")))


LARGE = "size=B/16,data=jsonl:x"


def large(file, arguments=LARGE, mesh="data:-1", flags=()):
    return pytest.param(f"{file}:{arguments}", mesh, flags, marks=pytest.mark.large)


@pytest.mark.slow
@WITH_LIBTPU
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:16x16", "v6e:4x8"])
@pytest.mark.parametrize(
    ("file", "mesh", "flags"),
    [
        *((file, "data:-1", ()) for file in CONFIGS),
        ("mlip.py", "fsdp:4", ("ring=always",)),
        ("mlip.py:objective=jsd", "fsdp:4", ("accumulation=2",)),
        ("mlip.py:objective=sigmoid", "fsdp:2,tensor:2", ("ring=always",)),
        large("mlip.py", mesh="fsdp:4", flags=("ring=always",)),
        *map(large, ("clip.py", "coca.py", "filip.py", "mlip.py", "siglip.py", "siglip2.py")),
        large("clip_lite.py", "size=RN50,data=jsonl:x"),
        *(large("baselines.py", f"run={run},data=jsonl:x") for run in BASELINES),
    ],
)
def test_the_tpu_compiler_takes_every_config(file, mesh, flags, topology):
    """A program that only a CPU accepts is a defect."""
    machine = machines.find(topology)
    arguments = [f"--config=configs/{file}", *(f"--config.{flag}" for flag in flags)]
    config = command_line.parse(arguments).config
    config.batch_size = 4 * len(machine.devices)
    for stage in stages.of(with_mesh(config, mesh)):
        plan = planning.estimate(stage.config, machine)
        assert plan.fits, plan.refusal
        assert plan.dtype == "bfloat16"
        assert plan.memory.total < machine.chip.memory
        assert plan.program.unknown_loops == 0
        assert plan.program.unestimated < plan.program.work / 10
        assert 0 < plan.utilisation(plan.compute_seconds) < 1
