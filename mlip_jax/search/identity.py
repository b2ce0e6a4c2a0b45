"""Which model an index was made with."""

from __future__ import annotations

import hashlib
import json

import jax
import numpy as np

from mlip_jax.core import schema
from mlip_jax.devices import parallel
from mlip_jax.inference import Model
from mlip_jax.interop import foreign

_MOVE_AN_EMBEDDING = ("model.", "perspectives.", "evaluation.frequency_mix")
_OF_TRAINING = (".odds", ".learn_bias")  # in no index made before they were keys


def digest(model: Model) -> str:
    """A digest of all that the model's embeddings depend on: weights, config and preprocessing.

    Two folders with the same weights, such as a run and its export, have the same. The device and
    its number format are left out: they move an embedding by rounding alone.
    """
    config = schema.flatten(model.config.to_dict())
    settings = {
        key: config[key]
        for key in sorted(config)
        if key.startswith(_MOVE_AN_EMBEDDING) and not key.endswith(_OF_TRAINING)
    }
    preprocessing = foreign.preprocessing_values(model.preprocess)
    if preprocessing.get("orientation") == "ignore":
        del preprocessing["orientation"]  # as in the digests of indexes made before there was one
    settings["preprocessing"] = preprocessing
    sha256 = hashlib.sha256(json.dumps(settings).encode())
    leaves = jax.tree_util.tree_leaves_with_path(model.variables)
    by_name = {parallel.path_name(path): leaf for path, leaf in leaves}
    for name in sorted(by_name):
        array = np.asarray(jax.device_get(by_name[name]))
        sha256.update(f"{name} {array.dtype} {array.shape}".encode())
        sha256.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()
