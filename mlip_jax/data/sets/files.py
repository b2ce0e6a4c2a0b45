"""What datasets of the user's files have in common: where images lie, and what is said about them.

Whether an image exists is found out when it is read: there may be millions.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int, Int8

from mlip_jax.core.files import read_file
from mlip_jax.core.texts import shown, whole
from mlip_jax.data.sets.records import Record, Skipped
from mlip_jax.data.sets.splits import Choice
from mlip_jax.data.text.captions import usable

# Of the last three Pillow reads none by itself: such files count as unreadable images, and are not
# passed over in silence.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
    *(".heic", ".heif", ".jxl"),
)
_PROBED = 16  # images that are looked for in each place where they may lie


def is_hidden(path: str) -> bool:
    """Whether a file or a folder that it lies in is hidden, by its name.

    Jupyter, macOS and others put copies and attributes there under the names of the images:
    `.ipynb_checkpoints`, `._1.jpg`, `__MACOSX`.

    Args:
      path: relative to the folder that is asked for, which may be hidden itself; with "/".
    """
    parts = path.split("/")
    return any(
        part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts
    )


def files_below(folder: Path) -> list[str]:
    """What lies in a folder and anywhere below it but folders, sorted by folder; nothing hidden.

    Links to folders are not followed, and folders that cannot be read are passed over. The depth
    does not matter.

    Returns:
      Paths from the folder on, with "/".
    """
    files: list[str] = []
    waiting = [""]
    while waiting:
        above = waiting.pop()
        with contextlib.suppress(OSError), os.scandir(os.path.join(folder, above)) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{above}{entry.name}/")
                else:
                    files.append(f"{above}{entry.name}")
    return sorted(files, key=lambda file: file.split("/"))


class Images(Protocol):
    """Encoded images by index, cheap to pickle."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """An image file's content. Raises OSError when it cannot be read."""

    def name(self, index: int) -> str:
        """Its path, for errors and reports."""


class ImageFiles:
    """Images that are files below one folder."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        """Takes `files` relative to `folder`."""
        self._folder = folder
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        """The file's content."""
        return read_file(self._folder / self._files[index])

    def name(self, index: int) -> str:
        """The file's path, in one line that can be printed."""
        return shown(str(self._folder / self._files[index]))


class ImageSource(ABC):
    """Images, each with the captions and the label of `_captions_and_label`."""

    attribution = ""

    def __init__(
        self,
        name: str,
        choice: Choice,
        images: Images,
        class_names: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        self.name = whole(name)
        self.split, self.parts = choice
        self.class_names = class_names
        self.notes = notes
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        captions, label = self._captions_and_label(index)
        place = self._place(index)
        return Record(self._images.read(place), captions, (), label, self._images.name(place))

    def name_of(self, index: int) -> str:
        """The image's path."""
        return self._images.name(self._place(index))

    def captions(self) -> Iterator[str]:
        """Every caption of the split."""
        for index in range(len(self)):
            yield from filter(None, self._captions_and_label(index)[0])

    def _place(self, index: int) -> int:
        """Among the images."""
        return index

    @abstractmethod
    def _captions_and_label(self, index: int) -> tuple[tuple[str, ...], int]:
        """Captions and label."""


class CaptionSource(ImageSource):
    """Images with captions of their own, held in memory."""

    def __init__(
        self,
        name: str,
        choice: Choice,
        images: Images,
        captions: Iterable[tuple[str, ...]],
        notes: tuple[str, ...] = (),
    ) -> None:
        """Takes one entry an image in `captions`, which hold no line breaks."""
        super().__init__(name, choice, images, notes=notes)
        # A text an image takes half of the memory that a tuple of texts takes.
        self._captions = ["\n".join(texts) for texts in captions]

    def _captions_and_label(self, index: int) -> tuple[tuple[str, ...], int]:
        return tuple(self._captions[index].split("\n")), -1


class ClassSource(ImageSource):
    """Images of one class each, whose name is the caption."""

    def __init__(
        self,
        name: str,
        choice: Choice,
        images: Images,
        labels: Int[np.ndarray, " images"],
        class_names: tuple[str, ...],
        *,
        cleaning: str,
        max_skipped_share: float,
    ) -> None:
        """Leaves out images whose class's name is no caption after the cleaning.

        Raises:
          UserError: when these are more than `max_skipped_share` of all.
        """
        super().__init__(name, choice, images, tuple(map(whole, class_names)))
        self._captions = [usable([name], cleaning) for name in class_names]
        has_caption = np.array([bool(texts) for texts in self._captions], bool)[labels]
        self._with_caption = np.flatnonzero(has_caption)
        self._labels = labels[self._with_caption].astype(np.int32)
        skipped = Skipped("images", cleaning)
        for index in np.flatnonzero(~has_caption):
            skipped.add(images.name(int(index)), [class_names[labels[index]]])
        self.notes = skipped.notes(len(self._with_caption), max_skipped_share)
        self.notes += _mended(class_names, cleaning)

    def __len__(self) -> int:
        return len(self._with_caption)

    def _place(self, index: int) -> int:
        return int(self._with_caption[index])

    def _captions_and_label(self, index: int) -> tuple[tuple[str, ...], int]:
        label = int(self._labels[index])
        return self._captions[label], label


class MultiLabelSource(ImageSource):
    """Images of any number of classes each; the names of those that are present are captions."""

    def __init__(
        self,
        name: str,
        choice: Choice,
        images: Images,
        targets: Int8[np.ndarray, "images classes"],
        class_names: tuple[str, ...],
        cleaning: str,
    ) -> None:
        """Takes `targets` as `targets()` gives them."""
        notes = _mended(class_names, cleaning)
        super().__init__(name, choice, images, tuple(map(whole, class_names)), notes)
        self._targets = targets
        self._cleaning = cleaning

    def targets(self) -> Int8[np.ndarray, "images classes"]:
        """1 where an image shows a class, -1 where not, 0 where too difficult to count."""
        return self._targets

    def _captions_and_label(self, index: int) -> tuple[tuple[str, ...], int]:
        return present_names(self._targets[index], self.class_names, self._cleaning), -1


def _mended(class_names: Iterable[str], cleaning: str) -> tuple[str, ...]:
    """A sentence about those that UTF-8 cannot hold, such as folders of another encoding."""
    mended = Skipped("class names", cleaning)
    for name in class_names:
        mended.mend(shown(name), [name])
    return mended.notes(0, 1.0)


def present_names(
    targets: Int8[np.ndarray, " classes"], class_names: Sequence[str], cleaning: str
) -> tuple[str, ...]:
    """The captions of an image with these targets: the classes' names, or "" where none is left.

    Such an image must not be left out: it counts against every class.
    """
    names = (class_names[index] for index in np.flatnonzero(targets == 1).tolist())
    return usable(names, cleaning) or ("",)


def find_images(candidates: Sequence[tuple[Path, list[str]]]) -> ImageFiles:
    """Images in the first of several places where one of the first few lies; else in the first.

    Args:
      candidates: a folder, and the files relative to it.
    """
    for folder, files in candidates:
        if any(os.path.isfile(folder / file) for file in files[:_PROBED]):
            return ImageFiles(folder, files)
    return ImageFiles(*candidates[0])
