"""CLIP: softmax over the batch on one perspective (Radford et al. 2021).

    python -m mlip_jax.main --config=configs/clip.py

trains a small ViT on the built-in emoji dataset, in minutes on two CPU cores, about as long as
configs/mlip.py. It reaches an R@1 of 42 % (text to image) and 41 % (image to text) on 952
validation images, mean of three seeds.

    python -m mlip_jax.main --config=configs/clip.py:size=B/16,data=jsonl:pairs.jsonl

is the recipe of the literature, for a TPU pod slice. It has not been run here.

Arguments: `size`, `data`; `pretrained=FOLDER` to start from a model of another library or of this
one. Or `image=FOLDER` to take the frozen image encoder of such a model, or a ViT of timm's, as LiT
does (Zhai et al. 2022), and `text=FOLDER` to take the frozen BERT in a Hugging Face folder, with
its vocabulary, as the text encoder.

This is the baseline of the other configs: the same encoders without Frequency Stage and merging.
"""

from mlip_jax.core.schema import arguments
from mlip_jax.interop.pretrained import adopt, adopt_frozen_bert, adopt_image, keep_own
from mlip_jax.recipes.recipes import recipe
from mlip_jax.recipes.sizes import PHOTOGRAPHS


def get_config(arg=None):
    """Takes size, data, and pretrained, or image and text: folders with what to start from."""
    args = arguments(arg, size="quick", data="emoji", pretrained="", image="", text="")
    config = recipe(args["size"], args["data"])
    config.name = "clip"
    if args["pretrained"]:
        keep_own(config, adopt(config, args["pretrained"]))
    if args["image"]:
        adopt_image(config, args["image"])
    if args["text"]:
        adopt_frozen_bert(config, args["text"], once=args["size"] in PHOTOGRAPHS)
    return config
