"""What the Frequency Stage has learned: the gain of its filters over spatial frequency."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Complex, Float
from matplotlib.figure import Figure

from mlip_jax.reports.style import QUIET, SERIES, picture

CHANNELS = 4
_MAP = "viridis"


def gain(
    kernel: Complex[np.ndarray, "height half channels"], height: int, width: int
) -> Float[np.ndarray, "height width channels"]:
    """|K| over the full spectrum, zero frequency in the middle.

    The columns that the half spectrum leaves out mirror those it holds. In the zero and Nyquist
    columns the inverse transform keeps the Hermitian part only; so does this.
    """
    response = np.fft.irfft2(kernel, s=(height, width), axes=(0, 1))
    return np.abs(np.fft.fftshift(np.fft.fft2(response, axes=(0, 1)), axes=(0, 1)))


def radial_profile(
    gains: Float[np.ndarray, "height width"],
) -> tuple[Float[np.ndarray, " rings"], Float[np.ndarray, " rings"]]:
    """Mean gain on rings one cycle wide: frequencies in cycles per image, and gains."""
    vertical, horizontal = (np.arange(n) - n // 2 for n in gains.shape)
    ring = np.rint(np.hypot(vertical[:, None], horizontal[None, :])).astype(int)
    counts = np.bincount(ring.ravel())
    sums = np.bincount(ring.ravel(), weights=gains.ravel())
    present = np.flatnonzero(counts)
    return present.astype(np.float64), sums[present] / counts[present]


def draw_filters(
    kernels: Sequence[Complex[np.ndarray, "height half channels"]], width: int
) -> Figure:
    """A row a block: mean gain, single channels; below, the radial profile of each block.

    Args:
      kernels: one half spectrum [h, w // 2 + 1, D] a block.
      width: w, which the half spectrum alone does not tell.
    """
    spectra = [gain(kernel, kernel.shape[0], width) for kernel in kernels]
    shown = min(CHANNELS, spectra[0].shape[-1])
    figure = Figure(figsize=(11.5, 2.25 * len(kernels) + 3.1), layout="constrained")
    heights = (2.25 * len(kernels), 3.1)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).ravel()
    grid = top.subplots(len(kernels), 1 + shown, squeeze=False, width_ratios=(1.35,) + (1,) * shown)
    means = [spectrum.mean(axis=-1) for spectrum in spectra]
    highest = max(np.max(mean) for mean in means)
    for block, (row, spectrum, mean) in enumerate(zip(grid, spectra, means, strict=True)):
        drawn = row[0].imshow(mean, cmap=_MAP, vmin=0, vmax=highest, **_frame(mean.shape))
        top.colorbar(drawn, ax=row[0], shrink=0.9, pad=0.04).outline.set_visible(False)
        row[0].set_title(f"Block {block + 1}: mean gain")
        row[0].grid(visible=False)
        row[0].set_ylabel("vertical", fontsize=8)
        if block == len(kernels) - 1:
            row[0].set_xlabel("horizontal, cycles an image", fontsize=8)
        for axes, channel in zip(row[1:], _spread_channels(spectrum, shown), strict=True):
            axes.imshow(spectrum[..., channel], cmap=_MAP, vmin=0, **_frame(mean.shape))
            axes.set_title(f"channel {channel}", fontsize=8.5, fontweight="normal", color=QUIET)
            picture(axes)

    axes = bottom.subplots(1, 1)
    axes.set_title("Gain by frequency, mean over channels and directions")
    for block, mean in enumerate(means):
        frequencies, gains = radial_profile(mean)
        axes.plot(
            frequencies,
            gains,
            color=SERIES[block % len(SERIES)],
            linestyle="-" if block < len(SERIES) else "--",
            marker="o",
            markersize=4,
            label=f"block {block + 1}",
        )
    nyquist = width / 2
    axes.axvline(nyquist, color=QUIET, linewidth=1, linestyle=":")
    axes.annotate(
        "finest along an axis",
        (nyquist, 0.03),
        xycoords=("data", "axes fraction"),
        xytext=(5, 0),
        textcoords="offset points",
        color=QUIET,
        fontsize=8,
    )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("spatial frequency, cycles an image (0: the mean; higher: finer detail)")
    axes.set_ylabel("|K|")
    axes.legend(ncols=2, loc="best")
    return figure


def _frame(shape: tuple[int, int]) -> dict[str, object]:
    """Extent that puts the tick of a frequency at the middle of its cell."""
    height, width = shape
    left, low = -(width // 2) - 0.5, -(height // 2) - 0.5
    return {"extent": (left, left + width, low + height, low), "interpolation": "nearest"}


def _spread_channels(spectrum: Float[np.ndarray, "height width channels"], count: int) -> list[int]:
    """Channels from the lowest-passing to the highest-passing, at even steps."""
    height, width, _ = spectrum.shape
    radius = np.hypot(
        (np.arange(height) - height // 2)[:, None], (np.arange(width) - width // 2)[None, :]
    )
    weights = spectrum.sum(axis=(0, 1))
    centroid = np.einsum("hwd,hw->d", spectrum, radius) / np.where(weights > 0, weights, 1)
    order = np.argsort(centroid, kind="stable")
    return [int(order[i]) for i in np.linspace(0, len(order) - 1, count).round().astype(int)]
