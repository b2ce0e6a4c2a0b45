"""CoCa: CLIP's loss and a decoder that writes the captions (Yu et al. 2022, arXiv 2205.01917).

    python -m mlip_jax.main --config=configs/coca.py

trains a small ViT with a decoder of one block on the built-in emoji dataset, in minutes on two CPU
cores. Its result has not been measured.

    python -m mlip_jax.main --config=configs/coca.py:size=B/16,data=jsonl:pairs.jsonl

is the recipe of the literature, for a TPU pod slice. It has not been run here.

Arguments: `size`, `data`; `pretrained=FOLDER` to start from a model of another library or of this
one, whose decoder is taken if it has one.

After the paper: the captioning loss weighs twice the contrastive one. Images are pooled by one
query for the contrastive loss, and by 256 for the decoder, or as many as there are patches if they
are fewer. Texts are read from left to right and pooled at their end. The decoder is as deep and as
wide as the text encoder.

Left out: the decoder has embeddings of its own and attends to the image in every block, where the
paper's goes on from the text encoder's last layer, so that both losses share that. The pooler for
the contrastive loss reads the patches, not the 256 pooled tokens. The recipe is that of the other
configs, not the paper's (batches of 65,536, Adafactor, images of 288 pixels, JFT's class names as
texts).
"""

from mlip_jax.core.schema import arguments
from mlip_jax.interop.pretrained import adopt, keep_own
from mlip_jax.models.building import grid
from mlip_jax.recipes.recipes import add_decoder, recipe


def get_config(arg=None):
    """Takes size, data, and pretrained: a folder with what to start from."""
    args = arguments(arg, size="quick", data="emoji", pretrained="")
    config = recipe(args["size"], args["data"])
    config.name = "coca"
    if config.model.image.architecture == "vit":
        config.model.image.pooling = "attention"
    if config.model.text.architecture == "clip":
        config.model.text.causal = True
        config.model.text.pooling = "last"
    own = adopt(config, args["pretrained"]) if args["pretrained"] else None
    add_decoder(config, weight=2.0, layers=config.model.text.depth)
    config.model.caption.queries = min(256, grid(config) ** 2)
    keep_own(config, own)
    return config
