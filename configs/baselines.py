"""Small public baselines: CLIP and FILIP on a few million pairs, with the figures to expect.

    python -m mlip_jax.main --config=configs/baselines.py:run=cc3m_vit_b16

None has been trained here: the figures, zero-shot top-1 on ImageNet by 80 prompts, are their
authors', and the recipes are theirs as far as they say them.

| run | model | pairs | batch | epochs | rate, decay | expected | by |
| --- | --- | --- | --- | --- | --- | --- | --- |
| cc3m_rn50 | ResNet-50 | CC3M | 1,024 | 30 | 1e-3, 0.1 | 18.5 to 19 | users of open_clip |
| cc3m_vit_b16 | ViT-B/16 | CC3M | 4,096 | 40 | 5e-4, 0.5 | 17.1 | SLIP (arXiv 2112.12750) |
| cc12m_vit_b16 | ViT-B/16 | CC12M | 4,096 | 35 | 5e-4, 0.5 | 36.5 | SLIP |
| yfcc15m_vit_b32 | ViT-B/32 | YFCC15M | 4,096 | 34 | 1e-3, 0.1 | 32.8 | arXiv 2203.05796 |
| yfcc15m_filip_b32 | ViT-B/32 | YFCC15M | 4,096 | 34 | 5e-4, 0.5 | 39.5 | arXiv 2203.05796 |

What differs: the ResNet-50 is torchvision's with a mean over its last grid, where open_clip's is
CLIP's with attention pooling. SLIP's figures are the best of all epochs. The FILIP of arXiv
2203.05796 sees two augmented views and keeps the tokens of highest similarity; this one is
`configs/filip.py`'s, on one view. YFCC15M is there its second edition.

One more is of COCO alone, with a locked image encoder (LiT, arXiv 2111.07991), after big_vision's
lit_coco.py:

    python -m mlip_jax.main --config=configs/baselines.py:run=coco_lit_vit_b16,image=VIT,text=BERT

VIT is a folder in timm's layout or one that `mlip_jax.load` takes; big_vision's weights are those
of timm's vit_base_patch16_224.augreg_in21k. BERT is a folder of Hugging Face's, such as
bert-base-uncased; without it a BERT of that size begins from nothing, with a vocabulary of the
captions. 5,000 batches of 4,096, rate 1e-3, decay 10 (theirs is 0.01, not multiplied by the rate),
texts of 16 tokens. Expected is 20.7 zero-shot on ImageNet, and on COCO's 5,000 test images an R@1
of 47.2 (image to text) and 32.1 (text to image).

What differs: images have a learned projection, where big_vision's have none; training crops keep an
image's height or width, and evaluation its middle, where theirs are resized to a square; there is
no RandAugment; the captions of an image take turns, where theirs are examples of their own.

`mlip plan --config=baselines:run=cc3m_vit_b16 --topology=h100:8` says what a step needs and the
least time that it takes. Arguments: `run`; `data`, another place of the pairs, such as
prepared:DIR; `image` and `text`, of coco_lit_vit_b16 alone.
"""

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.schema import arguments
from mlip_jax.interop.pretrained import adopt_bert, adopt_image
from mlip_jax.recipes.recipes import recipe

# Size, dataset, pairs a batch, epochs, peak rate, weight decay, samples of the warm-up, share of an
# image that the smallest crop has.
RUNS = {
    "cc3m_rn50": ("RN50", "cc3m", 1024, 30, 1e-3, 0.1, 10_000 * 1024, 0.9),
    "cc3m_vit_b16": ("B/16", "cc3m", 4096, 40, 5e-4, 0.5, 2_900_000, 0.5),
    "cc12m_vit_b16": ("B/16", "cc12m", 4096, 35, 5e-4, 0.5, 10_000_000, 0.5),
    "yfcc15m_vit_b32": ("B/32", "yfcc15m", 4096, 34, 1e-3, 0.1, 2500 * 4096, 0.5),
    "yfcc15m_filip_b32": ("B/32", "yfcc15m", 4096, 34, 5e-4, 0.5, 2500 * 4096, 0.5),
}
LIT = "coco_lit_vit_b16"  # of a folder's image encoder


def get_config(arg=None):
    """Takes run, a name of RUNS or LIT, and data; image and text with LIT."""
    args = arguments(arg, run="cc3m_vit_b16", data="", image="", text="")
    if args["run"] not in (*RUNS, LIT):
        raise UserError(
            f"unknown run {args['run']!r}: expected one of {', '.join((*RUNS, LIT))}"
            f"{suggestion(args['run'], (*RUNS, LIT))}"
        )
    if bool(args["image"]) != (args["run"] == LIT):
        raise UserError(
            f"run={LIT} needs image=FOLDER, a ViT that stays as it is; no other takes it"
        )
    if args["text"] and args["run"] != LIT:
        raise UserError(f"text=FOLDER goes with run={LIT} alone")
    if args["run"] == LIT:
        return _coco_lit(args["data"], args["image"], args["text"])
    size, data, batch, epochs, rate, decay, warmup, crop = RUNS[args["run"]]
    config = recipe(size, args["data"] or data)
    config.name = args["run"]
    config.batch_size, config.epochs = batch, float(epochs)
    optimizer, augment = config.optimizer, config.data.augment
    optimizer.name = "adamw"
    optimizer.learning_rate, optimizer.weight_decay = rate, decay
    optimizer.b1, optimizer.b2, optimizer.eps = 0.9, 0.98, 1e-8
    optimizer.warmup_samples = warmup
    optimizer.clip_norm = 0.0
    augment.crop, augment.flip = (crop, 1.0), False
    config.data.caption.tags = 0.0
    config.model.image.normalization = "imagenet" if "vit" in args["run"] else "clip"
    if size == "RN50":
        _clip_texts(config)
    if "filip" in args["run"]:
        config.perspectives.spatial_tokens.weight = 1.0
    return config


def _clip_texts(config):
    """CLIP's text encoder beside its ResNet-50, in a space of 1,024."""
    text = config.model.text
    text.architecture, text.tokenizer, text.context_length = "clip", "clip", 77
    text.width, text.depth, text.heads, text.dropout = 512, 12, 8, 0.0
    text.causal, text.pooling = True, "last"
    config.model.embed_dim = 1024


def _coco_lit(data, image, text):
    """A frozen ViT-B/16 and a BERT-base that learns, on COCO's captions."""
    config = recipe("B/16", data or "karpathy:dataset_coco.json#train")
    config.name, config.batch_size = LIT, 4096
    config.epochs, config.samples = 0.0, 5000 * 4096
    optimizer, augment, caption = config.optimizer, config.data.augment, config.data.caption
    optimizer.name = "adamw"
    optimizer.learning_rate, optimizer.weight_decay = 1e-3, 10.0
    optimizer.b1, optimizer.b2, optimizer.eps = 0.9, 0.999, 1e-8
    optimizer.warmup_samples, optimizer.clip_norm = 150 * 4096, 1.0
    augment.crop, augment.flip = (1.0, 1.0), True
    caption.first = caption.tags = 0.0
    words = config.model.text
    words.architecture, words.tokenizer, words.context_length = "bert", "wordpiece", 16
    words.width, words.depth, words.heads, words.dropout = 768, 12, 12, 0.1
    words.pooling, words.vocab_size = "first", 30_522
    config.model.embed_dim, config.model.head = 768, "linear_bias"
    config.perspectives.spatial_global.init_scale = 10.0
    adopt_image(config, image)
    if text:
        adopt_bert(config, text)
    return config
