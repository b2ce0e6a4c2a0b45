"""Sets of images with captions: what a spec such as "emoji" or "jsonl:pairs.jsonl" opens.

A source gives encoded images and texts by index. It holds places, not pixels: it is cheap to pickle
into the processes that decode, and images are read when asked for.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from mlip_jax.config import UserError, suggestion
from mlip_jax.data import coco, file_sources
from mlip_jax.data.cache import cache_folder
from mlip_jax.data.captions import check_cleaning
from mlip_jax.data.records import MissingSplit, Source

SPLITS = ("train", "validation")
NAMED = ("emoji", "coco")
KINDS = ("jsonl", "csv", "folder", "coco", "tfds")


def open_source(
    spec: str,
    split: str,
    *,
    cache_dir: str = "",
    max_skipped_share: float = 0.01,
    cleaning: str = "none",
) -> Source:
    """Opens a split of a set.

    Args:
      spec: "emoji", "coco", or KIND:PATH with KIND one of jsonl, csv, folder, coco, tfds
        (docs/data.md).
      split: "train" or "validation". Sets that name no splits are all "train".
      cache_dir: where sets named by one word lie; "" is $MLIP_JAX_CACHE or ~/.cache/mlip_jax.
      max_skipped_share: more rows without a usable caption than this are an error.
      cleaning: how captions and tags are cleaned, `config.model.text.cleaning`.

    Raises:
      MissingSplit: when the set has no such split.
      UserError: for an unknown spec or cleaning, a missing file or package, a malformed row, or a
        split without a single image.
    """
    check_cleaning(cleaning)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: train or validation{suggestion(split, SPLITS)}")
    source = _open(spec, split, cache_dir, max_skipped_share, cleaning)
    if not len(source):
        raise UserError(f"the {split} split of the set {spec!r} is empty")
    return source


def _open(spec: str, split: str, cache_dir: str, max_skipped_share: float, cleaning: str) -> Source:
    kind, colon, where = spec.partition(":")
    if spec == "emoji":
        from mlip_jax.data import tfds_sources  # here: its library takes a second to import

        return tfds_sources.open_emoji(split, cache_dir, cleaning)
    if spec == "coco":
        where = str(cache_folder(cache_dir) / "coco")
    elif not colon or kind not in KINDS or not where:
        valid = (*NAMED, *(f"{kind}:" for kind in KINDS))
        near = suggestion(spec if not colon else f"{kind}:", valid)
        raise UserError(
            f"unknown data set {spec!r}: expected emoji, jsonl:PATH, csv:PATH, folder:PATH, coco, "
            f"coco:PATH or tfds:NAME{near}"
        )
    if kind == "tfds":
        from mlip_jax.data import tfds_sources

        return tfds_sources.open_tfds(where, split, cleaning)
    read = {
        "jsonl": file_sources.open_jsonl,
        "csv": file_sources.open_csv,
        "folder": file_sources.open_folder,
        "coco": coco.open_coco,
    }[kind]
    return read(Path(where).expanduser(), split, max_skipped_share, cleaning)


def open_evaluation(spec: str, *, cache_dir: str = "", cleaning: str = "none") -> Source:
    """A set to evaluate on: its validation split, or all of it where it names no splits.

    Captions are cleaned as by `open_source`.

    Raises:
      UserError: as `open_source`.
    """
    try:
        return open_source(spec, "validation", cache_dir=cache_dir, cleaning=cleaning)
    except MissingSplit:
        return open_source(spec, "train", cache_dir=cache_dir, cleaning=cleaning)


def open_validation(config_data: ConfigDict, cleaning: str = "none") -> Source | None:
    """The set that `config.data.validation` names, or None.

    "auto" is the training set's own validation split, None when it has none; "" is None; anything
    else is opened by `open_evaluation`. Captions are cleaned as by `open_source`.

    Raises:
      UserError: as `open_source`.
    """
    if not config_data.validation:
        return None
    if config_data.validation != "auto":
        return open_evaluation(
            config_data.validation, cache_dir=config_data.cache_dir, cleaning=cleaning
        )
    try:
        return open_source(
            config_data.train, "validation", cache_dir=config_data.cache_dir, cleaning=cleaning
        )
    except MissingSplit:
        return None
