"""From encoded files to square uint8 images: what evaluation sees."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageFile, UnidentifiedImageError

from mlip_jax.core.files import is_number, read_file
from mlip_jax.data.images import limits, orientation
from mlip_jax.data.images.limits import UnreadableImage

if TYPE_CHECKING:
    import jax

ImageLike = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

# Of the host or of a device.
Pixels = TypeVar("Pixels", np.ndarray, "jax.Array")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5)
NORMALIZATIONS = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "siglip": (_HALF, _HALF),
}
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
RESIZES = ("shortest", "longest", "squash")
MOST_PIXELS = 8192  # along a side of what a model sees
_WORDS = {
    "transparency": ("drop", "white", "drop_first"),
    "interpolation": tuple(INTERPOLATIONS),
    "resize": RESIZES,
    "crop": ("round", "floor"),
}

# A file of a few kilobytes can unfold to gigabytes: Pillow's warning about it becomes the error by
# which such a file counts as unreadable.
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Of oddities in files that are decoded all the same, such as damaged EXIF blocks.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# Pillow hands some formats to other programs (EPS to Ghostscript): only these are decoded.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# Of a PNG's samples that have not 8 bits.
_TO_EIGHT_BITS: dict[str, Callable[[int], int]] = {
    "L;2": lambda sample: (sample & 0b11) * 0x55,
    "L;4": lambda sample: (sample & 0xF) * 0x11,
    "RGB;16B": lambda sample: sample >> 8,
}

# More drawn out than this, an image is cut to this aspect before it is resized.
_MAX_ASPECT = 64
_BAND = 2**20  # pixels of an image that are worked on at a time


_OF_NO_KNOWN_RANGE = "numbers of 32 bits, of which is not known what is white: save it with 8 or 16"


def decode(data: bytes, *, at_least: int = 0, upright: bool = False) -> Image.Image:
    """Decodes an encoded image.

    16-bit and float greyscale become 8-bit; palettes and CMYK become RGB.

    Args:
      data: the bytes of a file of one of FORMATS; of an animation, its first frame is taken.
      at_least: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as its
        short side keeps this many pixels; 0: at full size.
      upright: whether the image is turned as its EXIF data say, as by Pillow's
        `ImageOps.exif_transpose`. torchvision and open_clip ignore them. A TIFF file is always
        turned, by Pillow itself.

    Returns:
      An image of mode RGB, L, RGBA or LA. One of mode RGB or L may name its transparent colour in
      `info["transparency"]`. `flatten` makes all of them RGB.

    Raises:
      UnreadableImage: when that cannot be done, or the image is beyond one of the `limits`.
    """
    image, turn = decode_as_stored(data, at_least=at_least)
    return orientation.turned(image, turn) if upright else image


def decode_as_stored(data: bytes, *, at_least: int = 0) -> tuple[Image.Image, int]:
    """An image as `decode` gives it if not `upright`, and its orientation: 1 to 8, as in EXIF."""
    with readable():
        image = open_image(data)
        if at_least and image.format == "JPEG":
            short = min(image.size)
            width, height = (side * at_least // short for side in image.size)
            image.draft(None, (width, height))
        image.load()
        return eight_bits(image), orientation.of_file(image)


@contextlib.contextmanager
def readable(saying: str = "") -> Iterator[None]:
    """Whatever Pillow's plugins stumble over inside becomes an UnreadableImage.

    Args:
      saying: what its message begins with, if it is not one of the `limits`.
    """
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError:  # its message names the address of a buffer
        raise UnreadableImage(f"{saying}not an image of a known format") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UnreadableImage(
            f"the image's header says more than the {limits.MOST_PIXELS:,} pixels that are decoded"
        ) from None
    except Exception as error:  # OSError, SyntaxError, ValueError, ...
        raise UnreadableImage(f"{saying}{str(error) or type(error).__name__}") from error


def open_image(data: bytes) -> ImageFile.ImageFile:
    """An encoded image whose header alone is read, within the `limits`.

    Raises:
      UnreadableImage: when it is beyond one of them.
      Exception: what Pillow's plugins raise; see `readable`.
    """
    limits.check_bytes(data)
    image = Image.open(io.BytesIO(data), formats=_known_formats())
    limits.check_size(*image.size)
    if image.format in ("JPEG", "MPO"):
        limits.check_scans(data, *image.size)
    if image.format == "PNG" and image.mode in ("L", "RGB") and "transparency" in image.info:
        # The file says it in its own bits, the pixels that Pillow gives have 8.
        to_eight_bits = _TO_EIGHT_BITS.get(_raw_mode(image), lambda sample: sample & 0xFF)
        color = image.info["transparency"]
        image.info["transparency"] = (
            to_eight_bits(color) if image.mode == "L" else tuple(map(to_eight_bits, color))
        )
    return image


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How the file of a PNG stores its pixels: "L;4", "RGB;16B", ..."""
    *_, arguments = image.tile[0] if image.tile else ("",)
    return str(arguments)


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF came late to Pillow


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of a mode that `decode` gives, decoded from any."""
    if image.mode in ("RGB", "L", "RGBA", "LA"):
        return image
    if image.mode == "F":
        raise UnreadableImage(f"its pixels are {_OF_NO_KNOWN_RANGE}")
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits, whatever Pillow keeps them in
        samples = np.asarray(image)
        if samples.size and not 0 <= samples.min() <= samples.max() <= 0xFFFF:
            raise UnreadableImage(f"its pixels are {_OF_NO_KNOWN_RANGE}")
        grey = Image.fromarray((samples >> 8).astype(np.uint8))
        if "transparency" in image.info:  # all 16 bits count: shades next to it are not transparent
            opaque = samples != image.info["transparency"]
            grey.putalpha(Image.fromarray(opaque.astype(np.uint8) * np.uint8(255)))
        return grey
    if image.mode == "1":
        return image.convert("L")
    transparent = image.mode in ("PA", "La", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def flatten(image: Image.Image, transparency: str) -> Image.Image:
    """RGB without transparency.

    Args:
      image: any mode that `decode` gives.
      transparency: "white" lays the image on white; "drop" takes the colours as they are stored, as
        torchvision and open_clip do.
    """
    if transparency == "white" and (image.mode in ("RGBA", "LA") or "transparency" in image.info):
        flat = Image.new("RGB", image.size)
        for top, band in bands(image):
            band = with_alpha(band).convert("RGBA")
            white = Image.new("RGBA", band.size, "white")
            flat.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
        return flat
    return image if image.mode == "RGB" else image.convert("RGB")


def bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """An image in parts one below the other, each with its first row, for less memory in between.

    What is made of a large image step by step would otherwise lie in memory several times.
    """
    rows = max(1, _BAND // max(image.width, 1))
    if rows >= image.height:  # which needs no copy
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def with_alpha(image: Image.Image) -> Image.Image:
    """An image of a mode that `decode` gives; a transparent colour becomes a channel of alpha."""
    if image.mode in ("RGB", "L") and "transparency" in image.info:
        return image.convert("RGBA" if image.mode == "RGB" else "LA")
    return image


@dataclass(frozen=True)
class Preprocessing:
    """What evaluation does to an image; with a model's weights, all that its input depends on.

    The short side is resized to `image_size` (bicubic), the centre is cut out, pixels / 255 are
    normalised by `mean` and `std`: CLIP's preprocessing, equal to open_clip's with the defaults.

    Attributes:
      image_size: of the square.
      mean: of each channel.
      std: of each channel.
      transparency: "drop" takes the colours as they are stored, "white" lays the image on white
        (see `flatten`); "drop_first" drops before the image is resized, as Hugging Face does.
      interpolation: one of `INTERPOLATIONS`.
      resize: "shortest", the short side is brought to size and the rest cut off; "longest", the
        long side, and the rest is black; "squash", both.
      short_side: what "shortest" brings the short side to; 0: `image_size`.
      crop: how half a pixel is rounded where the centre is cut out: "round", as torchvision and
        open_clip do, or "floor", as transformers does.
      orientation: "exif" turns an image upright, as its EXIF data say; "ignore" takes it as it is
        stored, as torchvision and open_clip do. Arrays are taken as they are.
    """

    image_size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    transparency: str = "drop"
    interpolation: str = "bicubic"
    resize: str = "shortest"
    short_side: int = 0
    crop: str = "round"
    orientation: str = "ignore"

    @classmethod
    def of(cls, config: ConfigDict) -> Preprocessing:
        """The preprocessing of a model that is trained by `config`.

        Transparent images are laid on white, in training too: drawings are black on transparent
        more often than not, and would be black on black.
        """
        image = config.model.image
        mean, std = NORMALIZATIONS[image.normalization]
        turn = config.data.orientation
        return cls(image.image_size, mean, std, transparency="white", orientation=turn)

    def __call__(self, image: ImageLike) -> np.ndarray:
        """The square that the model sees, uint8 [image_size, image_size, 3].

        Args:
          image: encoded bytes, a path, a Pillow image, or uint8 [height, width] or
            [height, width, 1, 3 or 4].

        Raises:
          UnreadableImage: for bytes or a file that holds no image.
          OSError: for a file that cannot be read.
          ValueError: for an array of another type or shape.
        """
        pixels = _open(image, self.orientation == "exif")
        if self.transparency != "drop":
            pixels = flatten(pixels, "white" if self.transparency == "white" else "drop")
        size = self.image_size
        width, height = pixels.size
        if self.resize == "shortest" and max(width, height) > _MAX_ASPECT * min(width, height):
            reach = _MAX_ASPECT * min(width, height)
            pixels = _cut_centre(pixels, min(width, reach), min(height, reach))
        resized = self._resized_to(*pixels.size)
        if resized != pixels.size:
            pixels = pixels.resize(resized, INTERPOLATIONS[self.interpolation])
        return np.asarray(flatten(_cut_centre(pixels, size, size, self.crop), "drop"))

    def _resized_to(self, width: int, height: int) -> tuple[int, int]:
        """Rounded as by torchvision and, for "longest", open_clip, pixel for pixel."""
        size = self.image_size
        if self.resize == "squash":
            return size, size
        if self.resize == "longest":
            ratio = max(width, height) / size
            return max(round(width / ratio), 1), max(round(height / ratio), 1)
        short = self.short_side or size
        wide = short if width <= height else short * width // height
        high = short if height <= width else short * height // width
        return wide, high

    def normalize(self, images: Pixels) -> Pixels:
        """uint8 [..., height, width, 3] -> float32 of the same shape, as the model takes it."""
        mean, std = (np.array(values, np.float32) for values in (self.mean, self.std))
        return (images.astype(np.float32) / np.float32(255) - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def check(self) -> None:
        """Raises ValueError for values that no model's images are prepared by."""
        check_image_size(self.image_size)
        if not 0 <= self.short_side <= MOST_PIXELS:
            raise ValueError(f"short_side {self.short_side} is not from 0 to {MOST_PIXELS:,}")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            finite = all(map(is_number, numbers))
            if len(numbers) != 3 or not finite or (name == "std" and min(numbers) <= 0):
                raise ValueError(f"{name} {list(numbers)} is none of three channels")
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(words)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`, from JSON too.

        Raises:
          ValueError, TypeError, KeyError: for values that `to_dict` cannot have given.
        """
        prepared = cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        prepared.check()
        return prepared


def check_image_size(size: Any) -> None:
    """Raises ValueError for what no image's side can be."""
    if type(size) is not int or not 1 <= size <= MOST_PIXELS:
        raise ValueError(f"image_size {size!r} is no whole number from 1 to {MOST_PIXELS:,}")


def _cut_centre(
    image: Image.Image, width: int, height: int, rounding: str = "round"
) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = (_margin(image.width - width, rounding), _margin(image.height - height, rounding))
    return image.crop((left, top, left + width, top + height))  # black where the image ends


def _margin(excess: int, rounding: str) -> int:
    """What to cut off on one side, or, below 0, to add."""
    if excess < 0:
        return -(-excess // 2)
    return round(excess / 2) if rounding == "round" else excess // 2


def _open(image: ImageLike, upright: bool) -> Image.Image:
    if isinstance(image, bytes):
        return decode(image, upright=upright)
    if isinstance(image, (str, os.PathLike)):
        try:
            return decode(read_file(Path(image).expanduser()), upright=upright)
        except UnreadableImage as error:
            raise UnreadableImage(f"{image}: {error}") from None
    if isinstance(image, Image.Image):
        return _loaded(image, upright)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = getattr(image, "dtype", type(image).__name__)
        raise ValueError(f"an image must be bytes, a path, a Pillow image or uint8, not {kind}")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[2] in (3, 4)) or not image.size:
        raise ValueError(
            f"an image must be [height, width] or [height, width, 3], not {image.shape}"
        )
    return Image.fromarray(image)


def _loaded(image: Image.Image, upright: bool) -> Image.Image:
    """A Pillow image of the user's, of which perhaps the header alone is read until now."""
    with readable():
        if isinstance(image, ImageFile.ImageFile) and image.tile:
            limits.check_size(*image.size)
            if image.format in ("JPEG", "MPO"):
                limits.check_scans(_content(image), *image.size)
        image.load()
        pixels = eight_bits(image)
        return orientation.turned(pixels, orientation.of_image(image)) if upright else pixels


def _content(image: ImageFile.ImageFile) -> bytes:
    """The file that an image is still to be decoded from, which stays where it is."""
    assert image.fp is not None
    place = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(place)
    return content
