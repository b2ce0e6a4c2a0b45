"""What a run prints before it starts: its data, its model, its compiled step."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax.core.stages import Stage
from mlip_jax.core.tables import make_table
from mlip_jax.data.sets.mixtures import Mixture, datasets_of
from mlip_jax.data.sets.records import InShards, Source
from mlip_jax.devices import huge_pages, parallel
from mlip_jax.models.building import (
    compute_dtype,
    embed_kept,
    grid,
    image_encoder,
    merge_counts,
    seen,
    training_patches,
)
from mlip_jax.models.two_tower import PREDICTORS, TwoTower
from mlip_jax.recipes.lengths import suitable_epochs
from mlip_jax.training.step_cost import GIB, Memory

_MANY_PASSES = 300
_TOWERS = {"image_encoder": "image encoder", "text_encoder": "text encoder"}


def print_data(
    console: Console, source: Source, validation: Source | None, processes: int = 1
) -> None:
    """The sets, what was left out of them, and whom to thank; warns of shards that are shared."""
    held_out = f"{len(validation):,} images of {validation.name}" if validation else "none"
    console.print(f"data: {len(source):,} images of {source.name}; validation: {held_out}")
    for note in (*source.notes, *(validation.notes if validation else ())):
        console.print(f"  {note}")
    if source.attribution:
        console.print(f"  {source.attribution}")
    windows = {
        part.window for part in datasets_of(source) if isinstance(part, InShards) and part.window
    }
    if shared := [window for window in windows if window % processes]:
        console.print(
            f"  warning: with a window of {shared[0]} shards, {processes} processes read some "
            f"shards more than once; with --config.data.window="
            f"{-(-max(shared) // processes) * processes} each reads its own"
        )


def print_length(
    console: Console, config: ConfigDict, source: Source, stages: Sequence[Stage]
) -> None:
    """How often the run sees its training set; warns where that is too often, or in one batch."""
    batches = sorted({stage.config.batch_size for stage in stages})
    sizes_of_batches = " and ".join(f"{batch:,}" for batch in batches)
    sizes = {source.name: len(source)}
    seen = {source.name: config.samples}
    if isinstance(source, Mixture):
        names = source.samples(0)
        sizes = {name: len(part) for name, part in zip(names, source.sets(), strict=True)}
        seen = source.samples(config.samples)
    else:
        passes = f"{config.samples / len(source):,.3g}"
        console.print(
            f"length: {len(source):,} pairs, {passes} passes, {config.samples:,} samples in "
            f"{stages[-1].last:,} steps of {sizes_of_batches}"
        )
    if len(stages) > 1:
        for stage in stages:
            console.print(f"  {stage}")
    for name, size in sizes.items():
        passes = seen[name] / size
        if passes > _MANY_PASSES:
            console.print(
                f"  warning: the run sees the {size:,} pairs of {name} {passes:,.0f} times each, "
                f"and learns them by heart; --config.epochs={suitable_epochs(size)} suits a set of "
                "this size"
            )
    if batches[-1] > len(source):
        console.print(
            f"  warning: a batch of {batches[-1]:,} holds each of the {len(source):,} pairs "
            "more than once, and a pair is no negative of itself: lower config.batch_size"
        )


def parameter_counts(params: Mapping[str, Any]) -> dict[str, int]:
    """Parameters by tower and by prediction, "heads" being all that is in none of them."""
    counts = dict.fromkeys((*_TOWERS.values(), "heads"), 0)
    for name, part in params.items():
        predicted = name.removeprefix(PREDICTORS)
        part_name = f"for {predicted}" if predicted != name else _TOWERS.get(name, "heads")
        counts[part_name] = counts.get(part_name, 0) + sum(
            math.prod(leaf.shape) for leaf in jax.tree.leaves(part)
        )
    return counts


def forward_flops(network: TwoTower, variables: Any, config: ConfigDict) -> dict[str, float]:
    """Floating-point operations of one forward pass, by tower: of one image, of one text.

    Counted by XLA on the program before optimisation, so neither fused nor recomputed; the
    losses are not in it. Of an image the patches count that training keeps. A training step costs
    about three times as many.
    """
    size = config.model.image.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    text = jax.ShapeDtypeStruct((1, config.model.text.context_length), jnp.int32)
    local = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)

    def embed_images(variables: Any, rows: jax.Array) -> Any:
        return embed_kept(network, variables, rows, config)

    def embed_texts(variables: Any, rows: jax.Array) -> Any:
        return network.apply(variables, rows, method="embed_texts")

    def count(embed: Callable[..., Any], example: jax.ShapeDtypeStruct) -> float:
        cost = jax.jit(embed).lower(local, example).cost_analysis() or {}
        return float(cost.get("flops", math.nan))

    return {"image encoder": count(embed_images, image), "text encoder": count(embed_texts, text)}


def token_words(config: ConfigDict) -> str:
    """How many tokens an image has, and which of its pixels are in none."""
    tokens, size = grid(config) ** 2, config.model.image.image_size
    words = f"{tokens} in the last grid"
    if image_encoder(config).patch_tokens:
        words = f"{tokens} patches, {tokens - sum(merge_counts(config))} after merging"
        if config.model.image.patch_dropout:
            tokens = training_patches(config)
            left = tokens - sum(merge_counts(config, training=True))
            words += f"; in training {tokens}, {left} after merging"
    if seen(config) < size:
        words += f"; the last {size - seen(config)} of {size} pixels a side fill no patch"
    return words


def print_compiled(
    console: Console,
    network: TwoTower,
    variables: Any,
    step: jax.stages.Compiled,
    config: ConfigDict,
    mesh: Mesh,
    attention: Sequence[str] = (),
) -> None:
    """Parameters and FLOPs by tower, how parameters are sharded, and `print_step`."""
    params = variables["params"]
    flops = forward_flops(network, variables, config)
    table = make_table(("Model", "Parameters", "Forward FLOPs per pair"))
    for part, count in parameter_counts(params).items():
        table.add_row(part, f"{count:,}", f"{flops[part]:,.0f}" if part in flops else "")
    console.print(table)

    sharding = make_table(("Parameters whose path matches", "Sharded over", "Number"), words=2)
    rules = parallel.sharding_rules(config.sharding, params)
    for pattern, axes, count in parallel.sharding_table(params, mesh, rules):
        sharding.add_row(pattern, axes, f"{count:,}")
    console.print(sharding)
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    console.print(f"devices: {mesh.size} x {jax.devices()[0].device_kind} as {sizes}")
    if huge_pages.asked_for():
        variable = huge_pages.VARIABLE
        console.print(f"host memory in huge pages: {variable}={os.environ[variable]}")
    print_step(console, step, config, attention)


def print_step(
    console: Console, step: jax.stages.Compiled, config: ConfigDict, attention: Sequence[str] = ()
) -> None:
    """Tokens of an image, lines on the form of attention, and memory a device."""
    words = token_words(config)
    console.print(f"tokens an image: {words}; compute in {compute_dtype(config).name}")
    for line in attention:
        console.print(line)
    if step.memory_analysis() is None:
        return
    memory, mib = Memory.of(step), 2**20
    console.print(
        f"memory a device, by the compiler: {memory.arguments / mib:,.0f} MiB state and batch, "
        f"{memory.temporary / mib:,.0f} MiB temporary"
    )
    if limit := parallel.memory_limit():
        console.print(
            f"  in all {memory.total / GIB:.2f} of the {limit / GIB:.2f} GiB that JAX takes of a "
            "device"
        )


def headline(figures: Mapping[str, float]) -> str:
    """The figures that one looks at first, in one line."""
    parts = []
    for key, value in figures.items():
        if key.endswith(("_recall@1", "/top1", "/accuracy")):
            family, name, figure = key.split("/", 2)
            words = figure.replace("_recall@1", " R@1").replace("_", " ").replace("top1", "top-1")
            words = words if family == "retrieval" else f"{family.replace('_', '-')} {words}"
            parts.append(f"{name} {words} {100 * value:.1f} %")
    return ", ".join(parts) or "no figures"
