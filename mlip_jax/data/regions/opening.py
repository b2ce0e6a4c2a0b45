"""Datasets of regions: what a spec such as "compositions" or "refcoco:FOLDER#testA" opens."""

from __future__ import annotations

from pathlib import Path

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.data.regions.base import Regions, open_regions
from mlip_jax.data.regions.compositions import open_compositions
from mlip_jax.data.regions.refer import open_refer
from mlip_jax.data.sets.opening import missing_path, split_spec

_VALID = ("compositions", "refcoco:", "regions:")


def open_region_set(
    spec: str, *, cache_dir: str = "", cleaning: str = "none", max_skipped_share: float = 0.01
) -> Regions:
    """Opens a dataset to ground on.

    Args:
      spec: "compositions", "refcoco:FOLDER" in REFER's layout, or "regions:FILE", a JSONL file; a
        split may follow after "#".
      cache_dir: where datasets named by one word lie, as for `open_source`.
      cleaning: how expressions are cleaned, `config.model.text.cleaning`.
      max_skipped_share: more queries than this without an expression are an error.

    Raises:
      MissingSplit: when the dataset has no such split.
      UserError: for an unknown spec, a missing file, or a malformed row.
    """
    base, split = split_spec(spec)
    if base == "compositions":
        return open_compositions(split or "validation", cache_dir=cache_dir, cleaning=cleaning)
    kind, colon, where = base.partition(":")
    opener = {"refcoco": open_refer, "regions": open_regions}.get(kind)
    if opener is None or not where:
        near = suggestion(f"{kind}:" if colon else spec, _VALID)
        raise UserError(
            f"unknown dataset of regions {spec!r}: expected compositions, refcoco:FOLDER or "
            f"regions:FILE{near}"
        )
    path = Path(where).expanduser()
    try:
        return opener(path, split, cleaning=cleaning, max_skipped_share=max_skipped_share)
    except UserError as error:
        hint = missing_path(where, split)
        if not hint:
            raise
        raise UserError(f"{error}{hint}") from None
