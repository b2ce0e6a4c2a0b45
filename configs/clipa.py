"""CLIPA: small images first, then a short fine-tuning at full size (Li et al. 2023).

    python -m mlip_jax.main --config=configs/clipa.py

trains the model of configs/clip.py on the built-in emoji dataset for as many samples, four fifths
of them at half the image size. Its result has not been measured.

    python -m mlip_jax.main --config=configs/clipa.py:size=B/16,data=jsonl:pairs.jsonl

is the recipe of the literature, for a TPU pod slice. It has not been run here.

Arguments: `size`, `data`; `image_size` and `tokens` of the first stage. `image_size=84,tokens=8`
is what CLIPA-v2 (arXiv 2306.15658) begins with. `mlip plan` tells what each stage costs.

After the paper (arXiv 2305.07017) and its authors' configs, for the large sizes: the first stage
has 112 of 224 pixels; texts have 32 tokens; no patches are left out. 4.5 % of the samples are the
second stage's. Learning rates are 8e-6 and 8e-7 for each 256 pairs of the batch, each with a cosine
of its own; weight decay 0.2, beta2 0.95; crops keep at least 40 % of the image.

Chosen: the batch and the length, which are those of the other configs (the paper has 32,768 pairs
and 2.9 billion samples of LAION-400M); the warm-ups, by share; the optimizer's state, which goes on
over the border, where the paper begins a new one; learned positions, resampled at the border, where
the paper's are fixed sines; CLIP's tokenizer and text encoder; a size whose half is no whole number
of patches begins a little smaller. The small sizes keep their optimizer, a fifth of the samples and
a tenth of the rate for the second stage.

Left out: the choice of words by syntax (CLIPA-v2's short texts), since texts are cut; and
OpenVision's third stage at a larger size (arXiv 2505.04601), which is one more line in
config.stages.
"""

from mlip_jax.core.schema import arguments, whole_number
from mlip_jax.recipes import sizes
from mlip_jax.recipes.recipes import recipe


def get_config(arg=None):
    """Takes size, data, and image_size and tokens of the first stage."""
    args = arguments(arg, size="quick", data="emoji", image_size="", tokens="")
    config = recipe(args["size"], args["data"])
    config.name = "clipa"
    image, text = config.model.image, config.model.text
    share = 0.8
    rate = config.optimizer.learning_rate / 10
    if args["size"] not in sizes.SMALL:
        share = 0.955
        text.context_length = min(text.context_length, 32)
        config.optimizer.name = "adamw"
        config.optimizer.learning_rate = 8e-6 * config.batch_size / 256
        config.optimizer.weight_decay = 0.2
        config.optimizer.b2 = 0.95
        config.data.augment.crop = (0.4, 1.0)
        rate = 8e-7 * config.batch_size / 256
    small = image.image_size // 2
    if image.architecture == "vit":
        small -= small % image.patch_size
    first = {
        "image_size": whole_number("image_size", args["image_size"] or str(small)),
        "context_length": whole_number("tokens", args["tokens"] or str(text.context_length)),
    }
    settings = " ".join(f"{name}={value}" for name, value in first.items())
    config.stages = (
        f"{share:g} {settings}",
        f"{1 - share:g} learning_rate={rate:g} warmup_samples=-1",
    )
    return config
