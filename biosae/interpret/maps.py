"""Where in an item a latent fires: codes of tokens on the image, window or recording that they were made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from biosae.errors import InputError
from biosae.interpret.examples import activation

if TYPE_CHECKING:
    from anndata import AnnData

_MOST_STEPS = 20_000  # of a recording
_MOST_PARTS = 60  # of the shortest window
Box = tuple[float, float, float, float]
"""Left, upper, right, lower edge."""


@dataclass(frozen=True)
class TokenMap:
    """Codes of one latent over the tokens of one item (or the windows of one recording).

    Attributes
    ----------
    values : ndarray (rows, columns), float32
        Codes; NaN where there is no token. For signals a row is a channel, or there is one row for all channels.
    box : tuple of float
        Left, upper, right and lower edge of the grid: pixels of the item; for signals seconds and rows; without samples
        columns and rows of the grid. Tokens share it evenly.
    latent, sample_id : str
        What was asked for; of a recording its name.
    kind : str or None
        ``"image"`` or ``"signal"``; None if no samples were given.
    item : ndarray or None
        The item itself: ``uint8 (H, W, 3)`` or ``float32 (C, T)``.
    rows : tuple of str
        Names of the rows of signals that have one a channel.
    channels, rate, unit, mpp
        Of the samples: names of all channels, Hz, unit of values, micrometres per pixel.
    """

    values: np.ndarray
    box: Box
    latent: str
    sample_id: str
    kind: str | None = None
    item: np.ndarray | None = None
    rows: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    rate: float | None = None
    unit: str | None = None
    mpp: float | None = None

    @property
    def n_active(self) -> int:
        """Number of tokens whose code is not 0."""
        return int(np.count_nonzero(np.nan_to_num(self.values)))


def token_map(adata: AnnData, latent: str, sample_id: str, *, samples: Any = None) -> TokenMap:
    """Codes of one latent on the tokens of one item, placed on the item through the encoder's own preprocessing.

    An encoder sees an item resized and cropped, so the grid of its tokens may cover only the middle of an image, or
    leave out the end of a window. The edges of the grid are traced back to the item (:func:`grid_box`).

    Parameters
    ----------
    adata : AnnData
        Codes with tokens kept: ``bs.encode(sae, emb, tokens=None)``, of all samples or of a few
        (``emb.select([...])``).
    latent : str
    sample_id : str
    samples : biosae.Samples, optional
        Where the item is read from. Without it the map has no place but its own grid.

    Returns
    -------
    TokenMap
        Draw it with :func:`biosae.pl.heatmap` (images) or :func:`biosae.pl.strip` (signals).

    Raises
    ------
    InputError
        If tokens were not kept, the sample or latent is not there, or the physical scale or rate is unknown.
    ReadError
        If the item cannot be read.

    Examples
    --------
    >>> tokens = bs.encode(sae, emb.select(["case7_001"]), tokens=None)  # doctest: +SKIP
    >>> bs.pl.heatmap(bs.interpret.token_map(tokens, "L0042", "case7_001", samples=samples))  # doctest: +SKIP
    """
    values = activation(adata, latent)
    _need(adata, "sample_id", "token_row", "token_col")
    mine = (adata.obs["sample_id"].astype(str) == sample_id).to_numpy()
    if not mine.any():
        raise InputError(f"no tokens of sample {sample_id!r}; encode emb.select([{sample_id!r}]) with tokens=None")
    obs = adata.obs[mine]
    at = obs["token_row"].to_numpy(int), obs["token_col"].to_numpy(int)
    grid = token_grid(adata)
    table = np.full(grid, np.nan, np.float32)
    table[at] = values.to_numpy()[mine]
    if samples is None:
        return TokenMap(table, (0.0, 0.0, float(grid[1]), float(grid[0])), latent, sample_id)
    item = np.asarray(samples[sample_id])
    box = grid_box(_identity(adata), item.shape[:2], grid, kind=samples.item)
    facts: dict[str, Any] = {"mpp": samples.mpp}
    if samples.item == "signal":
        facts = {"rows": _row_names(_identity(adata), grid[0]), "channels": tuple(samples.channels),
                 "rate": samples.rate, "unit": samples.unit}  # fmt: skip
    return TokenMap(table, box, latent, sample_id, samples.item, item, **facts)


def recording_map(adata: AnnData, latent: str, recording: str) -> TokenMap:
    """Codes of one latent along a whole recording, from its windows (or the tokens of its windows).

    Parameters
    ----------
    adata : AnnData
        Codes of windows of signals, with ``recording``, ``start`` and ``duration`` (s) in ``obs`` as the readers of
        signals write them; tokens pooled or kept.
    latent, recording : str

    Returns
    -------
    TokenMap
        ``box`` in seconds of the recording. Windows that overlap are averaged, NaN where there is none. Time is cut
        into steps on whose edges all windows (or tokens) begin and end, at most 20,000 of them: where windows lie at
        uneven times their edges are rounded to that.

    Raises
    ------
    InputError
        If ``obs`` lacks these columns, there is no such recording or latent, or several patients have a recording of
        this name.
    """
    values = activation(adata, latent)
    _need(adata, "recording", "start", "duration")
    mine = (adata.obs["recording"].astype(str) == recording).to_numpy()
    if not mine.any():
        raise InputError(f"no recording {recording!r} among {adata.obs['recording'].nunique()} recordings")
    obs = adata.obs[mine]
    n_patients = obs["patient"].nunique() if "patient" in obs else 0
    if n_patients > 1:
        raise InputError(
            f"{n_patients} patients have a recording {recording!r}; pass the codes of one of them, "
            "adata[adata.obs['patient'] == ...]"
        )
    start, width = obs["start"].to_numpy(float), obs["duration"].to_numpy(float)
    row, n_rows = np.zeros(len(obs), int), 1
    if "token_row" in obs:
        n_rows, columns = token_grid(adata)
        spec = (_identity(adata) or {}).get("preprocess") or {}
        if spec.get("rate"):
            width = _used(np.rint(width * spec["rate"]).astype(int), spec) / spec["rate"]
        width = width / columns
        start, row = start + obs["token_col"].to_numpy(int) * width, obs["token_row"].to_numpy(int)
    origin, end = start.min(), (start + width).max()
    n_steps = _steps(start - origin, width)
    step = (end - origin) / n_steps
    first, last = (np.clip(np.rint((t - origin) / step).astype(int), 0, n_steps) for t in (start, start + width))
    last = np.maximum(last, first + 1)
    code = values.to_numpy(np.float64)[mine]
    total, count = np.zeros((2, n_rows, n_steps + 2))
    for target, amount in ((total, code), (count, np.ones(len(code)))):
        np.add.at(target, (row, first), amount)
        np.add.at(target, (row, last), -amount)
    held = np.rint(np.cumsum(count, axis=1)[:, :n_steps])
    table = np.divide(np.cumsum(total, axis=1)[:, :n_steps], held, out=np.full(held.shape, np.nan), where=held > 0)
    table[np.abs(table) < 1e-9 * max(np.abs(code).max(initial=0), 1e-30)] = 0  # rounding of the running sum
    names = _row_names(_identity(adata), n_rows)
    box = (float(origin), 0.0, float(origin + n_steps * step), float(n_rows))
    return TokenMap(table.astype(np.float32), box, latent, recording, "signal", rows=names)


def _steps(start: np.ndarray, width: np.ndarray) -> int:
    """Steps of equal length from 0 to the last end, on whose edges all windows begin and end."""
    gaps = np.diff(np.unique(np.round(start, 9)))
    edges = np.unique(np.r_[start, start + width])
    longest = float(min([width.min(), *([np.median(gaps)] if len(gaps) else [])]))
    for part in range(1, _MOST_PARTS + 1):
        n = max(1, round(edges[-1] * part / longest))
        place = edges / edges[-1] * n
        if n > _MOST_STEPS:
            break
        if np.abs(place - np.rint(place)).max() < 1e-2:
            return n
    return _MOST_STEPS


def grid_box(
    identity: Mapping[str, Any] | None, shape: Sequence[int], grid: tuple[int, int], *, kind: str = "image"
) -> Box:
    """Edges of the grid of tokens on the item.

    Parameters
    ----------
    identity : mapping or None
        That of the embeddings (``emb.identity``, ``adata.uns["biosae"]["identity"]``). Without one, or where it does
        not say how items were preprocessed, the grid is taken to cover the whole item.
    shape : sequence of int
        ``(H, W)`` of the image, or ``(C, T)`` of the signal.
    grid : tuple of int
        Rows and columns of tokens.
    kind : str
        ``"image"`` or ``"signal"``.

    Returns
    -------
    tuple of float
        Left, upper, right, lower: pixels of the image; for signals ``(0, 0, seconds, rows)``.

    Raises
    ------
    InputError
        If the physical scale of the image or the rate of the signal is needed and unknown.

    Notes
    -----
    Images: the resize and centred crop of :class:`biosae.encoders.preprocess.Preprocess`, undone. Tokens share the
    input evenly, which holds for transformers and padded convolutions. For ``nic``, whose convolutions are not padded,
    cells are centred on what they see.
    """
    spec = (identity or {}).get("preprocess") or {}
    if kind == "signal":
        rate = spec.get("rate") or ((identity or {}).get("given") or {}).get("rate")
        if not rate:
            raise InputError("the rate of these signals (Hz) is not known, so tokens have no time; embed with biosae")
        return (0.0, 0.0, float(_used(np.array([shape[1]]), spec)[0] / rate), float(grid[0]))
    left, upper, right, lower, size = _input_box(identity or {}, spec, int(shape[0]), int(shape[1]))
    if (identity or {}).get("architecture", {}).get("arch") != "nic":
        return left, upper, right, lower
    step, margin = _nic_cells(identity)
    sides = [(left, right, size[0], grid[1]), (upper, lower, size[1], grid[0])]
    ends = [(a + (b - a) * margin / n, a + (b - a) * (margin + count * step) / n) for a, b, n, count in sides]
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]


def _input_box(
    identity: Mapping[str, Any], spec: Mapping[str, Any], height: int, width: int
) -> tuple[float, float, float, float, tuple[int, int]]:
    """Edges on the image, in its pixels, of what the network sees, and the size of its input (width, height)."""
    size, target = spec.get("size"), spec.get("rescale_to_mpp")
    resize, w, h = spec.get("resize"), width, height
    if target is not None:
        mpp = identity.get("tile_mpp")
        if mpp is None:
            raise InputError("the images' micrometres per pixel are not known, but the encoder rescaled by them")
        w, h = (max(1, round(side * mpp / target)) for side in (width, height))
    if size is None or (resize == "squash" and target is None):
        return 0.0, 0.0, float(width), float(height), (w, h) if size is None else (size, size)
    if target is None and resize == "crop":
        side = min(width, height)
        left, upper = width // 2 - side // 2, height // 2 - side // 2
        return float(left), float(upper), float(left + side), float(upper + side), (size, size)
    if target is None:
        short = math.floor(size / spec["crop_pct"])
        long = int(short * max(width, height) / min(width, height))
        w, h = (long, short) if width > height else (short, long)
    left, upper = round((w - size) / 2.0), round((h - size) / 2.0)
    box = (left * width / w, upper * height / h, (left + size) * width / w, (upper + size) * height / h)
    return *box, (size, size)


def _nic_cells(identity: Mapping[str, Any]) -> tuple[int, float]:
    """Pixels of the input between cells of the network ``nic``, and from its edge to that of the first cell."""
    from biosae.encoders.nic import PATCH

    layer = str(identity.get("layer"))
    if layer == "final":
        step = int(identity["architecture"].get("args", {}).get("patch_stride", PATCH))
        return step, (PATCH - step) / 2
    step = 2 ** int(layer.removeprefix("bn"))
    return step, (step - 1) / 2  # a cell sees 2 step - 1 pixels


def _used(n: np.ndarray, spec: Mapping[str, Any]) -> np.ndarray:
    """Time steps that the encoder uses of windows of n."""
    length, multiple = spec.get("length"), spec.get("multiple") or 1
    n = n if length is None else np.minimum(n, length)
    return n - n % multiple


def _row_names(identity: Mapping[str, Any] | None, n_rows: int) -> tuple[str, ...]:
    """Channels of the rows of a signal's grid; none where one row stands for all."""
    if n_rows == 1:
        return ()
    named = ((identity or {}).get("preprocess") or {}).get("channels")
    named = named if named is not None else ((identity or {}).get("given") or {}).get("channels")
    return tuple(map(str, named)) if named is not None and len(named) == n_rows else tuple(map(str, range(n_rows)))


def token_grid(adata: AnnData) -> tuple[int, int]:
    """Rows and columns of the grid of tokens; raises where tokens were left out, so that it is not known."""
    rows, columns = (int(adata.obs[name].max()) + 1 for name in ("token_row", "token_col"))
    T = int(adata.uns.get("biosae", {}).get("tokens_per_sample", rows * columns))
    if rows * columns != T:
        raise InputError(
            f"these codes span {rows * columns} of {T} tokens, so the others' place is not known: pass the codes of "
            "whole items, and leave tokens out of the picture by setting their codes to 0"
        )
    return rows, columns


def _identity(adata: AnnData) -> Mapping[str, Any] | None:
    return adata.uns.get("biosae", {}).get("identity")


def _need(adata: AnnData, *columns: str) -> None:
    absent = [column for column in columns if column not in adata.obs]
    if absent:
        what = (
            "tokens are pooled; encode with tokens=None"
            if "token_row" in absent
            else "these are not windows of signals"
        )
        raise InputError(f"obs has no {', '.join(absent)}: {what}")
