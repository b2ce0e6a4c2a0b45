"""SigLIP: CLIP with the pairwise sigmoid loss (Zhai et al. 2023).

    python -m mlip_jax.main --config=configs/siglip.py
    python -m mlip_jax.main --config=configs/siglip.py:size=B/16,data=jsonl:pairs.jsonl

Scale and bias start at the paper's values, 10 and -10.
"""

from mlip_jax.config import arguments
from mlip_jax.recipes import recipe


def get_config(arg=None):
    """Takes size and data."""
    args = arguments(arg, size="quick", data="emoji")
    config = recipe(args["size"], args["data"])
    config.name = "siglip"
    spatial = config.perspectives.spatial_global
    spatial.loss = "sigmoid"
    spatial.init_scale = 10.0
    spatial.init_bias = -10.0
    return config
