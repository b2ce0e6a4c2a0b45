"""FILIP: CLIP with token-level similarity of patches and words (Yao et al. 2022).

    python -m mlip_jax.main --config=configs/filip.py

trains a small ViT on the built-in emoji dataset, in minutes on two CPU cores. Its result has not
been measured.

    python -m mlip_jax.main --config=configs/filip.py:size=B/16,data=jsonl:pairs.jsonl

is the recipe of the literature, for a TPU pod slice. It has not been run here.

Arguments: `size`, `data`; `text=FOLDER` to take the frozen BERT in a Hugging Face folder, with its
vocabulary, as the text encoder.

The global perspective is trained beside the token level, because retrieval uses it.
"""

from mlip_jax.core.schema import arguments
from mlip_jax.interop.pretrained import adopt_frozen_bert
from mlip_jax.recipes.recipes import recipe


def get_config(arg=None):
    """Takes size, data and text: the folder of a BERT."""
    args = arguments(arg, size="quick", data="emoji", text="")
    config = recipe(args["size"], args["data"])
    config.name = "filip"
    config.perspectives.spatial_tokens.weight = 1.0
    if args["text"]:
        adopt_frozen_bert(config, args["text"])
    return config
