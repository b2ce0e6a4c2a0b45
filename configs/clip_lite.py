"""CLIP-Lite: the Jensen-Shannon bound with few negatives per pair (Shrivastava et al. 2023).

    python -m mlip_jax.main --config=configs/clip_lite.py

trains a small ResNet and BERT on the built-in emoji dataset, in about 9 minutes on two CPU cores.
It reaches an R@1 of about 17 % in both directions on 952 validation images.

    python -m mlip_jax.main --config=configs/clip_lite.py:size=RN50,data=coco:COCO_FOLDER

is the recipe of the paper. It has not been run here.

    python -m mlip_jax.main --config=configs/clip_lite.py:negatives=31

compares each image with all other captions of the quick recipe's batch of 32.

Arguments: `size`, `data`; `negatives`, the number of other captions in the batch that each image is
compared with: 1 in the paper and in the large recipe, 4 in the quick one; `odds`, what they weigh
together: 1 in the paper, 0 for as many as the batch has other captions; `text=FOLDER` to start from
the BERT in a Hugging Face folder, with its vocabulary.
"""

from mlip_jax.core.schema import arguments, number, whole_number
from mlip_jax.interop.pretrained import adopt_bert
from mlip_jax.recipes.recipes import clip_lite


def get_config(arg=None):
    """Takes size, data, negatives, odds and text: a Hugging Face folder of a BERT to start from."""
    args = arguments(arg, size="quick", data="emoji", negatives="", odds="", text="")
    config = clip_lite(args["size"], args["data"])
    config.name = "clip_lite"
    if args["negatives"]:
        config.perspectives.spatial_global.shifts = whole_number("negatives", args["negatives"])
    if args["odds"]:
        config.perspectives.spatial_global.odds = number("odds", args["odds"])
    if args["text"]:
        adopt_bert(config, args["text"])
    return config
