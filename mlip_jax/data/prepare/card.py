"""What a prepared dataset says about itself: the index, the card, the broken records."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mlip_jax.core.errors import UserError
from mlip_jax.core.files import parse_json, read_file, write_atomically
from mlip_jax.core.markdown import code, plain
from mlip_jax.core.texts import brief
from mlip_jax.data.images.limits import MOST_PIXELS
from mlip_jax.data.prepare.examine import JPEG_QUALITY
from mlip_jax.data.prepare.make import Made, Tally, checksum, encoded
from mlip_jax.data.prepare.readers import Broken
from mlip_jax.data.sets.class_trees import read_classes
from mlip_jax.data.sets.shards import BROKEN, CARD, INDEX, SCORES, SUMS, Index, Shard

_MOST_NUMBERED = 100_000  # classes, when records name them by number and nobody by name
_MOST_DIGITS = 18  # of a class by number
_SHOWN = 20
Named = Sequence[str] | Mapping[str, str]


def read_named(file: str) -> Named:
    """What --classes names: a list of names in the order of the labels, or {key: name}.

    Raises:
      UserError: when the file cannot be read, or is of another form.
    """
    try:
        return read_classes(file, read_file(Path(file).expanduser()))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def classes(
    keys: Iterable[str], names: Sequence[str], file: str, named: Named = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes' keys and names in the order of their labels.

    Numbers are labels: 0, 1, ... up to the largest. Other keys are sorted, and are the names.

    Args:
      keys: how records name their classes.
      names: what numbers stand for, where the input knows it.
      file: of --classes; "": none.
      named: what it holds, by `read_named`.

    Raises:
      UserError: when a key is not among the names.
    """
    keys = set(keys)
    numbered = all(key.isascii() and key.isdigit() and len(key) < _MOST_DIGITS for key in keys)
    if file:
        pairs = dict(named) if isinstance(named, dict) else dict(zip(named, named, strict=True))
        if not isinstance(named, dict) and numbered:
            pairs = {str(number): name for number, name in enumerate(named)}
    elif names:
        pairs = {str(number): name for number, name in enumerate(names)}
    elif numbered and keys and max(map(int, keys)) < _MOST_NUMBERED:
        pairs = {str(number): str(number) for number in range(max(map(int, keys)) + 1)}
    else:
        pairs = {key: key for key in sorted(keys)}
    missing = sorted(keys - pairs.keys())
    if missing:
        where = file or "the input"
        raise UserError(
            f"{where} has {len(pairs)} classes; the class {brief(missing[0])} is not one"
        )
    return tuple(pairs), tuple(" ".join(name.replace("_", " ").split()) for name in pairs.values())


def write(folder: Path, index: Index, made: Sequence[Made]) -> None:
    """Writes broken.jsonl, the card, the checksums and, when all else is there, the index."""
    texts = {
        BROKEN: broken_lines(made),
        CARD: card(index, [b for each in made for b in each.broken]),
        INDEX: index.to_json(),
    }
    sums = {name: sum_ for shard in index.shards for name, _, sum_ in shard.files()}
    if (folder / SCORES).is_file():
        sums[SCORES] = checksum(folder / SCORES)
    sums |= {name: hashlib.sha256(encoded(text)).hexdigest() for name, text in texts.items()}
    texts = {SUMS: "".join(f"{sum_}  {name}\n" for name, sum_ in sums.items()), **texts}
    for name, text in texts.items():
        write_atomically(folder / name, encoded(text))


def broken_lines(made: Sequence[Made]) -> str:
    """The text of broken.jsonl."""
    return "".join(
        json.dumps({"shard": each.shard.name, "record": b.name, "reason": b.reason}) + "\n"
        for each in made
        for b in each.broken
    )


def read_broken(folder: Path) -> dict[str, list[Broken]]:
    """The broken records by shard.

    Raises:
      UserError: when the file is damaged.
    """
    path = folder / BROKEN
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    by_shard: dict[str, list[Broken]] = {}
    for number, line in enumerate(lines, start=1):
        entry = parse_json(line, f"{path}:{number}")
        texts = [entry.get(key) for key in ("shard", "record", "reason")]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f'{path}:{number}: needs "shard", "record" and "reason", texts')
        shard, *broken = texts
        by_shard.setdefault(shard, []).append(Broken(*broken))
    return by_shard


def card(index: Index, broken: Sequence[Broken]) -> str:
    """The text of README.md. It names neither time nor place, so that it is always the same."""
    tally = total(index.shards)
    job, records = index.job, sum(shard.records for shard in index.shards)
    lines = [f"# A prepared dataset of {records:,} images", ""]
    lines += ["| split | images | captions | bytes of images | shards |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for split in dict.fromkeys(shard.split for shard in index.shards):
        split_shards = [shard for shard in index.shards if shard.split == split and shard.records]
        tallied = total(split_shards)
        numbers = (
            sum(shard.records for shard in split_shards),
            tallied.captions,
            tallied.image_bytes,
        )
        lines.append(
            f"| {split} | {' | '.join(f'{n:,}' for n in numbers)} | {len(split_shards):,} |"
        )
    lines += ["", "## Where it comes from", "", f"Source: {code(job['source'])}."]
    if index.inputs.get("files"):
        files, size = index.inputs["files"], index.inputs["bytes"]
        lines[-1] += f" {files:,} {'file' if files == 1 else 'files'} of {size:,} bytes."
    if job["columns"]:
        named = ", ".join(f"{role} = {plain(name)}" for role, name in job["columns"].items())
        lines += ["", f"Columns: {named}."]
    lines += ["", f"Licence: {plain(index.licence) or 'not stated'}."]
    if index.attribution:
        lines += ["", f"Attribution: {plain(index.attribution)}"]
    lines += ["", "## What is in it", "", *_contents(index, tally)]
    lines += ["", "## What was left out", "", *_left_out(index, broken, records)]
    lines += [
        *("", "## How to use it", ""),
        "`--config.data.train=prepared:DIR` trains on it. `sha256sum --check SHA256SUMS` in its",
        "folder, or `prepare --check --out=DIR`, compares every file with its checksum.",
    ]
    return "\n".join(lines) + "\n"


def total(shards: Iterable[Shard]) -> Tally:
    """What the shards count, together."""
    tally = Tally()
    for shard in shards:
        tally.merge(shard.facts)
    return tally


def _contents(index: Index, tally: Tally) -> list[str]:
    formats = ", ".join(f"{name} {count:,}" for name, count in tally.formats.most_common())
    modes = ", ".join(f"{name} {count:,}" for name, count in tally.modes.most_common())
    low, high = tally.short_sides
    lines = [
        f"- Original formats: {formats or 'none'}. Modes: {modes or 'none'}.",
        f"- Shorter sides from {low:,} to {high:,} pixels; the longest side has "
        f"{tally.long_side:,}.",
        f"- The longest caption has {tally.longest_caption:,} characters.",
    ]
    if index.job["resize"]:
        lines.append(
            f"- {tally.resized:,} images were made smaller, to a shorter side of "
            f"{index.job['resize']:,} pixels (bicubic; JPEG of quality {JPEG_QUALITY}, PNG where "
            "transparent). The others have their bytes as they were."
        )
    else:
        lines.append("- Images have their bytes as they were; each was decoded once as a check.")
    if tally.animated:
        lines.append(f"- Animations: {tally.animated:,}; of each the first frame is used.")
    if tally.latin:
        lines.append(
            f"- Texts that were not in UTF-8: {tally.latin:,}. They were read as Windows-1252 "
            "(Latin-1's letters), or as UTF-16 where a mark says so."
        )
    if index.class_names:
        many = " Images show any number of them." if index.multi_label else ""
        lines.append(f"- {len(index.class_names):,} classes, in `index.json`.{many}")
    return lines + [f"- {plain(note)}" for note in index.notes]


def _left_out(index: Index, broken: Sequence[Broken], records: int) -> list[str]:
    if not broken:
        return ["Nothing."]
    share = len(broken) / (records + len(broken))
    kinds = Counter(re.sub(r"[\d,]+", "N", each.reason) for each in broken)
    return [
        f"{len(broken):,} of {records + len(broken):,} records ({share:.2%}), all of them in "
        f"`{BROKEN}`. More than {MOST_PIXELS:,} pixels are not decoded.",
        "",
        *(f"- {count:,}: {plain(kind)[:200]}" for kind, count in kinds.most_common(_SHOWN)),
    ]
