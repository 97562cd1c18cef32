"""Tables and figures as the report prints them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.pl import results, style

HEADINGS = {
    "target": "target", "latent": "feature", "source": "source", "estimate": "estimate", "n_units": "units",
    "n_samples": "samples", "n_groups": "groups", "p": "p", "q": "q", "p_maxt": "p (max-T)", "status": "status",
    "stratum": "stratum", "groups_shared": "patients in both",
    "ci": "95 % CI", "flag": "flag", "eta2_biology": "η² biology", "eta2_technical": "η² technical",
    "balanced_accuracy": "balanced accuracy", "chance": "chance", "unit": "unit", "method": "method",
    "n_queries": "queries", "n_left_out": "left out",
    "n_units_discovery": "discovery units", "n_units_replication": "replication units",
}  # fmt: skip


@dataclass
class Table:
    """Cells as text, each column numeric (right-aligned) or not."""

    headings: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    caption: str = ""


def table(
    frame: pd.DataFrame, columns: Mapping[str, str] | None = None, *, caption: str = "", digits: int = 2
) -> Table:
    """Print a DataFrame: counts with separators, p-values to two figures, estimates to ``digits`` decimals.

    Parameters
    ----------
    frame : DataFrame
        ``ci_low`` and ``ci_high`` become one column ``ci``.
    columns : mapping, optional
        Column -> heading, in order; columns that are absent are left out. All columns by default.
    caption : str
    digits : int
    """
    frame = frame.reset_index(drop=True)
    if {"ci_low", "ci_high"} <= set(frame):
        spans = [interval(a, b, digits=digits) for a, b in zip(frame["ci_low"], frame["ci_high"])]
        after = frame.columns.get_loc("ci_low")
        frame = frame.drop(columns=["ci_low", "ci_high"])
        frame.insert(min(after, frame.shape[1]), "ci", spans)
    if columns is None:
        columns = {c: HEADINGS.get(c, str(c).replace("_", " ")) for c in frame}
    held = {c: h for c, h in columns.items() if c in frame and frame[c].notna().any()}
    numeric = [(pd.api.types.is_numeric_dtype(frame[c]) and frame[c].dtype != bool) or c == "ci" for c in held]
    cells = [[cell(c, v, digits=digits) for v in frame[c]] for c in held]
    return Table(list(held.values()), [list(row) for row in zip(*cells)], numeric, caption)


_MAY_BE_SAID_ONCE = (
    "effect", "unit", "method", "status", "status_replication", "biology", "chance", "n_units", "n_groups", "n_samples",
    "n_classes", "n_splits", "n_units_discovery", "n_units_replication", "groups_shared",
)  # fmt: skip


def without_constants(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Drop columns that say the same in every one of several rows, and put them into a sentence."""
    said = []
    for column in _MAY_BE_SAID_ONCE if len(frame) > 1 else ():
        if column in frame and len(set(frame[column].astype(str))) == 1 and frame[column].notna().all():
            value = frame[column].iloc[0]
            frame = frame.drop(columns=column)
            if value != "ok":
                said.append(
                    f"{HEADINGS.get(column, column.removeprefix('n_'))} {cell(column, value)}".replace("_", " ")
                )
    return frame, f" In every row: {', '.join(said)}." if said else ""


def interval(low: float, high: float, *, digits: int = 2) -> str:
    """``0.12 to 0.44``, or a dash."""
    if pd.isna(low) or pd.isna(high):
        return "–"
    return f"{style.number(low, digits=digits)} to {style.number(high, digits=digits)}"


def cell(column: str, value: Any, *, digits: int = 2) -> str:
    """One value of a named column, as printed."""
    if value is None or (np.isscalar(value) and pd.isna(value)):
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if column == "effect":
        return results.effect_name(value)
    if isinstance(value, str):
        return value.replace("_", " ") if column in ("status", "flag", "source", "method") else value
    if column in ("p", "q") or column.startswith(("p_", "q_")):
        return style.p_value(float(value))
    if column.startswith("n_") or column in ("n", "samples", "patients", "slides", "rows") or _whole(value):
        return f"{int(value):,}"
    return style.number(float(value), digits=digits) if abs(value) < 1000 else f"{value:,.0f}"


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer))


@dataclass
class Picture:
    """A figure inside the page: ``src`` is a data URI."""

    src: str
    alt: str
    caption: str
    width: int


class Figures:
    """Draws figures, files each one as PDF and PNG, and hands it out as an inline SVG image.

    Parameters
    ----------
    folder : Path
        Where the files go.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.refused: dict[str, str] = {}

    def add(
        self,
        name: str,
        draw: Callable[..., Any],
        *args: Any,
        alt: str,
        caption: str,
        size: tuple[float, float],
        whole: bool = False,
        **kwargs: Any,
    ) -> Picture | None:
        """Draw with ``draw(*args, ax=..., **kwargs)``, or with ``fig=`` what takes a ``whole`` figure; None (and a
        noted reason) where the data do not allow it."""
        from matplotlib.figure import Figure

        with style.paper():
            fig = Figure(figsize=size, layout="constrained")
            try:
                draw(*args, **({"fig": fig} if whole else {"ax": fig.subplots()}), **kwargs)
            except InputError as error:
                self.refused[name] = str(error)
                return None
            _freeze(fig)
            style.save(fig, self.folder / name)
            return Picture(_svg(fig), alt, caption, round(size[0] * 96))

    def file_only(self, name: str, draw: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """File a figure that the page shows in another form (``draw`` takes ``fig=``)."""
        from matplotlib.figure import Figure

        with style.paper():
            size = kwargs.pop("size")
            fig = Figure(figsize=size, layout="constrained")
            draw(*args, fig=fig, **kwargs)
            _freeze(fig)
            style.save(fig, self.folder / name, dpi=150)


def _freeze(fig: Any) -> None:
    """Lay the figure out once, so that each format is drawn without solving the layout again."""
    fig.draw_without_rendering()
    fig.set_layout_engine("none")


def _svg(fig: Any) -> str:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", metadata=style.metadata("svg"), dpi=150)
    return data_uri(buffer.getvalue(), "image/svg+xml")


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as a ``data:`` address, so that the page needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(image: np.ndarray, *, side: int = 112) -> str:
    """An image as a small JPEG in a data URI: the middle square, at most ``side`` pixels wide."""
    from PIL import Image

    picture = Image.fromarray(np.asarray(image))
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    picture = picture.crop((left, top, left + edge, top + edge))
    if edge > side:
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=85)
    return data_uri(buffer.getvalue(), "image/jpeg")
