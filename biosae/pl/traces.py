"""Signals as stacked traces with a scale bar, and items of every kind as small pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from biosae.errors import InputError
from biosae.pl import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_POINTS = 2000  # on paper no more can be told apart


def traces(
    x: np.ndarray,
    *,
    rate: float,
    unit: str,
    channels: Sequence[str] = (),
    start: float = 0.0,
    max_channels: int = 16,
    ax: Axes | None = None,
) -> Axes:
    """Channels of a signal below each other, each about its own median, with a bar of the amplitude.

    Parameters
    ----------
    x : array of shape (C, T)
        Values in ``unit``; gaps (NaN) stay gaps.
    rate
        Samples a second, Hz.
    unit
        Unit of the values, for the bar.
    channels
        Names of all channels, first at the top; without any they are numbered.
    start
        Time of the first sample in the recording, s.
    max_channels
        Further channels are left out and counted in the title.
    ax
        Axes to draw into.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If ``x`` is not of two axes, or ``channels`` does not name each of them.
    """
    x = np.asarray(x, dtype=float)
    if x.ndim != 2:
        raise InputError(f"a signal has shape (channels, time), not {x.shape}")
    if len(channels) not in (0, len(x)):
        raise InputError(f"{len(channels)} names for {len(x)} channels; name every channel, or none")
    shown = x[:max_channels]
    centred, step = _stacked(shown)
    offsets = -step * np.arange(len(shown))
    with style.paper():
        ax = style.axes(ax, (6.9, 0.8 + 0.22 * len(shown)))
        seconds, lines = _thinned(centred, rate)
        for line, offset in zip(lines, offsets):
            ax.plot(start + seconds, line + offset, color=style.INK, linewidth=0.6)
        names = list(channels)[: len(shown)] or [str(i) for i in range(len(shown))]
        ax.set(yticks=offsets, yticklabels=names, xlabel="time (s)", xlim=(start, start + x.shape[1] / rate))
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
        bar = _round_down(step)
        ax.plot([1.01, 1.01], [offsets[0], offsets[0] - bar], transform=ax.get_yaxis_transform(), color=style.INK,
                linewidth=1.4, clip_on=False)  # fmt: skip
        ax.text(1.02, offsets[0] - bar / 2, f"{bar:g} {unit.replace('u', 'µ', 1) if unit.startswith('u') else unit}",
                transform=ax.get_yaxis_transform(), va="center", fontsize=6.5)  # fmt: skip
        if len(x) > len(shown):
            ax.set_title(f"{len(shown)} of {len(x)} channels", loc="left", fontsize=7.5)
    return ax


def picture(item: np.ndarray, *, size: int = 224) -> np.ndarray:
    """A small picture of any item, ``uint8 (H, W, 3)``: an image itself, a signal's traces, a vector's values."""
    if item.dtype == np.uint8:
        return item
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.paper():
        fig = Figure(figsize=(size / 100, size / 100), dpi=100, layout="none")
        ax = fig.add_axes((0.02, 0.02, 0.96, 0.96))
        rows = item[:12] if item.ndim == 2 else item[None]
        centred, step = _stacked(rows)
        seconds, lines = _thinned(centred, 1.0)
        for i, line in enumerate(lines):
            ax.plot(seconds, line - i * step, color=style.INK, linewidth=0.7)
        ax.set_axis_off()
        canvas = FigureCanvasAgg(fig)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _stacked(x: np.ndarray) -> tuple[np.ndarray, float]:
    """Channels less their median, and a distance between them at which few overlap (the 99 % range of the widest)."""
    known = np.isfinite(x)
    medians = np.array([np.median(row[k]) if k.any() else 0.0 for row, k in zip(x, known)])
    centred = x - medians[:, None]
    wide = [np.subtract(*np.percentile(row[k], [99.5, 0.5])) for row, k in zip(centred, known) if k.any()]
    return centred, float(max([*wide, 0.0])) or 1.0


def _thinned(x: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and channels; long traces keep the least and the greatest value of each stretch, so no peak is lost."""
    n = x.shape[1]
    stretch = -(-n // (_MAX_POINTS // 2))
    if stretch <= 2:
        return np.arange(n) / rate, x
    parts = np.pad(x, ((0, 0), (0, -n % stretch)), mode="edge").reshape(len(x), -1, stretch)
    out = np.stack([parts.min(axis=2), parts.max(axis=2)], axis=2).reshape(len(x), -1)
    edges = np.minimum(np.arange(parts.shape[1] + 1) * stretch, n)  # the last stretch may be shorter
    return np.repeat((edges[1:] + edges[:-1]) / 2 / rate, 2), out


def _round_down(value: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above a value.

    >>> _round_down(37.0), _round_down(0.21)
    (20.0, 0.2)
    """
    power = 10.0 ** np.floor(np.log10(value))
    return float(max(m for m in (1, 2, 5) if m * power <= value * (1 + 1e-9)) * power)
