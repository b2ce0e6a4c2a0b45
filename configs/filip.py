"""FILIP: CLIP with token-level similarity of patches and words (Yao et al. 2022).

    python -m mlip_jax.main --config=configs/filip.py
    python -m mlip_jax.main --config=configs/filip.py:size=B/16,data=jsonl:pairs.jsonl

The global perspective stays beside the token level: it is what retrieval is measured on.
"""

from mlip_jax.config import arguments
from mlip_jax.recipes.recipes import recipe


def get_config(arg=None):
    """Takes size and data."""
    args = arguments(arg, size="quick", data="emoji")
    config = recipe(args["size"], args["data"])
    config.name = "filip"
    config.perspectives.spatial_tokens.weight = 1.0
    return config
