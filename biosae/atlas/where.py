"""Where latents fire: codes of tokens on the items of the gallery, and codes of tiles on their slides."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.atlas.gallery import Items
from biosae.atlas.packing import bytes_text, number, numbers, quantised
from biosae.errors import BiosaeError, InputError
from biosae.interpret.maps import grid_box
from biosae.pl.gallery import noun as noun_of
from biosae.reports.run import Run

MAPPED = ("top", "bottom", "spread", "active")
"""Kinds of examples that fire, so that a map says something."""
LONGEST = 28
"""Cells of a map along either side; finer grids keep the largest code of each block."""
TRACE = (0.02 + 0.96 * 0.05 / 1.1, 0.02 + 0.96 * 1.05 / 1.1)
"""Where the first and last time point lie in the picture of a signal, as shares of its width: margins of the axes
(0.02) and those that matplotlib leaves beside data (0.05 of their range)."""
_BLOCK = 262_144  # token rows at once


def token_maps(
    run: Run, galleries: list[dict[str, Any]], items: Items, *, budget: float
) -> tuple[dict[str, Any] | None, str]:
    """Codes of tokens for the examples that fire, and where in a picture they lie; or None and the reason.

    The codes of one latent are int8 in steps of its largest; its maps follow each other in the order of its examples.
    """
    opened, reason = _token_source(run)
    if opened is None:
        return None, reason
    sae, emb = opened
    signal = getattr(run.samples, "item", "image") == "signal"
    grid = emb.grid
    shape = (1 if signal else min(grid[0], LONGEST), min(grid[1], LONGEST))
    wanted = [
        (latent, kind, place, item)
        for latent, parts in enumerate(galleries)
        for kind in MAPPED
        for place, item in enumerate(parts.get(kind, {}).get("items", []))
    ]
    most = int(budget / (shape[0] * shape[1] * 4 / 3))
    left_out = len(wanted) > most
    if left_out:  # the first of each kind before the second, so that every latent has some
        wanted = sorted(wanted, key=lambda w: (w[2], MAPPED.index(w[1])))[:most]
    need = pd.DataFrame(wanted, columns=["latent", "kind", "place", "item"])
    need["row"] = emb.obs.index.astype(str).get_indexer([items.ids[i] for i in need["item"]])
    need = need[need["row"] >= 0].reset_index(drop=True)
    grids = _grids(sae, emb, need, shape, signal=signal)
    latents: dict[int, dict[str, Any]] = {}
    for latent, part in need.groupby("latent"):
        part = part.assign(_k=part["kind"].map(MAPPED.index)).sort_values(["_k", "place"])
        values = grids[part.index]
        scale = float(np.abs(values).max(initial=0))
        held: dict[str, list[int]] = {}
        for kind, place in zip(part["kind"], part["place"]):
            held.setdefault(kind, []).append(int(place))
        latents[int(latent)] = {"scale": number(scale), "at": held, "codes": bytes_text(quantised(values, scale))}
    return {
        "grid": list(shape),
        "signal": signal,
        "reduced": shape[0] * shape[1] < grid[0] * grid[1],
        "left_out": left_out,
        "boxes": _boxes(run, emb, need, items, signal=signal),
        "latents": latents,
    }, ""


def _token_source(run: Run) -> tuple[tuple[Any, Any] | None, str]:
    """The SAE and the embeddings with tokens of the primary view."""
    from biosae import sae as saes
    from biosae.embeddings import Embeddings

    identity = run.facts.get("identity", {}) or {}
    primary = run.study.get("primary") or {"encoder": identity.get("encoder"), "layer": identity.get("layer")}
    encoder, layer = primary.get("encoder"), primary.get("layer")
    noun = noun_of(run.samples)
    try:
        emb = Embeddings.open(run.folder / "embeddings" / _plain(encoder) / _plain(layer))
        if emb.tokens_per_sample == 1 or emb.grid is None:
            return None, f"The encoder gave one vector for each {noun}, so there is no map within one."
        sae = saes.load(run.folder / "sae" / f"{encoder}__{layer}")
    except (BiosaeError, OSError) as error:
        return None, f"Maps within each {noun} could not be made: {run.redact(error)}"
    if emb.fingerprint != run.facts.get("fingerprint") or len(sae.decoder_) != run.adata.n_vars:
        return (
            None,
            f"Maps within each {noun} could not be made: they are of another SAE or encoder.",
        )
    return (sae, emb), ""


def _plain(name: Any) -> str:
    """A name as folders of embeddings have it."""
    return re.sub(r"^\.|[^A-Za-z0-9._-]", "_", str(name))


def _grids(sae: Any, emb: Any, need: pd.DataFrame, shape: tuple[int, int], *, signal: bool) -> np.ndarray:
    """float32 (rows of ``need``, rows, columns): the token grid of its latent in its item, reduced to ``shape``."""
    T, grid = emb.tokens_per_sample, emb.grid
    out = np.zeros((len(need), *shape), np.float32)
    rows = np.unique(need["row"].to_numpy())
    step = max(1, _BLOCK // T)
    by_row = {row: part.index.to_numpy() for row, part in need.groupby("row")}
    latent = need["latent"].to_numpy()
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        codes = sp.csr_matrix(sae.codes(emb.select(block)))
        for i, row in enumerate(block):
            at = by_row[row]
            dense = codes[i * T : (i + 1) * T].tocsc()[:, latent[at]].toarray().T.reshape(len(at), *grid)
            out[at] = _reduced(dense, shape, rows_too=signal)
    return out


def _reduced(grids: np.ndarray, shape: tuple[int, int], *, rows_too: bool) -> np.ndarray:
    """Code of largest size in each block of cells."""
    for axis, size in ((1, shape[0]), (2, shape[1])):
        n = grids.shape[axis]
        if n == size and not (rows_too and axis == 1 and n > 1):
            continue
        starts = np.unique(np.arange(size) * n // size)
        high, low = np.maximum.reduceat(grids, starts, axis=axis), np.minimum.reduceat(grids, starts, axis=axis)
        grids = np.where(high >= -low, high, low)
    return grids


def _boxes(run: Run, emb: Any, need: pd.DataFrame, items: Items, *, signal: bool) -> dict[str, Any]:
    """Edges of the grid in shares of the picture: the distinct boxes, and which of them each item has."""
    known: dict[tuple, int] = {}
    at: dict[int, int] = {}
    sides: dict[tuple, tuple] = {}
    for item in pd.unique(need["item"]):
        try:
            shape = np.asarray(run.samples[items.ids[item]]).shape[:2]
            if shape not in sides:
                sides[shape] = _share(emb, shape, run.samples, signal=signal)
        except (BiosaeError, OSError, ValueError, KeyError):
            continue  # an item without a picture has no map either
        at[int(item)] = known.setdefault(sides[shape], len(known))
    return {"edges": [list(box) for box in known], "of": at}


def _share(emb: Any, shape: tuple[int, int], samples: Any, *, signal: bool) -> tuple[float, ...]:
    left, upper, right, lower = grid_box(emb.identity, shape, emb.grid, kind="signal" if signal else "image")
    if not signal:
        height, width = shape
        return tuple(round(float(v), 5) for v in (left / width, upper / height, right / width, lower / height))
    duration = shape[1] / samples.rate if samples.rate else right
    first, last = TRACE
    edges = (first + (last - first) * t / duration for t in (left, right))
    a, b = (round(float(v), 5) for v in edges)
    return a, 0.0, b, 1.0


def slides(
    run: Run, codes: sp.csc_matrix, first: list[int], *, spatial: tuple[str, str] | None, budget: float
) -> tuple[dict[str, Any] | None, str]:
    """Places of tiles on their slides, and of each latent the tiles where it fires; or None and the reason.

    Parameters
    ----------
    run : Run
    codes : csc_matrix of shape (n_rows, n_latents)
    first : list of int
        Latents in the order in which they get a map if not all fit.
    spatial : tuple of str, optional
        Columns of ``obs`` with the places, if ``obsm["spatial"]`` has none.
    budget : float
        Bytes.
    """
    places = _places(run, spatial)
    if isinstance(places, str):
        return None, places
    rows = np.flatnonzero(np.isfinite(places).all(axis=1))
    obs = run.adata.obs.iloc[rows]
    names = [run.pseudonym(v) for v in obs["slide"]] if "slide" in obs else ["all"] * len(obs)
    at, levels = pd.factorize(np.asarray(names, dtype=object), sort=True)
    order = np.argsort(at, kind="stable")  # slides in the order of the run would tell their places in the alphabet
    rows, at = rows[order], at[order]
    position = np.full(run.adata.n_obs, -1)
    position[rows] = np.arange(len(rows))
    kind = np.uint16 if len(rows) < 2**16 else np.uint32
    out: dict[int, dict[str, Any]] = {}
    spent = 0.0
    for latent in first:
        span = slice(codes.indptr[latent], codes.indptr[latent + 1])
        where, values = position[codes.indices[span]], codes.data[span]
        where, values = where[where >= 0], values[where >= 0]
        spent += len(where) * (np.dtype(kind).itemsize + 1) * 4 / 3
        if spent > budget:
            break
        scale = float(np.abs(values).max(initial=0))
        tiles = bytes_text(where.astype(kind))
        out[int(latent)] = {"scale": number(scale), "tiles": tiles, "codes": bytes_text(quantised(values, scale))}
    return {
        "names": list(map(str, levels)),
        "slide": at.tolist(),
        "x": numbers(places[rows, 0], digits=6),
        "y": numbers(places[rows, 1], digits=6),
        "pitch": [number(_pitch(places[rows][at == i])) for i in range(len(levels))],
        "wide": kind is np.uint32,
        "n_left_out": len(first) - len(out),
        "latents": out,
    }, ""


def _places(run: Run, spatial: tuple[str, str] | None) -> np.ndarray | str:
    adata = run.adata
    if spatial is not None:
        absent = [column for column in spatial if column not in adata.obs]
        if absent or len(spatial) != 2:
            raise InputError(f"spatial={spatial!r} must name two columns of obs; absent: {', '.join(absent) or 'none'}")
        return np.column_stack([pd.to_numeric(adata.obs[c], errors="coerce").to_numpy(float) for c in spatial])
    if "spatial" in adata.obsm:
        return np.asarray(adata.obsm["spatial"], float)[:, :2]
    return "Places of the samples on a slide are not known, so there is no map over slides."


def _pitch(points: np.ndarray) -> float:
    """Distance between neighbours: the median of that to the nearest."""
    from scipy.spatial import cKDTree

    points = np.unique(points, axis=0)
    if len(points) < 2:
        return 1.0
    return float(np.median(cKDTree(points).query(points, k=2)[0][:, 1]))
