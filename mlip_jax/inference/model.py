"""A trained model behind `encode_image` and `encode_text`, with all that its input depends on."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict
from PIL import Image

from mlip_jax.core.cores import cores
from mlip_jax.core.errors import UserError
from mlip_jax.core.progress import track
from mlip_jax.data.images.preprocessing import ImageLike, Preprocessing
from mlip_jax.data.text.tokenizer import Tokenizer
from mlip_jax.inference.batches import Batches
from mlip_jax.inference.programs import Program, global_view, programs
from mlip_jax.models import building
from mlip_jax.models.two_tower import PREDICTORS


class Model:
    """Images and texts to L2-normalised float32 embeddings in one space.

    Any number of threads may call the methods of one model. Inputs of any number go through in
    batches of `config.evaluation.batch_size`.

    Attributes:
      config: the config it was trained by; it holds every key.
      preprocess: `Preprocessing`: an image of any kind to uint8 [size, size, 3].
      logit_scale: what training multiplied cosines by.
      pairwise: whether it scores pairs only, having no joint space (`config.model.critic`).
      writes: whether it has a caption decoder, which `caption` asks.
      step: of the checkpoint that it was loaded from; None when it was not.
      about: what its folder says of it beside that, such as its data's "attribution", or, in words,
        what was "lost" when it was exported for another library.
    """

    def __init__(
        self,
        config: ConfigDict,
        variables: Any,
        tokenizer: Tokenizer,
        preprocessing: Preprocessing,
        mesh: Mesh | None = None,
    ) -> None:
        """Puts a model behind the interface.

        Args:
          config: the model's config.
          variables: its "params" and "batch_stats", as arrays on a device, on `mesh`, or of numpy.
          tokenizer: what its text encoder was trained with.
          preprocessing: what its image encoder was trained with.
          mesh: the devices to spread batches over; None: one device.

        Raises:
          UserError: for a merging rate that cannot be reached, or a model without a global view.
        """
        self.config = config
        self.preprocess = preprocessing
        self._tokenizer = tokenizer
        # Numpy arrays would be copied to the device at every call.
        self._variables = variables if mesh else jax.device_put(variables)
        network = building.build_for(config, tokenizer, training=False)
        self._view = global_view(network)
        self._programs = programs(network, self._view, config, preprocessing)
        self._batches = Batches(config.evaluation.batch_size, mesh)
        self.pairwise = network.critic == "concat"
        self.writes = "caption" in network.predictions
        self.step: int | None = None
        self.about: Mapping[str, Any] = {}

    def __repr__(self) -> str:
        """What it is, in a line: config, sizes, parameters, step, perspectives."""
        image, text = self.config.model.image, self.config.model.text
        count = sum(leaf.size for leaf in jax.tree.leaves(self._variables["params"]))
        trained_on = [view for view, each in self.config.perspectives.items() if each.weight > 0]
        parts = [
            f"{image.architecture} of {image.depth} layers, {image.width} wide, "
            f"{image.image_size} pixels",
            f"{text.architecture} of {text.depth} layers, {text.width} wide",
            f"{count:,} parameters",
            "no step" if self.step is None else f"step {self.step:,}",
            f"perspectives {', '.join(trained_on)}",
        ]
        return f"<Model {self.config.name}: {'; '.join(parts)}>"

    def with_variables(self, variables: Any) -> Model:
        """The model with other variables, placed as the former; nothing is compiled again."""
        other = copy.copy(self)
        other._variables = variables
        return other

    @property
    def variables(self) -> Any:
        """The "params" and, with batch norm, "batch_stats" that embeddings are computed with."""
        return self._variables

    @property
    def tokenizer(self) -> Tokenizer:
        """What `tokenize` goes by."""
        return self._tokenizer

    def programs(self) -> dict[str, Program]:
        """The functions behind `encode_image_pixels` and `encode_token_ids`, weights included.

        Raises:
          UserError: for a model that scores pairs.
        """
        self._check_joint_space()
        size, context = self.preprocess.image_size, self.config.model.text.context_length
        embed_pixels, embed_texts = self._programs.embed_pixels, self._programs.embed_texts
        of_images, of_texts = (self._variables_without(tower) for tower in ("text", "image"))
        return {
            "encode_image": Program(
                lambda images: embed_pixels(of_images, images), (size, size, 3), np.uint8
            ),
            "encode_text": Program(
                lambda token_ids: embed_texts(of_texts, token_ids), (context,), np.int32
            ),
        }

    def _variables_without(self, tower: str) -> dict[str, Any]:
        other = (f"{tower}_encoder", f"{tower}_heads", PREDICTORS)
        return {
            collection: {name: part for name, part in tree.items() if not name.startswith(other)}
            for collection, tree in self._variables.items()
        }

    @property
    def logit_scale(self) -> float:
        """The learned scale of the perspective whose embeddings `encode_image` gives.

        1 for a model that scores pairs, which has none.
        """
        log_scale = self._variables["params"].get(f"log_scale_{self._view}", 0.0)
        return float(np.exp(jax.device_get(log_scale)))

    @property
    def logit_bias(self) -> float:
        """What is added to scaled cosines, where the loss has learned it; else 0."""
        bias = self._variables["params"].get(f"bias_{self._view}", 0.0)
        return float(jax.device_get(bias))

    def encode_image(
        self, images: ImageLike | Sequence[ImageLike], *, progress: bool = False
    ) -> Float[np.ndarray, "images width"]:
        """Embeds images: paths, encoded bytes, Pillow images or uint8 arrays.

        One image alone (no array, which takes a list around it) is embedded as a list of one.

        A batch is decoded, by several threads, while the one before it is embedded; no more than
        two are in memory.

        Args:
          images: of any size and number.
          progress: whether to draw a bar, where standard error is a terminal.

        Raises:
          OSError: for a file that cannot be read or holds no image.
          UserError: for a model that scores pairs, or whose folder does not say how images are
            prepared.
        """
        images = _images(images)
        self._check_joint_space()
        size = self._batches.size(len(images))
        if not images:
            return self.encode_image_pixels(self._pixels([]))
        with ThreadPoolExecutor(cores()) as pool:
            batches = self._decoded(images, size, pool, progress, "embedding images")
            embed = self._programs.embed_pixels
            return self._batches.over(embed, self._variables, batches, size)

    def encode_text(
        self, texts: str | Sequence[str], *, progress: bool = False
    ) -> Float[np.ndarray, "texts width"]:
        """Embeds texts.

        Args:
          texts: of any length and number; what is longer than the model's context is cut off. One
            text alone is a list of one: its embedding is [1, width], as in CLIP and open_clip.
          progress: whether to draw a bar, where standard error is a terminal.

        Raises:
          UserError: for a model that scores pairs, or whose folder holds no tokenizer.
        """
        texts = _texts(texts)
        size = self._batches.size(len(texts))
        if not progress or not texts:
            return self.encode_token_ids(self.tokenize(texts))
        self._check_joint_space()
        starts = track(range(0, len(texts), size), "embedding texts")
        batches = ((self.tokenize(texts[start : start + size]),) for start in starts)
        return self._batches.over(self._programs.embed_texts, self._variables, batches, size)

    def tokenize(self, texts: str | Sequence[str]) -> Int[np.ndarray, "texts context"]:
        """Token ids as the model takes them; of one text alone [1, context]."""
        return self._tokenizer.encode(_texts(texts), self.config.model.text.context_length)

    def encode_image_pixels(
        self, images: UInt8[np.ndarray, "images size size 3"]
    ) -> Float[np.ndarray, "images width"]:
        """Embeds images that `preprocess` has brought to size."""
        return self._embedded(self._programs.embed_pixels, np.asarray(images, np.uint8))

    def encode_image_array(
        self, images: Float[np.ndarray, "images size size 3"]
    ) -> Float[np.ndarray, "images width"]:
        """Embeds images that are resized and normalised, as `preprocess.normalize` gives them."""
        return self._embedded(self._programs.embed_array, np.asarray(images, np.float32))

    def encode_token_ids(
        self, token_ids: Int[np.ndarray, "texts context"]
    ) -> Float[np.ndarray, "texts width"]:
        """Embeds texts that are tokenised.

        Raises:
          UserError: for what are no whole numbers, or an id that has no row in the model's table.
        """
        ids = np.asarray(token_ids)
        rows = self._tokenizer.vocab_size
        if ids.size and not (np.issubdtype(ids.dtype, np.integer) and ids.min() >= 0):
            raise UserError("token ids are whole numbers, at least 0")
        if ids.size and ids.max() >= rows:
            raise UserError(f"token id {ids.max()}: this model has {rows:,} tokens, from 0 on")
        return self._embedded(self._programs.embed_texts, ids.astype(np.int32))

    def image_features(
        self, images: UInt8[np.ndarray, "images size size 3"]
    ) -> Float[np.ndarray, "images feature_width"]:
        """The image encoder's global view before any projection, not normalised.

        Models that score pairs have it too. A ViT's is its class token, a ResNet's the mean of its
        last grid.
        """
        return self._batched(self._programs.image_features, np.asarray(images, np.uint8))

    def score_pairs(
        self, images: ImageLike | Sequence[ImageLike], texts: str | Sequence[str]
    ) -> Float[np.ndarray, "pairs"]:
        """What the critic says of image i with text i: the higher, the likelier a pair.

        For a model with a joint space this is the scaled cosine.

        Raises:
          OSError: for a file that cannot be read or holds no image.
          ValueError: when there are not as many texts as images.
        """
        images, texts = _images(images), _texts(texts)
        _check_pairs(len(images), len(texts))
        return self._batched(self._programs.score_pairs, self._pixels(images), self.tokenize(texts))

    def caption(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        beams: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        progress: bool = False,
    ) -> list[str]:
        """Writes a caption of each image, by the decoder that the perspective `caption` trains.

        Args:
          images: as in `encode_image`.
          beams: captions in hand for an image; 1: at each place the likeliest token is taken.
          temperature: above 0 tokens are drawn in place of that, the more freely the higher; 1 is
            as likely as the model says.
          seed: of these draws; an image's are those of its place in `images`.
          progress: whether to draw a bar, where standard error is a terminal.

        Returns:
          A text an image, as the tokenizer writes it: of most, in lower case.

        Raises:
          OSError: for a file that cannot be read or holds no image.
          UserError: for a model without a decoder, or beams and a temperature that do not go
            together.
        """
        images = _images(images)
        self._check_writes(beams, temperature)
        if not images:
            return []
        size = self._batches.size(len(images))
        with ThreadPoolExecutor(cores()) as pool:
            batches = self._decoded(images, size, pool, progress, "captioning images")
            return self._written(batches, size, beams, temperature, seed)

    def caption_pixels(
        self,
        images: UInt8[np.ndarray, "images size size 3"],
        *,
        beams: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """As `caption`, of images that `preprocess` has brought to size."""
        images = np.asarray(images, np.uint8)
        self._check_writes(beams, temperature)
        if not len(images):
            return []
        size = self._batches.size(len(images))
        starts = range(0, len(images), size)
        batches = ((images[start : start + size],) for start in starts)
        return self._written(batches, size, beams, temperature, seed)

    def caption_losses(
        self,
        images: UInt8[np.ndarray, "images size size 3"],
        token_ids: Int[np.ndarray, "images context"],
    ) -> Float[np.ndarray, "images 2"]:
        """What the decoder loses on image i's caption i: the sum over its tokens, and their number.

        Args:
          images: as `preprocess` brings them to size.
          token_ids: as `tokenize` gives them.

        Raises:
          UserError: for a model without a decoder.
        """
        self._check_writes()
        _check_pairs(len(images), len(token_ids))
        images, token_ids = np.asarray(images, np.uint8), np.asarray(token_ids, np.int32)
        return self._batched(self._programs.caption_losses, images, token_ids)

    def _check_writes(self, beams: int = 1, temperature: float = 0.0) -> None:
        if not self.writes:
            raise UserError(
                "this model has no caption decoder: config.perspectives.caption.weight above 0 "
                "trains one (configs/coca.py)"
            )
        if beams < 1 or not 0 <= temperature < math.inf:
            raise UserError(
                f"beams={beams}, temperature={temperature}: at least one beam, and a temperature "
                "of at least 0"
            )
        if beams > 1 and temperature:
            raise UserError(
                f"beams={beams} find likely captions, temperature={temperature} draws one: give "
                "one of the two"
            )

    def _written(
        self,
        batches: Iterable[tuple[np.ndarray]],
        size: int,
        beams: int,
        temperature: float,
        seed: int,
    ) -> list[str]:
        """Captions of batches of pixels."""

        def with_draws() -> Iterator[tuple[np.ndarray, ...]]:
            first = 0
            for (pixels,) in batches:
                numbers = np.arange(first, first + len(pixels), dtype=np.uint32)
                alike = np.full(len(pixels), temperature, np.float32)
                yield pixels, alike, np.full(len(pixels), seed, np.uint32), numbers
                first += len(pixels)

        write = functools.partial(self._programs.captions, beams=beams, draws=temperature > 0)
        ids = self._batches.over(write, self._variables, with_draws(), size)
        return [self._tokenizer.decode(row) for row in ids]

    def saliency(
        self, images: UInt8[np.ndarray, "images size size 3"], texts: str | Sequence[str]
    ) -> Float[np.ndarray, "images rows columns"]:
        """Where image i speaks for text i: Grad-CAM of their score (arXiv 1610.02391).

        The score is the cosine that `encode_image` and `encode_text` give, or what the critic says.
        `building.evidence_layers` tells which layers it is of; the maps of several are added, and
        each patch has its token's value.

        Args:
          images: as `preprocess` brings them to size.
          texts: as many.

        Returns:
          A value at least 0 for each cell of the grid of patches (of a ResNet: of its last
          features); not normalised. The grid covers `building.seen` pixels of a side.

        Raises:
          ValueError: when there are not as many texts as images.
        """
        images, texts = np.asarray(images, np.uint8), _texts(texts)
        _check_pairs(len(images), len(texts))
        return self._batched(self._programs.saliency, images, self.tokenize(texts))

    def inspect(self, images: UInt8[np.ndarray, "images size size 3"]) -> dict[str, Any]:
        """Where the image encoder's tokens come from.

        Returns:
          "source": int32 [images, patches], the token that each patch ended in (of a ResNet: each
          cell), in row-major order; "sizes": float32 [images, merged]; "importance": float32
          [images, patches], the guidance of the first merge, or None.
        """
        views = self._programs.inspect(
            self._variables, jax.device_put(np.asarray(images, np.uint8))
        )
        patches = building.grid(self.config) ** 2
        if views.source is None:
            source = np.broadcast_to(np.arange(patches, dtype=np.int32), (len(images), patches))
        else:
            source = np.argmax(np.asarray(views.source), axis=1).astype(np.int32)
        importance = None if views.importance is None else np.asarray(views.importance, np.float32)
        return {
            "source": source,
            "sizes": np.asarray(views.sizes, np.float32),
            "importance": importance,
        }

    def guides(
        self, images: UInt8[np.ndarray, "images size size 3"]
    ) -> dict[str, Float[np.ndarray, "images patches"]]:
        """What each way of `models.guidance` says of the patches where tokens are first merged.

        Args:
          images: as `preprocess` brings them to size.

        Returns:
          By name, the importance of each patch, row by row of the grid: the higher, the more; only
          its order counts. With them "both" and the config's own guidance, where it is of two.

        Raises:
          UserError: for an encoder without patch tokens.
        """
        views = self._programs.inspect(
            self._variables, jax.device_put(np.asarray(images, np.uint8))
        )
        if views.guides is None:
            raise UserError("this model has no patch tokens to merge, and so no guidance")
        return {name: np.asarray(values, np.float32) for name, values in views.guides.items()}

    def image_flops(self) -> float:
        """Floating-point operations to embed one image, as XLA counts them before optimisation."""
        size = self.preprocess.image_size
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
        cost = self._programs.embed_pixels.lower(self._variables, image).cost_analysis() or {}
        return float(cost.get("flops", np.nan))

    def frequency_filters(self) -> list[np.ndarray]:
        """The Frequency Stage's learned gains, complex64 [rows, columns//2 + 1, width] a block."""
        encoder = self._variables["params"]["image_encoder"]
        kernels = [
            np.asarray(encoder[f"frequency_{index}"]["filter"])
            for index in range(self.config.model.image.frequency.depth)
        ]
        return [kernel[..., 0] + 1j * kernel[..., 1] for kernel in kernels]

    def _pixels(self, images: list[ImageLike]) -> UInt8[np.ndarray, "images size size 3"]:
        size = self.preprocess.image_size
        pixels = [self.preprocess(image) for image in images]
        return np.array(pixels, np.uint8).reshape(-1, size, size, 3)

    def _decoded(
        self,
        images: list[ImageLike],
        size: int,
        pool: ThreadPoolExecutor,
        progress: bool,
        words: str,
    ) -> Iterator[tuple[np.ndarray]]:
        """Batches of pixels, each decoded when it is asked for."""
        done = iter(track(range(len(images)), words, shown=progress))
        for start in range(0, len(images), size):
            pixels = []
            for image in pool.map(self.preprocess, images[start : start + size]):
                pixels.append(image)
                next(done)
            yield (np.stack(pixels),)
        next(done, None)  # takes the bar away

    def _embedded(self, embed: Callable[..., jax.Array], rows: np.ndarray) -> np.ndarray:
        self._check_joint_space()
        return self._batched(embed, rows)

    def _batched(self, function: Callable[..., jax.Array], *arrays: np.ndarray) -> np.ndarray:
        return self._batches.call(function, self._variables, *arrays)

    def _check_joint_space(self) -> None:
        if self.pairwise:
            raise UserError(
                "this model scores pairs and has no joint space (config.model.critic='concat'): "
                "use score_pairs(images, texts)"
            )


def _check_pairs(images: int, texts: int) -> None:
    if images != texts:
        raise ValueError(f"{images} images and {texts} texts are no pairs")


_SINGLE = (str, bytes, os.PathLike, Image.Image)


def _images(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """Several images, or one, as a list."""
    if isinstance(images, _SINGLE):
        return [images]
    # Rows of one image would pass for images in shades of grey.
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim < 4:
        raise TypeError("pass an array of one image in a list: [array]")
    return list(images)


def _texts(texts: str | Sequence[str]) -> list[str]:
    """Several texts, or one, as a list."""
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, _SINGLE):
        raise TypeError(f"pass a text or a list of texts, not {type(texts).__name__}")
    return list(texts)
