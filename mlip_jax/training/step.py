"""One training step, as a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mlip_jax.core.registry import DISTILLATIONS
from mlip_jax.core.schema import lessons
from mlip_jax.core.stages import WHOLE, Place
from mlip_jax.data.batches.teaching import TEXT_FEATURES
from mlip_jax.data.images.preprocessing import Preprocessing
from mlip_jax.devices import parallel
from mlip_jax.models import adapters
from mlip_jax.models.dropout import NUMBER, ROWS
from mlip_jax.models.two_tower import TwoTower
from mlip_jax.objectives import equality, perspectives
from mlip_jax.objectives.distillation import Embedded, Where
from mlip_jax.training import accumulation
from mlip_jax.training.optimizer import clip_scales, frozen_encoders, learning_rate
from mlip_jax.training.state import TrainState
from mlip_jax.training.teachers import NO_TEACHERS, WEIGHTS, Teachers

Metrics = dict[str, Float[Array, ""]]
Step = Callable[[TrainState, dict[str, Array]], tuple[TrainState, Metrics]]


def make_train_step(
    model: TwoTower,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    preprocessing: Preprocessing,
    mesh: Mesh | None = None,
    teachers: Teachers = NO_TEACHERS,
    place: Place = WHOLE,
) -> Step:
    """The step: forward, every perspective's loss, gradient, update, average.

    The step takes the state and {"image": uint8 [batch, size, size, 3], "token_ids": int32
    [batch, context], "record": int32 [batch], the number of the record that a row shows}, with
    "image_2" and "token_ids_2" where a perspective compares two views of a
    modality, with "text_features" float32 [batch, width], the text encoder's global view, under
    config.model.text.embedded="once", and what `teachers.shapes` says, all for the global batch,
    and returns the next state and scalars. A step whose loss or gradient is not finite changes
    nothing but the step's number, so that the last good state survives until the host hears of it.

    Args:
      model: the network.
      optimizer: from `optimizer.make`.
      config: the run's.
      preprocessing: the run's.
      mesh: the devices that the batch's rows lie on; None: one.
      teachers: the models that the run learns from; `model` is their `pupil`.
      place: of a stage in its run.

    Raises:
      UserError: when the batch cannot be cut in config.accumulation parts.
    """
    accumulation.check(config.batch_size, config.accumulation, mesh)
    schedule = learning_rate(config, place)
    objective = Objective(
        model=model,
        config=config,
        preprocessing=preprocessing,
        mesh=mesh,
        terms=perspectives.terms(config),
        key=jax.random.key(config.seed + 1),  # + 1: not the key of the initial parameters
        teachers=teachers,
        lessons=lessons(config),
        place=place,
    )

    def train_step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
        rows: dict[str, Any] = batch | {"number": jnp.arange(config.batch_size)}
        weights = rows.pop(WEIGHTS, [])
        with _known_to_kernels(mesh, model):
            taught = teachers.embedded(rows, weights, state, config.accumulation, mesh)
            loss, metrics, batch_stats, gradient = objective.value_and_gradient(state, rows, taught)
        norm = optax.tree.norm(gradient)
        after = updated(state, gradient, batch_stats, optimizer, config)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        metrics |= {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": schedule(state.step),
        }
        return kept.replace(step=state.step + 1), metrics

    return train_step


def _known_to_kernels(mesh: Mesh | None, model: TwoTower) -> AbstractContextManager[Any]:
    """The devices, while a model is traced whose attention is a kernel for each of them."""
    forms = {tower.get("attention_form") for tower in (model.image, model.text)}
    if mesh is None or mesh.size == 1 or "pallas" not in forms:
        return nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


@dataclass(frozen=True)
class Objective:
    """From parameters and a batch to the loss and its gradient."""

    model: TwoTower
    config: ConfigDict
    preprocessing: Preprocessing
    mesh: Mesh | None
    terms: tuple[perspectives.Term, ...]
    key: Array  # of dropout, folded with the step
    teachers: Teachers
    lessons: Mapping[tuple[str, str], float]  # weights by way of learning and view
    place: Place = WHOLE  # of a stage in its run

    def value_and_gradient(
        self, state: TrainState, rows: dict[str, Array], taught: Sequence[Embedded]
    ) -> tuple[Array, Metrics, Any, Any]:
        """Loss, metrics, the batch norms' new statistics, and the gradient.

        `taught` is what each teacher says of the rows.
        """
        if self.config.accumulation > 1:
            return self._accumulated(state, rows, taught)

        def loss_fn(params: Any) -> tuple[Array, tuple[Metrics, Any]]:
            embeddings, batch_stats = self.embed(params, rows, state)
            loss, metrics = self.loss(params, embeddings, state, rows, taught)
            return loss, (metrics, batch_stats)

        (loss, (metrics, batch_stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        return loss, metrics, batch_stats, gradient

    def _accumulated(
        self, state: TrainState, rows: dict[str, Array], taught: Sequence[Embedded]
    ) -> tuple[Array, Metrics, Any, Any]:
        """The same with the batch's parts embedded one after the other; without batch norms."""
        (loss, metrics), gradient = accumulation.value_and_gradient(
            lambda params, part: self.embed(params, part, state)[0],
            lambda params, embeddings: self.loss(params, embeddings, state, rows, taught),
            state.params,
            rows,
            self.config.accumulation,
            self.mesh,
            parallel.sharding_rules(self.config.sharding, state.params),
        )
        return loss, metrics, state.batch_stats, gradient

    def embed(
        self, params: Any, rows: dict[str, Array], state: TrainState
    ) -> tuple[dict[str, Array], Any]:
        """Embeddings of some rows of the batch, and the batch norms' new statistics."""
        # No gradient, so no backward pass either.
        still = {name: jax.lax.stop_gradient(params[name]) for name in frozen_encoders(self.config)}
        params = adapters.merged(params | still)
        second = rows.get("image_2")
        # What a frozen encoder says of the captions, where it has been asked before.
        texts = rows.get(TEXT_FEATURES, rows["token_ids"])
        (embeddings, _, _), changed = self.model.apply(
            {
                "params": params,
                "batch_stats": state.batch_stats,
                ROWS: {NUMBER: rows["number"]},
            },
            self.preprocessing.normalize(rows["image"]),
            texts,
            None if second is None else self.preprocessing.normalize(second),
            rows.get("token_ids_2"),
            deterministic=False,
            rngs={"dropout": jax.random.fold_in(self.key, state.step)},
            mutable=["batch_stats"],
        )
        return embeddings, changed.get("batch_stats", {})

    def loss(
        self,
        params: Any,
        embeddings: dict[str, Array],
        state: TrainState,
        rows: dict[str, Array],
        taught: Sequence[Embedded],
    ) -> tuple[Array, Metrics]:
        """The loss of the whole batch, and what is told of it."""
        record = rows["record"].astype(jnp.uint32)
        text = equality.text_keys(rows["token_ids"])

        def critic(view: str, one: Array, other: Array) -> Array:
            scores: Array = self.model.apply(
                {"params": params}, view, one, other, method="score_pairs"
            )
            return scores

        scales, biases = self.model.apply({"params": params}, method="scales_and_biases")
        loss, losses = perspectives.total_loss(
            self.terms,
            embeddings,
            scales,
            biases,
            (state.step - self.place.first).astype(jnp.float32) * self.config.batch_size
            + float(self.place.samples),
            prior_weight=self.config.model.prior_weight,
            chunk=self.config.token_chunk,
            blocks=self.config.ring,
            mesh=self.mesh,
            critic=critic if self.model.critic == "concat" else None,
            keys=equality.Keys(record, text if self.config.equal_texts == "mask" else None),
        )
        for (way, view), weight in self.lessons.items():
            lesson = self._lesson(params, way, view, embeddings, scales, taught)
            losses[f"{view}/{way}"] = lesson
            loss = loss + jnp.float32(weight) * lesson
        metrics = {f"loss/{view}": value for view, value in losses.items()}
        metrics["false_negatives"] = equality.false_negatives(record, text)
        return loss, metrics | {f"scale/{view}": scale for view, scale in scales.items()}

    def _lesson(
        self,
        params: Any,
        way: str,
        view: str,
        embeddings: Mapping[str, Array],
        scales: Mapping[str, Array],
        taught: Sequence[Embedded],
    ) -> Array:
        """The loss of one way to learn, without its weight: the mean over the teachers."""
        kind = DISTILLATIONS[way]

        def seen_by(teacher: int, side: str) -> Array:
            name = f"{teacher}_{side}"
            if not kind.same_space or name not in self.model.to_teachers:
                return embeddings[side]
            projected: Array = self.model.apply(
                {"params": params}, name, embeddings[side], method="project_to_teacher"
            )
            return projected

        total = jnp.zeros((), jnp.float32)
        for number, teacher in enumerate(taught):
            image, text = seen_by(number, view), seen_by(number, "text_global")
            student = Embedded(image, text, scales[view])
            total += kind.loss(student, teacher, Where(self.config.ring, self.mesh))
        return total / len(taught)


def updated(
    state: TrainState,
    gradient: Any,
    batch_stats: Any,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
) -> TrainState:
    """The state after an update, with the same step number.

    Args:
      state: before it.
      gradient: of the parameters.
      batch_stats: the batch norms' new statistics.
      optimizer: from `optimizer.make`.
      config: the run's.
    """
    settings = config.optimizer
    lookahead = settings.lookahead.period > 0
    before = optax.LookaheadParams(state.params, state.slow) if lookahead else state.params
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, before)
    after = optax.apply_updates(before, updates)
    params, slow = (
        clip_scales(weights, settings.max_scale)
        for weights in (after if lookahead else (after, state.slow))
    )
    ema = state.ema
    if settings.ema:
        # Early on the average follows closely; without this it would remember the start.
        seen = state.step.astype(jnp.float32)
        rate = jnp.minimum(settings.ema, (1.0 + seen) / (10.0 + seen))
        frozen = frozen_encoders(config)
        ema = {
            name: old
            if name in frozen
            else jax.tree.map(lambda old, new: rate * old + (1.0 - rate) * new, old, params[name])
            for name, old in ema.items()
        }
    return TrainState(state.step, params, batch_stats, optimizer_state, ema, slow)


def lower_step(
    train_step: Callable[..., Any],
    abstract: TrainState,
    config: ConfigDict,
    mesh: Mesh,
    more: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> jax.stages.Lowered:
    """The step of `make_train_step`, ready to compile; the state is donated.

    Args:
      train_step: from `make_train_step`.
      abstract: from `abstract_state`.
      config: the run's.
      mesh: the devices.
      more: what `train_step` takes in its batch besides images and token ids; see
        `Teachers.shapes`.
    """
    batch = abstract_batch(config, mesh) | dict(more or {})
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(shardings, parallel.replicated(mesh))
    ).lower(abstract, batch)


def compile_lowered(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles a step for the devices of a mesh.

    On GPUs it is kept from adding in any order, as it would where rows collide in the gradient of
    the texts' embedding: bits would differ from one run to the next. It sorts the rows first.
    """
    gpu = mesh.devices.flat[0].platform in ("gpu", "cuda", "rocm")
    options: dict[str, str | bool] = {"xla_gpu_exclude_nondeterministic_ops": True}
    return lowered.compile(compiler_options=options if gpu else None)


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the batch that a step takes."""
    batch, model = config.batch_size, config.model
    size, rows = model.image.image_size, parallel.batch_sharding(mesh)
    image = jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8, sharding=rows)
    token_ids = jax.ShapeDtypeStruct((batch, model.text.context_length), np.int32, sharding=rows)
    record = jax.ShapeDtypeStruct((batch,), np.int32, sharding=rows)
    shapes = {"image": image, "token_ids": token_ids, "record": record}
    if model.text.embedded == "once":
        features = (batch, model.text.width)
        shapes[TEXT_FEATURES] = jax.ShapeDtypeStruct(features, np.float32, sharding=rows)
    if config.perspectives.augmented_image.weight > 0:
        shapes["image_2"] = image
    if config.perspectives.other_caption.weight > 0:
        shapes["token_ids_2"] = token_ids
    return shapes


def random_rows(
    config: ConfigDict, mesh: Mesh, vocab_size: int, seed: int
) -> dict[str, np.ndarray]:
    """Random values in the place of this process's rows of a batch."""
    rng = np.random.default_rng(seed)
    rows = len(parallel.local_rows(mesh, config.batch_size))
    limits = {np.dtype(np.uint8): 256, np.dtype(np.int32): vocab_size}

    def values(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        shape = (rows, *leaf.shape[1:])
        if leaf.dtype == np.float32:
            return rng.normal(size=shape).astype(np.float32)
        return rng.integers(0, limits[np.dtype(leaf.dtype)], shape, leaf.dtype)

    return {name: values(leaf) for name, leaf in abstract_batch(config, mesh).items()}
