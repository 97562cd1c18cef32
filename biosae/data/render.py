"""Drawing of phantom histology tiles: where nuclei lie, and what each cell type looks like at 0.5 um per pixel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MPP = 0.5
GAP = 1.5  # least distance between two nuclei, px


@dataclass(frozen=True)
class Cell:
    """Appearance of one cell type. Lengths in pixels, stains in optical density, the rest relative to them."""

    density: float  # mean number in 96 x 96 px
    long: float  # semi-axes of the nucleus
    short: float
    stain: float  # haematoxylin of the nucleus
    fine: float = 0.0  # amplitude of fine and of coarse chromatin
    coarse: float = 0.0
    rim: float = 0.0  # darker nuclear membrane
    clumps: float = 0.0  # clock-face clumps under the membrane
    nucleoli: int = 0
    bend: float = 0.0  # curvature of the long axis
    notch: float = 0.0  # kidney-shaped indentation
    body: float = 0.0  # radius of the cytoplasm, in units of the nucleus' long semi-axis; 0 draws none
    body_shift: float = 0.0  # distance of the cytoplasm's centre from the nucleus', same units
    body_stain: tuple[float, float] = (0.0, 0.0)  # haematoxylin and eosin added by the cytoplasm
    body_texture: float = 0.0


CELLS: dict[str, Cell] = {
    "epithelial": Cell(
        4.0, 9.0, 7.2, 0.80, fine=0.10, coarse=0.10, rim=0.40, nucleoli=1, body=1.7, body_stain=(0.04, 0.14)
    ),
    "lymphocyte": Cell(3.5, 5.8, 5.4, 1.65, coarse=0.10, rim=0.05),
    "plasma": Cell(
        1.8, 5.9, 5.5, 1.35, clumps=0.40, rim=0.15, body=1.75, body_shift=0.75, body_stain=(0.38, 0.22),
        body_texture=0.15,
    ),
    "fibroblast": Cell(2.0, 13.0, 2.9, 1.15, fine=0.12, coarse=0.08, bend=0.10),
    "macrophage": Cell(
        1.2, 7.8, 5.8, 0.85, fine=0.06, coarse=0.22, rim=0.12, notch=0.55, body=1.9, body_shift=0.5,
        body_stain=(0.03, -0.10), body_texture=0.9,
    ),
}  # fmt: skip


@dataclass
class Layout:
    """Nuclei of one tile: centres (px, x to the right, y down), type index, angle, semi-axes, each ``(n,)``."""

    x: np.ndarray
    y: np.ndarray
    kind: np.ndarray
    angle: np.ndarray
    long: np.ndarray
    short: np.ndarray

    def counts(self, n_types: int) -> np.ndarray:
        """Nuclei of each type, ``(n_types,)``."""
        return np.bincount(self.kind, minlength=n_types)


def place(
    wanted: np.ndarray, types: tuple[str, ...], *, size: int, rng: np.random.Generator, tries: int = 60
) -> Layout:
    """Place nuclei so that none overlaps another and all lie fully inside the tile.

    Each nucleus is covered by discs (one, or several along a spindle); discs of two nuclei stay ``GAP`` px apart. Large
    nuclei are placed first. A nucleus that finds no room in ``tries`` trials is left out: what comes back is the truth.

    Parameters
    ----------
    wanted
        Number of nuclei wanted per type, ``(len(types),)``.
    types
        Names in :data:`CELLS`.
    size
        Edge of the tile, px.
    """
    kinds = np.repeat(np.arange(len(types)), wanted)
    cells = [CELLS[types[k]] for k in kinds]
    growth = np.exp(rng.normal(0, 0.10, (len(kinds), 2)))
    long = np.array([c.long for c in cells]) * growth[:, 0]
    short = np.minimum(np.array([c.short for c in cells]) * growth[:, 1], long)
    angle = rng.uniform(0, 2 * np.pi, len(kinds))
    kept: list[int] = []
    centres = np.zeros((len(kinds), 2))
    discs = np.zeros((0, 3))
    for i in np.argsort(-long, kind="stable"):
        offsets, radius = _cover(long[i], short[i])
        arm = offsets[:, None] * np.array([np.cos(angle[i]), np.sin(angle[i])])
        margin = np.abs(arm).max(axis=0) + radius + 1.0
        if np.any(2 * margin >= size):
            continue
        trials = rng.uniform(margin, size - margin, (tries, 2))
        points = trials[:, None, :] + arm
        if len(discs):
            apart = ((points[:, :, None, :] - discs[:, :2]) ** 2).sum(-1) >= (radius + discs[:, 2] + GAP) ** 2
            free = np.flatnonzero(apart.all(axis=(1, 2)))
        else:
            free = np.arange(tries)
        if not len(free):
            continue
        centres[i] = trials[free[0]]
        discs = np.vstack([discs, np.column_stack([points[free[0]], np.full(len(arm), radius)])])
        kept.append(int(i))
    keep = np.sort(np.array(kept, dtype=int))
    return Layout(centres[keep, 0], centres[keep, 1], kinds[keep], angle[keep], long[keep], short[keep])


def _cover(long: float, short: float) -> tuple[np.ndarray, float]:
    """Offsets along the long axis and the common radius of discs that cover an ellipse, bend and notch included."""
    if long < 2 * short:
        return np.zeros(1), 1.05 * long
    radius = 1.5 * short
    return np.linspace(-1, 1, 1 + 2 * int(np.ceil(long / radius / 2))) * (long - 0.5 * short), radius


def draw(
    layout: Layout, types: tuple[str, ...], *, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Haematoxylin and eosin concentration of a tile, each ``float64 (size, size)`` in optical density."""
    fine, coarse = _noise(rng, size, 0.9), _noise(rng, size, 2.0)
    haematoxylin, eosin = _stroma(rng, size, coarse)
    detail = rng.uniform(0, 1, (len(layout.x), 6))
    depth = np.exp(rng.normal(0, 0.12, len(layout.x)))
    for i, kind in enumerate(layout.kind):
        _body(haematoxylin, eosin, layout, i, CELLS[types[kind]], detail[i], coarse)
    for i, kind in enumerate(layout.kind):
        _nucleus(haematoxylin, eosin, layout, i, CELLS[types[kind]], detail[i], depth[i], fine, coarse)
    return np.maximum(haematoxylin, 0), np.maximum(eosin, 0)


def _noise(rng: np.random.Generator, size: int, scale: float) -> np.ndarray:
    """Gaussian noise of unit variance, smooth over ``scale`` px, periodic."""
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(rng.standard_normal((size, size)), scale, mode="wrap", truncate=3)
    return field * (2 * np.sqrt(np.pi) * scale)


def _stroma(rng: np.random.Generator, size: int, coarse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eosinophilic background with wavy collagen and a few pale clefts."""
    smooth, cleft = _noise(rng, size, 9.0), _noise(rng, size, 6.0)
    theta, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:size, :size]
    fibre = np.sin(2 * np.pi * (columns * np.cos(theta) + rows * np.sin(theta) + 5 * smooth) / 9 + phase)
    eosin = 0.50 + 0.09 * smooth + 0.05 * fibre + 0.035 * coarse
    haematoxylin = 0.06 + 0.02 * coarse
    open_space = 1 / (1 + np.exp(-6 * (cleft - 1.9)))
    return haematoxylin * (1 - 0.8 * open_space), eosin * (1 - 0.9 * open_space)


def _window(x: float, y: float, reach: float, size: int) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Slices of the square around a point, and pixel offsets from the point along x and y."""
    top, left = max(int(y - reach), 0), max(int(x - reach), 0)
    bottom, right = min(int(y + reach) + 2, size), min(int(x + reach) + 2, size)
    dy, dx = np.mgrid[top:bottom, left:right]
    return (slice(top, bottom), slice(left, right)), dx - x, dy - y


def _body(haematoxylin, eosin, layout: Layout, i: int, cell: Cell, detail: np.ndarray, coarse: np.ndarray) -> None:
    if not cell.body:
        return
    radius = cell.body * layout.long[i]
    direction = 2 * np.pi * detail[0]
    x = layout.x[i] + cell.body_shift * layout.long[i] * np.cos(direction)
    y = layout.y[i] + cell.body_shift * layout.long[i] * np.sin(direction)
    where, dx, dy = _window(x, y, radius + 3, len(eosin))
    if not dx.size:
        return
    distance = np.hypot(dx, dy) * (1 + 0.08 * np.sin(3 * np.arctan2(dy, dx) + 6 * detail[1]))
    mask = 1 / (1 + np.exp((distance - radius) / 0.9))
    grain = 1 + cell.body_texture * np.clip(coarse[where], -1.5, 1.5)
    haematoxylin[where] += cell.body_stain[0] * mask * grain
    eosin[where] += cell.body_stain[1] * mask * grain


def _nucleus(haematoxylin, eosin, layout: Layout, i: int, cell: Cell, detail, depth: float, fine, coarse) -> None:
    long, short = layout.long[i], layout.short[i]
    where, dx, dy = _window(layout.x[i], layout.y[i], long + 4, len(eosin))
    cosine, sine = np.cos(layout.angle[i]), np.sin(layout.angle[i])
    u, v = (dx * cosine + dy * sine) / long, (dy * cosine - dx * sine) / short
    v = v + cell.bend * (2 * detail[1] - 1) * (long / short) * (u * u - 0.4)
    around = np.arctan2(v, u)
    radius = np.hypot(u, v) * (
        1 + 0.04 * np.sin(2 * around + 6 * detail[2]) + 0.03 * np.sin(3 * around + 6 * detail[3])
    )
    radius = radius + cell.notch * np.exp(-(u * u + (v - 1) ** 2) / 0.12)
    mask = 1 / (1 + np.exp((radius - 1) * short / 0.55))
    chromatin = 1 + cell.fine * fine[where] + cell.coarse * coarse[where]
    chromatin += cell.rim * np.exp(-(((radius - 0.92) * short / 1.1) ** 2))
    if cell.clumps:
        spokes = np.cos(6 * around + 2 * np.pi * detail[4])
        chromatin += cell.clumps * spokes * np.exp(-(((radius - 0.74) / 0.22) ** 2))
    for k in range(cell.nucleoli):
        turn = 2 * np.pi * (detail[4] + k / cell.nucleoli)
        spot = (u - 0.35 * detail[5] * np.cos(turn)) ** 2 * long**2 + (
            v - 0.35 * detail[5] * np.sin(turn)
        ) ** 2 * short**2
        chromatin += 0.9 * np.exp(-spot / 3.5)
    haematoxylin[where] += mask * (cell.stain * depth * np.clip(chromatin, 0.3, 2.2) - haematoxylin[where])
    eosin[where] += mask * (0.25 - eosin[where])
