"""Codes of tokens over the image that they were made of: tiles, radiographs, photographs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from biosae.errors import InputError
from biosae.pl import style
from biosae.pl.tissue import scale_bar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from biosae.interpret.maps import TokenMap

POSITIVE, NEGATIVE = style.PALETTE["vermilion"], style.PALETTE["blue"]
_OPAQUE = 0.8  # of the strongest token: what lies below must still be seen


def heatmap(
    tokens: TokenMap,
    *,
    limit: float | None = None,
    grey: bool = True,
    colorbar: bool = True,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Codes of one latent as colour over its image: vermilion above 0, blue below, nothing where it is silent.

    Parameters
    ----------
    tokens : TokenMap
        What :func:`biosae.interpret.token_map` gave, with or without samples.
    limit : float, optional
        Code of full colour. Default: the largest of this image; pass one number (``adata.var["max"]``, say) for images
        that are to be compared.
    grey : bool
        Show the image without its colours, so that they cannot be taken for codes.
    colorbar : bool
    title : str, optional
        Default: the latent and how many tokens are active.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
        Its units are pixels of the image. A thin frame is the part that the encoder saw, where that is not all.

    Raises
    ------
    InputError
        For a map of a signal, or a limit that is not above 0.
    """
    if tokens.kind == "signal":
        raise InputError("this is a map of a signal; draw it with bs.pl.strip")
    left, upper, right, lower = tokens.box
    height, width = tokens.values.shape if tokens.item is None else tokens.item.shape[:2]
    top = scale_of(tokens.values, limit)
    with style.paper():
        side = 2.8 / max(width, height)
        ax = style.axes(ax, (max(1.4, width * side) + 0.7, max(1.0, height * side) + 0.4))
        if tokens.item is not None:
            picture = tokens.item @ np.array([0.299, 0.587, 0.114]) if grey else tokens.item
            ax.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0), interpolation="antialiased")
        ax.imshow(
            coloured(tokens.values, top), extent=(left, right, lower, upper), interpolation="nearest", origin="upper"
        )
        if (left, upper, right, lower) != (0, 0, width, height):
            frame = [left, right, right, left, left], [upper, upper, lower, lower, upper]
            ax.plot(*frame, color=style.PALETTE["yellow"], linewidth=0.7)
        ax.set(xlim=(0, width), ylim=(height, 0))
        ax.set_axis_off()
        if tokens.item is not None and tokens.mpp:
            scale_bar(ax, width, 1 / tokens.mpp)
        if colorbar:
            bar(ax, tokens.values, top)
        ax.set_title(caption(tokens.latent, tokens.values, "token") if title is None else title)
    return ax


def scale_of(values: np.ndarray, limit: float | None) -> float:
    """Code of full colour."""
    if limit is not None and not 0 < limit < np.inf:
        raise InputError(f"limit={limit} must be a code above 0")
    largest = float(np.nanmax(np.abs(values), initial=0)) if np.isfinite(values).any() else 0.0
    return float(limit) if limit is not None else largest or 1.0


def coloured(values: np.ndarray, limit: float, *, opaque: float = _OPAQUE) -> np.ndarray:
    """Codes as colours with transparency, ``float (..., 4)``: as opaque as the code is large, clear where it is 0 or
    there is none."""
    from matplotlib.colors import to_rgb

    known = np.nan_to_num(values)
    out = np.empty((*values.shape, 4))
    out[..., :3] = np.where((known < 0)[..., None], to_rgb(NEGATIVE), to_rgb(POSITIVE))
    out[..., 3] = opaque * np.clip(np.abs(known) / limit, 0, 1)
    return out


def bar(ax: Axes, values: np.ndarray, limit: float, *, opaque: float = _OPAQUE, flat: bool = False) -> None:
    """A colour bar from 0 (of signed codes from the lowest) to the limit; ``flat`` for axes of little height."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    signed = bool((np.nan_to_num(values) < 0).any())
    steps = np.linspace(-limit if signed else 0, limit, 129)
    colours = coloured(steps, limit, opaque=opaque)
    blended = colours[:, :3] * colours[:, 3:] + 1 - colours[:, 3:]
    shown = ScalarMappable(Normalize(steps[0], limit), LinearSegmentedColormap.from_list("code", blended))
    shape = {"shrink": 1.0, "aspect": 6} if flat else {"shrink": 0.7, "aspect": 18}
    made = ax.figure.colorbar(shown, ax=ax, pad=0.02, label="code", ticks=MaxNLocator(2 if flat else 5), **shape)
    made.outline.set_visible(False)
    made.ax.tick_params(length=2, labelsize=6.5)


def caption(latent: str, values: np.ndarray, noun: str, *, n: tuple[int, int] | None = None) -> str:
    """``L0042: active in 12 of 196 tokens, highest 3.2``; ``n``: how many are active, of how many."""
    known = values[np.isfinite(values)]
    active, of = (np.count_nonzero(known), known.size) if n is None else n
    text = f"{style.plain(latent)}: active in {active:,} of {style.count(of, noun)}"
    if (known > 0).any():
        text += f", highest {style.number(float(known.max()))}"
    if (known < 0).any():
        text += f", lowest {style.number(float(known.min()))}"
    return text
