"""Perspectives that predict something of an example, where the others compare two views of it.

Such a perspective has a part of the network of its own. The part gives, for each example, the sum
of its losses and how many there are, so that a batch's mean is the same however the batch is cut in
parts or spread over devices, though examples have different numbers of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict


@dataclass(frozen=True)
class Prediction:
    """One such perspective; its name has a section in config.perspectives and config.model.

    Attributes:
      module: a Flax module, called as `module(image, text, token_ids, deterministic)` on the
        encoders' views (`vit.ImageViews`, `text.TextViews`) and the ids [batch, context] of the
        captions; returns each example's sum of losses, float32 [batch], and their number, int32
        [batch]. Besides `fields` it has the fields `vocab_size`, `start_id`, `end_id`, `dtype` and
        `remat`, whether blocks are computed again for their gradient.
      fields: config -> its other fields.
      check: raises UserError for a config that it cannot follow; called where its weight is
        above 0.
      describe: it in some words.
    """

    module: type[nn.Module]
    fields: Callable[[ConfigDict], Mapping[str, Any]]
    check: Callable[[ConfigDict], None]
    describe: Callable[[ConfigDict], str]
