"""The models that a run learns from, opened: what they see, and what they say of it."""

from __future__ import annotations

import abc
import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from mlip_jax.core import places
from mlip_jax.core.errors import UserError
from mlip_jax.core.registry import DISTILLATIONS
from mlip_jax.core.schema import KEPT, OWN_AVERAGE, flatten, lessons, to_json
from mlip_jax.data.batches.teaching import IMAGE, NO_INPUTS, TOKEN_IDS, TeacherInputs
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.data.sets.kept import Kept, open_kept, same_views
from mlip_jax.data.text.tokenizer import Tokenizer
from mlip_jax.devices import parallel
from mlip_jax.inference import Model, load
from mlip_jax.inference.programs import Programs, global_view, programs
from mlip_jax.models import building
from mlip_jax.models.two_tower import TwoTower
from mlip_jax.objectives.distillation import Embedded
from mlip_jax.search.identity import digest
from mlip_jax.training import accumulation
from mlip_jax.training.state import TrainState

_OF_VIEWS = ("data.augment.", "data.orientation", "data.decode", "model.text.cleaning")
WEIGHTS = "teachers"  # of a step's batch: the variables of those that are folders, in order


@dataclass(frozen=True, kw_only=True)
class Teacher(abc.ABC):
    """One model that teaches.

    Attributes:
      name: as config.teacher has it.
      identity: what tells it from every other, whatever its place.
      width: of its embeddings.
      model: the folder's; None: it has no weights of its own here.
    """

    name: str
    identity: str
    width: int
    model: Model | None = None

    @property
    @abc.abstractmethod
    def keys(self) -> tuple[str, str]:
        """The batch's keys of what it takes."""

    @abc.abstractmethod
    def variables(self, weights: Iterator[Any], average: Any) -> Any:
        """What it computes with: the next of the weights, the run's own average, or nothing."""

    @abc.abstractmethod
    def embed(self, variables: Any, rows: Mapping[str, Array]) -> dict[str, Array]:
        """Its embeddings of images and texts of some rows of a batch."""

    @abc.abstractmethod
    def scale(self, variables: Any) -> Array:
        """What it multiplies cosines by."""

    @abc.abstractmethod
    def line(self, config: ConfigDict) -> str:
        """How it sees the run's pairs, in words; `config` is the run's."""


@dataclass(frozen=True, kw_only=True)
class ModelTeacher(Teacher):
    """A model, or the run's own average, that looks at each batch.

    Attributes:
      view: the perspective that they are of.
      functions: what computes them.
      image: the batch's key of what it sees.
      token_ids: the batch's key of what it reads.
    """

    view: str
    functions: Programs
    image: str = IMAGE
    token_ids: str = TOKEN_IDS

    @property
    def keys(self) -> tuple[str, str]:
        return self.image, self.token_ids

    def variables(self, weights: Iterator[Any], average: Any) -> Any:
        return next(weights) if self.model else average

    def embed(self, variables: Any, rows: Mapping[str, Array]) -> dict[str, Array]:
        image = self.functions.embed_pixels(variables, rows[self.image])
        return {"image": image, "text": self.functions.embed_texts(variables, rows[self.token_ids])}

    def scale(self, variables: Any) -> Array:
        return jnp.exp(variables["params"][f"log_scale_{self.view}"])

    def line(self, config: ConfigDict) -> str:
        if self.model is None:
            return f"teacher: the average of the run's own parameters, {self.width} wide"
        image, own = self.model.config.model.image, config.model.image.image_size
        size = self.model.preprocess.image_size
        count = sum(leaf.size for leaf in jax.tree.leaves(self.model.variables["params"]))
        pixels = f"{size} pixels, as the run's" if size == own else f"{size} pixels, the run {own}"
        texts = "the run's" if self.token_ids == TOKEN_IDS else "its own"
        length = self.model.config.model.text.context_length
        return (
            f"teacher {self.name}: {image.architecture} of {image.depth} layers, {count:,} "
            f"parameters, embeddings of {self.width}; sees the run's augmented views at {pixels}, "
            f"normalised as it was trained; reads {length} tokens by {texts} tokenizer"
        )


@dataclass(frozen=True, kw_only=True)
class KeptTeacher(Teacher):
    """A model that has looked at the dataset before.

    Attributes:
      kept: what it has said.
      key: the beginning of the batch's keys.
    """

    kept: Kept
    key: str

    @property
    def keys(self) -> tuple[str, str]:
        return f"{self.key}_image", f"{self.key}_text"

    def variables(self, weights: Iterator[Any], average: Any) -> Any:
        del weights, average
        return {}

    def embed(self, variables: Any, rows: Mapping[str, Array]) -> dict[str, Array]:
        del variables
        image, text = (rows[key].astype(jnp.float32) for key in self.keys)
        return {"image": image, "text": text}

    def scale(self, variables: Any) -> Array:
        del variables
        return jnp.float32(self.kept.scale)

    def line(self, config: ConfigDict) -> str:
        del config
        return (
            f"teacher {self.name}: embeddings of {self.width} that {self.kept.folder} keeps in "
            f"float16, of {self.kept.views} views of each image at {self.kept.image_size} pixels, "
            f"by the model {self.kept.teacher[:12]}"
        )


@dataclass(frozen=True)
class Teachers:
    """All models that teach a run.

    Attributes:
      all: in the order of config.teacher.
      inputs: what of a batch is made for them alone.
      projections: of the student's embeddings, by name, see `TwoTower.to_teachers`.
    """

    all: tuple[Teacher, ...] = ()
    inputs: TeacherInputs = NO_INPUTS
    projections: Mapping[str, int] = field(default_factory=dict)

    @property
    def identities(self) -> list[str]:
        """What tells the teachers from all others."""
        return [teacher.identity for teacher in self.all]

    def check_same(self, identities: Sequence[str]) -> None:
        """Raises UserError unless these are the teachers that a run had when it was saved."""
        for number, (teacher, before) in enumerate(zip(self.all, identities, strict=False), 1):
            if teacher.identity != before:
                raise UserError(
                    f"config.teacher: number {number}, {teacher.name}, is another model than the "
                    "run has learned from so far: give the folder as it was, or another --workdir"
                )
        if len(identities) != len(self.all):
            raise UserError(
                f"config.teacher names {len(self.all)} models, and the run has learned from "
                f"{len(identities)} so far: give the same, or another --workdir"
            )

    def pupil(self, network: TwoTower) -> TwoTower:
        """The run's model with the projections to its teachers' spaces."""
        return network.clone(to_teachers=self.projections) if self.projections else network

    def shapes(self, batch_size: int, mesh: Mesh) -> dict[str, Any]:
        """Shapes and shardings of what a step takes for them in its batch."""
        if not self.all:
            return {}
        rows = parallel.batch_sharding(mesh)
        shapes: dict[str, Any] = {
            key: jax.ShapeDtypeStruct((batch_size, size, size, 3), np.uint8, sharding=rows)
            for key, size in self.inputs.sizes.items()
        }
        shapes |= {
            key: jax.ShapeDtypeStruct((batch_size, length), np.int32, sharding=rows)
            for key, (_, length) in self.inputs.tokenizers.items()
        }
        shapes |= {
            key: jax.ShapeDtypeStruct((batch_size, width), np.float16, sharding=rows)
            for key, width in self._kept().items()
        }
        variables = self._variables()
        shapes[WEIGHTS] = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            variables,
            parallel.tree_shardings(variables, mesh),
        )
        return shapes

    def example(self, config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of one row of what they see, the run's own image and token ids included."""
        sizes = {IMAGE: config.model.image.image_size} | dict(self.inputs.sizes)
        lengths = {key: length for key, (_, length) in self.inputs.tokenizers.items()}
        lengths[TOKEN_IDS] = config.model.text.context_length
        images = {key: (1, size, size, 3) for key, size in sizes.items()}
        return {
            **{key: jax.ShapeDtypeStruct(shape, np.uint8) for key, shape in images.items()},
            **{key: jax.ShapeDtypeStruct((1, size), np.int32) for key, size in lengths.items()},
            **{key: jax.ShapeDtypeStruct((1, w), np.float16) for key, w in self._kept().items()},
        }

    def random_rows(self, rows: int, seed: int) -> dict[str, np.ndarray]:
        """Random values in the place of what is made for them of some rows of a batch."""
        rng = np.random.default_rng(seed)
        images = {
            key: rng.integers(0, 256, (rows, size, size, 3), np.uint8)
            for key, size in self.inputs.sizes.items()
        }
        token_ids = {
            key: rng.integers(0, tokenizer.vocab_size, (rows, length), np.int32)
            for key, (tokenizer, length) in self.inputs.tokenizers.items()
        }
        kept = {
            key: rng.normal(0, width**-0.5, (rows, width)).astype(np.float16)
            for key, width in self._kept().items()
        }
        return images | token_ids | kept

    def placed(self, mesh: Mesh) -> dict[str, Any]:
        """Their weights on the devices of a mesh, sharded as a run's are; {} without teachers."""
        if not self.all:
            return {}
        variables = self._variables()
        shardings = parallel.tree_shardings(variables, mesh)
        # Of host arrays, which every process has.
        return {WEIGHTS: jax.jit(lambda tree: tree, out_shardings=shardings)(variables)}

    def _kept(self) -> dict[str, int]:
        """The widths of what is kept, by the batch's keys."""
        return {
            f"{key}_{side}": kept.width
            for key, kept in self.inputs.kept.items()
            for side in ("image", "text")
        }

    def _variables(self) -> list[Any]:
        return [teacher.model.variables for teacher in self.all if teacher.model]

    def embedded(
        self,
        rows: Mapping[str, Array],
        weights: list[Any],
        state: TrainState,
        parts: int,
        mesh: Mesh | None,
    ) -> list[Embedded]:
        """What they say of a batch.

        Args:
          rows: of the batch.
          weights: from `placed`.
          state: before the step, for the run's own average.
          parts: that a device's rows are cut in; see `training.accumulation`.
          mesh: the devices that the rows lie on; None: one.
        """
        loaded = iter(weights)
        result = []
        for teacher in self.all:
            variables = teacher.variables(loaded, state.evaluated)
            seen = {key: rows[key] for key in teacher.keys}
            if parts == 1:
                both = teacher.embed(variables, seen)
            else:
                both = accumulation.embedded(teacher.embed, variables, seen, parts, mesh)
            result.append(Embedded(both["image"], both["text"], teacher.scale(variables)))
        return result


NO_TEACHERS = Teachers()


def open_teachers(
    config: ConfigDict,
    network: TwoTower,
    tokenizer: Tokenizer | None,
    say: Callable[[str], None] = lambda _: None,
) -> Teachers:
    """Loads the models that config.teacher names.

    Args:
      config: the run's, validated.
      network: the run's model.
      tokenizer: the run's; None: one that no teacher has.
      say: is told of each.

    Raises:
      UserError: for a folder that holds no model, a damaged one, one without a joint space, or one
        that does not say how its images and texts are prepared.
    """
    same_space = [view for way, view in lessons(config) if DISTILLATIONS[way].same_space]
    projected = dict.fromkeys([*same_space, "text_global"] if same_space else [])
    opened: list[Teacher] = []
    sizes: dict[str, int] = {}
    tokenizers: dict[str, tuple[Tokenizer, int]] = {}
    all_kept: dict[str, Kept] = {}
    projections: dict[str, int] = {}
    for number, name in enumerate(config.teacher):
        teacher: Teacher
        if name == OWN_AVERAGE:
            teacher = _own_average(config, network)
        elif name.partition(":")[0] == KEPT:
            key = f"kept_{number}"
            teacher = _kept(name, config, key)
            all_kept[key] = teacher.kept
        else:
            teacher = _load(name, config, tokenizer, sizes, tokenizers)
        if teacher.width != config.model.embed_dim:
            projections |= {f"{number}_{view}": teacher.width for view in projected}
        say(teacher.line(config))
        opened.append(teacher)
    same_views(list(all_kept.values()))
    return Teachers(tuple(opened), TeacherInputs(sizes, tokenizers, all_kept), projections)


def _kept(name: str, config: ConfigDict, key: str) -> KeptTeacher:
    """What the training set keeps of a teacher; of "kept:FOLDER", of the model in the folder."""
    kind, _, place = config.data.train.partition("#")[0].partition(":")
    if kind != "prepared" or places.is_url(place):
        raise UserError(
            f"config.teacher={name!r} reads what mlip prepare --teacher has kept beside a prepared "
            f"dataset on this machine: config.data.train={config.data.train!r} is none"
        )
    for option in ("tags", "shuffle", "word_dropout"):
        if config.data.caption[option]:
            raise UserError(
                f"config.data.caption.{option}={config.data.caption[option]:g} changes captions, "
                f"and the teacher has read them as they are: set it to 0"
            )
    folder = name.partition(":")[2]
    identity = digest(load(folder)) if folder else ""
    kept = open_kept(Path(place).expanduser(), view_settings(config), identity)
    views = hashlib.sha256(json.dumps(kept.to_values(), sort_keys=True).encode()).hexdigest()
    identity = f"kept {kept.teacher} {views}"
    return KeptTeacher(name=name, identity=identity, width=kept.width, kept=kept, key=key)


def view_settings(config: ConfigDict) -> dict[str, Any]:
    """What the views and the captions of a dataset depend on, by the config's keys."""
    flat = flatten(json.loads(to_json(config)))
    return {key: flat[key] for key in flat if key.startswith(_OF_VIEWS)}


def _own_average(config: ConfigDict, network: TwoTower) -> ModelTeacher:
    view = global_view(network)
    functions = programs(network, view, config, Preprocessing.of(config))
    return ModelTeacher(
        name=OWN_AVERAGE,
        identity=OWN_AVERAGE,
        width=config.model.embed_dim,
        view=view,
        functions=functions,
    )


def _load(
    name: str,
    config: ConfigDict,
    tokenizer: Tokenizer | None,
    sizes: dict[str, int],
    tokenizers: dict[str, tuple[Tokenizer, int]],
) -> ModelTeacher:
    """A folder's model; notes in `sizes` and `tokenizers` what it needs that is not there yet."""
    model = load_teacher(name, "config.teacher")
    # A run has its weights once on its devices, by `placed`.
    model = model.with_variables(jax.device_get(model.variables))
    size = model.preprocess.image_size
    image = IMAGE if size == config.model.image.image_size else f"image_at_{size}"
    if image != IMAGE:
        sizes[image] = size
    length, own_length = (each.model.text.context_length for each in (model.config, config))
    own = [(TOKEN_IDS, (tokenizer, own_length))] if tokenizer else []
    known = [*own, *tokenizers.items()]
    same = (key for key, other in known if _is_same((model.tokenizer, length), other))
    token_ids = next(same, f"token_ids_of_teacher_{len(tokenizers) + 1}")
    if token_ids not in dict(known):
        tokenizers[token_ids] = model.tokenizer, length
    settings = copy.deepcopy(model.config)
    if settings.compute_dtype == "auto":
        settings.compute_dtype = config.compute_dtype
    network = building.build_for(settings, model.tokenizer, training=False)
    view = global_view(network)
    functions = programs(network, view, settings, model.preprocess)
    text = np.zeros((1, length), np.int32)
    width = jax.eval_shape(functions.embed_texts, model.variables, text).shape[-1]
    return ModelTeacher(
        name=name,
        identity=digest(model),
        width=width,
        model=model,
        view=view,
        functions=functions,
        image=image,
        token_ids=token_ids,
    )


def load_teacher(place: str, option: str) -> Model:
    """The model of a folder, which can teach, or score pairs by cosines.

    Args:
      place: the folder.
      option: what names it, for messages.

    Raises:
      UserError: as `open_teachers`.
    """
    try:
        model = load(place)
        if model.pairwise:
            raise UserError(f"the model in {place} scores pairs: it has no joint space")
        model.preprocess.normalize(np.zeros((1, 1, 1, 3), np.uint8))
        model.tokenize("a text")
    except UserError as error:
        raise UserError(f"{option}: {error}") from error
    return model


def _is_same(one: tuple[Tokenizer, int], other: tuple[Tokenizer, int]) -> bool:
    return one[1] == other[1] and one[0].to_json() == other[0].to_json()
