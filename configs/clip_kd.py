"""CLIP-KD: CLIP that also learns from another model (Yang et al., CVPR 2024, arXiv 2307.12732).

    python -m mlip_jax.main --config=configs/clip_kd.py

trains a small ViT on the built-in emoji dataset beside the moving average of its own parameters.
Its result has not been measured. A larger model teaches more:

    python -m mlip_jax.main --config=configs/clip_kd.py:teacher=runs/large

learns from the model in runs/large: the workdir of a run, an exported model, or a folder of
open_clip's or of Hugging Face's CLIP or SigLIP.

    python -m mlip_jax.main --config=configs/clip_kd.py:size=B/16,data=cc12m,teacher=FOLDER

is a recipe of the literature, for a TPU pod slice. It has not been run here.

Arguments: `size`, `data`; `teacher`, a folder, several with + between, or "ema".

Of the paper's losses these are feature distillation and contrastive relational distillation, with
the weights of its code, 2,000 and 1, beside CLIP's own. Interactive contrastive learning, which has
a scale of its own there, is left out.
"""

from mlip_jax.core.schema import OWN_AVERAGE, arguments
from mlip_jax.recipes.recipes import recipe


def get_config(arg=None):
    """Takes size, data, and teacher: folders of models to learn from."""
    args = arguments(arg, size="quick", data="emoji", teacher=OWN_AVERAGE)
    config = recipe(args["size"], args["data"])
    config.name = "clip_kd"
    config.teacher = tuple(args["teacher"].split("+"))
    config.distillation.features.spatial_global = 2000.0
    config.distillation.relation.spatial_global = 1.0
    if OWN_AVERAGE in config.teacher and not config.optimizer.ema:
        config.optimizer.ema = 0.999
    return config
