"""The training recipes that the files in `configs/` start from."""

from __future__ import annotations

from ml_collections import ConfigDict

from mlip_jax.core import schema
from mlip_jax.recipes import sizes
from mlip_jax.recipes.lengths import BY_SET

# Images for training of the datasets that are named by one word (mlip_jax.data.sets.public says
# where they lie); of what is fetched from the web, some are gone each year.
_PAIRS = {
    "coco": 118_287,
    "flickr30k": 29_000,
    "cc3m": 2_900_000,
    "cc12m": 10_000_000,
    "yfcc15m": 15_000_000,
    "imagenet": 1_281_167,
    "voc": 5_011,
}
_EPOCHS = 32
_SMALL = 2_000_000  # pairs, below which batches are of 1,024


def recipe(size: str, data: str) -> ConfigDict:
    """A CLIP config of that size on that data; what the quick start and the large runs share.

    Args:
      size: one of `sizes.SIZES`.
      data: a dataset as `config.data.train` takes it.

    Raises:
      UserError: for an unknown size.
    """
    config = schema.default()
    sizes.apply(config, size)
    config.data.train = data
    config.data.orientation = "exif"
    config.epochs = float(BY_SET)
    config.optimizer.warmup_samples = BY_SET
    config.checkpoint.every_samples = config.evaluation.every_samples = BY_SET
    if size in sizes.SMALL:
        _quick(config)
    else:
        _large(config)
    if size in sizes.PHOTOGRAPHS:
        _photographs(config)
    if data == "emoji":
        _drawings(config)
        if size == sizes.QUICK:
            _samples(config, 160_000, warmup=10_000, every=32_000)
    elif data in _PAIRS:
        _named(config, data, schedule=size not in sizes.SMALL)
    return config


def add_decoder(config: ConfigDict, *, weight: float, layers: int) -> None:
    """Adds a caption decoder as wide as the text encoder, and its evaluation, in place.

    Args:
      config: a recipe's.
      weight: of its loss.
      layers: blocks of it.
    """
    text, caption = config.model.text, config.model.caption
    for key in ("width", "heads", "mlp_ratio", "activation", "dropout"):
        caption[key] = text[key]
    caption.depth = layers
    config.perspectives.caption.weight = weight
    config.evaluation.captioning = ("validation",)


def clip_lite(size: str, data: str) -> ConfigDict:
    """The config of CLIP-Lite: one perspective by the Jensen-Shannon bound, small batches.

    Args:
      size: one of `sizes.SIZES`.
      data: a dataset as `config.data.train` takes it.

    Raises:
      UserError: for an unknown size.
    """
    config = recipe(size, data)
    config.model.head = "projection_block"
    config.model.text.cleaning = "clip_lite"
    config.perspectives.spatial_global.loss = "jsd"
    if size == sizes.QUICK:
        _clip_lite_quick(config)
    else:
        config.model.embed_dim = 2048
        config.batch_size = 1024
        if config.model.image.architecture == "resnet":
            _clip_lite_coco(config)
            if data.partition(":")[0] in ("coco", "karpathy"):
                _samples(config, 250_000 * 1024, warmup=10_000 * 1024, every=10_000 * 1024)
                config.checkpoint.every_samples = 2000 * 1024
    return config


def _clip_lite_quick(config: ConfigDict) -> None:
    """A small ResNet and a BERT of two layers, batches of 32, four negatives a pair."""
    sizes.resnet_and_bert(config, image_size=32, layers=18, stem="small", width=16)
    text = config.model.text
    text.width, text.depth, text.heads, text.vocab_size = 128, 2, 2, 4096
    config.model.embed_dim = 256
    config.batch_size = 32
    config.optimizer.weight_decay = 0.2
    config.optimizer.max_scale = 100.0
    config.optimizer.ema = 0.0
    config.perspectives.spatial_global.shifts = 4


def _clip_lite_coco(config: ConfigDict) -> None:
    """CLIP-Lite's recipe on COCO's captions (arXiv 2112.07133)."""
    config.model.text.vocab_size = 30_522
    optimizer = config.optimizer
    optimizer.name = "sgd"
    optimizer.learning_rate = 0.2
    optimizer.rates.text = optimizer.rates.heads = 1e-3 / 0.2
    optimizer.weight_decay = 1e-4
    optimizer.clip_norm = 10.0
    optimizer.lookahead.period = 5
    config.data.augment.crop = (0.2, 1.0)
    config.data.augment.flip = True
    config.data.augment.color = 1.0


def _quick(config: ConfigDict) -> None:
    """Minutes on two CPU cores."""
    config.batch_size = 128
    config.samples = 320_000
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.5
    config.optimizer.max_scale = 12.0
    config.optimizer.ema = 0.99
    config.data.augment.crop = (0.6, 1.0)
    config.data.augment.flip = True
    config.data.augment.color = 0.25
    config.log_every = 20


def _photographs(config: ConfigDict) -> None:
    """Some thousand photographs, each seen some dozen times: smaller crops, stochastic depth."""
    config.optimizer.schedule = "wsd"
    config.optimizer.ema = 0.999
    config.model.image.drop_path = 0.1
    config.data.augment.crop = (0.35, 1.0)
    config.data.augment.color = 0.5
    config.data.augment.grayscale = 0.1


def _large(config: ConfigDict) -> None:
    """CLIP's recipe on 15 million pairs, as the public baselines train it (a choice)."""
    config.batch_size = 4096
    config.samples = 32 * 15_000_000
    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 0.5
    config.data.augment.crop = (0.5, 1.0)
    config.evaluation.templates = "clip_80"
    config.log_every = 50


def _samples(config: ConfigDict, samples: int, *, warmup: int, every: int) -> None:
    """A length that does not follow from the size of the set."""
    config.epochs = 0.0
    config.samples = samples
    config.optimizer.warmup_samples = warmup
    config.checkpoint.every_samples = config.evaluation.every_samples = every


def _drawings(config: ConfigDict) -> None:
    """The embedded dataset: short names; margins, line width and colour are matters of style."""
    augment, caption = config.data.augment, config.data.caption
    augment.flip = False
    augment.trim = 1.0
    augment.crop = (0.75, 1.0)
    augment.affine = 0.3
    augment.color = 0.6
    augment.morphology = 0.4
    augment.grayscale = 0.05
    augment.blur = 0.05
    caption.first = 0.9
    caption.tags = 0.1
    config.model.text.context_length = 16


def _named(config: ConfigDict, data: str, schedule: bool) -> None:
    """The data section of a public dataset, and for a large size its schedule (choices)."""
    augment, caption, evaluation = config.data.augment, config.data.caption, config.evaluation
    pairs = _PAIRS[data]
    caption.tags = 0.0  # they have none
    augment.flip = data != "flickr30k"
    augment.crop = (0.5, 1.0)
    if data == "flickr30k":
        evaluation.retrieval = ("validation", "flickr30k#test")
    elif data == "imagenet":
        # Captions are the classes' names: there is nothing to retrieve by.
        evaluation.retrieval = ()
        evaluation.class_names = "imagenet1k"
        evaluation.templates = "clip_80"
        evaluation.linear_probe = ("validation",)
        augment.crop = (0.2, 1.0)
    elif data == "voc":
        # Several classes an image; trained on trainval, tested on test.
        evaluation.retrieval = evaluation.zero_shot = ()
        evaluation.svm = ("voc",)
        augment.crop = (0.2, 1.0)
    if schedule:
        config.batch_size = 1024 if pairs < _SMALL else 4096
        config.samples = _EPOCHS * pairs
