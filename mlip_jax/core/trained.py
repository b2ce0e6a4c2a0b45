"""The config of a run that is looked at from another folder than the one it was trained from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mlip_jax.core import schema
from mlip_jax.core.files import read_json
from mlip_jax.core.registry import DATASETS

ENVIRONMENT = "environment.json"  # of a workdir; its FOLDER is where the run was trained from
FOLDER = "folder"
START = "start.json"  # of a workdir: what the run started from, in lines
_OF_REGIONS = ("refcoco", "regions")
_SPEC = re.compile(r"(?P<kind>\w+):(?P<where>.+)", re.DOTALL)
_OF_MIXTURE = re.compile(r"(?<=[:+])(?P<kind>\w+):(?P<where>[^*]+)(?=\*)")


def read_config(workdir: Path) -> ConfigDict:
    """The config in a workdir, whose relative paths of datasets are found from anywhere.

    A relative path that does not exist here is taken from the folder that the run was trained from,
    as the workdir's environment.json says it.

    Raises:
      UserError: when config.json cannot be read, or environment.json is damaged.
    """
    config = schema.from_file(workdir / "config.json")
    trained_from = read_json(workdir / ENVIRONMENT, missing={}).get(FOLDER)
    if not isinstance(trained_from, str):
        return config
    home = Path(trained_from)
    for key, value in schema.flatten(config.to_dict()).items():
        if key in ("data.train", "data.validation") or key.startswith("evaluation."):
            located = _located(value, home)
            if located != value:
                schema.set_key(config, key, located)
    return config


def _located(value: Any, home: Path) -> Any:
    if isinstance(value, tuple):
        return tuple(_located(each, home) for each in value)
    if not isinstance(value, str):
        return value
    if value.endswith(".json") and not _SPEC.fullmatch(value):
        return _located_path(value, home)

    def replaced(match: re.Match[str]) -> str:
        kind, where = match.groups()
        takes_path = kind in _OF_REGIONS or (kind in DATASETS and DATASETS[kind].where == "PATH")
        return f"{kind}:{_located_path(where, home) if takes_path else where}"

    if value.startswith("mix:"):
        return _OF_MIXTURE.sub(replaced, value)
    return _SPEC.sub(replaced, value, count=1) if _SPEC.fullmatch(value) else value


def _located_path(where: str, home: Path) -> str:
    path, without_split = Path(where).expanduser(), Path(where.rpartition("#")[0] or where)
    if path.is_absolute() or "://" in where or path.exists() or without_split.exists():
        return where
    return str(home / where)
