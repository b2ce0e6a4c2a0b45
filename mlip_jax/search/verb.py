"""The search subcommand: index a folder of images, query it, serve it to a local browser."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlip_jax.core import places
from mlip_jax.core.errors import UserError
from mlip_jax.core.files import read_file
from mlip_jax.core.tables import make_table
from mlip_jax.devices import cluster
from mlip_jax.inference import Model, load
from mlip_jax.interop import model_folders
from mlip_jax.search.build import Outcome, build
from mlip_jax.search.collection import Collection, open_collection, reason
from mlip_jax.search.files import printable
from mlip_jax.search.identity import digest
from mlip_jax.search.index import FILE_NAME, About, Index, check_model
from mlip_jax.search.query import nearest
from mlip_jax.search.server import serve as serve_index

_TOP, _TOP_OF_PAGE = 10, 48
_SHARE = 0.5  # ours: in a folder of one's own, many files may be no images
_LISTED = 5
_WIDE = 1000  # letters a line where a program reads them: no path is broken


def search(
    config: ConfigDict,
    workdir: str | Path,
    images: str = "",
    index: str = "",
    text: str = "",
    image: str = "",
    top: int | None = None,
    serve: int | None = None,
    max_skipped_share: float = _SHARE,
) -> int:
    """Indexes images, answers queries and serves a page: what the flags ask for, in this order.

    Args:
      config: the model's, with the overrides of the command line.
      workdir: any folder that `mlip_jax.load` takes.
      images: a folder, or a dataset's spec: what is indexed, or brought up to date.
      index: the index's folder; left out, search/NAME in the workdir, with NAME that of the images
        (of another library's model: in runs/foreign/ITS_NAME).
      text: to be found.
      image: a file to find images like it.
      top: how many are found; 10, and 48 on the page.
      serve: the port of the page, at 127.0.0.1; 0: any; None: no page.
      max_skipped_share: more unreadable images than this share are an error.

    Returns:
      0.

    Raises:
      UserError: for what is not there, or an index of another model.
      RunError: when too many images are unreadable.
    """
    if not (images or text or image) and serve is None:
        raise UserError(
            "search needs something to do: --images=FOLDER to index, --text=WORDS or --image=FILE "
            "to search, --serve for a page in the browser"
        )
    return cluster.by_first(
        lambda: _search(
            config, places.local(workdir), images, index, text, image, top, serve, max_skipped_share
        )
    )


def _search(
    config: ConfigDict,
    workdir: Path,
    images: str,
    index: str,
    text: str,
    image: str,
    top: int | None,
    port: int | None,
    share: float,
) -> int:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _WIDE
    cache_dir = config.data.cache_dir
    collection = open_collection(images, cache_dir) if images else None
    folder = _folder(index, workdir, collection)
    content = _content(image) if image else b""
    model = load(workdir, config=config)
    if model.pairwise:
        raise UserError(
            "this model scores pairs and has no joint space to search in "
            "(config.model.critic='concat')"
        )
    queries = []  # first: what cannot be asked for ends the run before anything is indexed
    if text:
        queries.append((f"Images for {text!r}", model.encode_text([text])[0]))
    if content:
        queries.append((f"Images like {printable(image)}", _embedding(model, image, content)))
    about = About(
        images=collection.spec if collection else "",
        model=places.shown(workdir),
        step=model.step,
        digest=digest(model),
        count=0,
        unreadable=0,
        generation=0,
    )
    if collection:
        started = time.monotonic()
        outcome = build(folder, collection, model, about, share)
        _tell(console, folder, outcome, time.monotonic() - started)
    opened = Index(folder)
    check_model(opened.about, folder, about.digest, about.model_name())
    collection = collection or open_collection(opened.about.images, cache_dir)
    for title, query in queries:
        console.print(_table(title, opened, collection, query, top or _TOP))
    if port is not None:
        serve_index(opened, collection, model, port, top or _TOP_OF_PAGE, console)
    return 0


def find_index(workdir: str | Path) -> Index:
    """The only index of a model that lies in its default place.

    Args:
      workdir: the model's folder.

    Raises:
      UserError: where there is none, or where there are several.
    """
    above = _home(places.local(workdir)) / "search"
    places.fetch(above)
    folders = sorted(path.parent for path in above.glob(f"*/{FILE_NAME}"))
    if len(folders) == 1:
        return Index(folders[0])
    if folders:
        raise UserError(
            f"there are several indices, say which: --index={', --index='.join(map(str, folders))}"
        )
    raise UserError(
        f"there is no index in {above}: make one with --images=FOLDER, or name one with --index=DIR"
    )


def _home(workdir: Path) -> Path:
    """The folder above a model's indices by default."""
    if model_folders.kind(workdir) in ("workdir", "exported"):
        return workdir
    return Path("runs") / "foreign" / workdir.resolve().name  # not ours to write in


def _folder(index: str, workdir: Path, collection: Collection | None) -> Path:
    """The index's folder; where nothing is to be indexed, one that holds an index."""
    if not collection:
        return (Index(_index_folder(index)) if index else find_index(workdir)).folder
    name = re.sub("[:#]", "-", Path(collection.spec).name) or "root"
    return _index_folder(index) if index else _fetched(_home(workdir) / "search" / name)


def _index_folder(index: str) -> Path:
    return _fetched(places.local(index).expanduser())


def _fetched(folder: Path) -> Path:
    places.fetch(folder)
    return folder


def _content(image: str) -> bytes:
    try:
        return read_file(Path(image).expanduser())
    except OSError as error:
        raise UserError(f"cannot read --image={image}: {reason(error)}") from error


def _embedding(model: Model, image: str, content: bytes) -> Float32[np.ndarray, " width"]:
    try:
        return model.encode_image([content])[0]
    except OSError as error:
        raise UserError(f"--image={image} is no image that can be read: {reason(error)}") from error


def _tell(console: Console, folder: Path, outcome: Outcome, seconds: float) -> None:
    for path, why in outcome.unreadable[:_LISTED]:
        console.print(f"unreadable: {printable(path)}: {why}")
    opened = Index(folder)
    if len(outcome.unreadable) > _LISTED:
        console.print(
            f"{len(outcome.unreadable):,} unreadable images are left out; all are listed in "
            f"{opened.file('unreadable', 'jsonl')}"
        )
    counts = {
        "new": outcome.new,
        "changed": outcome.changed,
        "as before": outcome.unchanged,
        "removed": outcome.removed,
        "unreadable": len(outcome.unreadable),
    }
    summary = ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)
    console.print(
        f"index: {places.shown(folder)}: {opened.about.count:,} images ({summary}) in "
        f"{seconds:,.1f} s"
    )


def _table(
    title: str,
    index: Index,
    collection: Collection,
    query: Float32[np.ndarray, " width"],
    top: int,
) -> Table:
    table = make_table(("Rank", "Score"), words=0, title=title, title_justify="left")
    table.add_column("Path", overflow="fold")
    for rank, (score, row) in enumerate(zip(*nearest(index, query, top), strict=True), 1):
        place = collection.place(index.path(int(row)))
        table.add_row(str(rank), f"{score:.4f}", Text(printable(place)))
    return table
