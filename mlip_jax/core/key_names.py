"""Finds the key of the config that a short or foreign name means: "lr", "batch-size", "wd"."""

from __future__ import annotations

import difflib
from collections.abc import Collection

# What other programs call a key, where no part of the key's own name is like it.
_ELSEWHERE = {
    "lr": "optimizer.learning_rate",
    "wd": "optimizer.weight_decay",
    "bs": "batch_size",
    "warmup": "optimizer.warmup_samples",
    "beta1": "optimizer.b1",
    "beta2": "optimizer.b2",
    "grad_clip": "optimizer.clip_norm",
    "accum_freq": "accumulation",
    "num_workers": "data.workers",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "steps": "samples",
    "train_num_samples": "samples",
    "precision": "compute_dtype",
    "dtype": "compute_dtype",
    "train_data": "data.train",
    "val_data": "data.validation",
    "resolution": "model.image.image_size",
    "res": "model.image.image_size",
    "grad_checkpointing": "model.image.remat",
    "save_frequency": "checkpoint.every_samples",
    "val_frequency": "evaluation.every_samples",
}
_NEAR = 0.6  # of 1: how alike two names are at least


def find_key(name: str, known: Collection[str], *, near: bool = True) -> str | None:
    """The key of `known` that a name means; None when there is none.

    Args:
      name: as it was written, without "config.": a key, its last part, or what another program
        calls it.
      known: dotted keys.
      near: whether a name that is only like a key's counts too.
    """
    wanted = name.strip().lower().replace("-", "_")
    if wanted in known:
        return wanted
    for key in known:
        if key.endswith(f".{wanted}"):
            return key
    section, dot, last = wanted.rpartition(".")
    key = _ELSEWHERE.get(last, "")
    if key in known and key.startswith(f"{section}{dot}"):
        return key
    if not near:
        return None
    candidates = {key.rpartition(".")[2]: key for key in reversed(list(known))}
    candidates |= {key: key for key in known}
    found = difflib.get_close_matches(wanted, candidates, n=1, cutoff=_NEAR)
    return candidates[found[0]] if found else None
