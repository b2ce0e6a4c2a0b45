"""What a model says of every pair of an input, and the input without the pairs that it likes least.

scores.npz lies beside the shards. For each SPLIT it holds SPLIT.captions, how many captions each
record of the input has that are scored, and of these, one after the other, SPLIT.scores and
SPLIT.kept. SPLIT.repeats says of each record whether it is a near-duplicate of another: it goes
with all its captions then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from mlip_jax.core import places
from mlip_jax.core.files import whole_file
from mlip_jax.data.prepare.readers import Broken, InputRecord, Reader
from mlip_jax.data.sets.shards import SCORES

_ARRAYS = {"captions": np.int32, "scores": np.float32, "kept": np.bool_, "repeats": np.bool_}


@dataclass(frozen=True)
class Choice:
    """The scores of the records of one split, in the order of the input, and which pairs stay."""

    captions: Int32[np.ndarray, " records"]  # scored ones; 0: the record stays as it is
    scores: Float32[np.ndarray, " pairs"]
    kept: Bool[np.ndarray, " pairs"]
    repeats: Bool[np.ndarray, " records"]  # whether it is a near-duplicate of one that is kept

    @property
    def begins(self) -> Int64[np.ndarray, " records"]:
        """Where each record's pairs begin."""
        return np.cumsum(self.captions, dtype=np.int64) - self.captions


class _Scored(NamedTuple):
    """A record with the captions that stay, by their places, and their scores."""

    ref: Any
    captions: int
    chosen: tuple[int, ...]
    scores: tuple[float, ...]


class Scored(Reader):
    """Another input without the pairs that are not chosen; a record without any is left out."""

    def __init__(
        self, reader: Reader, choices: Mapping[str, Choice], sentences: Sequence[str]
    ) -> None:
        """Takes the input, what is chosen of each split, and what is said about that."""
        self._reader = reader
        self._choices = dict(choices)
        self._sentences = tuple(sentences)
        self.class_names = reader.class_names
        self.multi_label = reader.multi_label
        self.attribution = reader.attribution

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_choices": {}}  # the workers only read

    def files(self) -> Sequence[Path]:
        """The input's."""
        return self._reader.files()

    def shown(self, file: Path) -> str:
        """The input's."""
        return self._reader.shown(file)

    def total(self) -> int | None:
        """The records that stay."""
        return sum(len(choice.captions) for choice in self._choices.values()) - self._out

    @property
    def _out(self) -> int:
        return sum(int(left_out(choice).sum()) for choice in self._choices.values())

    def notes(self) -> Iterable[str]:
        """The input's, and what is said about the scores."""
        yield from self._reader.notes()
        yield from self._sentences

    def refs(self) -> Iterator[tuple[str, Any]]:
        """The input's refs, of those that stay."""
        self.left_out = self._out
        begins = {split: choice.begins for split, choice in self._choices.items()}
        out = {split: left_out(choice) for split, choice in self._choices.items()}
        rows = dict.fromkeys(self._choices, 0)
        for split, ref in self._reader.refs():
            row, choice = rows[split], self._choices[split]
            rows[split] += 1
            if out[split][row]:
                continue
            begin, count = int(begins[split][row]), int(choice.captions[row])
            chosen = np.flatnonzero(choice.kept[begin : begin + count])
            scores = choice.scores[begin + chosen]
            shown = tuple(round(float(score), 5) for score in scores)
            yield split, _Scored(ref, count, tuple(chosen.tolist()), shown) if count else ref

    def read(self, refs: Sequence[Any]) -> Iterator[InputRecord | Broken]:
        """The input's records, with the captions that stay."""
        plain = [ref.ref if isinstance(ref, _Scored) else ref for ref in refs]
        for ref, record in zip(refs, self._reader.read(plain), strict=True):
            if not isinstance(ref, _Scored) or isinstance(record, Broken):
                yield record
                continue
            example = record.example
            if len(example.captions) != ref.captions:
                place = record.place or example.name
                yield Broken(place, "has other captions than when it was scored")
                continue
            captions = tuple(example.captions[place] for place in ref.chosen)
            example = replace(example, captions=captions, scores=ref.scores)
            yield record._replace(example=example)


def left_out(choice: Choice) -> Bool[np.ndarray, " records"]:
    """Of each record whether it has captions that are scored, and none of them stays."""
    record = np.repeat(np.arange(len(choice.captions)), choice.captions)
    stays = np.bincount(record[choice.kept], minlength=len(choice.captions))
    return (choice.captions > 0) & (stays == 0)


def write_choices(folder: Path, digest: str, choices: Mapping[str, Choice]) -> None:
    """Writes scores.npz.

    Args:
      folder: of the dataset.
      digest: of what was scored.
      choices: by split.
    """
    arrays = {
        f"{split}.{name}": getattr(choice, name)
        for split, choice in sorted(choices.items())
        for name in _ARRAYS
    }
    save(folder / SCORES, digest, arrays)


def read_choices(folder: Path, digest: str) -> dict[str, Choice] | None:
    """What `write_choices` has written of the same input; None where there is nothing of it."""
    places.fetch(folder / SCORES)
    arrays = load(folder / SCORES, digest)
    if arrays is None:
        return None
    splits = {name.rpartition(".")[0] for name in arrays}
    with contextlib.suppress(KeyError, ValueError):
        choices = {
            split: Choice(**{name: arrays[f"{split}.{name}"] for name in _ARRAYS})
            for split in splits
        }
        if all(map(_is_sound, choices.values())):
            return choices
    return None


def _is_sound(choice: Choice) -> bool:
    right = all(getattr(choice, name).dtype == kind for name, kind in _ARRAYS.items())
    return (
        right
        and bool((choice.captions >= 0).all())
        and choice.captions.sum() == len(choice.scores) == len(choice.kept)
        and len(choice.repeats) == len(choice.captions)
    )


def save(path: Path, digest: str, arrays: Mapping[str, Any]) -> None:
    """Writes arrays and the digest of what they are of; the same bytes for the same arrays."""
    with whole_file(path) as draft, draft.open("wb") as file:
        np.savez(file, digest=np.array(digest), **arrays)


def load(path: Path, digest: str) -> dict[str, np.ndarray] | None:
    """The arrays that `save` has written with this digest; None where there are none."""
    # What a damaged file gives is a matter of zipfile and numpy: BadZipFile, ValueError, EOFError.
    with contextlib.suppress(Exception), path.open("rb") as file:
        with np.load(file, allow_pickle=False) as members:
            arrays = dict(members)
        if str(arrays.pop("digest")) == digest:
            return arrays
    return None
