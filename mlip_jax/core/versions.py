"""The packages that decide a run's numbers, and the versions of JAX that were tested."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Iterator, Mapping

from mlip_jax.core.errors import Told

__version__ = "0.1.0"
# The first version and the last minor one that the whole test suite passed on. Nothing is said
# about another one unless something fails.
TESTED_JAX = ("0.9.0", "0.12")
_PACKAGES = ("mlip_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def installed() -> dict[str, str]:
    """Python's version and those of the packages, by name; what is not installed is left out."""
    import importlib.metadata  # slow, and a signal is heard once the program has begun

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def changes(before: Mapping[str, str]) -> list[str]:
    """What has another version now, such as "jax 0.10.2 -> 0.12.0"."""
    now = installed()
    return [
        f"{package} {version} -> {now[package]}"
        for package, version in before.items()
        if package in now and now[package] != version
    ]


@contextlib.contextmanager
def named_in_errors() -> Iterator[None]:
    """Adds to an unexpected error, below its traceback, that this JAX was not tested."""
    try:
        yield
    except Told:  # which says all that there is to say
        raise
    except Exception as error:
        if note := _untested():
            error.add_note(note)
        raise


def _untested() -> str:
    version = installed().get("jax", "")
    first, last = TESTED_JAX
    numbers = _numbers(version)
    if not version or _numbers(first) <= numbers and numbers[:2] <= _numbers(last):
        return ""
    return f"mlip_jax was tested with jax {first} to {last}; installed is jax {version}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
