"""What a run learns from a teacher: losses between its embeddings of a batch and the teacher's.

Both are of the same pairs, each model's in a space of its own. No gradient goes to the teacher.
Each way to learn is an entry of `core.registry.DISTILLATIONS` and a section of config.distillation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mlip_jax.objectives import blocks, contrastive
from mlip_jax.objectives.contrastive import Scalar
from mlip_jax.objectives.losses import in_blocks


class Embedded(NamedTuple):
    """A model's view of a batch: embeddings, L2-normalised, and what it multiplies cosines by."""

    image: Float[Array, "batch width"]
    text: Float[Array, "batch width"]
    scale: Float[Array, ""] | float


class Where(NamedTuple):
    """How a loss over all pairs is computed."""

    blocks: str = "auto"  # see `losses.in_blocks`
    mesh: Mesh | None = None  # the devices that the rows lie on; None: one


HERE = Where()


@dataclass(frozen=True)
class Distillation:
    """One way to learn from a teacher.

    Attributes:
      loss: of the student's embeddings, the teacher's, and where they lie -> the mean loss.
      same_space: whether the two are compared directly. Where the teacher's are of another width,
        the student's come through a learned linear map, and are normalised again.
      products: of all images with all texts that it takes: (the student's, the teacher's).
    """

    loss: Callable[[Embedded, Embedded, Where], Scalar]
    same_space: bool = False
    products: tuple[int, int] = (0, 0)


def features(student: Embedded, teacher: Embedded, where: Where = HERE) -> Scalar:
    """CLIP-KD's feature distillation (arXiv 2307.12732, 3.2): the squared distance to the teacher.

    The mean over a batch and over the width, as in the authors' code, of images and of texts; their
    sum. The paper weighs it 2,000 against 1 of the contrastive loss, at a width of 512.
    """
    del where  # each row by itself
    return sum(
        (
            jnp.mean(jnp.square(one.astype(jnp.float32) - other.astype(jnp.float32)))
            for one, other in ((student.image, teacher.image), (student.text, teacher.text))
        ),
        start=jnp.zeros((), jnp.float32),
    )


def relation(student: Embedded, teacher: Embedded, where: Where = HERE) -> Scalar:
    """CLIP-KD's contrastive relational distillation (arXiv 2307.12732, 3.2).

    The divergence KL(teacher || student) of the distribution over all texts of a batch that an
    image's scores give, and of that over all images that a text's give; the mean over rows and over
    both directions. Each model's scores are its cosines by its own scale. TinyCLIP's affinity
    mimicking (arXiv 2309.12314) and open_clip's distillation loss are its cross-entropy: the same
    gradient, a value that is higher by the entropy of the teacher's distribution.
    """
    if in_blocks(where.blocks, len(student.image), 2, where.mesh):
        return blocks.divergence(*student, *teacher, mesh=where.mesh)
    return divergence_of_scores(
        *(each.scale * contrastive.similarity(each.image, each.text) for each in (student, teacher))
    )


def divergence_of_scores(
    student: Float[Array, "images texts"], teacher: Float[Array, "images texts"]
) -> Scalar:
    """KL(teacher || student) of the softmax of rows, and of columns; the mean of both."""
    total = jnp.zeros((), jnp.float32)
    for axis in (0, 1):
        of_student, of_teacher = (jax.nn.log_softmax(each, axis) for each in (student, teacher))
        terms = jnp.exp(of_teacher) * (of_teacher - of_student)
        total += jnp.mean(jnp.sum(terms, axis=axis)) / 2
    return total


FEATURES = Distillation(features, same_space=True)
RELATION = Distillation(relation, products=(1, 1))
