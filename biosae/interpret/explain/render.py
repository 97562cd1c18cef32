"""Items as small pictures for a rater: images as they are, signals as traces, grids and outlines drawn on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SIGNAL_SIZE = (336, 448)
"""Height and width of a drawn signal, px."""
MAX_CHANNELS = 12
INK, PAPER, MARK = (30, 30, 30), (255, 255, 255), (255, 214, 0)
_CAPTION = 16


def to_rgb(item: np.ndarray) -> np.ndarray:
    """An item as ``uint8 (H, W, 3)``: an image itself, a signal (C, T) as traces below each other, a vector as one."""
    if item.dtype == np.uint8:
        return item
    from PIL import Image, ImageDraw

    rows = (item if item.ndim == 2 else item[None])[:MAX_CHANNELS].astype(float)
    height, width = SIGNAL_SIZE
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


def outlined(rgb: np.ndarray, region: np.ndarray | None, grid: tuple[int, int] | None) -> np.ndarray:
    """A copy with the border of the region's cells drawn in yellow on black, or with the lines of a grid.

    Parameters
    ----------
    rgb : uint8 (H, W, 3)
    region : bool (rows, columns), or None
        Cells inside the border; what lies in them stays visible.
    grid : (rows, columns), or None
        Grid drawn as thin lines.
    """
    from PIL import Image, ImageDraw

    height, width = rgb.shape[:2]
    factor = max(1, -(-224 // min(height, width)))  # small tiles are enlarged so that lines do not hide them
    canvas = Image.fromarray(rgb).resize((width * factor, height * factor), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    if grid is not None:
        for segment in _segments(np.ones(grid, bool), canvas.size, inner=True):
            draw.line(segment, fill=MARK, width=1)
    if region is not None:
        segments = _segments(region, canvas.size, inner=False)
        for colour, thick in ((INK, 4), (MARK, 2)):
            for segment in segments:
                draw.line(segment, fill=colour, width=thick)
    return np.asarray(canvas).copy()


def _segments(region: np.ndarray, size: tuple[int, int], *, inner: bool) -> list[tuple[float, float, float, float]]:
    """Lines between cells inside and outside of a region; ``inner`` also those between two cells inside."""
    rows, columns = region.shape
    x = np.round(np.linspace(0, size[0] - 1, columns + 1)).tolist()
    y = np.round(np.linspace(0, size[1] - 1, rows + 1)).tolist()
    wide = np.pad(region, 1)
    found = []
    for r in range(rows + 1):
        for c in range(columns + 1):
            if c < columns and (inner or wide[r, c + 1] != wide[r + 1, c + 1]):
                found.append((x[c], y[r], x[c + 1], y[r]))
            if r < rows and (inner or wide[r + 1, c] != wide[r + 1, c + 1]):
                found.append((x[c], y[r], x[c], y[r + 1]))
    return found


def sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], *, panel: int = 224) -> np.ndarray:
    """Pictures in rows of up to five with a caption above each, ``uint8 (H, W, 3)``; every panel is a square."""
    from PIL import Image, ImageDraw

    columns = min(5, len(pictures))
    rows, step = -(-len(pictures) // columns), panel + 4
    canvas = Image.new("RGB", (columns * step - 4, rows * (step + _CAPTION)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        x, y = i % columns * step, i // columns * (step + _CAPTION)
        image = Image.fromarray(picture)
        ratio = panel / max(image.size)
        image = image.resize([max(1, round(s * ratio)) for s in image.size], Image.Resampling.BICUBIC)
        draw.text((x + 2, y + 2), caption, fill=INK)
        canvas.paste(image, (x + (panel - image.width) // 2, y + _CAPTION + (panel - image.height) // 2))
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
