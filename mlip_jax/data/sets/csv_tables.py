"""CSV and TSV tables beside images."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.files import CaptionSource, ImageFiles
from mlip_jax.data.sets.kinds import Opening, by_path
from mlip_jax.data.sets.records import Skipped
from mlip_jax.data.sets.splits import STANDARD, split_of
from mlip_jax.data.text.captions import usable

IMAGE_KEYS = ("file", "image", "path")
_CAPTION_KEYS = ("caption", "text", "title")


def open_csv(path: Path, opening: Opening) -> CaptionSource:
    """Opens a CSV table, or a tab-separated one when its suffix is .tsv or .tab.

    Columns: "file", "image" or "path"; "caption" (or "text", "title"); "split" if there are splits.
    Rows of the same image become one record with several captions, which are cleaned.

    Raises:
      MissingSplit: when no row is of this split.
      UserError: for a missing file or column, or "PATH:LINE: what is wrong" for a malformed row.
    """
    captions: dict[str, dict[str, list[str]]] = {}
    skipped: dict[str, Skipped] = {}
    for number, row in _table(path):
        place = f"{path}:{number}"
        file, caption = row["file"].strip(), usable([row["caption"]], opening.cleaning)
        if not file:
            raise UserError(f"{place}: the image column is empty")
        of = split_of(place, row.get("split"))
        images = captions.setdefault(of, {})
        if caption:
            images.setdefault(file, []).extend(caption)
        else:
            skipped.setdefault(of, Skipped("rows", opening.cleaning)).add(place, [row["caption"]])
    choice = STANDARD.choose(path, opening.wanted, captions)
    chosen: dict[str, list[str]] = {}
    left_out = Skipped("rows", opening.cleaning)
    for part in choice.parts:
        for file, texts in captions[part].items():
            chosen.setdefault(file, []).extend(texts)
        if part in skipped:
            left_out.merge(skipped[part])
    rows = sum(len(texts) for texts in chosen.values())
    return CaptionSource(
        path.stem,
        choice,
        ImageFiles(path.parent, list(chosen)),
        [tuple(dict.fromkeys(texts)) for texts in chosen.values()],
        left_out.notes(rows, opening.max_skipped_share),
    )


def _table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with their line numbers, the image column as "file", the text column as "caption"."""
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            columns = [column.strip().lower() for column in reader.fieldnames or ()]
            image = next((key for key in IMAGE_KEYS if key in columns), None)
            text = next((key for key in _CAPTION_KEYS if key in columns), None)
            if image is None or text is None:
                raise UserError(
                    f"{path}:1: needs a column file (or image, path) and a column caption, "
                    f"found {', '.join(columns) or 'nothing'}"
                )
            reader.fieldnames = columns
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{path}:{reader.line_num}: not {len(columns)} columns")
                yield reader.line_num, {**row, "file": row[image], "caption": row[text]}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}") from None


KIND = by_path(open_csv)
