"""CLIP-Lite: the Jensen-Shannon bound with one negative a pair (Shrivastava et al. 2023).

    python -m mlip_jax.main --config=configs/clip_lite.py
    python -m mlip_jax.main --config=configs/clip_lite.py:size=RN50,data=coco:COCO_FOLDER

The first takes about 8 minutes on two CPU cores.
The second is the paper's recipe and has not been run here.
"""

from mlip_jax.config import arguments
from mlip_jax.interop.pretrained import adopt_bert
from mlip_jax.recipes import clip_lite


def get_config(arg=None):
    """Takes size, data and text: the folder of a Hugging Face BERT to start from."""
    args = arguments(arg, size="quick", data="emoji", text="")
    config = clip_lite(args["size"], args["data"])
    config.name = "clip_lite"
    if args["text"]:
        adopt_bert(config, args["text"])
    return config
