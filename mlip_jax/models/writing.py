"""Captions of images, written by a decoder: greedily, by beams, or drawn."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from mlip_jax.models.captioning import Written
from mlip_jax.models.two_tower import TwoTower

NAME = "caption"  # of the prediction


class _Beams(NamedTuple):
    """The captions in hand, the best of each image first."""

    place: Int[Array, ""]  # of the last tokens
    token_ids: Int[Array, "batch beams places"]  # what is written; `end_id` where nothing is
    last: Int[Array, "batch beams"]
    total: Float[Array, "batch beams"]  # of the logs of the tokens' probabilities
    length: Int[Array, "batch beams"]  # tokens behind `total`
    ended: Bool[Array, "batch beams"]
    written: tuple[Written, ...]  # rows [batch * beams]


def write_captions(
    network: TwoTower,
    variables: Any,
    images: Float[Array, "batch size size 3"],
    beams: int = 1,
    temperature: Float[Array, "batch"] | None = None,
    keys: Array | None = None,
) -> Int[Array, "batch places"]:
    """The ids of a caption for each image, without the start of text.

    Each step looks up keys and values of the places before, and of the image's tokens. It ends when
    every caption has; after its end a caption has ends alone.

    Args:
      network: one with a decoder.
      variables: its variables.
      images: normalised.
      beams: captions in hand for an image; 1: the likeliest token is taken at every place. Of
        several the caption with the highest mean of log probabilities counts, its end included (a
        choice of ours).
      temperature: for each image, what the logits are divided by before a token is drawn; it goes
        with one beam. None: nothing is drawn.
      keys: of these draws, one an image.
    """

    def decoder(module: TwoTower, method: str, *inputs: Any) -> Any:
        return getattr(module.predictors[NAME], method)(*inputs)

    fields = network.predictions[NAME]
    end_id, start_id = fields["end_id"], fields["start_id"]
    places = fields["context_length"] - (start_id >= 0)
    views = network.apply(variables, images, method="inspect_images")
    looked = network.apply(variables, "look", views, method=decoder)
    memory, size = jax.tree.map(lambda rows: jnp.repeat(rows, beams, axis=0), looked)
    batch = len(images)
    nothing = network.apply(variables, "nothing_written", batch * beams, method=decoder)
    first = start_id if start_id >= 0 else end_id
    start = _Beams(
        place=jnp.zeros((), jnp.int32),
        token_ids=jnp.full((batch, beams, places), end_id, jnp.int32),
        last=jnp.full((batch, beams), first, jnp.int32),
        # One caption at the start, not the same one several times.
        total=jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf) * jnp.ones((batch, 1)),
        length=jnp.zeros((batch, beams), jnp.int32),
        ended=jnp.zeros((batch, beams), bool),
        written=nothing,
    )

    def step(before: _Beams) -> _Beams:
        logits, written = network.apply(
            variables,
            "write",
            before.last.reshape(-1),
            before.place,
            before.written,
            memory,
            size,
            method=decoder,
        )
        logs = rearrange(jax.nn.log_softmax(logits), "(b k) v -> b k v", k=beams)
        # What has ended goes on in one way, which costs nothing.
        goes_on = jnp.where(jnp.arange(logs.shape[-1]) == end_id, 0.0, -jnp.inf)
        logs = jnp.where(before.ended[..., None], goes_on, logs)
        length = before.length + ~before.ended
        scores = (before.total[..., None] + logs) / length[..., None]
        if temperature is not None and keys is not None:
            noise = jax.vmap(lambda key: _gumbel(key, before.place, logs.shape[1:]))(keys)
            scores = logs + temperature[:, None, None] * noise
        _, best = jax.lax.top_k(rearrange(scores, "b k v -> b (k v)"), beams)
        beam, token = best // logs.shape[-1], best % logs.shape[-1]
        chosen = logs[jnp.arange(batch)[:, None], beam, token]

        def of_beam(rows: Array) -> Array:
            """Rows [batch, beams, ...] in the order of the new beams."""
            index = jnp.expand_dims(beam, tuple(range(2, rows.ndim)))
            return jnp.take_along_axis(rows, index, axis=1)

        def of_rows(rows: Array) -> Array:
            if beams == 1:
                return rows
            split = rows.reshape(batch, beams, *rows.shape[1:])
            return of_beam(split).reshape(rows.shape)

        token_ids = of_beam(before.token_ids).at[:, :, before.place].set(token)
        return _Beams(
            place=before.place + 1,
            token_ids=token_ids,
            last=token,
            total=of_beam(before.total) + chosen,
            length=of_beam(length),
            ended=of_beam(before.ended) | (token == end_id),
            written=jax.tree.map(of_rows, written),
        )

    def going_on(now: _Beams) -> Bool[Array, ""]:
        return (now.place < places) & ~jnp.all(now.ended)

    return jax.lax.while_loop(going_on, step, start).token_ids[:, 0]


def _gumbel(key: Array, place: Int[Array, ""], shape: tuple[int, ...]) -> Array:
    return jax.random.gumbel(jax.random.fold_in(key, place), shape)
