"""CLIP: one perspective, softmax over the batch (Radford et al. 2021).

    python -m mlip_jax.main --config=configs/clip.py
    python -m mlip_jax.main --config=configs/clip.py:size=B/16,data=jsonl:pairs.jsonl

The first reaches an R@1 of 42 % (text to image) and 41 % (image to text), of 952, three seeds.
The second is the literature's recipe for a pod slice and has not been run here.

`pretrained=FOLDER` goes on from a model that another library, or this one, has written.

The baseline of the other configs: the same encoders without Frequency Stage and merging.
"""

from mlip_jax.config import arguments
from mlip_jax.interop.pretrained import adopt
from mlip_jax.recipes.recipes import recipe


def get_config(arg=None):
    """Takes size, data and pretrained: a folder with a model to start from."""
    args = arguments(arg, size="quick", data="emoji", pretrained="")
    config = recipe(args["size"], args["data"])
    config.name = "clip"
    if args["pretrained"]:
        adopt(config, args["pretrained"])
    return config
