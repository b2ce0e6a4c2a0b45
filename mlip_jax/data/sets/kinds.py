"""What a kind of dataset is: what stands behind its name in a spec, and how that is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlip_jax.core import places
from mlip_jax.core.errors import UserError
from mlip_jax.data.sets.records import MissingSplit, Source
from mlip_jax.data.sets.splits import Wanted


@dataclass(frozen=True)
class Opening:
    """What is asked of a dataset when it is opened."""

    wanted: Wanted  # the split
    max_skipped_share: float = 0.01  # more records without a usable caption than this are an error
    cleaning: str = "none"  # how captions and tags are cleaned, `config.model.text.cleaning`
    cache_dir: str = ""  # where datasets named by one word lie; see `cache.cache_folder`
    window: int = -1  # shards that are mixed in training, `config.data.window`


@dataclass(frozen=True)
class DatasetKind:
    """A kind of dataset; its spec is NAME or NAME:WHERE.

    Attributes:
      open: (WHERE, what is asked) -> the source. Raises `MissingSplit` where the dataset does not
        have the split, and UserError.
      where: what WHERE is: "PATH", "NAME", or "" where the name says all.
    """

    open: Callable[[str, Opening], Source]
    where: str = ""

    def spec(self, name: str) -> str:
        """How it is written in a config, such as "jsonl:PATH"."""
        return f"{name}:{self.where}" if self.where else name


OBJECT_NAME = "object"  # the kind of a source that a program hands to `mlip_jax.train`


def _not_here(name: str, opening: Opening) -> Source:
    if opening.wanted.role != "train":
        raise MissingSplit(f"the source object {name!r} has no other split")
    raise UserError(
        f"the run was trained on {name!r}, a source object of a Python program: give it again, by "
        "mlip_jax.train(config, workdir, source=...)"
    )


OBJECT = DatasetKind(_not_here, "NAME")


def by_path(
    open_path: Callable[[Path, Opening], Source],
    open_url: Callable[[str, Opening], Source] | None = None,
) -> DatasetKind:
    """A kind of dataset that is a file or a folder, and perhaps one in a bucket."""

    def open_where(where: str, opening: Opening) -> Source:
        if not places.is_url(where):
            return open_path(Path(where).expanduser(), opening)
        if open_url is None:
            raise UserError(
                f"{where}: datasets of this kind are read from this machine alone. mlip prepare "
                "--source=KIND:URL makes one of it that may lie in a bucket, as prepared:URL; tar "
                "shards may lie there as they are, as webdataset:URL"
            )
        return open_url(where, opening)

    return DatasetKind(open_where, "PATH")
