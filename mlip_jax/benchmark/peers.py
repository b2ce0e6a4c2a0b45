"""Other programs that are timed beside ours, each in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mlip_jax.benchmark.results import Result, Timing, summarize
from mlip_jax.core.cores import cores
from mlip_jax.core.errors import RunError, UserError, suggestion
from mlip_jax.models import building

PEERS = ("open_clip",)
_PROGRAM = Path(__file__).with_name("open_clip_step.py")


def check(config: ConfigDict, name: str) -> None:
    """Raises UserError for a peer that is unknown, not installed, or has no model of this kind."""
    if name not in PEERS:
        raise UserError(f"--against={name!r} is not known{suggestion(name, PEERS)}")
    for package in ("torch", "open_clip"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--against={name} needs {package}, which is not installed: "
                "pip install 'mlip_jax[bench]'"
            )
    image, text = config.model.image, config.model.text
    for key, value, wanted in (
        ("model.image.architecture", image.architecture, "vit"),
        ("model.image.stem", image.stem, "patch"),
        ("model.text.architecture", text.architecture, "clip"),
        ("optimizer.name", config.optimizer.name, "adamw"),
    ):
        if value != wanted:
            raise UserError(
                f"--against={name} needs config.{key}={wanted!r}, not {value!r}: {name} has no "
                "other; a large size, such as configs/clip.py:size=B/32, fits"
            )


class Peer:
    """open_clip's training step of a config's sizes: its model, its loss, AdamW by torch."""

    def __init__(self, config: ConfigDict, process: subprocess.Popen[str]) -> None:
        self._config = config
        self._process = process
        assert process.stdin is not None and process.stdout is not None  # pipes, see `started`
        self._stdin, self._stdout = process.stdin, process.stdout
        report = self._read()
        self.name = "open_clip, torch.compile" if report["compiled"] else "open_clip, eager"
        self._parameters, self._seconds = report["parameters"], report["seconds"]

    def run(self, steps: int) -> list[Timing]:
        """Trains some steps."""
        self._process.send_signal(signal.SIGCONT)
        self._stdin.write(f"{steps}\n")
        self._stdin.flush()
        return [Timing(seconds, 0.0) for seconds in self._read()["seconds"]]

    def result(self, timings: list[Timing]) -> Result:
        """What the timed steps come to."""
        return summarize(
            timings,
            name=self.name,
            batch_size=self._config.batch_size,
            dtype=building.compute_dtype(self._config).name,
            parameters=self._parameters,
            compile_seconds=self._seconds,
        )

    def _read(self) -> dict[str, Any]:
        line = self._stdout.readline()
        if not line:
            raise RunError(f"open_clip ended with exit code {self._process.wait()} (see above)")
        # Its threads would spin on the cores for seconds, in the other side's turn.
        self._process.send_signal(signal.SIGSTOP)
        return json.loads(line)


@contextlib.contextmanager
def started(config: ConfigDict) -> Iterator[Peer]:
    """Starts open_clip in a process, with as many threads as there are cores."""
    image, text = config.model.image, config.model.text
    sizes = {
        "threads": cores(),
        "batch_size": config.batch_size,
        "device": "cpu" if jax.default_backend() == "cpu" else "cuda",
        "dtype": building.compute_dtype(config).name,
        "loss": "sigmoid" if config.perspectives.spatial_global.loss == "sigmoid" else "softmax",
        "learning_rate": config.optimizer.learning_rate,
        "weight_decay": config.optimizer.weight_decay,
        "betas": [config.optimizer.b1, config.optimizer.b2],
        "quick_gelu": image.activation == "quick_gelu",
        "embed_dim": config.model.embed_dim,
        "vision_cfg": {
            "image_size": image.image_size,
            "patch_size": image.patch_size,
            "width": image.width,
            "layers": image.depth,
            "head_width": image.width // image.heads,
            "mlp_ratio": image.mlp_ratio,
        },
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": 49408,
            "width": text.width,
            "heads": text.heads,
            "layers": text.depth,
        },
    }
    process = subprocess.Popen(
        [sys.executable, str(_PROGRAM), json.dumps(sizes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(cores())},
    )
    with process:
        try:
            yield Peer(config, process)
        finally:
            process.kill()
