"""What a training step costs: the memory of its program, and the arithmetic of its model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal, Var
from ml_collections import ConfigDict

from mlip_jax.core.registry import DISTILLATIONS, LOSSES
from mlip_jax.core.schema import PERSPECTIVES, lessons, views_of
from mlip_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from mlip_jax.models import building
from mlip_jax.models.two_tower import TwoTower
from mlip_jax.objectives import perspectives
from mlip_jax.training.teachers import NO_TEACHERS, Teachers, open_teachers

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of a device, by the compiler."""

    arguments: int  # state and batch
    outputs: int
    aliased: int  # outputs that take the place of arguments: the donated state
    temporary: int
    code: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> Memory:
        """The memory of a compiled program."""
        sizes = compiled.memory_analysis()
        assert sizes is not None  # the compilers for CPU, GPU and TPU give it
        return cls(
            arguments=sizes.argument_size_in_bytes,
            outputs=sizes.output_size_in_bytes,
            aliased=sizes.alias_size_in_bytes,
            temporary=sizes.temp_size_in_bytes,
            code=sizes.generated_code_size_in_bytes,
        )

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.arguments + self.outputs - self.aliased + self.temporary + self.code


def network_of(config: ConfigDict) -> TwoTower:
    """The model without its data: a vocabulary to be trained counts as large as it may get."""
    tokenizer = _tokenizer_of(config)
    if tokenizer:
        return building.build_for(config, tokenizer)
    return building.build(config, vocab_size=config.model.text.vocab_size, start_id=0, end_id=1)


def teachers_of(config: ConfigDict, network: TwoTower) -> Teachers:
    """The models that a config's run learns from, without its data."""
    return open_teachers(config, network, _tokenizer_of(config))


def _tokenizer_of(config: ConfigDict) -> Tokenizer | None:
    """The tokenizer; None for one that is trained on the data."""
    text = config.model.text
    if text.tokenizer == "wordpiece":
        return None
    return load_tokenizer(text.tokenizer, cleaning=text.cleaning)


def step_flops(
    network: TwoTower, variables: Any, config: ConfigDict, teachers: Teachers = NO_TEACHERS
) -> float:
    """FLOPs of the matrix products of a training step on the global batch.

    Three times those of the forward pass, encoders, heads, predictions and scores: each product has
    two in the backward pass. A frozen tower and a teacher have no backward pass. Nothing recomputed
    counts, nor does the optimizer; a concat critic and projections to a teacher's space are left
    out.

    Args:
      network: the model.
      variables: its variables, as arrays or shapes.
      config: the run's.
      teachers: of `network`.
    """
    size = config.model.image.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    text = jax.ShapeDtypeStruct((1, config.model.text.context_length), jnp.int32)
    local = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    total = both = 0.0
    for tower, example, second in (
        ("image", image, "augmented_image"),
        ("text", text, "other_caption"),
    ):

        def embed(variables: Any, rows: jax.Array, tower: str = tower) -> Any:
            if tower == "image":
                return building.embed_kept(network, variables, rows, config)
            return network.apply(variables, rows, method="embed_texts")

        program, out = jax.make_jaxpr(embed, return_shape=True)(local, example)
        shapes |= out
        passes = 1 if tower in network.frozen else 3
        once = matrix_flops(program.jaxpr)
        total += passes * views_of(config, second) * config.batch_size * once
        both += once
    terms = [term for term in perspectives.terms(config) if not term.predicts]
    scores = sum(_score_flops(term, shapes, config.batch_size) for term in terms)
    if network.predictions:

        def embed_pair(variables: Any, images: jax.Array, token_ids: jax.Array) -> Any:
            return building.all_kept(network, variables, images, token_ids, config)

        whole = matrix_flops(jax.make_jaxpr(embed_pair)(local, image, text).jaxpr)
        total += 3 * config.batch_size * (whole - both)
    return total + 3 * scores + _lesson_flops(local, config, teachers)


def _lesson_flops(variables: Any, config: ConfigDict, teachers: Teachers) -> float:
    """Of the teachers' forward passes, and of all images' scores with all texts."""
    batch, total = config.batch_size, 0.0
    for teacher in teachers.all:
        embedded = jax.make_jaxpr(teacher.embed)(
            teacher.model.variables if teacher.model else variables, teachers.example(config)
        )
        total += batch * matrix_flops(embedded.jaxpr)
        for way, _ in lessons(config):
            own, theirs = DISTILLATIONS[way].products
            total += 2.0 * batch**2 * (3 * own * config.model.embed_dim + theirs * teacher.width)
    return total


def _score_flops(
    term: perspectives.Term, shapes: dict[str, jax.ShapeDtypeStruct], batch: int
) -> float:
    """Of the scores of one perspective: all pairs, or with jsd the positives and the shifts."""
    if term.view not in shapes:  # two views of a modality: as wide as the global ones
        one = other = shapes["spatial_global" if "spatial_global" in shapes else "text_global"]
    else:
        one, other = shapes[term.view], shapes[PERSPECTIVES[term.view]]
    pairs = LOSSES[term.loss].scored_pairs(batch, term.shifts)
    tokens = math.prod(one.shape[1:-1]) * math.prod(other.shape[1:-1])
    return 2.0 * pairs * tokens * one.shape[-1]


def matrix_flops(program: Jaxpr) -> float:
    """FLOPs of a program's matrix products and convolutions, two for each multiply-add."""
    total = 0.0
    for equation in program.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = _array(equation.invars[0]), _array(equation.outvars[0])
            total += 2.0 * out.size * math.prod(left.shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, out = _array(equation.invars[1]), _array(equation.outvars[0])
            channels = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * out.size * kernel.size / channels
        else:
            inside = [matrix_flops(part) for part in _parts(equation.params)]
            if name == "scan":
                total += equation.params["length"] * sum(inside)
            elif equation.params.get("branches_platforms"):
                total += inside[-1]  # the default: a product elsewhere may only stand for a sum
            else:
                total += max(inside, default=0.0) if name == "cond" else sum(inside)
    return total


def _array(operand: Literal | Var) -> jax.core.ShapedArray:
    """What a product takes or gives."""
    assert isinstance(operand.aval, jax.core.ShapedArray)
    return operand.aval


def _parts(params: dict[str, Any]) -> list[Jaxpr]:
    """The programs within an equation."""
    # Before JAX 0.12 a closed program is not a Jaxpr but holds one.
    parts = [getattr(leaf, "jaxpr", leaf) for leaf in jax.tree.leaves(list(params.values()))]
    return [part for part in parts if isinstance(part, Jaxpr)]
