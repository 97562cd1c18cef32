"""Codes over time beside the traces of a signal: EEG and ECG with their leads, wearables, whole recordings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from biosae.errors import InputError
from biosae.pl import style
from biosae.pl.heatmap import bar, caption, coloured, scale_of
from biosae.pl.traces import traces

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from biosae.interpret.maps import TokenMap

_BEHIND = 0.6  # opacity of the strongest code behind a trace


def strip(
    tokens: TokenMap,
    *,
    limit: float | None = None,
    start: float = 0.0,
    max_channels: int = 16,
    colorbar: bool = True,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Traces of a signal with the codes of one latent behind them, or a strip of codes along a recording.

    Where tokens belong to single channels (leads), each code lies behind its own lead; where they span all channels, it
    lies behind all of them. Vermilion is above 0, blue below.

    Parameters
    ----------
    tokens : TokenMap
        What :func:`biosae.interpret.token_map` gave of a signal, or :func:`biosae.interpret.recording_map`.
    limit : float, optional
        Code of full colour; default: the largest that is shown.
    start : float
        Time of the window's first sample in its recording, s.
    max_channels : int
        Further channels are left out, as in :func:`biosae.pl.traces`.
    colorbar : bool
    title : str, optional
        Default: the latent and how many tokens are active.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
        x: seconds. Grey along a recording: no window there.

    Raises
    ------
    InputError
        For a map of an image, rows that belong to no channel, or a limit that is not above 0.
    """
    if tokens.kind != "signal":
        raise InputError("this is no map of a signal; draw it with bs.pl.heatmap, or pass samples= to token_map")
    left, _, right, _ = tokens.box
    top = scale_of(tokens.values, limit)
    text = caption(tokens.latent, tokens.values, "step" if tokens.item is None else "token")
    opaque = 1.0 if tokens.item is None else _BEHIND
    with style.paper():
        if tokens.item is None:
            ax = _along(tokens, top, ax)
        else:
            ax = traces(tokens.item, rate=tokens.rate, unit=tokens.unit or "native", channels=tokens.channels,
                        start=start, max_channels=max_channels, ax=ax)  # fmt: skip
            heights = ax.get_yticks()
            half = np.ptp(heights) / max(len(heights) - 1, 1) / 2 or np.abs(ax.get_ylim()).max()
            low, high = heights.min() - half, heights.max() + half
            limits = ax.get_xlim()
            bands = [(tokens.values[0], low, high)] if not tokens.rows else [
                (row, heights[channel] - half, heights[channel] + half)
                for channel, row in zip(_channels(tokens), tokens.values) if channel < len(heights)
            ]  # fmt: skip
            for row, bottom, above in bands:
                ax.imshow(coloured(row[None], top, opaque=opaque), extent=(start + left, start + right, bottom, above),
                          aspect="auto", interpolation="nearest", zorder=0)  # fmt: skip
            ax.set(xlim=limits, ylim=(min(low, ax.get_ylim()[0]), max(high, ax.get_ylim()[1])))
            text = f"{text}; {ax.get_title(loc='left')}".removesuffix("; ")
        if colorbar:
            bar(ax, tokens.values, top, opaque=opaque, flat=len(ax.get_yticks()) < 4)
        ax.set_title(text if title is None else title, loc="left")
    return ax


def _channels(tokens: TokenMap) -> list[int]:
    """Number of the channel of each row: by name, or by place where there is one row a channel."""
    if set(tokens.rows) <= set(tokens.channels):
        return [tokens.channels.index(name) for name in tokens.rows]
    if len(tokens.rows) != len(tokens.item):
        raise InputError(
            f"the map has {len(tokens.rows)} rows ({', '.join(tokens.rows[:4])}), the signal {len(tokens.item)} "
            "channels of other names; which is whose is not known. Pass the samples that were embedded"
        )
    return list(range(len(tokens.rows)))


def _along(tokens: TokenMap, top: float, ax: Axes | None) -> Axes:
    """Rows of codes over time; without a window, grey."""
    left, _, right, n_rows = tokens.box
    ax = style.axes(ax, (6.9, 0.9 + 0.2 * n_rows))
    ax.set_facecolor("#E8E8E8")
    white = np.where(np.isnan(tokens.values)[..., None], (1.0, 1.0, 1.0, 0.0), (1.0, 1.0, 1.0, 1.0))
    extent = (left, right, n_rows - 0.5, -0.5)
    for layer in (white, coloured(tokens.values, top, opaque=1.0)):
        ax.imshow(layer, extent=extent, aspect="auto", interpolation="nearest")
    names = tokens.rows or ("",)
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel="time in the recording (s)", xlim=(left, right))
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return ax
