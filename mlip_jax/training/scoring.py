"""What a model says of each pair of an input, and which pairs are kept: `prepare --score=FOLDER`.

The score of a pair is the cosine of image and caption, as in CLIP-filtered datasets (LAION-400M,
arXiv 2111.02114; DataComp, arXiv 2304.14108). Pairs are ranked, not images: an image keeps those of
its captions that are among the best. Near-duplicates are found exactly, by comparing each image
with all better ones that are kept so far, in blocks; `data.prepare.scored` has the format.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float16, Float64, Int64

from mlip_jax.core import places
from mlip_jax.core.cores import cores
from mlip_jax.core.errors import RunError, UserError
from mlip_jax.core.files import whole_file
from mlip_jax.core.progress import track
from mlip_jax.data.images.limits import UnreadableImage
from mlip_jax.data.prepare import scored
from mlip_jax.data.prepare.by_image import ByImage
from mlip_jax.data.prepare.make import DRAFTS, SCORE_DRAFTS, Piece
from mlip_jax.data.prepare.pool import pieces
from mlip_jax.data.prepare.readers import Broken, InputRecord
from mlip_jax.data.prepare.scored import Choice, Scored
from mlip_jax.data.sets.shards import SCORES
from mlip_jax.evaluations.scores import on_grid
from mlip_jax.inference import Model
from mlip_jax.search.identity import digest
from mlip_jax.training.looking import Shown, look
from mlip_jax.training.teachers import load_teacher

TRAIN = "train"  # the split that is chosen from; of others everything stays
_DIGITS = 5  # of a score: what is beyond is rounding, which may differ between machines
_PAIRS, _IMAGES = 1024, 8192  # that are compared at a time
_ROUNDING = 1e-5  # of a cosine of kept embeddings
_DECILES = range(10, 100, 20)


@dataclass(frozen=True)
class Scorer:
    """A model that scores pairs, and what is kept of them.

    Attributes:
      model: which scores.
      identity: the model's, whatever its place.
      keep: the share of the training pairs.
      near: the cosine from which on images are near-duplicates; None: none are.
    """

    model: Model
    identity: str
    keep: float
    near: float | None

    @property
    def job(self) -> dict[str, Any]:
        """What the prepared dataset depends on besides its source."""
        return {"score": self.identity, "keep": self.keep, "near_duplicates": self.near}

    def choose(self, reader: ByImage, folder: Path, records: int) -> Scored:
        """The input without the pairs that are not kept; all are scored first.

        A run that was stopped goes on with the pieces that it has not finished, and a finished
        one is not scored again.

        Args:
          reader: the input.
          folder: of the dataset, where it says what it has done.
          records: that are noted together.

        Raises:
          UserError: for an input without captions, or without any in the training split to choose
            from.
          RunError: for NaN or infinity among the embeddings.
        """
        last, walk = reader.again(), reader.again()
        sha256 = hashlib.sha256()
        for piece in pieces(reader, records):
            sha256.update(f"{piece.name} {piece.digest}\n".encode())
        everything = sha256.hexdigest()
        choices = scored.read_choices(folder, everything)
        if choices is None:
            parts = self._score_all(walk, folder, records)
            choices = {split: self._chosen(split, each) for split, each in parts.items()}
            scored.write_choices(folder, everything, choices)
        return Scored(last, choices, tuple(self._sentences(choices)))

    def _score_all(self, reader: ByImage, folder: Path, records: int) -> dict[str, _Part]:
        """The scores of each split."""
        drafts = folder / DRAFTS / SCORE_DRAFTS
        drafts.mkdir(parents=True, exist_ok=True)
        parts: dict[str, _Part] = {}
        total = reader.total()
        with ThreadPoolExecutor(cores()) as pool:
            todo = track(
                pieces(reader, records), "scoring", -(-total // records) if total else None
            )
            for piece in todo:
                path = drafts / f"{piece.name}.npz"
                arrays = scored.load(path, piece.digest)
                if arrays is None or self._lacks_images(path, piece.split, len(arrays["captions"])):
                    arrays, images = self._score(reader, piece, pool)
                    if images is not None:  # in a file of its own, which need not be read whole
                        file = _images_of(path)
                        with whole_file(file) as draft, draft.open("wb") as stream:
                            np.save(stream, images, allow_pickle=False)
                    scored.save(path, piece.digest, arrays)
                part = parts.setdefault(piece.split, _Part())
                part.captions.append(arrays["captions"])
                part.scores.append(arrays["scores"])
                part.files.append(path)
        if not any(len(scores) for part in parts.values() for scores in part.scores):
            places.remove(drafts)  # nothing to go on with
            raise UserError("--score: the source has no captions, of images that can be read")
        train = parts.get(TRAIN, _Part())
        if (self.keep < 1 or self.near) and not any(map(len, train.scores)):
            places.remove(drafts)
            raise UserError(
                "--keep and --near-duplicates choose from the split train, and the source has no "
                "captions in it"
            )
        return parts

    def _lacks_images(self, path: Path, split: str, records: int) -> bool:
        """Whether near-duplicates are looked for by embeddings that are not there, or cut off."""
        if not self.near or split != TRAIN:
            return False
        # What a damaged file gives is a matter of numpy: ValueError, EOFError, SyntaxError.
        with contextlib.suppress(Exception):
            images = np.load(_images_of(path), mmap_mode="r", allow_pickle=False)
            return images.dtype != np.float16 or images.ndim != 2 or len(images) != records
        return True

    def _score(
        self, reader: ByImage, piece: Piece, pool: ThreadPoolExecutor
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Of a piece, how many captions of each record are scored, the scores, and embeddings."""
        counts: list[int] = []
        scores: list[np.ndarray] = [np.zeros(0, np.float32)]
        embeddings: list[np.ndarray] = []
        for shown, images, texts in look(self.model, reader.read(piece.refs), self._shown, pool):
            some = [len(captions) for _, captions in shown]
            counts += some
            has_image = np.array([bool(pixels) for pixels, _ in shown])
            of_image = np.repeat(np.cumsum(has_image) - 1, some)
            cosines = np.einsum("pe,pe->p", images[of_image], texts)
            if not np.isfinite(cosines).all():
                raise RunError(f"--score: the model {self.identity[:12]} gives NaN or infinity")
            scores.append(np.round(cosines, _DIGITS).astype(np.float32))
            if self.near and piece.split == TRAIN:
                rows = np.zeros((len(shown), images.shape[1]), np.float16)
                rows[has_image] = images
                embeddings.append(rows)
        arrays = {"captions": np.array(counts, np.int32), "scores": np.concatenate(scores)}
        return arrays, np.concatenate(embeddings) if embeddings else None

    def _shown(self, record: InputRecord | Broken) -> Shown:
        """Nothing of a record without captions, or whose image `prepare` will leave out."""
        if isinstance(record, Broken) or not record.example.captions:
            return [], []
        try:
            return [self.model.preprocess(record.example.image)], record.example.captions
        except UnreadableImage:
            return [], []

    def _chosen(self, split: str, part: _Part) -> Choice:
        captions, scores = np.concatenate(part.captions), np.concatenate(part.scores)
        repeats = np.zeros(len(captions), bool)
        if split != TRAIN or not len(scores):
            return Choice(captions, scores, np.ones(len(scores), bool), repeats)
        # Of equal scores the first; numpy's order is stable.
        order = np.argsort(-scores, kind="stable")
        quota = max(1, round(self.keep * len(scores)))
        kept = np.zeros(len(scores), bool)
        if not self.near:
            kept[order[:quota]] = True
            return Choice(captions, scores, kept, repeats)
        record = np.repeat(np.arange(len(captions)), captions)
        counts = [len(each) for each in part.captions]
        embeddings = _Embeddings(part.files, np.cumsum(counts))
        distinct = _Distinct(self.near, part.files[0].parent / "distinct.f16")
        known = np.zeros(len(captions), bool)
        left = quota
        for start in track(range(0, len(order), _PAIRS), "looking for near-duplicates"):
            pairs = order[start : start + _PAIRS]
            some, first = np.unique(record[pairs], return_index=True)
            some = some[np.argsort(first)]  # the best first
            some = some[~known[some]]
            known[some] = True
            repeats[some] = distinct.repeats(embeddings.rows(some))
            pairs = pairs[~repeats[record[pairs]]][:left]
            kept[pairs] = True
            left -= len(pairs)
            if not left:
                break
        return Choice(captions, scores, kept, repeats)

    def _sentences(self, choices: dict[str, Choice]) -> Iterator[str]:
        yield (
            f"each pair of image and caption was scored by the model {self.identity[:12]}, by "
            "their cosine; the scores are in the texts of the records, and of all pairs of the "
            f"source in {SCORES}"
        )
        for split, choice in sorted(choices.items()):
            scores = choice.scores
            unscored = int((choice.captions == 0).sum())
            if len(scores):
                tenths = np.percentile(scores, _DECILES)
                listed = ", ".join(
                    f"{percent} % {score:.3f}"
                    for percent, score in zip(_DECILES, tenths, strict=True)
                )
                yield f"scores of the {len(scores):,} pairs in {split}: {listed}"
            if unscored:
                yield (
                    f"records in {split} without a caption, or whose image cannot be read, which "
                    f"are not scored: {unscored:,}"
                )
            if split != TRAIN or not len(scores):
                continue
            images = int((choice.captions > 0).sum())
            left = images - int(scored.left_out(choice).sum())
            if self.near:
                yield (
                    f"near-duplicates in {split}, with a cosine of {self.near:g} or more to an "
                    f"image with a better caption, that are left out: {int(choice.repeats.sum()):,}"
                )
            number = int(choice.kept.sum())
            if number < len(scores):
                yield (
                    f"of the pairs in {split} the best {number:,} are kept, "
                    f"{number / len(scores):.1%}, from {scores[choice.kept].min():.3f} up, of "
                    f"{left:,} of {images:,} images; an image keeps those of its captions that are "
                    "among them"
                )


def _images_of(path: Path) -> Path:
    """Where the embeddings of a piece's images lie."""
    return path.with_suffix(".npy")


@dataclass
class _Part:
    """What is known of a split, a piece after the other."""

    captions: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class _Embeddings:
    """Those of a split's images, on the disk."""

    files: list[Path]
    ends: Int64[np.ndarray, " files"]

    def rows(self, records: Int64[np.ndarray, " records"]) -> Float16[np.ndarray, "records width"]:
        """Of some records, in their order."""
        if not len(records):
            return np.zeros((0, 1), np.float16)
        file = np.searchsorted(self.ends, records, "right")
        order = np.argsort(file, kind="stable")
        starts = np.flatnonzero(np.diff(file[order], prepend=-1))
        result: np.ndarray | None = None
        for rows in np.split(order, starts[1:]):
            number = file[rows[0]]
            begin = self.ends[number - 1] if number else 0
            path = _images_of(self.files[number])
            images = np.load(path, mmap_mode="r", allow_pickle=False)
            if result is None:
                result = np.empty((len(records), images.shape[1]), np.float16)
            result[rows] = images[records[rows] - begin]
        assert result is not None
        return result


@dataclass
class _Distinct:
    """The images that are no near-duplicates of one another so far, in a file."""

    near: float
    path: Path
    count: int = 0

    def repeats(self, rows: Float16[np.ndarray, "rows width"]) -> Bool[np.ndarray, " rows"]:
        """Whether each is a near-duplicate of an earlier one; those that are not are noted."""
        new = on_grid(rows, "image embeddings")
        repeats = np.zeros(len(rows), bool)
        for some in self._blocks(rows.shape[1]):
            repeats |= self._reaches(new, some).any(axis=1)
        likes = self._reaches(new, new)
        for row in range(len(rows)):
            if not repeats[row]:
                repeats[row + 1 :] |= likes[row, row + 1 :]
        with self.path.open("ab" if self.count else "wb") as file:
            file.write(np.ascontiguousarray(rows[~repeats]).tobytes())
        self.count += int((~repeats).sum())
        return repeats

    def _reaches(
        self, left: Float64[np.ndarray, "left width"], right: Float64[np.ndarray, "right width"]
    ) -> Bool[np.ndarray, "left right"]:
        # Exact products: the same on every machine and for every block.
        return left @ right.T >= self.near - _ROUNDING

    def _blocks(self, width: int) -> Iterator[Float64[np.ndarray, "block width"]]:
        if not self.count:
            return
        rows = np.memmap(self.path, np.float16, "r", shape=(self.count, width))
        for start in range(0, self.count, _IMAGES):
            yield on_grid(rows[start : start + _IMAGES], "image embeddings")


def open_scorer(folder: str, keep: float, near: float | None) -> Scorer:
    """The model of a folder.

    Raises:
      UserError: for a folder that holds no model, or one without a joint space.
    """
    model = load_teacher(folder, "--score")
    return Scorer(model, digest(model), keep, near)
