"""What a frozen text encoder says of the captions, computed once for the whole run.

Under config.model.text.embedded="once" every caption of the training set is embedded before the
first step, and a step takes the global view of its captions in place of computing it: the text
encoder costs nothing from then on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mlip_jax.core.errors import UserError
from mlip_jax.core.waiting import announced
from mlip_jax.data.batches.teaching import TEXT_FEATURES, TOKEN_IDS
from mlip_jax.data.text.captions import swap_sides
from mlip_jax.devices import processes
from mlip_jax.inference.batches import Batches
from mlip_jax.models import building
from mlip_jax.training.run import Run
from mlip_jax.training.state import TrainState

_BATCH = 256  # captions embedded at a time
_ENCODED = 8192  # captions turned into ids at a time
_MOST_BYTES = 2**30


class KnownTexts:
    """The text encoder's global view of token ids."""

    def __init__(self, run: Run, state: TrainState) -> None:
        """Embeds every caption of the training set, mirrored ones included.

        Raises:
          UserError: when there are too many.
        """
        network = building.build_for(run.config, run.tokenizer)
        self._function = jax.jit(
            lambda variables, ids: network.apply(variables, ids, method="text_features")
        )
        # All but the image encoder's: the heads' parameters are asked for, and few.
        params = {name: part for name, part in state.params.items() if name != "image_encoder"}
        # A copy, since the steps give the state's memory away.
        self._variables = {"params": jax.tree.map(jnp.copy, processes.at_home(params, run.home))}
        self._batches = Batches(_BATCH, run.home)
        width = run.config.model.text.width
        places: dict[bytes, int] = {}
        for ids in _token_ids(run):
            for row in ids:
                places.setdefault(row.tobytes(), len(places))
            if len(places) * width * np.dtype(np.float32).itemsize > _MOST_BYTES:
                raise UserError(
                    f"config.model.text.embedded='once': more than {len(places):,} captions of "
                    f"{width} numbers are too many to keep; set it to 'each_step'"
                )
        self._places = places
        length = run.config.model.text.context_length
        known = np.frombuffer(b"".join(places), np.int32).reshape(-1, length)
        self._features = self._computed(known)

    def __len__(self) -> int:
        return len(self._places)

    def of(self, token_ids: Int[np.ndarray, "batch context"]) -> Float[np.ndarray, "batch width"]:
        """The features of some texts; a text that augmentation has made is embedded here."""
        places = np.array([self._places.get(row.tobytes(), -1) for row in token_ids])
        features = self._features[places]
        new = places < 0
        if new.any():
            # Not kept: what a batch holds would depend on where a run was resumed.
            features[new] = self._computed(token_ids[new])
        return features

    def _computed(self, token_ids: np.ndarray) -> np.ndarray:
        return self._batches.call(self._function, self._variables, token_ids)


def of_run(run: Run, state: TrainState) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """What of a batch is known before: {"text_features": ...} where the config asks for it, or {}.

    Args:
      run: opened.
      state: that it starts from; the text encoder's parameters stay as they are.

    Returns:
      A function of a batch. It may run a program, so that one thread calls it and the steps.

    Raises:
      UserError: for a training set with too many captions.
    """
    if run.config.model.text.embedded != "once":
        return lambda batch: {}
    with announced("embedding the captions", run.console.print):
        known = KnownTexts(run, state)
    run.console.print(f"captions: {len(known):,} embedded by the frozen text encoder, once")
    return lambda batch: {TEXT_FEATURES: known.of(batch[TOKEN_IDS])}


def _token_ids(run: Run) -> Iterator[np.ndarray]:
    """The ids of every caption of the training set, and of those with left and right swapped."""
    captions = run.source.captions()
    length = run.config.model.text.context_length
    while some := list(itertools.islice(captions, _ENCODED)):
        if run.config.data.augment.flip:
            some = list(dict.fromkeys(some + [swap_sides(text) for text in some]))
        yield run.tokenizer.encode(some, length)
