"""Datasets of images with captions: what a spec such as "emoji" or "jsonl:pairs.jsonl" opens.

A source gives encoded images and texts by index. It holds places, not pixels: it is cheap to pickle
into the processes that decode, and images are read when asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ml_collections import ConfigDict

from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.core.registry import DATASETS
from mlip_jax.data.sets import held_out, mixtures, public
from mlip_jax.data.sets.held_out import Share
from mlip_jax.data.sets.kinds import Opening
from mlip_jax.data.sets.records import InShards, MissingSplit, Source
from mlip_jax.data.sets.splits import Wanted, canonical
from mlip_jax.data.text.captions import check_cleaning

SPLITS = ("train", "validation")
_MAX_SKIPPED_SHARE = 0.01


def _same(share: Share) -> Share:
    return share


def named() -> list[str]:
    """The datasets that are named by one word."""
    alone = [name for name, kind in DATASETS.items() if not kind.where]
    return [*alone, *public.PLACES]


def open_source(
    spec: str,
    split: str,
    *,
    cache_dir: str = "",
    max_skipped_share: float = _MAX_SKIPPED_SHARE,
    cleaning: str = "none",
) -> Source:
    """Opens a split of a dataset.

    Args:
      spec: one of `named`, or KIND:PATH with a KIND of `registry.DATASETS` (docs/data.md). With
        #SPLIT after it, that split is opened, whatever `split` says; #all is every split together,
        and #SPLIT[:95%] and #SPLIT[95%:] are shares of one.
        For training also mix:SPEC*WEIGHT+SPEC*WEIGHT.
      split: "train" or "validation". Datasets that name no splits are all "train".
      cache_dir: where datasets named by one word lie; "" is $MLIP_JAX_CACHE or ~/.cache/mlip_jax.
      max_skipped_share: more rows without a usable caption than this are an error.
      cleaning: how captions and tags are cleaned, `config.model.text.cleaning`.

    Raises:
      MissingSplit: when the dataset has no such split.
      UserError: for an unknown spec or cleaning, a missing file or package, a malformed row, or a
        split without a single image.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: train or validation{suggestion(split, SPLITS)}")
    return _open(spec, split, cache_dir, max_skipped_share, cleaning)


def open_evaluation(spec: str, *, cache_dir: str = "", cleaning: str = "none") -> Source:
    """A dataset to evaluate on.

    That is its validation split, or its test split where it has none, or all of it where it names
    no splits. Of datasets whose literature has a standard it is that: `test` of Karpathy's splits
    and of PASCAL VOC. #SPLIT after the spec names another.

    Captions are cleaned as by `open_source`.

    Raises:
      UserError: as `open_source`.
    """
    return _open(spec, "evaluation", cache_dir, _MAX_SKIPPED_SHARE, cleaning)


def split_spec(spec: str) -> tuple[str, str]:
    """A spec without the split that is pinned, and that split, "" for none.

    "coco#val" -> ("coco", "val"). A path that exists is taken as it is, whatever it holds; so is a
    "#" in the name of a folder.
    """
    base, mark, split = spec.rpartition("#")
    if (
        not mark
        or "/" in split
        or mixtures.is_mixture(spec)
        or Path(spec.partition(":")[2] or spec).expanduser().exists()
    ):
        return spec, ""
    return base, split


def _open(
    spec: str,
    role: str,
    cache_dir: str,
    max_skipped_share: float,
    cleaning: str,
    part: Callable[[Share], Share] = _same,
    window: int = -1,
) -> Source:
    check_cleaning(cleaning)
    if mixtures.is_mixture(spec):
        return _open_mixture(spec, role, cache_dir, max_skipped_share, cleaning, window=window)
    base, marked = split_spec(spec)
    name, share = held_out.parse(marked)
    wanted = Wanted(role, name)
    kind, colon, where = base.partition(":")
    if base != spec and not marked:
        raise UserError(f"dataset {spec!r}: expected a split after #, such as {base}#test")
    if base in public.PLACES:
        kind, where = public.find(base, cache_dir)
    elif kind not in DATASETS or not bool(colon) == bool(where) == bool(DATASETS[kind].where):
        raise _unknown(spec, kind, colon)
    opening = Opening(wanted, max_skipped_share, cleaning, cache_dir, window)
    try:
        source = DATASETS[kind].open(where, opening)
    except UserError as error:
        hint = (
            missing_path(where, marked)
            if kind in DATASETS and DATASETS[kind].where == "PATH"
            else ""
        )
        if not hint:
            raise
        raise UserError(f"{error}{hint}") from None
    if not len(source):
        raise UserError(f"the {source.split} split of the dataset {spec!r} is empty")
    return held_out.take(source, part(share), where)


def missing_path(where: str, split: str) -> str:
    """What an error should add about a path of a spec that does not exist; "" if it does.

    Args:
      where: the path.
      split: what followed it after "#", or "".
    """
    path = Path(where).expanduser()
    if path.exists() or "://" in where:
        return ""
    mark = (
        f"; #{split} is taken for a split, as there is no {where}#{split} either" if split else ""
    )
    return mark if path.is_absolute() else f"{mark}; the path is relative to {Path.cwd()}"


def _open_mixture(
    spec: str,
    role: str,
    cache_dir: str,
    max_skipped_share: float,
    cleaning: str,
    first: Callable[[Share], Share] = _same,
    window: int = -1,
) -> Source:
    """A mixture; `first` says which share of its first dataset is opened."""
    if role != "train":
        raise UserError(f"the mixture {spec!r} is for training: name one dataset to evaluate on")
    parts = mixtures.parse(spec)
    how = (role, cache_dir, max_skipped_share, cleaning)
    opened = [
        _open(part.spec, *how, _same if place else first, window)
        for place, part in enumerate(parts)
    ]
    if len(opened) == 1:
        return opened[0]
    return mixtures.Mixture(opened, [part.weight for part in parts])


def _unknown(spec: str, kind: str, colon: str) -> UserError:
    specs = [each.spec(name) for name, each in DATASETS.items()]
    prefixes = [f"{name}:" for name, each in DATASETS.items() if each.where]
    near = suggestion(f"{kind}:" if colon else spec, (*named(), *prefixes))
    return UserError(
        f"unknown dataset {spec!r}: expected {', '.join((*specs, *public.PLACES))}{near}"
    )


def open_training(config_data: ConfigDict, cleaning: str = "none") -> Source:
    """The training split of what `config.data.train` names; its captions are cleaned.

    Without the share of it that `config.data.validation` holds out, such as "5%": of a mixture, of
    its first dataset.

    Raises:
      UserError: as `open_source`.
    """
    how = (config_data.cache_dir, config_data.max_skipped_share, cleaning)
    window = config_data.window
    share = held_out_share(config_data)

    def kept(part: Share) -> Share:
        return part.without_last(share) if share else part

    if mixtures.is_mixture(config_data.train):
        source = _open_mixture(config_data.train, "train", *how, first=kept, window=window)
    else:
        source = _open(config_data.train, "train", *how, part=kept, window=window)
    sharded = [isinstance(each, InShards) for each in mixtures.datasets_of(source)]
    if window > 0 and not any(sharded):
        raise UserError(
            f"config.data.window={window} mixes shards, and {config_data.train} has none: prepared "
            "datasets and tar files have; leave the key out"
        )
    return source


def held_out_share(config_data: ConfigDict) -> float:
    """The share of the training split that is held out for validation; 0.0 where none is.

    Raises:
      UserError: for one that leaves a side empty.
    """
    share = held_out.percent(config_data.validation)
    if share is None:
        return 0.0
    if not 0 < share < 1:
        raise UserError(
            f"config.data.validation={config_data.validation!r} leaves nothing on one side: hold "
            "out more than 0% and less than 100%, such as 5%"
        )
    return share


def open_validation(config_data: ConfigDict, cleaning: str = "none") -> Source | None:
    """The dataset that `config.data.validation` names, or None.

    "auto" is the training set's own validation split, None when it has none or when training is
    pinned to another split than its training split; of a mixture, that of its first dataset that
    has one; "" is None; of any other dataset it is the validation split, or what `open_evaluation`
    opens where it has none; "5%" is that share of the training split, by a hash of the records'
    names, of a mixture that of its first dataset. Captions are cleaned as by `open_source`.

    Raises:
      UserError: as `open_source`.
    """
    how = {"cache_dir": config_data.cache_dir, "cleaning": cleaning}
    if not config_data.validation:
        return None
    if share := held_out_share(config_data):
        is_mixture = mixtures.is_mixture(config_data.train)
        spec = mixtures.parse(config_data.train)[0].spec if is_mixture else config_data.train
        skipped = config_data.max_skipped_share
        return _open(
            spec,
            "train",
            config_data.cache_dir,
            skipped,
            cleaning,
            part=lambda part: part.last(share),
            window=config_data.window,
        )
    if config_data.validation != "auto":
        # Where there are both, the split for validation: the test is not for choosing a checkpoint.
        try:
            return open_source(config_data.validation, "validation", **how)
        except MissingSplit:
            return open_evaluation(config_data.validation, **how)
    for spec in _own_sets(config_data.train):
        with contextlib.suppress(MissingSplit):
            return open_source(spec, "validation", **how)
    return None


def own_set(config_data: ConfigDict) -> str:
    """The training set; of a mixture, the dataset whose validation split is the run's own.

    Raises:
      UserError: as `open_source`.
    """
    if mixtures.is_mixture(config_data.train):
        for spec in _own_sets(config_data.train):
            with contextlib.suppress(MissingSplit):
                open_source(spec, "validation", cache_dir=config_data.cache_dir)
                return spec
    return config_data.train


def _own_sets(train: str) -> Iterator[str]:
    """Datasets whose validation split may be the run's own: those not pinned to another split."""
    parts = mixtures.parse(train) if mixtures.is_mixture(train) else ()
    for spec in [part.spec for part in parts] or [train]:
        base, pinned = split_spec(spec)
        if not pinned or canonical(held_out.parse(pinned)[0]) == "train":
            yield base
