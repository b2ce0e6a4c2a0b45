"""What the text of a compiled program shows: cycles by the compiler's estimate, and collectives."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<op>[a-z][\w\-]*)\((?P<operands>[^)]*)"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=([^,\s]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BOUND = re.compile(r"\bs32\[\]\S* constant\((\d+)\)")
_GROUPS = re.compile(r"replica_groups=(\{\{[\d,]*\}|\[[\d,]+\]<=|mesh\[[^]]*\][^{]*\{[^}]*\})")
_MESH_AXIS = re.compile(r"('\w+')=(\d+)")
_USED_AXIS = re.compile(r"('\w+')(?::\(\d+\)(\d+))?")
_REDUCE_SCATTER = "all-reduce-scatter"
_PALLAS = 'custom_call_target="tpu_custom_call"'
# Instructions that take time; the compiler gives most of them an estimate.
_WORK = ("fusion", "sort", "convolution", "dot", "scatter", "copy", "reduce", "fft")


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of COLLECTIVES.
      payload: bytes of the whole array: what it makes, or what a reduce-scatter takes.
      devices: that take part in one group.
      times: how often a step runs it.
    """

    kind: str
    payload: int
    devices: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all, by the ring algorithm; a permute sends the payload."""
        share = (self.devices - 1) / self.devices
        rounds = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * self.payload * rounds


@dataclass(frozen=True)
class Call:
    """A kernel that is not XLA's own and of which it estimates nothing.

    Attributes:
      name: the kernel's.
      traffic: bytes that it reads and writes, each array once.
      times: how often a step runs it.
    """

    name: str
    traffic: int
    times: int


@dataclass
class Program:
    """What the text of a program sums up to, a device and step.

    Attributes:
      cycles: the compiler's estimates of the instructions in the order that they run: those of the
        entry computation, those of a loop's body times its trips, of a conditional's costliest
        branch. Collectives and copies between memories that run beside them have none.
      work: instructions that take time, without collectives.
      unestimated: those of them without an estimate.
      unknown_loops: loops whose trips are not known; counted once.
      collectives: each once, however many instructions it is spread over.
      calls: kernels of Pallas on TPUs; they count as work without an estimate.
    """

    cycles: int = 0
    work: int = 0
    unestimated: int = 0
    unknown_loops: int = 0
    collectives: list[Collective] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        return sum(collective.sent for collective in self.collectives)


@dataclass(frozen=True)
class Array:
    """An array in the text of a program."""

    dtype: str  # such as "bf16"
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes; of less than a byte each, rounded down in all."""
        bits = 8 if self.dtype == "pred" else int(_BITS.findall(self.dtype)[0])
        return self.size * bits // 8


@dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    op: str
    type: str
    operands: tuple[str, ...]  # names; of a parameter, its number
    line: str


Computations = dict[str, list[Instruction]]


@dataclass(frozen=True)
class Place:
    """An instruction that a step runs: where it stands, and how often it runs."""

    instruction: Instruction
    computation: str
    times: int
    fused: bool  # it is part of another instruction


def read(text: str, devices: int) -> Program:
    """Reads the text of a compiled program.

    Args:
      text: `as_text()` of a `jax.stages.Compiled`.
      devices: that it runs on.
    """
    entry, computations = parse(text)
    program = Program()
    program.cycles = _cycles(entry, computations, program)
    program.calls = _calls(entry, computations)
    program.work += len(program.calls)
    program.unestimated += len(program.calls)
    seen = set()
    # A collective that runs beside the arithmetic is spread over several fusions; those of a
    # shard_map share one channel. So what is scheduled counts, and in fusions what is new.
    for fused in (False, True):
        for place in reached(entry, computations, 1, False):
            collective = _collective(place, devices) if place.fused == fused else None
            if collective is None:
                continue
            channel = _CHANNEL.search(place.instruction.line)
            key = (collective.kind, collective.payload, channel[1] if channel else "")
            if not (fused and key in seen):
                program.collectives.append(collective)
            seen.add(key)
    return program


def parse(text: str) -> tuple[str, Computations]:
    """The name of the entry computation, and all computations by name."""
    computations: Computations = {}
    entry = name = ""
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _COMPUTATION.match(line)
            if header:
                name = header["name"]
                computations[name] = []
                entry = name if header["entry"] else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction and name:
            computations[name].append(
                Instruction(
                    name=instruction["name"],
                    op=instruction["op"],
                    type=instruction["type"],
                    operands=_operands(instruction["operands"]),
                    line=line,
                )
            )
    return entry, computations


def _trips(instruction: Instruction, computations: Computations) -> int | None:
    """How often a loop runs; None where the text does not tell.

    The loops of `lax.scan`, `lax.map` and `fori_loop` count from 0 by 1 to a constant.
    """
    trip_count = _TRIPS.search(instruction.line)
    if trip_count:
        return int(trip_count[1])
    condition = _CONDITION.search(instruction.line)
    lines = computations.get(condition[1], []) if condition else []
    bounds = [bound for line in lines if (bound := _BOUND.search(line.line))]
    return int(bounds[0][1]) if len(bounds) == 1 else None


def _branches(line: str) -> list[str]:
    names = [name for pair in _BRANCHES.findall(line) for name in pair if name]
    return [name.strip(" %") for group in names for name in group.split(",")]


def _named(computation: re.Pattern[str], line: str) -> str:
    """The computation that an instruction runs."""
    match = computation.search(line)
    assert match is not None  # every loop, call and fusion names one
    return match[1]


def _cycles(name: str, computations: Computations, program: Program) -> int:
    total = 0
    for instruction in computations.get(name, []):
        line = instruction.line
        if instruction.op == "while":
            trips = _trips(instruction, computations)
            program.unknown_loops += trips is None
            body = _cycles(_named(_BODY, line), computations, program)
            total += body * (1 if trips is None else trips)
        elif instruction.op == "conditional":
            branches = [_cycles(branch, computations, program) for branch in _branches(line)]
            total += max(branches, default=0)
        elif instruction.op == "call":
            total += _cycles(_named(_CALLED, line), computations, program)
        elif instruction.op in _WORK:
            estimate = _CYCLES.search(line)
            if estimate is None and _starts_collective(instruction, computations):
                continue
            program.work += 1
            program.unestimated += estimate is None
            total += int(estimate[1]) if estimate else 0
        elif estimate := _CYCLES.search(line):
            total += int(estimate[1])
    return total


def _calls(entry: str, computations: Computations) -> list[Call]:
    calls = []
    for place in reached(entry, computations, 1, False):
        instruction = place.instruction
        if instruction.op != "custom-call" or _PALLAS not in instruction.line:
            continue
        types = {one.name: one.type for one in computations[place.computation]}
        moved = (instruction.type, *(types.get(name, "") for name in instruction.operands))
        traffic = sum(array.bytes for type_ in moved for array in arrays(type_))
        name = instruction.name.split(".")[0]
        calls.append(Call(name, traffic, place.times))
    return calls


def _starts_collective(instruction: Instruction, computations: Computations) -> bool:
    return any(other.op in COLLECTIVES for other in inside(instruction, computations))


def inside(instruction: Instruction, computations: Computations) -> list[Instruction]:
    """What the computation holds that a fusion or a call runs; [] for other instructions."""
    called = _CALLED.search(instruction.line)
    return computations.get(called[1], []) if called else []


def reached(name: str, computations: Computations, times: int, fused: bool) -> Iterator[Place]:
    """Every instruction that a step runs, from a computation on."""
    for instruction in computations.get(name, []):
        yield Place(instruction, name, times, fused)
        line, op = instruction.line, instruction.op
        if op == "while":
            inside = times * (_trips(instruction, computations) or 1)
            yield from reached(_named(_BODY, line), computations, inside, fused)
        elif op == "conditional":
            for branch in _branches(line):
                yield from reached(branch, computations, times, fused)
        elif op in ("fusion", "call", "async-start"):
            called = _named(_CALLED, line)
            # A reduce-scatter, as the TPU compiler writes it, is a fusion by itself.
            within = fused or op == "fusion" and not called.startswith(_REDUCE_SCATTER)
            yield from reached(called, computations, times, within)


def _collective(place: Place, devices: int) -> Collective | None:
    instruction = place.instruction
    kind = instruction.op.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    size = _group_size(instruction.line, devices)
    sizes = [array.bytes for array in arrays(instruction.type)]
    payload = sum(sizes)
    if instruction.op in ("all-gather-start", "reduce-scatter-start"):  # give their operands too
        payload = payload * size // (size + 1)
    elif kind == "collective-permute":
        payload = max(sizes)
    elif kind == "reduce-scatter":
        payload *= size
    elif place.computation.startswith(_REDUCE_SCATTER):
        kind = "reduce-scatter"
    return Collective(kind, payload, size, place.times)


def arrays(type_: str) -> list[Array]:
    """The arrays of a type, those of a tuple in order."""
    return [
        Array(dtype, tuple(int(size) for size in shape.split(",") if size))
        for dtype, shape in _ARRAY.findall(type_)
    ]


def _operands(text: str) -> tuple[str, ...]:
    """The names in "%a, f32[2,3]{1,0} %b", with types or without."""
    return tuple(part.split()[-1].lstrip("%") for part in text.split(", ") if part.strip())


def _group_size(line: str, devices: int) -> int:
    """Devices in a group of "{{0,1},{2,3}}", "[groups,size]<=[...]" or "mesh['a'=2] {'a'}"."""
    match = _GROUPS.search(line)
    if not match:
        return devices
    groups = match[1]
    if groups.startswith("{{"):
        return groups.count(",") + 1
    if groups.startswith("["):
        return int(groups.removesuffix("]<=").rsplit(",", 1)[-1].lstrip("["))
    axes, _, used = groups.partition("]")
    sizes = dict(_MESH_AXIS.findall(axes))
    used = used[used.rindex("{") :]
    return math.prod(int(part or sizes[axis]) for axis, part in _USED_AXIS.findall(used))
