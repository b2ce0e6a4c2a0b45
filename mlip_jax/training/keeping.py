"""What a teacher says of a prepared dataset, looked up once: `prepare --teacher=FOLDER`.

Runs learn from it with config.teacher=kept, and no step costs a teacher (MobileCLIP's dataset
reinforcement, arXiv 2311.17049). `data.sets.kept` has the format.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax.core import places
from mlip_jax.core.cores import cores
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import whole_file, write_atomically
from mlip_jax.core.progress import track
from mlip_jax.data.batches.teaching import TeacherInputs
from mlip_jax.data.batches.training import Example
from mlip_jax.data.sets import kept, shards
from mlip_jax.data.sets.kept import Kept
from mlip_jax.data.sets.opening import open_training
from mlip_jax.data.sets.records import InShards, Record, Source
from mlip_jax.data.text.captions import swap_sides
from mlip_jax.inference import Model
from mlip_jax.search.identity import digest
from mlip_jax.training.looking import Shown, look
from mlip_jax.training.teachers import load_teacher, view_settings

_SEEN = "image_of_teacher"  # the key of what the model sees


def keep(config: ConfigDict, out: str, teacher: str, views: int) -> int:
    """Keeps what a model says of the training split of a prepared dataset; prints a line about it.

    A run that was stopped goes on with the shards that it has not finished. Shards that have
    changed since are looked at again.

    Args:
      config: of the runs that will learn from it: its augmentation, its cleaning of captions, its
        seed and its image size count.
      out: the dataset's folder.
      teacher: a folder that `load` opens.
      views: augmented views of each image.

    Returns:
      0.

    Raises:
      UserError: for a folder that is no prepared dataset or lies in a bucket, one that holds no
        model, or a damaged image.
    """
    if places.is_url(out):
        raise UserError(f"--out={out}: embeddings are kept beside a dataset on this machine")
    folder = Path(out).expanduser()
    index = shards.read_index(folder)
    model = load_teacher(teacher, "--teacher")
    config = copy.deepcopy(config)
    config.data.train, config.data.validation = f"prepared:{folder}", ""
    source = open_training(config.data, config.model.text.cleaning)
    assert isinstance(source, InShards)  # a prepared dataset
    made = Kept(
        folder=folder,
        teacher=digest(model),
        width=model.encode_text("").shape[-1],
        scale=model.logit_scale,
        image_size=model.preprocess.image_size,
        views=views,
        seed=config.seed,
        settings=view_settings(config),
        shards={},
    )
    sums = {shard.name: list(shard.sums) for shard in index.shards}
    entries = _done_before(made, sums)
    example = Example(config, source, TeacherInputs({_SEEN: made.image_size}))
    looker = _Looker(model, example, source, made, bool(config.data.augment.flip))
    todo = [(name, span) for name, span in _spans(source) if name not in entries]
    left = track(todo, "looking at shards")
    with ThreadPoolExecutor(cores()) as pool:
        for name, span in left:
            for path, array in zip(
                kept.array_files(folder, name, made.teacher), looker.look(span, pool), strict=True
            ):
                with whole_file(path) as draft, draft.open("wb") as file:
                    np.save(file, array, allow_pickle=False)
            entries[name] = {
                "sums": sums[name],
                "sizes": kept.sizes(folder, name, made.teacher),
            }
            _write(made, entries)
    _write(made, entries)
    size = sum(size for entry in entries.values() for size in entry["sizes"])
    Console(highlight=False, markup=False, soft_wrap=True).print(
        f"{folder}: what {teacher} says of {len(source):,} images in {views:,} views each is kept, "
        f"{size / 2**20:,.1f} MiB\nlearn from it with --config.data.train=prepared:{folder} "
        "--config.teacher=kept"
    )
    return 0


def _done_before(made: Kept, sums: dict[str, list[str]]) -> dict[str, Any]:
    """The entries of shards that an earlier run has looked at in the same way."""
    if not made.file.is_file():
        return {}
    former = kept.read(made.file)
    if json.dumps(_without_shards(former)) != json.dumps(_without_shards(made)):
        return {}
    return {
        name: dict(entry)
        for name, entry in former.shards.items()
        if sums.get(name) == entry["sums"]
        and kept.sizes(made.folder, name, made.teacher) == entry["sizes"]
    }


def _without_shards(made: Kept) -> dict[str, Any]:
    return dataclasses.replace(made, shards={}).to_values()


def _write(made: Kept, entries: dict[str, Any]) -> None:
    values = dataclasses.replace(made, shards=entries).to_values()
    write_atomically(made.file, json.dumps(values, indent=1) + "\n")


def _spans(source: Source) -> Iterator[tuple[str, range]]:
    """Each shard's name, and its records by their indices."""
    assert isinstance(source, InShards)
    begin = 0
    for end in source.shard_ends().tolist():
        origin = source[begin].origin
        assert origin is not None  # of a prepared dataset
        yield origin.shard, range(begin, end)
        begin = end


@dataclasses.dataclass(frozen=True)
class _Looker:
    """Shows records to a model."""

    model: Model
    example: Example
    source: Source
    made: Kept
    mirrors: bool

    def look(self, span: range, pool: ThreadPoolExecutor) -> tuple[np.ndarray, ...]:
        """The arrays of a shard, in the order of `kept.ARRAYS`."""
        images, texts, records = [], [], [0]
        walk = look(self.model, span, self._shown, pool, self.made.views)
        for shown, of_images, of_texts in walk:
            images.append(of_images.reshape(len(shown), self.made.views, -1).astype(np.float16))
            texts.append(of_texts.reshape(-1, 1 + self.mirrors, self.made.width))
            records += [len(sides) // (1 + self.mirrors) for _, sides in shown]
        return (
            np.concatenate(images),
            np.concatenate(texts).astype(np.float16),
            np.cumsum(records, dtype=np.int64),
        )

    def _shown(self, index: int) -> Shown:
        try:
            record, views = self.example.kept_views(index, self.made.seed, self.made.views)
        except OSError as error:
            raise UserError(f"{self.source.name_of(index)}: {error}: run prepare again") from error
        return [view[_SEEN] for view in views], self._sides(record)

    def _sides(self, record: Record) -> list[str]:
        """Its captions, each followed by that of the mirrored image."""
        if not self.mirrors:
            return list(record.captions)
        return [side for each in record.captions for side in (each, swap_sides(each))]
