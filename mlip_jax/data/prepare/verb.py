"""The subcommand: a source and a folder in, a prepared dataset and a line about it out."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from mlip_jax.core import places
from mlip_jax.core.cores import cores
from mlip_jax.core.errors import RunError, UserError, suggestion
from mlip_jax.core.files import write_atomically
from mlip_jax.core.registry import DATASETS, READERS
from mlip_jax.data.prepare import card, in_bucket, output
from mlip_jax.data.prepare import columns as column
from mlip_jax.data.prepare.by_image import ByImage
from mlip_jax.data.prepare.containers import SUFFIXES
from mlip_jax.data.prepare.in_bucket import InBucket
from mlip_jax.data.prepare.make import DRAFTS, Made, Maker, checksum
from mlip_jax.data.prepare.opened_sets import OpenedSet
from mlip_jax.data.prepare.pool import make_all
from mlip_jax.data.prepare.readers import Broken, Reader
from mlip_jax.data.sets import shards
from mlip_jax.data.sets.opening import named
from mlip_jax.data.sets.shards import BROKEN, Index
from mlip_jax.data.sets.splits import canonical

_WITH_IMAGES = (*SUFFIXES, ".parquet", ".arrow")
_SHOWN = 3


def prepare(
    config: ConfigDict | None,
    workdir: Path | None,
    *,
    out: str,
    source: str = "",
    columns: str = "",
    split: str = "",
    classes: str = "",
    resize: int = 0,
    shard_records: int = 5000,
    workers: int = -1,
    max_skipped_share: float = 0.01,
    licence: str = "",
    attribution: str = "",
    check: bool = False,
    teacher: str = "",
    views: int = 8,
    score: str = "",
    keep: float = 1.0,
    near_duplicates: float | None = None,
) -> int:
    """Writes a prepared dataset, or goes on with one; prints what is in it.

    The shards are a function of the source and of `columns`, `split`, `resize` and `shard_records`
    alone. A run that is killed goes on with the shards that it has not finished, and ends with the
    same bytes. A finished dataset is compared with its checksums, and damaged files are made again.

    Args:
      config: with `teacher`, of the runs that will learn from it; else None.
      workdir: not used.
      out: the dataset's folder, a path or a URL: shards are brought to a bucket one by one.
      source: KIND:PATH; see docs/data.md. Of a URL a copy is brought to this machine.
      columns: ROLE=NAME,...; see `columns.read_columns`.
      split: what all records belong to; "": as the source says.
      classes: a file that names the classes; see `card.read_named`.
      resize: pixels of the shorter side of images that are larger; 0: none is changed.
      shard_records: of a shard, at most.
      workers: processes; -1: as many as there are cores.
      max_skipped_share: more broken records than this share are an error in the end.
      licence: for the card.
      attribution: for the card, and to be shown wherever the dataset is used.
      check: only compare a finished dataset with its checksums.
      teacher: a folder with a model: only keep what it says of a finished dataset.
      views: of each image that it is shown.
      score: a folder with a model, which scores each pair first; the scores are kept.
      keep: the share of the training pairs that is kept, the best by their scores.
      near_duplicates: the cosine from which on the better one of two training images alone is kept.

    Returns:
      0; with `check`, 1 when a file is damaged.

    Raises:
      UserError: for options or a source that cannot be used, a folder that holds something else, or
        too many broken records.
      RunError: when a worker process is killed, or a file cannot be written.
    """
    del workdir
    if teacher:
        # What loads models lies above this subpackage.
        keeping = importlib.import_module("mlip_jax.training.keeping")
        return int(keeping.keep(config, out, teacher, views))
    folder = places.local(out, empty=True).expanduser()
    places.fetch(folder / shards.INDEX)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if check:
        return _check(folder, console)
    if not source:
        raise UserError("prepare needs a source: add --source=KIND:PATH (--help shows more)")
    chosen = column.read_columns(columns)
    named_split = canonical(split) if split else ""
    if named_split is None:
        raise UserError(f"--split={split}: expected train, validation or test")
    class_names = card.read_named(classes) if classes else ()
    progress = Console(stderr=True, highlight=False, markup=False)
    reader: Reader = ByImage(open_reader(source, chosen, named_split), progress)
    job, inputs = _job(reader, source, chosen, split, resize, shard_records)
    if score:
        scoring = importlib.import_module("mlip_jax.training.scoring")  # above, too
        scorer = scoring.open_scorer(score, keep, near_duplicates)
        job |= scorer.job
    with output.reserved(folder, job), _writing(folder):
        done = output.done_before(folder, console)
        if score:
            reader = scorer.choose(reader, folder, shard_records)
        made = make_all(
            reader,
            Maker(reader, folder, resize),
            records=shard_records,
            workers=workers if workers > 0 else cores(),
            done=done,
            console=progress,
        )
        output.remove_others(folder, done.values(), made)
        keys, names = card.classes(
            (key for each in made for key in each.shard.facts["class_keys"]),
            reader.class_names,
            classes,
            class_names,
        )
        index = Index(
            job=job,
            shards=tuple(each.shard for each in made),
            class_keys=keys,
            class_names=names,
            multi_label=reader.multi_label or any(each.shard.facts["multi_label"] for each in made),
            attribution=attribution or reader.attribution,
            licence=licence,
            notes=tuple(reader.notes()),
            inputs=inputs,
        )
        _judge(made, max_skipped_share, source, folder, reader.left_out)
        card.write(folder, index, made)
        places.remove(folder / DRAFTS)
    _tell(console, folder, index, made)
    return 0


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Gives an error of the disk one line, but for a full disk, of which the front door tells."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"cannot write {error.filename or folder}: {error.strerror}") from error


def open_reader(source: str, columns: Mapping[str, str], split: str) -> Reader:
    """The input that --source names.

    Raises:
      UserError: for an unknown kind, and what the kinds raise.
    """
    kind, colon, where = source.partition(":")
    if places.is_url(where) and (kind in READERS or _is_path(kind)):
        where, mark, part = (where, "", "") if kind in READERS else where.partition("#")
        copy = in_bucket.bring(kind, where)
        return InBucket(
            copy, lambda here: open_reader(f"{kind}:{here}{mark}{part}", columns, split)
        )
    if kind in READERS and where:
        return READERS[kind](where, columns, split)
    opened = [name for name, each in DATASETS.items() if each.where and name != "prepared"]
    if (kind in opened and where) or source.partition("#")[0] in named():
        return OpenedSet(source, columns, split)
    known = list(dict.fromkeys([*READERS, *opened]))
    near = suggestion(f"{kind}:" if colon else source, (*(f"{name}:" for name in known), *named()))
    raise UserError(
        f"--source={source}: expected KIND:PATH with a KIND of {', '.join(known)}{near}"
    )


def _is_path(kind: str) -> bool:
    return kind in DATASETS and DATASETS[kind].where == "PATH" and kind != "prepared"


def _job(
    reader: Reader, source: str, columns: Mapping[str, str], split: str, resize: int, records: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """What the shards depend on, and the number and bytes of the files."""
    try:
        sizes = {reader.shown(file): file.stat().st_size for file in reader.files()}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    inputs = {"files": len(sizes), "bytes": sum(sizes.values())}
    # Of texts the content counts; images are too many to be read for this alone.
    texts = [f for f in reader.files() if not f.name.lower().endswith(_WITH_IMAGES)]
    sums = {reader.shown(file): checksum(file) for file in texts}
    digest = hashlib.sha256(json.dumps([sizes, sums]).encode()).hexdigest()
    job = {
        "source": source,
        "columns": dict(columns),
        "split": split,
        "resize": resize,
        "shard_records": records,
        "files": digest,
    }
    return job, inputs


def _check(folder: Path, console: Console) -> int:
    index = shards.read_index(folder)
    damaged = output.damaged_files(folder, index.shards, console)
    for name in damaged:
        console.print(f"{places.shown(folder / name)} is damaged")
    number = sum(len(shard.files()) for shard in index.shards)
    what = "sizes" if places.mirror_of(folder) else "checksums"
    console.print(f"{number - len(damaged):,} of {number:,} files have their {what}")
    return 1 if damaged else 0


def _judge(made: Sequence[Made], share: float, source: str, folder: Path, left_out: int) -> None:
    """Raises UserError when too much of all records is broken; a list of that is written then."""
    broken = [each for shard in made for each in shard.broken]
    records = sum(each.shard.records for each in made)
    if not broken and not records:
        raise UserError(f"--source={source} has no records")
    if not records:
        raise UserError(f"--source={source} has no usable record: {_broken_line(broken, records)}")
    if len(broken) > share * (records + len(broken) + left_out):
        write_atomically(folder / BROKEN, card.broken_lines(made))
        raise UserError(
            f"{_broken_line(broken, records)}; more than --max-skipped-share={share:g} allows (all "
            f"of them are in {folder / BROKEN}). The same command with a larger share keeps the "
            "shards and writes the index"
        )


def _broken_line(broken: Sequence[Broken], records: int) -> str:
    total = records + len(broken)
    first = "; ".join(f"{each.name} ({each.reason})" for each in broken[:_SHOWN])
    more = "; ..." if len(broken) > _SHOWN else ""
    share = len(broken) / total
    return f"{len(broken):,} of {total:,} records ({share:.2%}) are broken: {first}{more}"


def _tell(console: Console, folder: Path, index: Index, made: Sequence[Made]) -> None:
    splits: dict[str, int] = {}
    for shard in index.shards:
        splits[shard.split] = splits.get(shard.split, 0) + shard.records
    records = sum(splits.values())
    size = sum(size for shard in index.shards for _, size, _ in shard.files())
    each = ", ".join(f"{split} {count:,}" for split, count in splits.items())
    console.print(f"{places.shown(folder)}: {records:,} images ({each}), {size / 2**20:,.1f} MiB")
    broken = [b for one in made for b in one.broken]
    if broken:
        console.print(_broken_line(broken, records))
        console.print(f"all of them are in {places.shown(folder / BROKEN)}")
    for note in index.notes:
        console.print(note)
    if not index.licence:
        console.print("the card states no licence: add --licence=NAME to the same command")
    console.print(f"train on it with --config.data.train=prepared:{places.shown(folder)}")
