"""What the kernels of a GPU's program multiply, read and write, by the program's text.

XLA estimates no cycles for GPUs. From these figures follows the least that a kernel takes: its
products at the card's rate, or its bytes at the card's bandwidth, whichever is longer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlip_jax.planning import hlo
from mlip_jax.planning.gpus import Card

_ATTENTION = "__cudnn$fmha"
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^\]}]*)')
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")
_HIGHEST = "operand_precision={highest,highest}"
# They move nothing: names of what is there, and what is counted elsewhere.
_FREE = [
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "while",
    "conditional",
    "call",
    "partition-id",
    "replica-id",
    "add-dependency",
    "opt-barrier",
    "async-done",
    "copy-done",
]


@dataclass(frozen=True)
class Kernel:
    """A kernel that a step runs.

    Attributes:
      products: FLOPs by the type of what is multiplied: "bf16", "f32" (as TF32), "f32 highest".
      traffic: bytes read and written, each array once.
      times: how often a step runs it.
      target: of a call to a library, such as "__cudnn$convForward"; "" for XLA's own.
      uncounted: a library's kernel whose FLOPs are not known here.
    """

    products: Mapping[str, float]
    traffic: int
    times: int
    target: str = ""
    uncounted: bool = False

    @property
    def is_attention(self) -> bool:
        """Whether it is attention as one kernel of cuDNN's."""
        return self.target.startswith(_ATTENTION)

    def seconds(self, card: Card) -> float:
        """The least that all its runs of a step take."""
        rates = {"f32": card.tf32, "f32 highest": card.float32}
        compute = sum(flops / rates.get(dtype, card.peak) for dtype, flops in self.products.items())
        return self.times * max(compute, self.traffic / card.bandwidth)


def read(text: str) -> list[Kernel]:
    """The kernels of the text of a program that was compiled for a GPU."""
    entry, computations = hlo.parse(text)
    types = {
        name: {one.name: one.type for one in instructions}
        for name, instructions in computations.items()
    }
    return [
        _kernel(place, types[place.computation], computations)
        for place in hlo.reached(entry, computations, 1, False)
        if not place.fused and _moves(place.instruction.op)
    ]


def products(kernels: Iterable[Kernel]) -> Counter[str]:
    """FLOPs of a step by the type of what is multiplied."""
    total: Counter[str] = Counter()
    for kernel in kernels:
        for dtype, flops in kernel.products.items():
            total[dtype] += kernel.times * int(flops)
    return total


def _moves(op: str) -> bool:
    collective = op.removesuffix("-start").removesuffix("-done")
    return op not in _FREE and collective not in hlo.COLLECTIVES


def _kernel(place: hlo.Place, types: Mapping[str, str], computations: hlo.Computations) -> Kernel:
    instruction = place.instruction
    target = _TARGET.search(instruction.line)
    flops = _products(instruction, types, computations)
    return Kernel(
        products=flops,
        traffic=_traffic(instruction, types, computations),
        times=place.times,
        target=target[1] if target else "",
        uncounted=instruction.op == "custom-call" and not flops,
    )


def _products(
    instruction: hlo.Instruction, types: Mapping[str, str], computations: hlo.Computations
) -> Counter[str]:
    """FLOPs of an instruction and of what is fused into it, by type."""
    total: Counter[str] = Counter()
    if instruction.op == "dot" or "$gemm" in instruction.line or "$lt$matmul" in instruction.line:
        left = types.get(instruction.operands[0], "")
        contracted = _CONTRACTED.search(instruction.line)
        if left and contracted:
            sides = hlo.arrays(left)[0].shape
            axes = [int(axis.strip('" ')) for axis in contracted[1].split(",") if axis.strip('" ')]
            size = math.prod(sides[axis] for axis in axes)
            out = hlo.arrays(instruction.type)[0]
            total[_dtype(left, instruction.line)] += 2 * out.size * size
    elif labels := _LABELS.search(instruction.line):
        total[_dtype(types.get(instruction.operands[0], ""), instruction.line)] += _convolution(
            instruction, types, labels[1]
        )
    if instruction.op == "fusion":
        inner = hlo.inside(instruction, computations)
        inner_types = {one.name: one.type for one in inner}
        for one in inner:
            total += _products(one, inner_types, computations)
    return total


def _convolution(instruction: hlo.Instruction, types: Mapping[str, str], labels: str) -> int:
    """Two for each weight and element of what it makes, or of which it takes the gradient."""
    names = instruction.operands[:2]
    operands = [hlo.arrays(types[name])[0] for name in names if name in types]
    if len(operands) < 2:
        return 0
    out = hlo.arrays(instruction.type)[0]
    if "BackwardFilter" in instruction.line:
        features, kernel = operands[1], out
    elif "BackwardInput" in instruction.line:
        features, kernel = operands
    else:
        features, kernel = out, operands[1]
    return 2 * features.size * kernel.size // kernel.shape[labels.index("o")]


def _dtype(type_: str, line: str) -> str:
    arrays = hlo.arrays(type_)
    dtype = arrays[0].dtype if arrays else "f32"
    return f"{dtype} highest" if dtype == "f32" and _HIGHEST in line else dtype


def _traffic(
    instruction: hlo.Instruction, types: Mapping[str, str], computations: hlo.Computations
) -> int:
    written = sum(array.bytes for array in hlo.arrays(instruction.type))
    fused = instruction.op == "fusion"
    sliced = _sliced(hlo.inside(instruction, computations)) if fused else {}
    total = written
    for place, operand in enumerate(instruction.operands):
        whole = sum(array.bytes for array in hlo.arrays(types.get(operand, "")))
        total += min(sliced.get(place, whole), whole)
    return total


def _sliced(inside: list[hlo.Instruction]) -> dict[int, int]:
    """Of a fusion's arguments of which slices alone are read: the bytes of these."""
    parameters = {
        one.name: int(one.operands[0])
        for one in inside
        if one.op == "parameter" and one.operands and one.operands[0].isdigit()
    }
    read: dict[int, int] = {}
    whole: set[int] = set()
    for one in inside:
        for position, operand in enumerate(one.operands):
            if operand not in parameters:
                continue
            place = parameters[operand]
            if one.op == "dynamic-slice" and position == 0:
                read[place] = read.get(place, 0) + sum(a.bytes for a in hlo.arrays(one.type))
            elif one.op != "dynamic-slice":
                whole.add(place)
    return {place: size for place, size in read.items() if place not in whole}
