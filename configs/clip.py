"""CLIP: softmax over the batch on one perspective (Radford et al. 2021).

    python -m mlip_jax.main --config=configs/clip.py

trains a small ViT on the built-in emoji dataset, in minutes on two CPU cores, about as long as
configs/mlip.py. It reaches an R@1 of 42 % (text to image) and 41 % (image to text) on 952
validation images, mean of three seeds.

    python -m mlip_jax.main --config=configs/clip.py:size=B/16,data=jsonl:pairs.jsonl

is the recipe of the literature, for a TPU pod slice. It has not been run here.

Arguments: `size`, `data`; `pretrained=FOLDER` to start from a model of another library or of this
one, or `text=FOLDER` to take the frozen BERT in a Hugging Face folder, with its vocabulary, as the
text encoder.

This is the baseline of the other configs: the same encoders without Frequency Stage and merging.
"""

from mlip_jax.core.schema import arguments
from mlip_jax.interop.pretrained import adopt, adopt_frozen_bert, keep_own
from mlip_jax.recipes.recipes import recipe


def get_config(arg=None):
    """Takes size, data, and pretrained or text: folders with what to start from."""
    args = arguments(arg, size="quick", data="emoji", pretrained="", text="")
    config = recipe(args["size"], args["data"])
    config.name = "clip"
    if args["pretrained"]:
        keep_own(config, adopt(config, args["pretrained"]))
    if args["text"]:
        adopt_frozen_bert(config, args["text"])
    return config
