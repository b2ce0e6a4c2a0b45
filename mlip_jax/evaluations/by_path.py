"""Evaluations that are files of examples, with their images beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlip_jax.core import places
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import parse_json, read_file, read_json
from mlip_jax.data.sets.files import CaptionSource, ImageFiles, find_images
from mlip_jax.data.sets.splits import Choice
from mlip_jax.evaluations.sets import EmbeddedSet, Sets, embed_source

# Where the images lie, from the folder that is named, or else the file's own.
_FOLDERS = (".", "images", "val2017")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def split_spec(spec: str) -> tuple[Path, Path]:
    """The file of a spec, and the folder of its images: the one after an "@", or the file's."""
    path, _, folder = spec.partition("@")
    file = places.local(path).expanduser()
    return file, places.local(folder).expanduser() if folder else file.parent


def read_values(file: Path) -> Iterator[tuple[str, Any]]:
    """The values of FILE.jsonl, one a line, or of the object or the list of a JSON file.

    Yields:
      The place of each, for messages, and the value.

    Raises:
      UserError: when the file cannot be read.
    """
    if file.suffix != ".jsonl":
        values = read_json(file, (dict, list))
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            yield f"{file}: [{key}]", value
        return
    try:
        content = read_file(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            yield f"{file}:{number}", parse_json(line, f"{file}:{number}")


def named_images(folder: Path, names: Sequence[str]) -> ImageFiles:
    """Images by name: files there, in images/ or in val2017/; of names without suffix, with one."""
    suffixes = ("",) if any(Path(name).suffix for name in names) else _SUFFIXES
    return find_images(
        [
            (folder / below, [f"{name}{suffix}" for name in names])
            for below in _FOLDERS
            for suffix in suffixes
        ]
    )


def embed_images(sets: Sets, name: str, images: ImageFiles, count: int) -> EmbeddedSet:
    """Some images, without captions, as the model embeds them.

    Raises:
      UserError: when too many images cannot be read.
      RunError: for NaN or infinity among the embeddings.
    """
    config = sets.config
    return embed_source(
        sets.model,
        CaptionSource(name, Choice("test", ("test",)), images, [("",)] * count),
        name,
        config.evaluation.batch_size,
        max_skipped_share=config.data.max_skipped_share,
        progress=sets.progress,
    )
