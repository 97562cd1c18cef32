"""Items as small pictures for a rater: images as they are, signals as traces, grids and outlines drawn on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from biosae.interpret.maps import grid_box

SIGNAL_WIDTH, SIGNAL_BAND = 896, 64
"""Width of a drawn signal and height of a channel of it, px."""
SIGNAL_HEIGHTS = (192, 768)
MAX_CHANNELS = 32
INK, PAPER, MARK, SHADE = (30, 30, 30), (255, 255, 255), (255, 214, 0), (255, 236, 140)
_CAPTION = 22


@dataclass(frozen=True)
class Marks:
    """What is drawn over an item: borders of cells of the token grid.

    Attributes
    ----------
    shape
        Rows and columns of the token grid.
    rows, columns
        Edges of the cells in tokens, from 0 to the number of rows (columns).
    region
        Cells (rows, columns) to outline; None: every cell, as a grid of thin lines.
    identity
        Of the embeddings; says where on the item the tokens lie.
    """

    shape: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    region: tuple[tuple[bool, ...], ...] | None = None
    identity: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def what(self) -> list[Any]:
        """What is drawn, without where."""
        return [self.shape, self.rows, self.columns, self.region]


def marked(item: np.ndarray, marks: Marks, samples: Any) -> np.ndarray:
    """An item with marks where its tokens lie: images through the encoder's resize and crop, signals in time.

    A region is outlined on images, and shaded on signals. A signal is drawn with the channels that the rows of the grid
    stand for, or with all where one row stands for all.

    Raises
    ------
    InputError
        If the physical scale or the rate is needed and unknown.
    """
    identity, (n_rows, n_columns) = marks.identity, marks.shape
    box = (0.0, 0.0, 1.0, 1.0)
    if item.dtype == np.uint8:
        height, width = item.shape[:2]
        box = np.divide(grid_box(identity, (height, width), marks.shape), (width, height, width, height))
    elif item.ndim == 2:
        if identity is not None:
            seconds = grid_box(identity, item.shape, marks.shape, kind="signal")[2]
            box = (0.0, 0.0, min(1.0, seconds * samples.rate / item.shape[1]), 1.0)
        if n_rows > 1:
            item = item[_channels(identity, list(samples.channels), n_rows)]
    left, upper, right, lower = box
    x = left + (right - left) * np.array(marks.columns) / n_columns
    y = upper + (lower - upper) * np.array(marks.rows) / n_rows
    region = None if marks.region is None else np.asarray(marks.region, bool)
    rgb = to_rgb(item, most=max(MAX_CHANNELS, n_rows))
    return outlined(rgb, region, x, y) if item.dtype == np.uint8 or region is None else shaded(rgb, region, x, y)


def shaded(rgb: np.ndarray, region: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A copy with the paper under a region in pale yellow; arguments as of :func:`outlined`."""
    height, width = rgb.shape[:2]
    row = np.searchsorted(y, (np.arange(height) + 0.5) / height) - 1
    column = np.searchsorted(x, (np.arange(width) + 0.5) / width) - 1
    inside = np.zeros((height, width), bool)
    r, c = (row >= 0) & (row < len(y) - 1), (column >= 0) & (column < len(x) - 1)
    inside[np.ix_(r, c)] = region[np.ix_(row[r], column[c])]
    out = rgb.copy()
    out[inside & (rgb == PAPER).all(axis=2)] = SHADE
    return out


def _channels(identity: Mapping[str, Any] | None, names: list[str], n_rows: int) -> list[int]:
    """Channels of the samples that the rows of the grid stand for."""
    identity = identity or {}
    used = (identity.get("preprocess") or {}).get("channels")
    used = used if used is not None else (identity.get("given") or {}).get("channels")
    found = [names.index(str(name)) for name in (() if used is None else used) if str(name) in names]
    return found if len(found) == n_rows else list(range(n_rows))


def to_rgb(item: np.ndarray, *, most: int = MAX_CHANNELS) -> np.ndarray:
    """An item as ``uint8 (H, W, 3)``: an image itself, a signal (C, T) as traces below each other, a vector as one."""
    if item.dtype == np.uint8:
        return item
    from PIL import Image, ImageDraw

    rows = (item if item.ndim == 2 else item[None])[:most].astype(float)
    height, width = int(np.clip(SIGNAL_BAND * len(rows), *SIGNAL_HEIGHTS)), SIGNAL_WIDTH
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    known = np.isfinite(rows)
    centre = np.array([np.median(r[k]) if k.any() else 0.0 for r, k in zip(rows, known)])
    spread = [np.ptp(np.percentile(r[k], [0.5, 99.5])) for r, k in zip(rows, known) if k.any()]
    band = height / len(rows)
    scale = 0.9 * band / (max([*spread, 0.0]) or 1.0)
    for i, row in enumerate(rows):
        low, high = _columns(row - centre[i], width)
        middle = (i + 0.5) * band
        for x in np.flatnonzero(np.isfinite(low)):
            top, bottom = np.clip(middle - scale * np.array([high[x], low[x]]), i * band, (i + 1) * band - 1)
            draw.line([(x, top), (x, bottom)], fill=INK)
            if x and np.isfinite(low[x - 1]):  # join with the column before, so that steep parts have no gap
                before = np.clip(middle - scale * (high[x - 1] + low[x - 1]) / 2, i * band, (i + 1) * band - 1)
                draw.line([(x - 1, before), (x, (top + bottom) / 2)], fill=INK)
    return np.asarray(canvas).copy()


def _columns(row: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest value of the signal in each column of pixels; NaN where nothing was recorded."""
    edges = np.linspace(0, len(row), width + 1)
    low, high = np.full(width, np.nan), np.full(width, np.nan)
    for x in range(width):
        part = row[int(edges[x]) : max(int(edges[x]) + 1, int(edges[x + 1]))]
        part = part[np.isfinite(part)]
        if len(part):
            low[x], high[x] = part.min(), part.max()
    return low, high


def outlined(rgb: np.ndarray, region: np.ndarray | None, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A copy with the border of a region drawn in yellow on black, or with all cells as a grid of thin lines.

    Parameters
    ----------
    rgb : uint8 (H, W, 3)
        Enlarged by a whole factor if it is smaller than 224 px, so that lines do not hide it.
    region : bool (rows, columns), or None
        Cells inside the border; what lies in them stays visible. None: the grid.
    x, y : (columns + 1,), (rows + 1,)
        Edges of the cells as shares of width and height.
    """
    from PIL import Image, ImageDraw

    height, width = rgb.shape[:2]
    factor = max(1, -(-224 // min(height, width)))
    canvas = Image.fromarray(rgb).resize((width * factor, height * factor), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    x, y = np.round(x * (canvas.width - 1)), np.round(y * (canvas.height - 1))
    if region is None:
        across, down = np.ones((len(y), len(x) - 1), bool), np.ones((len(y) - 1, len(x)), bool)
    else:
        cells = np.pad(region, 1)
        across, down = cells[:-1, 1:-1] != cells[1:, 1:-1], cells[1:-1, :-1] != cells[1:-1, 1:]
    lines = [(x[c], y[r], x[c + 1], y[r]) for r, c in np.argwhere(across)]
    lines += [(x[c], y[r], x[c], y[r + 1]) for r, c in np.argwhere(down)]
    for colour, thick in ((MARK, 1),) if region is None else ((INK, 4), (MARK, 2)):
        for line in lines:
            draw.line([float(v) for v in line], fill=colour, width=thick)
    return np.asarray(canvas).copy()


def sheet(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Pictures with a caption above each, ``uint8 (H, W, 3)``: five to a row, wide ones two to a row."""
    from PIL import Image, ImageDraw, ImageFont

    flat = max(p.shape[0] / p.shape[1] for p in pictures)
    most, panel = (5, (224, 224)) if flat > 0.6 else (2, (568, round(568 * flat)))
    columns = min(most, len(pictures))
    rows, step = -(-len(pictures) // columns), (panel[0] + 4, panel[1] + 4 + _CAPTION)
    canvas = Image.new("RGB", (columns * step[0] - 4, rows * step[1]), PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=16)
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        x, y = i % columns * step[0], i // columns * step[1]
        image = Image.fromarray(picture)
        ratio = min(panel[0] / image.width, panel[1] / image.height)
        image = image.resize([max(1, round(s * ratio)) for s in image.size], Image.Resampling.BICUBIC)
        draw.text((x + 2, y + 1), caption, fill=INK, font=font)
        canvas.paste(image, (x + (panel[0] - image.width) // 2, y + _CAPTION + (panel[1] - image.height) // 2))
    return np.asarray(canvas).copy()


def png(rgb: np.ndarray, *, longest: int | None = None) -> bytes:
    """PNG of a picture, without metadata; ``longest`` shrinks its longer side to so many px."""
    import io

    from PIL import Image

    image = Image.fromarray(rgb)
    if longest is not None and max(image.size) > longest:
        image = image.resize(
            [max(1, round(s * longest / max(image.size))) for s in image.size], Image.Resampling.LANCZOS
        )
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
