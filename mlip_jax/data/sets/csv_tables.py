"""CSV and TSV tables beside images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlip_jax.core.errors import UserError
from mlip_jax.core.texts import shown, wrong_path, wrong_text
from mlip_jax.data.sets.files import CaptionSource, ImageFiles
from mlip_jax.data.sets.kinds import Opening, by_path
from mlip_jax.data.sets.records import Skipped
from mlip_jax.data.sets.splits import STANDARD, split_of
from mlip_jax.data.sets.table_rows import TableFile
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
    for place, file, text, split in _rows(path):
        if not file:
            raise UserError(f"{place}: the image column is empty")
        if wrong := wrong_path(file):
            raise UserError(f"{place}: the path of the image {wrong}")
        if wrong := wrong_text(text):
            raise UserError(f"{place}: the caption {wrong}")
        caption = usable([text], opening.cleaning)
        of = split_of(place, split)
        images = captions.setdefault(of, {})
        if caption:
            images.setdefault(file, []).extend(caption)
        else:
            skipped.setdefault(of, Skipped("rows", opening.cleaning)).add(place, [text])
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


def _rows(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """The place, the image, the text and the split of each row."""
    table = TableFile(path, bytes.decode)
    with path.open("rb") as file:
        header = table.header(file)
        columns = [column.strip().lower() for column in header.fields]
        image = next((key for key in IMAGE_KEYS if key in columns), None)
        text = next((key for key in _CAPTION_KEYS if key in columns), None)
        if header.reason:
            raise UserError(f"{path}:{header.line}: {header.reason}")
        if image is None or text is None:
            raise UserError(
                f"{path}:1: needs a column file (or image, path) and a column caption, found "
                f"{shown(', '.join(columns))[:200] or 'nothing'}"
            )
        image_at, text_at = columns.index(image), columns.index(text)
        split_at = columns.index("split") if "split" in columns else None
        for row in table.rows(file, header, image_at):
            place = f"{path}:{row.line}"
            if row.reason:
                raise UserError(f"{place}: {row.reason}")
            split = "" if split_at is None else row.fields[split_at]
            yield place, row.fields[image_at].strip(), row.fields[text_at], split


KIND = by_path(open_csv)
