"""Config files: found by path or by the name of a packaged one, run, and checked."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mlip_jax.core import schema
from mlip_jax.core.errors import UserError, suggestion
from mlip_jax.recipes.lengths import settle

_PACKAGE = Path(__file__).parents[1]


def packaged_folder() -> Path:
    """Where the package's own config files lie: in it when installed, beside it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def packaged() -> list[str]:
    """The names of the package's own configs, such as "mlip"."""
    return sorted(path.stem for path in packaged_folder().glob("*.py") if path.stem[0] != "_")


def load_config(argument: str) -> ConfigDict:
    """The config of "FILE", "NAME" of a packaged one, or of either with ":name=value,..." behind.

    Raises:
      UserError: when there is no such file, for what it raises, and for a config with an unknown
        key.
    """
    name, *values = argument.split(":", 1)
    path = _find(name)
    # Files of version 0.1.0 import from a module of this name; `mlip_jax.config` is a function now.
    sys.modules.setdefault("mlip_jax.config", schema)
    try:
        config = runpy.run_path(str(path))["get_config"](*values)
        # A round trip through the schema: a key that it does not know, or a value of another
        # type, is a mistake in the file.
        return schema.from_json(schema.to_json(config))
    except UserError as error:
        raise UserError(f"{argument}: {error}") from error
    except Exception as error:  # the file is the user's: whatever it raises is theirs to mend
        raise UserError(f"config file {name}{_line(error, path)}: {_reason(error)}") from error


def import_file(name: str) -> None:
    """Runs a Python file for what it registers.

    Raises:
      UserError: when there is no such file, and for what it raises.
    """
    path = Path(name)
    if not path.is_file():
        raise UserError(f"there is no file {name} to import")
    try:
        runpy.run_path(name)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except Exception as error:  # the same
        raise UserError(f"{name}{_line(error, path)}: {_reason(error)}") from error


def with_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """The config with other values by dotted key, in place.

    Raises:
      UserError: for an unknown key, or a value of another type.
    """
    for key, value in overrides.items():
        schema.set_key(config, key, value)
    settle(config, overrides)
    return config


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    packaged_names = packaged()
    if name in packaged_names:
        return packaged_folder() / f"{name}.py"
    if path.stem in packaged_names:
        raise UserError(
            f"there is no config file {name}; the package has one of that name: "
            f"--config={path.stem}"
        )
    local_files = sorted(str(file) for file in path.parent.glob("*.py"))
    listed = (
        f"in {path.parent}: {', '.join(local_files)}" if local_files else f"none in {path.parent}"
    )
    raise UserError(
        f"there is no config file {name}; packaged: {', '.join(packaged_names)}; {listed}"
        f"{suggestion(name, [*packaged_names, *local_files])}"
    )


def _line(error: Exception, file: Path) -> str:
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines = []
    step = error.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename == str(file):
            lines.append(step.tb_lineno)
        step = step.tb_next
    return f", line {lines[-1]}" if lines else ""


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args == ("get_config",):
        return "it defines no function get_config"
    return f"{type(error).__name__}: {error}"
