"""Robustness: zero-shot classification or retrieval on images that are noisy, blurred or pale.

The corruptions and their strengths are those of ImageNet-C (Hendrycks and Dietterich 2019,
arXiv 1903.12261), which are made for 224 pixels; blur is scaled to the model's image size. They act
on the image as the model gets it.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from mlip_jax.core.errors import UserError
from mlip_jax.evaluations import retrieval, zero_shot
from mlip_jax.evaluations.family import Family
from mlip_jax.evaluations.interface import Encoder, Outcome
from mlip_jax.evaluations.sets import Sets

_SEVERITIES = (0, 2, 4)  # of five: the mildest, the middle one, the strongest
_PUBLISHED_SIZE = 224

Picture = UInt8[np.ndarray, "size size 3"]


def gaussian_noise(image: Picture, deviation: float) -> Picture:
    """Adds noise, always the same to the same image."""
    rng = np.random.default_rng(zlib.crc32(image.tobytes()))
    return _bytes(image / 255 + rng.normal(0, deviation, image.shape))


def gaussian_blur(image: Picture, deviation: float) -> Picture:
    """Blurs by a deviation in pixels of an image of 224."""
    radius = deviation * len(image) / _PUBLISHED_SIZE
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def contrast(image: Picture, factor: float) -> Picture:
    """Brings each channel towards its mean."""
    pixels = image / 255
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return _bytes((pixels - mean) * factor + mean)


def brightness(image: Picture, more: float) -> Picture:
    """Raises the value of HSV; hue and saturation stay."""
    colors = np.asarray(Image.fromarray(image).convert("HSV")).copy()
    colors[..., 2] = _bytes(colors[..., 2] / 255 + more)
    return np.asarray(Image.fromarray(colors, "HSV").convert("RGB"))


def jpeg(image: Picture, quality: float) -> Picture:
    """Writes it as JPEG and reads it again."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file).convert("RGB"))


def pixelate(image: Picture, share: float) -> Picture:
    """Reduces it to a share of its side and enlarges it again."""
    side = len(image)
    small = max(1, int(side * share))
    picture = Image.fromarray(image).resize((small, small), Image.Resampling.BOX)
    return np.asarray(picture.resize((side, side), Image.Resampling.NEAREST))


CORRUPTIONS: Mapping[str, tuple[Callable[[Picture, float], Picture], tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "gaussian_blur": (gaussian_blur, (1, 2, 3, 4, 6)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "jpeg": (jpeg, (25, 18, 15, 10, 7)),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
}


def _bytes(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    return np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)


class Corrupted:
    """A model that sees every image corrupted; its texts are embedded once for all corruptions."""

    def __init__(
        self,
        model: Encoder,
        corrupt: Callable[[Picture, float], Picture],
        strength: float,
        texts: dict[tuple[str, ...], Any],
    ) -> None:
        """Takes the model, the corruption, and where embeddings of texts are kept."""
        self._model, self._corrupt, self._strength, self._texts = model, corrupt, strength, texts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_image_pixels(
        self, images: UInt8[np.ndarray, "images size size 3"]
    ) -> Float[np.ndarray, "images width"]:
        """Embeds the images, corrupted."""
        corrupted = [self._corrupt(image, self._strength) for image in images]
        return self._model.encode_image_pixels(np.stack(corrupted))

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
        """Embeds texts, or gives what they were embedded as before."""
        key = tuple(texts)
        if key not in self._texts:
            self._texts[key] = self._model.encode_text(texts)
        return self._texts[key]


def check(sets: Sets, spec: str) -> None:
    """Raises UserError for a dataset that cannot be opened."""
    sets.source(spec)


def score(sets: Sets, spec: str) -> Outcome | None:
    """The main figures of a dataset under each corruption, the mean over three strengths.

    Those of zero-shot classification where the dataset has classes, else R@1 of retrieval.

    Returns:
      None for "validation" where it has neither.

    Raises:
      UserError: for a dataset without classes and captions.
      RunError: for NaN or infinity among the embeddings.
    """
    source = sets.source(spec)
    if source is None:
        return None
    family = zero_shot if source.class_names else retrieval
    texts: dict[tuple[str, ...], Any] = {}
    clean = family.score(sets, spec)
    if clean is None:
        return None
    wanted = [key for key in clean.figures if key.endswith(("top1", "_recall@1", "precision"))]
    if not wanted:
        raise UserError(f"config.evaluation.corruptions: the dataset {spec!r} has no main figure")
    figures = {f"clean_{key}": clean.figures[key] for key in wanted}
    models = [
        Corrupted(sets.model, corrupt, strengths[severity], texts)
        for corrupt, strengths in CORRUPTIONS.values()
        for severity in _SEVERITIES
    ]
    corrupted = iter(sets.seen_by_each(models, spec))
    for name in CORRUPTIONS:
        outcomes = [family.score(next(corrupted), spec) for _ in _SEVERITIES]
        for key in wanted:
            values = [outcome.figures[key] for outcome in outcomes if outcome]
            figures[f"{name}_{key}"] = float(np.mean(values))
    for key in wanted:
        figures[f"mean_{key}"] = float(np.mean([figures[f"{name}_{key}"] for name in CORRUPTIONS]))
    main = {figure: next(key for key in wanted if figure.endswith(key)) for figure in figures}
    note = (
        "Corruptions of ImageNet-C on the image as the model gets it, the mean over the first, "
        f"third and fifth of its strengths; mean: over the {len(CORRUPTIONS)} corruptions. "
    )
    return Outcome(
        clean.name,
        figures,
        {figure: clean.chance[key] for figure, key in main.items()},
        {figure: clean.examples[key] for figure, key in main.items()},
        {figure: clean.protocols[key] for figure, key in main.items()},
        note + clean.note,
    )


FAMILY = Family(score, check, wants=("labels and captions", "folder:DIR"))
