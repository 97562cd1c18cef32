"""Codes of a slide for other programs: GeoJSON for QuPath, a table for squidpy and scanpy."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from biosae.errors import InputError
from biosae.files import atomic_path
from biosae.interpret.examples import activation
from biosae.interpret.slides import only_slide, places, rows_of, scale_of, slide_view

if TYPE_CHECKING:
    from anndata import AnnData


def write_geojson(
    path: str | os.PathLike,
    adata: AnnData,
    latents: str | Sequence[str],
    *,
    slide: str | None = None,
    tile_um: float | None = None,
    slide_mpp: float | tuple[float, float] | None = None,
    source: str | os.PathLike | None = None,
    active_only: bool = False,
) -> int:
    """Write the tiles (or tokens) of a slide with the codes of some latents as GeoJSON that QuPath opens.

    In QuPath drop the file on the open slide, then *Measure > Show measurement maps*. Squares are tile objects in
    pixels of the full resolution; each has one measurement a latent. Nothing about the patient or file is written.

    Parameters
    ----------
    path : path-like
        File to write, ``.geojson``; atomically.
    adata, slide, tile_um
        As of :func:`places`.
    latents : str or sequence of str
    slide_mpp : float or (float, float), optional
        Micrometres per pixel of the slide's full resolution (x, y). Default: ``slide_mpp_x`` and ``slide_mpp_y`` of
        ``obs``, which :func:`biosae.read.wsi` writes, else what ``source`` states.
    source : path-like, optional
        The slide. Needed where QuPath shows only the scanned part of it (MIRAX, Leica; ``openslide.bounds-x`` in the
        file): pixels are then counted from the corner of that part, which only the file tells.
    active_only : bool
        Leave out squares on which none of these latents fires.

    Returns
    -------
    int
        Squares written.

    Raises
    ------
    InputError
        As of :func:`places`; for an unknown latent, a code that is not a number, or if the scale is unknown.
    ReadError
        If the slide cannot be read.
    """
    names = [latents] if isinstance(latents, str) else list(latents)
    if not names:
        raise InputError("name at least one latent to write")
    mine = rows_of(adata, slide)
    codes = np.stack([activation(adata, name).to_numpy()[mine] for name in names], axis=1)
    if not np.isfinite(codes).all():
        raise InputError(f"{(~np.isfinite(codes)).any(axis=1).sum()} rows have a code that is not a number; drop them")
    where = places(adata, slide=slide, tile_um=tile_um)
    mpp = np.array(scale_of(slide_mpp, obs=adata.obs[mine], source=source))
    centre = where[["x_um", "y_um"]].to_numpy() / mpp - (_origin(source) if source is not None else 0)
    half = where[["width_um", "height_um"]].to_numpy() / mpp / 2
    low, high = np.round(centre - half, 2), np.round(centre + half, 2)
    kept = np.flatnonzero(codes.any(axis=1)) if active_only else np.arange(len(codes))
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        stream.write('{"type": "FeatureCollection", "features": [')
        for number, i in enumerate(kept):
            (x0, y0), (x1, y1) = low[i].tolist(), high[i].tolist()
            feature = {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{i},{x0},{y0},{x1},{y1}")),
                "geometry": {"type": "Polygon", "coordinates": [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]},
                "properties": {
                    "objectType": "tile",
                    "measurements": [{"name": n, "value": float(v)} for n, v in zip(names, codes[i])],
                },
            }
            stream.write(("\n" if number == 0 else ",\n") + json.dumps(feature, separators=(",", ":")))
        stream.write("\n]}\n")
    return len(kept)


def _origin(source: str | os.PathLike) -> np.ndarray:
    """Pixel (x, y) of level 0 from which QuPath counts."""
    from biosae.read.slides import open_slide

    slide = open_slide(source)
    try:
        return np.array(slide.origin, float)
    finally:
        slide.close()


def spatial_table(
    adata: AnnData,
    *,
    slide: str | None = None,
    source: str | os.PathLike | None = None,
    tile_um: float | None = None,
    slide_mpp: float | tuple[float, float] | None = None,
    size: int = 1000,
) -> AnnData:
    """Codes of one slide in the layout in which squidpy and scanpy expect spatial data.

    Parameters
    ----------
    adata, slide, tile_um
        As of :func:`places`.
    source : path-like, optional
        The slide, for its picture.
    slide_mpp : float or (float, float), optional
        As of :func:`write_geojson`; default also what the file states.
    size : int
        Longer side of the picture in pixels.

    Returns
    -------
    AnnData
        A copy of the slide's rows. ``obsm["spatial"]`` is in pixels of the full resolution, as these libraries have it
        (that of :func:`biosae.encode` is in um, and stays in ``obsm["spatial_um"]``); ``uns["spatial"][slide]`` holds
        ``images["hires"]`` (with ``source``) and ``scalefactors``. A ``/`` in the slide's name becomes ``_``, as HDF5
        would take it for two names.

    Raises
    ------
    InputError
        As of :func:`places`, or if the scale is unknown.
    ReadError
        If the slide cannot be read.
    """
    mine = rows_of(adata, slide)
    where = places(adata, slide=slide, tile_um=tile_um)
    name = slide if slide is not None else only_slide(adata) or "slide"
    mpp = np.array(scale_of(slide_mpp, obs=adata.obs[mine], source=source))
    out = adata[mine].copy()
    um = where[["x_um", "y_um"]].to_numpy()
    out.obsm["spatial_um"], out.obsm["spatial"] = um, um / mpp
    factors = {"spot_diameter_fullres": float(where["width_um"].iloc[0] / mpp[0]), "tissue_hires_scalef": 1.0}
    entry: dict[str, Any] = {"scalefactors": factors, "images": {}}
    if source is not None:
        image, box = slide_view(source, size=size, slide_mpp=tuple(mpp))
        factors["tissue_hires_scalef"] = float(image.shape[1] / (box[2] / mpp[0]))
        entry["images"]["hires"] = image
    out.uns["spatial"] = {str(name).replace("/", "_"): entry}
    return out
