"""CLIP: one perspective, softmax over the batch (Radford et al. 2021).

    python -m mlip_jax.main --config=configs/clip.py
    python -m mlip_jax.main --config=configs/clip.py:size=B/16,data=jsonl:pairs.jsonl

The baseline of the other configs: the same encoders without Frequency Stage and merging.
"""

from mlip_jax.config import arguments
from mlip_jax.recipes import recipe


def get_config(arg=None):
    """Takes size and data."""
    args = arguments(arg, size="quick", data="emoji")
    config = recipe(args["size"], args["data"])
    config.name = "clip"
    return config
