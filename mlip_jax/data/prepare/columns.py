"""Which column of a table, or key of an object, is the image, the caption, the label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.data.prepare.readers import InputRecord, keys_of, texts_of
from mlip_jax.data.sets.shards import Example

ROLES = ("image", "caption", "label", "tags", "split")
# Names by which a role is found, the best first; those of one group are taken together.
_NAMES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "image": tuple(
        (name,)
        for name in (
            *("image", "file", "path", "img", "file_name", "filename", "filepath", "image_path"),
            *("jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "image_data"),
        )
    ),
    "caption": (
        ("caption", "captions"),
        ("text", "texts"),
        ("sentence", "sentences"),
        ("title",),
        ("description",),
    ),
    "label": (("label", "labels"), ("class",), ("cls",), ("fine_label",), ("category",)),
    "tags": (("tags",),),
    "split": (("split",),),
}


def read_columns(text: str) -> dict[str, str]:
    """Reads --columns=ROLE=NAME,...: {"caption": "TEXT"}.

    Raises:
      UserError: for a role that there is not.
    """
    columns = {}
    for part in filter(None, text.split(",")):
        role, equals, name = part.partition("=")
        if role not in ROLES or not name:
            raise UserError(
                f"--columns: expected ROLE=NAME with a role of {', '.join(ROLES)}, found "
                f"{part!r}{suggestion(role, ROLES)}"
            )
        columns[role] = name
    return columns


def choose(role: str, present: Iterable[str], columns: Mapping[str, str]) -> tuple[str, ...]:
    """The columns that hold a role among those present; () when there is none.

    Names are compared in lower case. Of a role that `columns` names, only that one counts.
    """
    present = list(present)
    lowered = {name.strip().lower(): name for name in reversed(present)}
    if role in columns:
        name = columns[role] if columns[role] in present else lowered.get(columns[role].lower())
        return (name,) if name is not None else ()
    for group in _NAMES[role]:
        if matches := tuple(lowered[name] for name in group if name in lowered):
            return matches
    return ()


def example(
    values: Mapping[str, Any], columns: Mapping[str, str], name: str, image: bytes, latin: int = 0
) -> InputRecord:
    """A record of the values of a row or an object.

    Raises:
      ValueError: when one of them is of another type.
    """

    def gather(role: str, read: Any) -> tuple[str, ...]:
        chosen = choose(role, values, columns)
        return tuple(text for key in chosen for text in read(values[key]))

    label_keys = choose("label", values, columns)
    multi_label = any(isinstance(values[key], (list, tuple)) for key in label_keys)
    captions = gather("caption", lambda value: texts_of(value, "caption"))
    tags = gather("tags", lambda value: texts_of(value, "tags"))
    labels = gather("label", keys_of)
    return InputRecord(
        Example(name, image, tuple(dict.fromkeys(captions)), tags, labels), latin, multi_label
    )
