"""CLIP-Lite: the Jensen-Shannon bound with one negative a pair (Shrivastava et al. 2023).

    python -m mlip_jax.main --config=configs/clip_lite.py
    python -m mlip_jax.main --config=configs/clip_lite.py:size=RN50,data=coco:COCO_FOLDER
    python -m mlip_jax.main --config=configs/clip_lite.py:negatives=31

The first takes about 9 minutes on two CPU cores and reaches an R@1 of about 17 % each way, of 952.
The second is the paper's recipe and has not been run here.

`negatives` is how many of the batch's other captions each image is told apart from: 1 in the paper
and in the large recipe, 4 in the quick one. `text=FOLDER` starts from the BERT in a Hugging Face
folder, with its vocabulary.
"""

from mlip_jax.config import arguments, whole_number
from mlip_jax.interop.pretrained import adopt_bert
from mlip_jax.recipes.recipes import clip_lite


def get_config(arg=None):
    """Takes size, data, negatives and text: the folder of a Hugging Face BERT to start from."""
    args = arguments(arg, size="quick", data="emoji", negatives="", text="")
    config = clip_lite(args["size"], args["data"])
    config.name = "clip_lite"
    if args["negatives"]:
        config.perspectives.spatial_global.shifts = whole_number("negatives", args["negatives"])
    if args["text"]:
        adopt_bert(config, args["text"])
    return config
