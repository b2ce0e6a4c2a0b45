"""SigLIP 2's first stage: the sigmoid loss and a decoder (Tschannen et al. 2025, arXiv 2502.14786).

    python -m mlip_jax.main --config=configs/siglip2.py

trains a small ViT with a decoder of one block on the built-in emoji dataset, in minutes on two CPU
cores. Its result has not been measured.

    python -m mlip_jax.main --config=configs/siglip2.py:size=B/16,data=jsonl:pairs.jsonl

is the recipe of the literature, for a TPU pod slice. It has not been run here.

Arguments: `size`, `data`; `pretrained=FOLDER` to start from a model of another library or of this
one, whose decoder is taken if it has one.

After the paper: both losses weigh the same. Scale and bias start at SigLIP's 10 and -10. Images
are pooled by attention. The decoder attends to all of the image's tokens, is as wide as the text
encoder and half as deep, and predicts half of the captions all tokens at once.

Left out: LocCa's other two tasks, which want boxes (referring expressions, captions of regions);
the self-distillation and the masked prediction of the last fifth of the paper's training (SILC,
TIPS); the data's curation. The tokenizer is CLIP's, not Gemma's, and the text encoder is that of
the other configs.
"""

from mlip_jax.core.schema import arguments
from mlip_jax.interop.pretrained import adopt, keep_own
from mlip_jax.recipes.recipes import add_decoder, recipe


def get_config(arg=None):
    """Takes size, data, and pretrained: a folder with what to start from."""
    args = arguments(arg, size="quick", data="emoji", pretrained="")
    config = recipe(args["size"], args["data"])
    config.name = "siglip2"
    if config.model.image.architecture == "vit":
        config.model.image.pooling = "attention"
    own = adopt(config, args["pretrained"]) if args["pretrained"] else None
    spatial = config.perspectives.spatial_global
    spatial.loss = "sigmoid"
    spatial.init_scale = 10.0
    spatial.init_bias = -10.0
    add_decoder(config, weight=1.0, layers=-(-config.model.text.depth // 2))
    config.perspectives.caption.parallel = 0.5
    keep_own(config, own)
    return config
