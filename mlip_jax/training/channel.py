"""What the processes of a run tell each other at every step."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from mlip_jax.devices import parallel
from mlip_jax.training.state import TrainState
from mlip_jax.training.step import Metrics, Step

_SKIPPED = "skipped"  # int32 [batch]: a row's unreadable image, or -1
_ASKED = "asked"  # bool [devices]: whether the process of a device is asked to stop


class Channel:
    """Unreadable images and the wish to stop, from each process to all; with one, from it to it.

    They travel in the training step's own program and are heard a step later, so that nobody waits
    for them.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._several = jax.process_count() > 1
        self._rows = parallel.batch_sharding(mesh)
        self._devices = NamedSharding(mesh, PartitionSpec(parallel.AXES))
        self._last: Any = np.zeros(0, np.int32), np.zeros(0, bool)

    def through(self, train_step: Step) -> Step:
        """The step with the channel in it."""
        if not self._several:
            return train_step

        def step(state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, Metrics]:
            rows = dict(batch)
            messages = {key: rows.pop(key) for key in (_SKIPPED, _ASKED)}
            state, metrics = train_step(state, rows)
            return state, metrics | messages

        return step

    def shapes(self, batch_size: int) -> dict[str, Any]:
        """What the step takes besides its batch."""
        if not self._several:
            return {}
        devices = self._devices.num_devices
        return {
            _SKIPPED: jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=self._rows),
            _ASKED: jax.ShapeDtypeStruct((devices,), bool, sharding=self._devices),
        }

    def tell(self, skipped: Int[np.ndarray, " rows"], asked: bool) -> dict[str, jax.Array]:
        """What to add to the batch, to tell of this process's rows and whether it is to stop."""
        if not self._several:
            self._last = skipped, np.zeros(0, bool)
            return {}
        place = jax.make_array_from_process_local_data
        return {
            _SKIPPED: place(self._rows, skipped),
            _ASKED: place(self._devices, np.full(jax.local_device_count(), asked)),
        }

    def hear(self, metrics: Metrics, asked: bool) -> tuple[Int[np.ndarray, " rows"], bool]:
        """Takes what is told out of a step's metrics, and gives what was told in the step before.

        With one process it gives what was told in this step, and whether it is asked to stop now.

        Returns:
          The unreadable images' indices, -1 for readable ones, and whether to stop.
        """
        former = self._last
        if not self._several:
            return former[0], asked
        self._last = metrics.pop(_SKIPPED), metrics.pop(_ASKED)
        skipped, several_asked = jax.device_get(former)
        return skipped, bool(several_asked.any())

    def last(self) -> Int[np.ndarray, " rows"]:
        """The unreadable images of the last step, which no other has come after to tell of."""
        return jax.device_get(self._last[0])
