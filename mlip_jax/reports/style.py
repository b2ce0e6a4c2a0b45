"""One look for all pictures: palette, type, and figures without pyplot's global state."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mlip_jax.core.files import write_atomically
from mlip_jax.data.images.preprocessing import decode, flatten

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK = "#1f2937"
QUIET = "#6b7280"
GRID = "#e5e7eb"

# Okabe and Ito's palette, which readers of every colour vision can tell apart. The spatial
# domain is blue, the frequency domain orange; the global level dark, the token level light.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1f2937")
PERSPECTIVES = {
    "spatial_global": "#0072b2",
    "spatial_tokens": "#56b4e9",
    "frequency_global": "#d55e00",
    "frequency_tokens": "#e69f00",
}

_RC: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def style() -> Iterator[None]:
    """Figures made and saved inside have the report's look; nothing outlasts it."""
    with matplotlib.rc_context(_RC):
        yield


def picture(axes: Axes) -> None:
    """Makes axes that show an image: no ticks, no grid, a thin frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, color="#d1d5db", linewidth=0.8)


def save(figure: Figure, path: str | os.PathLike[str]) -> str:
    """Writes a PNG and gives it as a data URI."""
    out = io.BytesIO()
    figure.savefig(out, dpi=144)
    write_atomically(Path(path), out.getvalue())
    return data_uri(out.getvalue(), "image/png")


def thumbnail(image: bytes, size: int = 160) -> str:
    """An encoded image of any kind, upright, as a small JPEG data URI, on white if transparent."""
    flat = flatten(decode(image, at_least=size, upright=True), "white")
    flat.thumbnail((size, size), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    flat.save(out, "JPEG", quality=88)
    return data_uri(out.getvalue(), "image/jpeg")


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as an address that a page can hold."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
