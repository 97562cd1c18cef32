"""Paper style: colours that colour-blind readers can tell apart, fonts that stay text, one way to save a figure."""

from __future__ import annotations

import builtins
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biosae.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008), "Color Universal Design"
PALETTE = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
}
COLOURS = [PALETTE[name] for name in ("blue", "vermilion", "green", "orange", "purple", "sky", "black", "yellow")]
SOURCE_COLOURS = {"latent": PALETTE["blue"], "raw": PALETTE["orange"], "pca": PALETTE["green"]}
SOURCE_MARKERS = {"latent": "o", "raw": "s", "pca": "D"}
SOURCE_NAMES = {"latent": "SAE latent", "raw": "raw dimension", "pca": "PCA component"}
FLAG_COLOURS = {
    "biology": PALETTE["blue"],
    "technical": PALETTE["vermilion"],
    "mixed": PALETTE["orange"],
    "not_separable": "#767676",
    "neither": "#B4B4B4",
    "undetermined": "#D0D0D0",
}
MUTED = "#B4B4B4"
INK = "#333333"

_RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 7.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": "#555555",
    "axes.labelsize": 8,
    "axes.linewidth": 0.7,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "biosae",
    "figure.dpi": 110,
    "savefig.dpi": 300,
}


@contextmanager
def paper() -> Iterator[None]:
    """Context in which matplotlib draws in the paper style; outside of it the user's own settings are untouched.

    The first figure of a session loads the backend, and that of notebooks switches interactive mode on. This is kept:
    without it a notebook shows no further figure.
    """
    import matplotlib

    interactive = False
    try:
        with matplotlib.rc_context(_RC):
            try:
                yield
            finally:
                interactive = matplotlib.is_interactive()
    finally:
        matplotlib.interactive(interactive)


def figure(figsize: tuple[float, float]) -> Figure:
    """New figure of ``figsize`` inches, laid out so that labels do not overlap.

    In an interactive session the figure is made by pyplot, so that a notebook shows it; in a script it is a plain
    object that needs no display and no closing.
    """
    if hasattr(sys, "ps1") or hasattr(builtins, "__IPYTHON__"):
        from matplotlib import pyplot

        return pyplot.figure(figsize=figsize, layout="constrained")
    from matplotlib.figure import Figure

    return Figure(figsize=figsize, layout="constrained")


def axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """The given axes, or the only axes of a new figure of ``figsize`` inches."""
    return figure(figsize).subplots() if ax is None else ax


def save(
    fig: Figure | Axes, path: str | os.PathLike, *, formats: Sequence[str] = ("pdf", "png"), dpi: int = 300
) -> list[Path]:
    """Write a figure to ``path.pdf`` and ``path.png``, each atomically, and return the paths.

    Fonts are embedded as TrueType (type 42), so that text stays editable in drawing programs; no date is written, so
    that equal figures give equal files.

    Parameters
    ----------
    fig : matplotlib.figure.Figure or matplotlib.axes.Axes
        Of axes the whole figure is written.
    path : path-like
        Target without a suffix; the folder is made.
    formats : sequence of str
        Any of ``"pdf"``, ``"png"``, ``"svg"``.
    dpi : int
        Dots per inch of raster formats and rasterised parts.
    """
    written, fig = [], getattr(fig, "figure", fig)
    for kind in formats:
        target = Path(f"{os.fspath(path)}.{kind}")
        with paper(), atomic_path(target) as temporary:
            fig.savefig(temporary, format=kind, dpi=dpi, metadata=metadata(kind), facecolor="white")
        written.append(target)
    return written


def metadata(kind: str) -> dict[str, Any]:
    """Metadata that takes the clock time out of a figure file of this format."""
    return {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind, {})


def number(value: float, *, digits: int = 2) -> str:
    """A number for people: fixed decimals, thousands separated, a true minus sign, an en dash where there is none.

    >>> number(-0.456), number(-0.001), number(1234), number(float("nan"))
    ('−0.46', '0.00', '1,234', '–')
    """
    if value is None or value != value:
        return "–"
    if float(value).is_integer() and abs(value) >= 10:
        return f"{int(value):,}".replace("-", "−")
    text = f"{value:.{digits}f}"
    return (text.removeprefix("-") if float(text) == 0 else text).replace("-", "−")


def p_value(value: float) -> str:
    """A p- or q-value for people.

    >>> p_value(0.0312), p_value(4e-12), p_value(0.0)
    ('0.031', '4×10⁻¹²', '<10⁻³⁰⁰')
    """
    if value is None or value != value:
        return "–"
    if value >= 0.001:
        return f"{value:.2g}" if value < 0.0995 else f"{value:.2f}"
    if value < 1e-300:
        return "<10⁻³⁰⁰"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def count(n: int, noun: str) -> str:
    """``n`` and its noun, in the singular where it is one.

    >>> count(1, "patient"), count(2400, "sample")
    ('1 patient', '2,400 samples')
    """
    return f"{int(n):,} {noun}" + ("" if int(n) == 1 else "s")


def plain(text: str) -> str:
    """Text of others (classes, channels, names) so that matplotlib does not read mathematics between its dollars."""
    return str(text).replace("$", r"\$")


def wrap(text: str, *, width: int = 62) -> str:
    """Break a title line so that it fits the width of a column."""
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def name_beside(
    ax: Axes, items: Sequence[tuple[float, float, str]], *, x: np.ndarray, y: np.ndarray, rightward: bool
) -> None:
    """Write names in a column to the right (or left) of all dots at their height, with lines to their own dots.

    The limits of the axes must be set. Names keep the order of their dots' heights, and none lies on another.

    Parameters
    ----------
    items : sequence of (float, float, str)
        Dots to name: position and name.
    x, y : ndarray (n,)
        Every dot that a name should not lie on.
    rightward : bool
    """
    if not items:
        return
    low, high = ax.get_ylim()
    gap = 0.055 * (high - low)
    placed = np.array([height for _, height, _ in items], float)
    for below, above in itertools.pairwise(np.argsort(placed, kind="stable")):
        placed[above] = max(placed[above], placed[below] + gap)
    placed -= max(0.0, placed.max() - high)
    beside = x[y >= placed.min() - gap]
    column = beside.max() if rightward else beside.min()
    for (dot_x, dot_y, name), height in zip(items, placed):
        text = ax.annotate(
            name, (column, height), xytext=(10 if rightward else -10, 0), textcoords="offset points",
            ha="left" if rightward else "right", va="center", fontsize=6.5,
        )  # fmt: skip
        ax.annotate(
            "", (dot_x, dot_y), xytext=(0.0 if rightward else 1.0, 0.5), textcoords=text,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.4, "shrinkA": 1, "shrinkB": 2},
        )  # fmt: skip
