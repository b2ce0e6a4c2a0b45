"""A model as programs call it that are written for open_clip's: tensors of PyTorch in and out.

PyTorch is imported when the first tensor is made, open_clip only to be told of the model.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlip_jax.core import exit_codes, places
from mlip_jax.core.errors import UserError
from mlip_jax.data.images.preprocessing import ImageLike, Preprocessing
from mlip_jax.inference import Model, load

if TYPE_CHECKING:
    import torch

NAME = "mlip_jax"  # of the kind of model, for programs that know several


class TorchModel:
    """What `open_clip.create_model` gives, as far as evaluations ask it.

    The weights stay where JAX has them. Embeddings come back on the device of what was embedded.
    """

    def __init__(self, model: Model) -> None:
        """Takes a model with a joint space."""
        self._model = model

    def encode_image(self, images: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """Embeds images that a `Transform` has prepared.

        Args:
          images: uint8 [images, 3, size, size].
          normalize: ignored: the embeddings, float32 [images, width], are L2-normalised anyway.

        Raises:
          UserError: for images that were prepared otherwise.
        """
        pixels = images.detach().cpu().numpy()
        if pixels.dtype != np.uint8:
            raise UserError(
                f"images of {images.dtype} were not prepared by this model's own transform, which "
                "gives uint8"
            )
        return _tensor(self._model.encode_image_pixels(pixels.transpose(0, 2, 3, 1)), images.device)

    def encode_text(self, token_ids: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """Embeds texts that a `TorchTokenizer` has tokenised.

        Args:
          token_ids: [texts, context].
          normalize: ignored: the embeddings, float32 [texts, width], are L2-normalised anyway.
        """
        ids = token_ids.detach().cpu().numpy()
        return _tensor(self._model.encode_token_ids(ids), token_ids.device)

    def eval(self) -> TorchModel:
        """Does nothing: it is always in evaluation."""
        return self

    def to(self, *_: Any, **__: Any) -> TorchModel:
        """Does nothing: JAX has placed it."""
        return self


class Transform:
    """Brings an image to the pixels that the model takes, uint8 [3, size, size]; picklable."""

    def __init__(self, preprocess: Preprocessing) -> None:
        """Takes the model's own preprocessing."""
        self._preprocess = preprocess

    def __call__(self, image: ImageLike) -> torch.Tensor:
        """Prepares one image."""
        return _tensor(self._preprocess(image).transpose(2, 0, 1))


class TorchTokenizer:
    """Texts to token ids, int64 [texts, context]."""

    def __init__(self, model: Model) -> None:
        """Takes the model whose tokenizer it is."""
        self._tokenize = model.tokenize

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Tokenises a text or several."""
        return _tensor(self._tokenize(texts).astype(np.int64))


@functools.lru_cache(maxsize=1)  # programs open the same model for each dataset
def opened(folder: str) -> tuple[TorchModel, Transform, TorchTokenizer]:
    """What `mlip_jax.load` finds in a folder, its transform and its tokenizer.

    Raises:
      UserError: if the folder holds no model, or one that scores pairs and embeds nothing.
    """
    model = load(folder)
    if model.pairwise:
        raise UserError(
            f"{folder}: its model scores pairs and has no joint space "
            "(config.model.critic='concat')"
        )
    return TorchModel(model), Transform(model.preprocess), TorchTokenizer(model)


@contextlib.contextmanager
def known_to_open_clip() -> Iterator[None]:
    """Inside, open_clip makes models of the name "mlip_jax" too.

    `open_clip.create_model_and_transforms("mlip_jax", pretrained=FOLDER)` opens a folder, and
    `open_clip.get_tokenizer("mlip_jax")` gives the tokenizer of the one that was opened last.
    """
    import open_clip

    create, tokenizer_of = open_clip.create_model_and_transforms, open_clip.get_tokenizer
    last = ""

    def create_model_and_transforms(
        model_name: str, pretrained: Any = None, *args: Any, **options: Any
    ) -> Any:
        nonlocal last
        if model_name != NAME:
            return create(model_name, pretrained, *args, **options)
        last = str(pretrained)
        model, transform, _ = opened(last)
        return model, transform, transform

    def get_tokenizer(model_name: str, *args: Any, **options: Any) -> Any:
        return opened(last)[2] if model_name == NAME else tokenizer_of(model_name, *args, **options)

    open_clip.create_model_and_transforms = create_model_and_transforms
    open_clip.get_tokenizer = get_tokenizer
    try:
        yield
    finally:
        open_clip.create_model_and_transforms, open_clip.get_tokenizer = create, tokenizer_of


def run(act: Callable[[Sequence[str]], None]) -> int:
    """Calls another program's command with the arguments of this one.

    Returns:
      The exit code, as of this package's own command.
    """
    # JAX warns of them. The processes by which PyTorch loads data decode and tokenise alone.
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)

    def called() -> int:
        with places.named_in_errors():
            act(sys.argv[1:])
        return 0

    return exit_codes.of(called)


def _tensor(values: np.ndarray, device: Any = "cpu") -> torch.Tensor:
    import torch

    # A copy: JAX's arrays may not be written to, as PyTorch wants to be able to.
    return torch.from_numpy(np.array(values)).to(device)
