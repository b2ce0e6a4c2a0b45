"""Batches for training and evaluation.

What stands at a position of the training stream is a function of (seed, position) alone: of the
number of processes, hosts and workers, and of the step that a run starts at, nothing depends.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from mlip_jax.core.cores import cores
from mlip_jax.core.errors import UserError
from mlip_jax.core.schema import views_of
from mlip_jax.data.batches.ahead import ReadAhead
from mlip_jax.data.batches.order import order, windowed_orders
from mlip_jax.data.batches.shared_memory import Lender, Lent, Receiver
from mlip_jax.data.batches.teaching import IMAGE, NO_INPUTS, TeacherInputs
from mlip_jax.data.batches.workers import BATCHES_IN_FLIGHT, end_with_parent, worker_count
from mlip_jax.data.images.augment import augment, by_pillow, short_side, trim
from mlip_jax.data.images.fast_decoding import decode_pixels
from mlip_jax.data.images.preprocessing import Preprocessing, decode, flatten
from mlip_jax.data.sets.kept import random_of_view, same_views
from mlip_jax.data.sets.mixtures import datasets_of, stand_ins
from mlip_jax.data.sets.one_image import bits_of
from mlip_jax.data.sets.records import InShards, Record, Source
from mlip_jax.data.text import captions
from mlip_jax.data.text.tokenizer import Tokenizer

_BUFFERED = 2  # batches of a thread
_MAX_THREADS = 8  # of an evaluation
_LARGEST = 2**31 - 1  # what an int32 holds
_MAX_REPLACEMENTS = 100  # unreadable images in a row
_KEPT_BYTES = 256 * 2**20  # decoded images a process, when the whole dataset fits
_LAST_WISHES_SECONDS = 30.0
_NAMES_SHOWN = 3
# Token ids of thousands of captions are sent sooner than shared memory is opened and closed.
_SMALL_ARRAYS_ARE_COPIED = grain.experimental.DatasetOptions(min_shm_size=2**20)


def train_batches(
    config: ConfigDict,
    source: Source,
    tokenizer: Tokenizer,
    *,
    start_step: int,
    rows: Sequence[int] | np.ndarray | None = None,
    teachers: TeacherInputs = NO_INPUTS,
) -> Generator[dict[str, np.ndarray]]:
    """The training batches of one process, from a step on, without end.

    The source is shuffled anew in each epoch, and so is each dataset of a mixture. Close the
    iterator, or use it up to the end of the program, to stop its workers.

    Args:
      config: the run's config: batch_size, seed, data, model.image.image_size,
        model.text.context_length and the weights of the perspectives of one modality are used.
      source: what to train on.
      tokenizer: turns captions into ids.
      start_step: the step of the first batch: 0, or where a resumed run goes on.
      rows: b rows of the global batch, those that this process feeds; None: all.
      teachers: what else is made of each example.

    Yields:
      "image": uint8 [b, image_size, image_size, 3];
      "token_ids": int32 [b, context_length];
      "record": int32 [b], the index of the record that stands in each row, or, where nobody has
        looked for equal images before, 31 bits of its image;
      "skipped": int32 [b], the index of the record whose image could not be read and for which the
      next readable record stands; -1 where all is well;
      "image_2", where config.perspectives.augmented_image has a weight: as "image", another view of
      the same images, mirrored or not on its own;
      "token_ids_2", where config.perspectives.other_caption has a weight: as "token_ids", another
      caption of the same images where they have one, with left and right as in "image";
      and by the keys of `teachers`: uint8 [b, size, size, 3], the view of "image" in another size;
      int32 [b, length], the caption of "token_ids" by another tokenizer; float16 [b, width], what
      is kept of the view and the caption.

    Raises:
      UserError: when the source is empty, or too many images in a row cannot be read.
    """
    if not len(source):
        raise UserError(f"the training set {source.name!r} is empty")
    process_rows = tuple(range(config.batch_size) if rows is None else map(int, rows))
    batch_size = config.batch_size
    examples = order(source, config.seed, batch_size).random_map(Example(config, source, teachers))
    workers = workers_for(config, len(process_rows), teachers)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its flags; outside of absl's main nobody parses
    pieces = BATCHES_IN_FLIGHT + 1 if workers else 0
    lenders = {size: Lender(pieces) for size in teachers.sizes.values()}
    lenders[config.model.image.image_size] = Lender(pieces * views_of(config, "augmented_image"))
    batch_source = _Batches(
        examples,
        batch_size,
        process_rows,
        tokenizer,
        config.model.text.context_length,
        lenders,
        teachers,
    )
    batches = (
        grain.MapDataset.source(batch_source)
        .slice(slice(start_step, None))
        # An element is a whole batch: a deep buffer of them would be large, and late. A worker has
        # one ready and one in the making, in one thread.
        .to_iter_dataset(grain.ReadOptions(0, 0) if workers else grain.ReadOptions(1, _BUFFERED))
    )
    batches = grain.experimental.WithOptionsIterDataset(batches, _SMALL_ARRAYS_ARE_COPIED)
    datasets = datasets_of(source)
    remote = [
        (dataset, windowed)
        for number, windowed in windowed_orders(source, config.seed, batch_size)
        if isinstance(dataset := datasets[number], InShards) and dataset.is_remote
    ]
    return _until_closed(
        batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1),
            worker_init_fn=_outlive_nobody,
        ),
        ReadAhead(
            remote, process_rows, start_step, BATCHES_IN_FLIGHT * workers if workers else _BUFFERED
        ),
    )


def batch_bytes(config: ConfigDict, rows: int, teachers: TeacherInputs = NO_INPUTS) -> int:
    """The bytes of the images of a batch of this many rows, all views."""
    own = views_of(config, "augmented_image") * config.model.image.image_size**2
    return rows * 3 * (own + sum(size**2 for size in teachers.sizes.values()))


def workers_for(config: ConfigDict, rows: int, teachers: TeacherInputs = NO_INPUTS) -> int:
    """How many workers make batches of this many rows.

    Raises:
      UserError: when the shared memory is too small for config.data.workers.
    """
    return worker_count(config.data.workers, batch_bytes(config, rows, teachers))


def _until_closed(
    batches: grain.IterDataset, shards: ReadAhead
) -> Generator[dict[str, np.ndarray]]:
    iterator, receiver = iter(batches), Receiver()
    shards.start()
    try:
        for batch in iterator:
            shards.advance()
            yield {
                key: receiver.images(value) if isinstance(value, Lent) else value
                for key, value in batch.items()
            }
            del batch  # held while the next is waited for, it would not be given back
    finally:
        shards.end()
        iterator.close()


_Decoded = Image.Image | np.ndarray  # RGB, uint8 [height, width, 3]


class Example:
    """From the index of a record to a view of its image and a caption."""

    def __init__(self, config: ConfigDict, source: Source, teachers: TeacherInputs) -> None:
        self._source = source
        self._teachers = teachers
        self._views_kept = same_views(list(teachers.kept.values()))
        self._augment = config.data.augment.copy_and_resolve_references()
        self._caption = config.data.caption.to_dict()
        self._size = config.model.image.image_size
        self._exact = config.data.decode == "exact"
        self._upright = config.data.orientation == "exif"
        self._by_pillow = self._exact or by_pillow(self._augment)
        self._trimmed = self._augment.trim >= 1  # without exception, and so once for all visits
        largest = teachers.largest(self._size)
        self._at_least = 0 if self._exact else short_side(self._augment, largest)
        self._two_images = config.perspectives.augmented_image.weight > 0
        self._two_captions = config.perspectives.other_caption.weight > 0
        self._by_content = any(
            isinstance(dataset, InShards) and dataset.by_content for dataset in datasets_of(source)
        )
        self._cache: dict[int, tuple[Record, _Decoded, int]] = {}

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        index = int(index)
        record, image, number, place = self._readable(index)
        # The same draws in the same order, whether second views follow or not, and in every size.
        chance, view = rng, 0
        if self._views_kept:
            view = int(rng.integers(self._views_kept.views))
            assert record.origin is not None  # see `TeacherInputs.said`
            chance = random_of_view(self._views_kept.seed, record.origin, view)
        views, flipped = self._views(image, chance)
        words = record.captions, record.tags, self._caption, rng
        texts: tuple[str, ...]
        texts = captions.compose_two(*words) if self._two_captions else (captions.compose(*words),)
        said = self._teachers.said(record, view, texts[0], flipped)
        if flipped:
            texts = tuple(captions.swap_sides(text) for text in texts)
        skipped = -1 if place == index else index
        example: dict[str, Any] = {**views, **said, "record": number, "skipped": skipped}
        example |= zip(("caption", "caption_2"), texts, strict=False)
        if self._two_images:
            example["image_2"], _ = self._view(image, rng, self._size)
        return example

    def kept_views(
        self, index: int, seed: int, count: int
    ) -> tuple[Record, list[dict[str, np.ndarray]]]:
        """A record, and its first views of `data.sets.kept` in every size, by the batch's keys.

        Raises:
          OSError: when the image cannot be read.
        """
        record, image, _ = self._decoded(index)
        assert record.origin is not None  # of a prepared dataset
        chances = (random_of_view(seed, record.origin, view) for view in range(count))
        return record, [self._views(image, chance)[0] for chance in chances]

    def _views(
        self, image: _Decoded, rng: np.random.Generator
    ) -> tuple[dict[str, np.ndarray], bool]:
        sizes = self._teachers.sizes
        at_start = copy.deepcopy(rng) if sizes else rng
        pixels, flipped = self._view(image, rng, self._size)
        others = {
            key: self._view(image, copy.deepcopy(at_start), size)[0] for key, size in sizes.items()
        }
        return {IMAGE: pixels} | others, flipped

    def _view(
        self, image: _Decoded, rng: np.random.Generator, size: int
    ) -> tuple[np.ndarray, bool]:
        return augment(image, self._augment, size, rng, exact=self._exact, trimmed=self._trimmed)

    def _readable(self, index: int) -> tuple[Record, _Decoded, int, int]:
        """The record, or another of its dataset whose image can be read.

        With its number by which it is told from others, and its index.
        """
        first_error = None
        tried = 0
        for place in stand_ins(self._source, index, _MAX_REPLACEMENTS):
            tried += 1
            try:
                return *self._decoded(place), place
            except OSError as error:
                first_error = first_error or error
        raise UserError(
            f"none of {tried} images in a row of {self._source.name!r} can be read; the first: "
            f"{self._source.name_of(index)} ({first_error})"
        )

    def _decoded(self, index: int) -> tuple[Record, _Decoded, int]:
        if index in self._cache:
            return self._cache[index]
        record = self._source[index]
        if self._by_pillow:
            picture = decode(record.image, at_least=self._at_least, upright=self._upright)
            picture = flatten(picture, "white")
            picture = trim(picture) if self._trimmed else picture
            image: _Decoded = picture
            area = picture.width * picture.height
        else:
            pixels = decode_pixels(record.image, self._at_least, upright=self._upright)
            image, area = pixels, pixels.shape[0] * pixels.shape[1]
        # Of equal bits are two of a batch of 10,000 images in one of 40 batches.
        number = bits_of(record.image) & _LARGEST if self._by_content else index
        record = replace(record, image=b"")
        # A small dataset is decoded once, which about halves the work of its later epochs.
        if 3 * area * len(self._source) <= _KEPT_BYTES:
            self._cache[index] = record, image.copy(), number
        return record, image, number


class _Batches:
    """The rows that one process feeds of each global batch, as arrays."""

    def __init__(
        self,
        examples: grain.MapDataset,
        batch_size: int,
        rows: tuple[int, ...],
        tokenizer: Tokenizer,
        context_length: int,
        lenders: Mapping[int, Lender],
        teachers: TeacherInputs,
    ) -> None:
        self._examples = examples
        self._batch_size = batch_size
        self._rows = rows
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._lenders = lenders  # by the side of an image: what one lends is all of one size
        self._teachers = teachers

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> dict[str, np.ndarray | Lent]:
        images: dict[str, np.ndarray] = {}
        batch: dict[str, np.ndarray | Lent] = {}
        values_by_key: dict[str, list[Any]] = {}
        for row, place in enumerate(self._rows):
            example = self._examples[step * self._batch_size + place]
            for key, value in example.items():
                if not key.startswith("image"):
                    values_by_key.setdefault(key, []).append(value)
                    continue
                if key not in images:
                    shape = (len(self._rows), *value.shape)
                    images[key], batch[key] = self._lenders[len(value)].empty(shape)
                images[key][row] = value  # at once, while it is in the processor's caches
        for key in ("record", "skipped"):
            batch[key] = np.array(values_by_key[key], np.int32)
        for view in ("", "_2"):
            if f"caption{view}" in values_by_key:  # tokenised together
                ids = self._tokenizer.encode(values_by_key[f"caption{view}"], self._context_length)
                batch[f"token_ids{view}"] = ids
        for key in (f"{kept}_{side}" for kept in self._teachers.kept for side in ("image", "text")):
            batch[key] = np.stack(values_by_key[key])
        return batch | self._teachers.token_ids(values_by_key["caption"])


def _outlive_nobody(worker_index: int, worker_count: int) -> None:
    """In a worker: leave signals to the parent, and end when it does, however it ends."""
    del worker_index, worker_count
    # Schedulers and Ctrl-C signal the whole group, while the parent still wants its last batch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)
    end_with_parent()


def _end_soon(signal_number: int, frame: Any) -> None:
    del signal_number, frame
    timer = threading.Timer(_LAST_WISHES_SECONDS, os._exit, (0,))
    timer.daemon = True
    timer.start()


class SkipCounter:
    """Counts the images that could not be read, each once, against the share that is allowed."""

    def __init__(self, source: Source, max_share: float) -> None:
        self._source = source
        self._max_share = max_share
        self._indices: set[int] = set()

    def update(self, skipped: np.ndarray) -> None:
        """Takes a batch's "skipped".

        Raises:
          UserError: when more than the share of the dataset is unreadable; it names some of them.
        """
        self._indices.update(int(index) for index in skipped[skipped >= 0])
        if len(self._indices) > self._max_share * len(self._source):
            raise UserError(
                f"{self.summary()}; more than config.data.max_skipped_share={self._max_share:g} "
                "allows"
            )

    @property
    def count(self) -> int:
        """Different unreadable images so far."""
        return len(self._indices)

    def summary(self) -> str:
        """One line: how many of how many, and the names of the first few; "" for none."""
        if not self._indices:
            return ""
        first = sorted(self._indices)[:_NAMES_SHOWN]
        names = ", ".join(self._source.name_of(index) for index in first)
        more = ", ..." if len(self._indices) > len(first) else ""
        total = len(self._source)
        share = len(self._indices) / total
        return f"{len(self._indices)} of {total} images ({share:.2%}) cannot be read: {names}{more}"


class EvaluationBatch(NamedTuple):
    """Images of a fixed number, with what is known of them; the last batch is filled up."""

    images: np.ndarray  # uint8 [batch, image_size, image_size, 3]; zeros where not readable
    indices: np.ndarray  # int64 [batch], into the source; -1 where the batch is filled up
    readable: np.ndarray  # bool [batch]; rows to count
    captions: list[tuple[str, ...]]  # () where not readable
    labels: np.ndarray  # int32 [batch]; -1 where there is none
    digests: list[bytes]  # equal for images of equal bytes; b"" where not readable
    unreadable: list[str]  # names of the images that could not be read


class _Loaded(NamedTuple):
    image: np.ndarray
    captions: tuple[str, ...]
    label: int
    digest: bytes


def evaluation_batches(
    source: Source, preprocessing: Preprocessing, batch_size: int
) -> Iterator[EvaluationBatch]:
    """All of a source once, in order, decoded by threads one batch ahead."""

    def load(index: int) -> _Loaded | str:
        try:
            record = source[index]
            digest = blake2b(record.image, digest_size=16).digest()
            return _Loaded(preprocessing(record.image), record.captions, record.label, digest)
        except OSError as error:
            return f"{source.name_of(index)} ({error})"

    starts = range(0, len(source), batch_size)
    pool = ThreadPoolExecutor(min(_MAX_THREADS, cores()))
    try:
        ahead = None
        for start in starts:
            loading = pool.map(load, range(start, min(start + batch_size, len(source))))
            if ahead is not None:
                yield _evaluation_batch(*ahead, preprocessing.image_size, batch_size)
            ahead = start, loading
        if ahead is not None:
            yield _evaluation_batch(*ahead, preprocessing.image_size, batch_size)
    finally:  # without a wait for a disk that does not answer
        pool.shutdown(wait=False, cancel_futures=True)


def _evaluation_batch(
    start: int, loading: Iterator[_Loaded | str], size: int, batch_size: int
) -> EvaluationBatch:
    batch = EvaluationBatch(
        images=np.zeros((batch_size, size, size, 3), np.uint8),
        indices=np.full(batch_size, -1, np.int64),
        readable=np.zeros(batch_size, bool),
        captions=[()] * batch_size,
        labels=np.full(batch_size, -1, np.int32),
        digests=[b""] * batch_size,
        unreadable=[],
    )
    for row, loaded in enumerate(loading):
        batch.indices[row] = start + row
        if isinstance(loaded, str):
            batch.unreadable.append(loaded)
            continue
        batch.images[row] = loaded.image
        batch.readable[row] = True
        batch.captions[row] = loaded.captions
        batch.labels[row] = loaded.label
        batch.digests[row] = loaded.digest
    return batch
