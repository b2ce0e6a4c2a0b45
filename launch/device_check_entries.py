"""The entries of a device check: what each of them runs, and what it finds."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from device_check_children import Children, Failed, Owed

from mlip_jax.core.files import read_json
from mlip_jax.core.schema import ATTENTIONS
from mlip_jax.evaluations import read_results
from mlip_jax.planning.gpus import CARDS
from mlip_jax.storage.saved import FOLDER, restore_fields
from mlip_jax.training.signals import STOPPED
from mlip_jax.training.step_cost import GIB
from mlip_jax.training.summary import headline

CONFIGS = ("mlip", "clip_lite", "clip", "siglip", "filip")
GROUPS = ("quick", "largest", "merging", "attention", "open_clip", "plan")
_NEEDED = {"cudnn": ("gpu", "needs an NVIDIA GPU"), "pallas": ("tpu", "needs a TPU")}
_COMPARED = ("step", "params", "optimizer")
_TIMED = ("--steps=10", "--warmup=3")

_ENVIRONMENT = """
import json, jax
from mlip_jax.core.cores import cores
from mlip_jax.core.versions import installed
from mlip_jax.devices.parallel import memory_limit
devices = jax.devices()
print(json.dumps({
    "device": devices[0].device_kind, "devices": len(devices), "platform": devices[0].platform,
    "memory": memory_limit(), "cores": cores(), "versions": installed(),
}))
"""


class Sizes(NamedTuple):
    """How large everything is.

    Attributes:
      quick: flags of the quick configs.
      checkpoint: samples between two checkpoints of the run that is stopped. They are many: none
        starts before the one before it is on the disk, so that a signal after the first comes long
        before the end.
      large: flags of the large ones.
      merging: further flags of those with a Frequency Stage.
      batch: where the search for the largest batch that fits starts.
    """

    quick: tuple[str, ...]
    checkpoint: int
    large: tuple[str, ...]
    merging: tuple[str, ...]
    batch: int


FULL = Sizes(quick=("--config.samples=12800",), checkpoint=1280, large=(), merging=(), batch=1024)
_TINY_MODEL = (
    "--config.model.image.width=16",
    "--config.model.image.heads=2",
    "--config.model.text.width=16",
    "--config.model.text.heads=2",
    "--config.model.text.depth=1",
    "--config.model.token_dim=8",
    "--config.data.workers=0",
)
TINY = Sizes(
    quick=(
        *_TINY_MODEL,
        "--config.optimizer.name=adamw",  # Muon's products take long to compile
        "--config.batch_size=8",
        "--config.samples=96",
        "--config.optimizer.warmup_samples=16",
    ),
    checkpoint=8,
    large=(
        *_TINY_MODEL,
        "--config.model.embed_dim=16",
        "--config.model.image.image_size=32",
        "--config.model.image.patch_size=8",
        "--config.model.image.depth=4",
    ),
    merging=("--config.model.image.frequency.depth=1",),
    batch=16,
)


class Found(NamedTuple):
    """What an entry found: in words, and as figures for JSON."""

    words: str
    figures: dict[str, Any]


class Task(NamedTuple):
    """An entry to be worked on: its name, what it may take, and how its figures are found."""

    name: str
    seconds: float
    find: Callable[[], Found]


class Check:
    """The measurements. Later ones start from what earlier ones found."""

    def __init__(self, children: Children, scratch: Path, sizes: Sizes) -> None:
        """Measures nothing yet.

        Args:
          children: runs the command line.
          scratch: a folder for workdirs.
          sizes: of models and batches.
        """
        self._children, self._scratch, self._sizes = children, scratch, sizes
        self._device: dict[str, Any] = {}
        self._timed: dict[str, dict[str, Any]] = {}  # results of `benchmark` by name
        self._batches: dict[str, int] = {}  # that fitted, by group

    def tasks(self, only: Sequence[str] = ()) -> list[Task]:
        """All entries, or the environment and those of some groups."""
        groups: dict[str, list[Task]] = {
            "quick": [Task(f"{name}, quick", 120, partial(self.quick, name)) for name in CONFIGS],
            "largest": [
                self._timing(f"{name} B/16, largest batch", name, name) for name in ("clip", "mlip")
            ],
            "merging": [
                self._timing(
                    f"mlip B/16, rho {rate}",
                    "mlip",
                    "merging",
                    f"--config.model.image.merging.rate={rate}",
                )
                for rate in (0.0, 0.5, 0.75)
            ],
            "attention": [
                Task(f"clip B/16, {form} attention", 120, partial(self.attention, form))
                for form in ATTENTIONS
            ],
            "open_clip": [Task("clip B/16 and open_clip", 150, self.open_clip)],
            "plan": [
                Task(f"plan of {name} B/16", 120, partial(self.plan, name))
                for name in ("clip", "mlip")
            ],
        }
        chosen = [task for group in only or GROUPS for task in groups[group]]
        return [Task("environment", 60, self.environment), *chosen]

    def environment(self) -> Found:
        """The device, its memory, and the versions."""
        ended = self._children.python("-c", _ENVIRONMENT)
        if ended.code:
            raise Failed(ended.why())
        self._device = json.loads(ended.output.splitlines()[-1])
        device = self._device
        memory = f", JAX takes {device['memory'] / GIB:.1f} GiB" if device["memory"] else ""
        return Found(
            f"{device['devices']} x {device['device']}{memory}, {device['cores']} cores, "
            f"jax {device['versions']['jax']}",
            device,
        )

    def quick(self, name: str) -> Found:
        """Trains a config once without a stop, and once stopped and resumed."""
        whole, parts = self._scratch / f"{name}-whole", self._scratch / f"{name}-parts"
        self._train(name, whole)
        last, figures = _last_step(whole), dict(read_results(whole).figures)
        every = f"--config.checkpoint.every_samples={self._sizes.checkpoint}"
        self._train(name, parts, every, codes=(STOPPED,), stop_at=1)
        stopped_at = _last_step(parts)
        if stopped_at >= last:
            raise Failed(f"was stopped after its last step, {last}, so that nothing was resumed")
        # With its last step it has done what it is for: figures and report were made before.
        unevaluated = ("--config.evaluation.retrieval=()", "--config.evaluation.zero_shot=()")
        self._train(name, parts, *unevaluated, codes=(0, STOPPED), stop_at=last)
        if other := differing(whole, parts):
            raise Failed(
                f"stopped at step {stopped_at} of {last} and resumed: {len(other)} arrays have "
                f"other bits, the first {other[0]}"
            )
        return Found(
            f"same bits, stopped at step {stopped_at} of {last}; {headline(figures)}",
            {"stopped_at": stopped_at, "steps": last, "evaluation": figures},
        )

    def _train(
        self,
        name: str,
        workdir: Path,
        *flags: str,
        codes: Sequence[int] = (0,),
        stop_at: int | None = None,
    ) -> None:
        """Trains a quick config; one of the exit codes is right. SIGTERM at a step's checkpoint."""
        ended = self._children.python(
            *("-m", "mlip_jax.main", f"--config={name}", f"--workdir={workdir}"),
            *self._sizes.quick,
            "--config.evaluation.every_samples=0",
            "--config.checkpoint.every_samples=0",
            *flags,
            stop_when=None if stop_at is None else lambda: _last_step(workdir) >= stop_at,
        )
        if ended.code not in codes:
            raise Failed(ended.why())

    def attention(self, form: str) -> Found:
        """Times CLIP with a form of attention."""
        platform, words = _NEEDED.get(form, (None, ""))
        if platform and self._device.get("platform") != platform:
            raise Owed(words)
        flag = f"--config.attention={form}"
        return self._time(f"clip B/16, {form}", "clip", "attention", flag)

    def open_clip(self) -> Found:
        """Times CLIP and open_clip in turns."""
        for package in ("torch", "open_clip"):
            if importlib.util.find_spec(package) is None:
                raise Owed(f"{package} is not installed: pip install 'mlip_jax[bench]'")
        # Both are in memory at a time.
        self._batches["open_clip"] = max(self._batches.get("clip", self._sizes.batch) // 4, 2)
        return self._time("open_clip", "clip", "open_clip", "--against=open_clip")

    def plan(self, name: str) -> Found:
        """What `plan` says of the memory of a step that was timed, which it never saw."""
        if name not in self._timed:
            raise Owed("its step was not timed")
        timed = self._timed[name]
        device = self._device.get("device", "")
        card = next((card for card in CARDS if card in device.lower()), None)
        if card is None:
            raise Owed(f"plan does not know the device {device}")
        forms = set((timed["attention"] or {}).values())
        if len(forms) > 1:
            raise Owed("plan takes one form of attention, and the towers have two")
        try:
            figures = planned(
                self._children,
                *self._flags(name),
                f"--topology={card}:{self._device['devices']}",
                f"--config.batch_size={timed['batch_size']}",
                *(f"--config.attention={form}" for form in forms),
            )
        except Failed as error:
            if "plan-gpu" in str(error):
                raise Owed("the extra plan-gpu is not installed") from error
            raise
        memory, measured = figures["memory"], timed["memory"]
        return Found(
            f"batch {timed['batch_size']:,}: {memory / GIB:.2f} GiB planned, "
            f"{measured / GIB:.2f} GiB compiled here",
            {**figures, "compiled_here": measured},
        )

    def _timing(self, name: str, config: str, group: str, *flags: str) -> Task:
        return Task(name, 150, partial(self._time, name, config, group, *flags))

    def _time(self, name: str, config: str, group: str, *flags: str) -> Found:
        """Times a large config. The entries of a group have one batch, unless it does not fit."""
        workdir = self._scratch / re.sub(r"\W+", "_", name)
        batch = self._batches.get(group, self._sizes.batch)
        figures = timed(self._children, workdir, batch, *self._flags(config), *_TIMED, *flags)
        ours = figures["results"][0]
        self._batches[group] = ours["batch_size"]
        if group == config:
            self._timed[config] = ours
        return Found("; ".join(map(_speed, figures["results"])), figures)

    def _flags(self, config: str) -> tuple[str, ...]:
        more = self._sizes.merging if config == "mlip" else ()
        return (f"--config={config}:size=B/16", *self._sizes.large, *more)


def timed(children: Children, workdir: Path, batch: int, *flags: str) -> dict[str, Any]:
    """The JSON of `benchmark` at the largest batch that fits, from `batch` downwards.

    Raises:
      Owed, Failed: as `Children.python`; Failed when no batch fits, and for other errors.
    """
    arguments = ("-m", "mlip_jax.main", "benchmark", f"--workdir={workdir}", *flags)
    while True:
        ended = children.python(*arguments, f"--config.batch_size={batch}")
        if ended.code == 0:
            content: dict[str, Any] = read_json(max(workdir.glob("benchmark-*.json")))
            return content
        batch = smaller_batch(ended.output, batch)
        if not batch:
            raise Failed(ended.why())


def smaller_batch(output: str, batch: int) -> int:
    """A batch to try next: what `benchmark` names in its error, half where it names none.

    Returns:
      0 when the output is not about memory, or nothing smaller is left.
    """
    if fits := re.search(r"--config\.batch_size=(\d+) fits", output):
        return int(fits[1]) if int(fits[1]) < batch else 0
    about_memory = "out of memory at batch" in output or "RESOURCE_EXHAUSTED" in output
    return batch // 2 if about_memory and "no batch fits" not in output and batch >= 4 else 0


def planned(children: Children, *flags: str) -> dict[str, Any]:
    """The memory of a device, in bytes, by `plan`, and whether the step fits.

    Raises:
      Owed, Failed: as `Children.python`; Failed for a plan that names no memory.
    """
    ended = children.python("-m", "mlip_jax.main", "plan", *flags)
    memory = re.search(r"^fits: .*?([\d.]+) GiB a device", ended.output, re.MULTILINE)
    if ended.code not in (0, 1) or memory is None:
        raise Failed(ended.why())
    return {"memory": round(float(memory[1]) * GIB), "fits": ended.code == 0}


def differing(one: Path, other: Path) -> list[str]:
    """The paths of what differs in the last states of two workdirs, bit for bit.

    Raises:
      UserError, RunError: when a state cannot be read.
    """
    jax.config.update("jax_platforms", "cpu")  # of this process; the device is for its children
    states = [restore_fields(workdir, _COMPARED)[0] for workdir in (one, other)]
    first, second = (
        {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, states)
    )
    return [
        path
        for path in sorted(first.keys() | second.keys())
        if path not in first or path not in second or _bits(first[path]) != _bits(second[path])
    ]


def _bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.name, array.shape, array.tobytes()


def _last_step(workdir: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    steps = (path.name for path in workdir.glob(f"{FOLDER}/*"))
    return max((int(name) for name in steps if name.isdigit()), default=0)


def _speed(result: dict[str, Any]) -> str:
    """A result of `benchmark` in words."""
    parts = [f"batch {result['batch_size']:,}", f"{result['images_per_second']:,.0f} images/s"]
    if result["utilisation"] is not None:
        parts.append(f"{result['utilisation']:.1%} of peak")
    if result["memory"] is not None:
        parts.append(f"{result['memory'] / GIB:.2f} GiB")
    own = result["memory"] is not None  # a peer's memory is not known
    return ", ".join(parts if own else [result["name"], *parts])
