"""From encoded files to square uint8 images: what training sees, different at every visit."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float64, UInt8
from ml_collections import ConfigDict
from PIL import Image, ImageChops, ImageFilter

from mlip_jax.data.images import fast_decoding
from mlip_jax.data.images.preprocessing import bands, flatten

_LUMA = np.array((0.299, 0.587, 0.114))
_GREY = np.tile(_LUMA, (3, 1))  # every channel becomes the luma
# Hue turns the plane of I and Q in YIQ space: the luma's part, and the cosine's and the sine's.
_TO_YIQ = np.array((_LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)))
_HUE = [
    np.linalg.inv(_TO_YIQ) @ np.array(part) @ _TO_YIQ
    for part in (
        ((1, 0, 0), (0, 0, 0), (0, 0, 0)),
        ((0, 0, 0), (0, 1, 0), (0, 0, 1)),
        ((0, 0, 0), (0, 0, -1), (0, 1, 0)),
    )
]
_COLORS = np.reshape((*_HUE, _GREY), (4, 9))
# CLIP-Lite's colour jitter at strength 1, and how often it happens.
_BRIGHTNESS = _CONTRAST = _SATURATION = 0.4
_HUE_TURNS = 0.1
_COLOR_CHANCE = 0.8
_ASPECTS = (3 / 4, 4 / 3)
_CONTENT = 24  # levels of 255 by which a pixel must differ from the ground, JPEG noise being less


def short_side(config_augment: ConfigDict, image_size: int) -> int:
    """The short side with which an image may be decoded at a fraction of its size.

    With it even the smallest crop has about twice the pixels of the view, so that what the
    fraction loses is lost in the view anyway (PSNR above 40 dB; docs/performance.md).
    """
    return math.ceil(2 * image_size / math.sqrt(config_augment.crop[0]))


def by_pillow(config_augment: ConfigDict) -> bool:
    """Whether views need what only Pillow does: trims, affine maps or changes of line width."""
    return bool(config_augment.trim or config_augment.morphology or config_augment.affine)


def augment(
    image: Image.Image | UInt8[np.ndarray, "height width 3"],
    config_augment: ConfigDict,
    image_size: int,
    rng: np.random.Generator,
    *,
    exact: bool = False,
    trimmed: bool = False,
) -> tuple[UInt8[np.ndarray, "size size 3"], bool]:
    """One random view of an image.

    Crop, mirror image and affine map are one resampling; brightness, contrast, saturation, hue and
    greyscale are one matrix on the small result.

    Args:
      image: of any size; transparency is laid on white.
      config_augment: `config.data.augment`.
      image_size: the side of the result.
      rng: where chance comes from.
      exact: crops are resized by Pillow, not by `fast.resize`.
      trimmed: the image comes out of `trim`.

    Returns:
      uint8 [image_size, image_size, 3], and whether it is mirrored.
    """
    if isinstance(image, Image.Image):
        image = flatten(image, "white")
    elif exact or by_pillow(config_augment):
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):  # which both need; see `by_pillow`
        if config_augment.trim and rng.random() < config_augment.trim and not trimmed:
            image = trim(image)
        if config_augment.morphology and rng.random() < config_augment.morphology:
            image = _morphology(image, image_size, rng)
    flipped = bool(config_augment.flip and rng.random() < 0.5)
    size = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    box = _crop_box(size, config_augment.crop, rng)
    if config_augment.affine:
        assert isinstance(image, Image.Image)  # as `by_pillow` says
        view = np.asarray(_affine(image, box, config_augment.affine, image_size, flipped, rng))
    else:
        view = _resized(image, box, image_size, exact)
    changed = None  # Pillow's image of the view, once it has something to do
    if flipped and not config_augment.affine:
        changed = Image.fromarray(view).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config_augment.blur and rng.random() < config_augment.blur:
        radius = rng.uniform(0.1, 1.0) * max(1.0, image_size / 112)
        changed = (changed or Image.fromarray(view)).filter(ImageFilter.GaussianBlur(radius))
        view = np.asarray(changed)
    # The colours that the matrix starts from are the same in the mirror image.
    matrix = _color_matrix(view, config_augment.color, config_augment.grayscale, rng)
    if matrix is not None:
        changed = (changed or Image.fromarray(view)).convert("RGB", matrix)
    return view if changed is None else np.asarray(changed), flipped


def _resized(
    image: Image.Image | UInt8[np.ndarray, "height width 3"],
    box: tuple[float, float, float, float],
    size: int,
    exact: bool,
) -> UInt8[np.ndarray, "size size 3"]:
    if exact:
        assert isinstance(image, Image.Image)  # `augment` has made it one
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return fast_decoding.resize(np.asarray(image), box, size)


def trim(image: Image.Image) -> Image.Image:
    """The smallest square around what differs from the corners' colour; whole if nothing does."""
    color = _corner_color(image)
    boxes = []
    for first, band in bands(image):
        ground = Image.new("RGB", band.size, color)
        noise = Image.new("RGB", band.size, (_CONTENT, _CONTENT, _CONTENT))
        box = ImageChops.subtract(ImageChops.difference(band, ground), noise).getbbox()
        if box is not None:
            boxes.append((box[0], first + box[1], box[2], first + box[3]))
    if not boxes:
        return image
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    left, top, right, bottom = min(lefts), min(tops), max(rights), max(bottoms)
    side = max(right - left, bottom - top)
    # Where the square would leave the image, it is moved back in, or as wide as the image.
    left, top = (
        min(max((low + high - side) // 2, 0), max(extent - side, 0))
        for low, high, extent in ((left, right, image.width), (top, bottom, image.height))
    )
    return image.crop((left, top, min(left + side, image.width), min(top + side, image.height)))


def _crop_box(
    size: tuple[int, int], areas: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A box of a share of the area within `areas`, its aspect near 1 (Szegedy et al. 2015)."""
    width, height = size
    area = width * height * rng.uniform(*areas)
    aspect = math.exp(rng.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
    wide = min(width, math.sqrt(area * aspect))
    high = min(height, math.sqrt(area / aspect))
    left = rng.random() * (width - wide)
    top = rng.random() * (height - high)
    return left, top, left + wide, top + high


def _affine(
    image: Image.Image,
    box: tuple[float, float, float, float],
    strength: float,
    size: int,
    flipped: bool,
    rng: np.random.Generator,
) -> Image.Image:
    """Crop, mirror, turn, shear and shift in one map from the result's pixels to the image's."""
    turn, shear, right, down = rng.uniform(-strength, strength, 4)
    fill = _corner_color(image)
    left, top, wide, high = box[0], box[1], box[2] - box[0], box[3] - box[1]
    # Pillow's affine map samples points and does not average: first halve the image while there is
    # plenty of it, then sample at twice the size and average.
    reduction = max(1, int(min(wide, high) / (2 * size)))
    if reduction > 1:
        image = image.reduce(reduction)
        left, top, wide, high = (value / reduction for value in (left, top, wide, high))
    grid = 2 * size if min(wide, high) > size else size
    angle = turn * math.radians(30)
    cos, sin = math.cos(angle), math.sin(angle)
    mirror = -1 if flipped else 1
    # In units of the crop's half width and half height, the centre of both at 0.
    across = (mirror * cos, mirror * (0.2 * shear * cos - sin), 0.4 * right)
    along = (sin, 0.2 * shear * sin + cos, 0.4 * down)
    rows = []
    for (a, b, c), extent, start in ((across, wide, left), (along, high, top)):
        a, b = a * extent / grid, b * extent / grid
        rows += [a, b, start + extent * (1 + c) / 2 - (a + b) * grid / 2]
    image = image.transform(
        (grid, grid),
        Image.Transform.AFFINE,
        rows,
        resample=Image.Resampling.BILINEAR,
        fillcolor=fill,
    )
    return image.reduce(2) if grid > size else image


def _corner_color(image: Image.Image) -> tuple[int, int, int]:
    """What to paint where the map leaves the image: the middle of its corners' colours."""
    right, bottom = image.width - 1, image.height - 1
    corners = [image.getpixel(at) for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))]
    return tuple(sum(sorted(channel)[1:3]) // 2 for channel in zip(*corners, strict=True))


def _morphology(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Thicker or thinner lines, by about a pixel of an image of twice the result's size."""
    reduction = min(image.size) // (2 * size)
    if reduction > 1:
        image = image.reduce(reduction)
    extreme = np.minimum if rng.random() < 0.5 else np.maximum
    # Down and across one after the other: many times faster than Pillow's rank filter.
    pixels = np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)), mode="edge")
    pixels = extreme(extreme(pixels[:-2], pixels[1:-1]), pixels[2:])
    pixels = extreme(extreme(pixels[:, :-2], pixels[:, 1:-1]), pixels[:, 2:])
    return Image.fromarray(pixels)


def _color_matrix(
    view: UInt8[np.ndarray, "size size 3"],
    strength: float,
    grayscale: float,
    rng: np.random.Generator,
) -> tuple[float, ...] | None:
    """Pillow's 3 x 4 colour matrix, or None when colours stay."""
    matrix, offset = np.eye(3), 0.0
    jitter = strength and rng.random() < _COLOR_CHANCE
    if jitter:
        brightness, contrast, saturation, hue = rng.uniform(-strength, strength, 4).tolist()
        scale = 1 + _BRIGHTNESS * brightness
        offset = -_CONTRAST * contrast * scale * float(_LUMA @ _mean_color(view))
        scale *= 1 + _CONTRAST * contrast
        chroma = scale * (1 + _SATURATION * saturation)
        angle = 2 * math.pi * _HUE_TURNS * hue
        # The hue's matrix leaves grey alone: of saturation's two parts it turns the first.
        shares = (chroma, chroma * math.cos(angle), chroma * math.sin(angle), scale - chroma)
        matrix = (np.array(shares) @ _COLORS).reshape(3, 3)
    gray = grayscale and rng.random() < grayscale
    if gray:
        matrix = _GREY @ matrix
    if not (jitter or gray):
        return None
    # Each of the matrices leaves grey alone, so that the offset needs none of them.
    red, green, blue = matrix.tolist()
    return (*red, offset, *green, offset, *blue, offset)


def _mean_color(view: UInt8[np.ndarray, "size size 3"]) -> Float64[np.ndarray, " 3"]:
    # Rows first, which is ten times as fast as NumPy's mean over both, and as exact.
    columns = view.reshape(len(view), -1).sum(0, dtype=np.uint32).reshape(-1, 3)
    return columns.sum(0, dtype=np.uint64) / (len(columns) * len(view))
