"""What the page asks for, answered from an index, its images and its model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from mlip_jax.core.cores import cores
from mlip_jax.core.errors import UserError
from mlip_jax.inference import Model
from mlip_jax.models import building
from mlip_jax.search import pictures
from mlip_jax.search.collection import Collection, reason
from mlip_jax.search.files import printable
from mlip_jax.search.index import Index
from mlip_jax.search.query import nearest

MOST_TOP = 500
_LONGEST_TEXT = 10_000  # letters; a model's context is far shorter


class Answer(NamedTuple):
    """A response."""

    status: HTTPStatus
    kind: str  # its media type
    content: bytes


class Refusal(Exception):
    """A request that is not answered: the status and a sentence."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Answers:
    """The page's questions. Images are asked for by their row in the index, never by a path.

    Attributes:
      index: what is searched.
      collection: its images.
      model: the one that it was made with.
      top: how many results there are when a request does not say.
      turns: how many images are decoded at a time.
    """

    index: Index
    collection: Collection
    model: Model
    top: int
    # Decoding takes memory: browsers ask for many images at a time.
    turns: threading.BoundedSemaphore = field(
        init=False, default_factory=lambda: threading.BoundedSemaphore(cores())
    )

    def get(self, path: str, values: Mapping[str, str]) -> Answer:
        """Answers GET `path`?`values`.

        Raises:
          Refusal: for what is not there or makes no sense.
        """
        if path == "/about":
            return self._about()
        if path == "/search":
            return self._search(values)
        kind, _, row = path.removeprefix("/").partition("/")
        pages: dict[str, Callable[[int, Mapping[str, str]], Answer]] = {
            "thumbnail": self._thumbnail,
            "square": self._square,
            "saliency": self._saliency,
        }
        if kind not in pages or not (row.isascii() and row.isdecimal() and len(row) < 12):
            raise Refusal(HTTPStatus.NOT_FOUND, "there is no such page")
        if int(row) >= self.index.about.count:
            raise Refusal(HTTPStatus.NOT_FOUND, "the index has no such image")
        with self.turns:
            try:
                return pages[kind](int(row), values)
            except OSError as error:
                sentence = f"the image cannot be read any more: {reason(error)}"
                raise Refusal(HTTPStatus.NOT_FOUND, sentence) from error

    def search_like(self, content: bytes, values: Mapping[str, str]) -> Answer:
        """The images nearest to an encoded one.

        Raises:
          Refusal: when it is none.
        """
        with self.turns:
            try:
                query = self.model.encode_image([content])[0]
            except OSError as error:
                raise Refusal(
                    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                    f"this is no image that can be read: {reason(error)}",
                ) from error
        return self._nearest(query, values)

    def _about(self) -> Answer:
        about = self.index.about
        images = about.images
        return _json(
            {
                "count": about.count,
                "images": printable(images),
                "name": printable(Path(images).name) or images,
                "model": about.model_name(),
                "attribution": self.collection.attribution,
            }
        )

    def _search(self, values: Mapping[str, str]) -> Answer:
        if "like" in values:
            row = _number(values["like"], "like", 0, self.index.about.count - 1)
            return self._nearest(np.asarray(self.index.embeddings[row]), values)
        return self._nearest(self._encoded(_text(values)), values)

    def _encoded(self, text: str) -> Float32[np.ndarray, " width"]:
        try:
            return self.model.encode_text([text])[0]
        except UserError as error:  # a folder of another library's may hold no tokenizer
            raise Refusal(HTTPStatus.BAD_REQUEST, str(error)) from error

    def _nearest(self, query: Float32[np.ndarray, " width"], values: Mapping[str, str]) -> Answer:
        top = _number(values.get("top", str(self.top)), "top", 1, max(MOST_TOP, self.top))
        results = [
            {"row": int(row), "score": float(score), "path": self._place(int(row))}
            for score, row in zip(*nearest(self.index, query, top), strict=True)
        ]
        return _json({"results": results})

    def _place(self, row: int) -> str:
        return printable(self.collection.place(self.index.path(row)))

    def _content(self, row: int) -> bytes:
        return self.collection.read(self.index.path(row))

    def _thumbnail(self, row: int, values: Mapping[str, str]) -> Answer:
        del values
        return Answer(HTTPStatus.OK, "image/jpeg", pictures.thumbnail(self._content(row)))

    def _square(self, row: int, values: Mapping[str, str]) -> Answer:
        del values
        square = pictures.square(self._content(row), self.model.preprocess)
        return Answer(HTTPStatus.OK, "image/jpeg", square)

    def _saliency(self, row: int, values: Mapping[str, str]) -> Answer:
        content = self._content(row)
        pixels = self.model.preprocess(content)
        saliency = self.model.saliency(pixels[None], [_text(values)])[0]
        if not saliency.any():
            return Answer(HTTPStatus.NO_CONTENT, "image/png", b"")
        seen = building.seen(self.model.config) / self.model.config.model.image.image_size
        turn = pictures.left_to_turn(content, self.model.preprocess)
        return Answer(HTTPStatus.OK, "image/png", pictures.heat(saliency, seen, turn))


def _text(values: Mapping[str, str]) -> str:
    text = values.get("text", "").strip()
    if not text:
        raise Refusal(HTTPStatus.BAD_REQUEST, "no words to search for")
    if len(text) > _LONGEST_TEXT:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"more than {_LONGEST_TEXT:,} letters")
    return text


def _number(text: str, name: str, least: int, most: int) -> int:
    digits = text.isascii() and text.isdecimal() and len(text) < 12
    if not digits or not least <= int(text) <= most:
        raise Refusal(
            HTTPStatus.BAD_REQUEST, f"{name}: expected a whole number from {least} to {most}"
        )
    return int(text)


def _json(values: Any) -> Answer:
    return Answer(HTTPStatus.OK, "application/json", json.dumps(values).encode())
