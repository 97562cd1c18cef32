"""Latents for viewers: SpatialData (napari, squidpy, Vitessce) and cellxgene."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, nearest
from biosae.export.tables import write_zarr
from biosae.files import write_h5ad


def write_spatialdata(adata: Any, path: Path, *, region: str = "slide") -> None:
    """A table of SpatialData: ``obs["region"]`` and ``obs["instance_id"]`` say which shape of which element a row is.

    Parameters
    ----------
    adata
        With ``obsm["spatial"]``, micrometres.
    path
        ``.zarr`` or ``.h5ad``.
    region
        Column of ``obs`` whose values become names of elements (other characters than letters, digits, ``_``, ``-``
        and ``.`` become ``_``); without that column all rows are of one region, ``tiles``.

    Raises
    ------
    InputError
        If there are no positions, a row has no region, or two regions would have one name.
    """
    if "spatial" not in adata.obsm:
        raise InputError(
            "these latents have no positions (obsm['spatial']); read tiles with their places, such as bs.read.wsi, or "
            "put micrometres (x, y) there"
        )
    if region != "slide" and region not in adata.obs:
        raise InputError(f"obs has no column {region!r}; {nearest(region, adata.obs.columns)}")
    groups = adata.obs[region] if region in adata.obs else pd.Series("tiles", index=adata.obs.index)
    if groups.isna().any():
        raise InputError(f"{int(groups.isna().sum())} rows have no {region}; leave them out or fill the column")
    names = groups.astype(str).map(lambda name: re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip("_.") or "region")
    if len(set(map(str.casefold, names))) < groups.astype(str).nunique():
        raise InputError(f"two values of {region!r} give one name of an element; rename one of them")
    out = adata.copy()
    out.obs["region"] = pd.Categorical(names)
    out.obs["instance_id"] = names.groupby(names, observed=True).cumcount().to_numpy(np.int64)
    out.uns["spatialdata_attrs"] = {
        "region": sorted(set(names)), "region_key": "region", "instance_key": "instance_id",
    }  # fmt: skip
    (write_h5ad if path.suffix == ".h5ad" else _zarr)(path, out)


def write_cellxgene(adata: Any, path: Path) -> None:
    """A ``.h5ad`` for ``cellxgene launch``: samples as cells, latents as genes, two-dimensional maps as layouts.

    Codes are float32 by column; every two-dimensional map of ``obsm`` is called ``X_...``; a latent that has a name is
    called ``L0042 name``; whole numbers and text take the types that the viewer knows.

    Raises
    ------
    InputError
        If there is no map to lay samples out by.
    """
    layouts = {}
    for key, value in adata.obsm.items():
        if key.startswith("X_") or key == "spatial":
            xy = np.asarray(value, np.float32)[:, :2]
            if xy.shape[1] == 2 and np.isfinite(xy).all():
                xy = xy * (1, -1) if key == "spatial" else xy  # its y axis points up
                layouts[key if key.startswith("X_") else "X_spatial"] = xy
    if not layouts:
        raise InputError(
            "cellxgene needs a two-dimensional map without gaps; make one first: bs.search.cluster leaves "
            "obsm['X_umap']"
        )
    out = adata.copy()
    out.X = sp.csc_matrix(adata.X, dtype=np.float32)
    for key in list(out.obsm):
        del out.obsm[key]
    out.obsm.update(layouts)
    out.obs = adata.obs.apply(_known_type)
    if "name" in out.var:
        names = out.var["name"].astype(object)
        out.var_names = [f"{latent} {name}" if isinstance(name, str) and name else latent
                         for latent, name in zip(out.var_names, names)]  # fmt: skip
    write_h5ad(path, out)


def _known_type(column: pd.Series) -> pd.Series:
    """int32, float32 or categories of text."""
    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        return column.astype(object).map(str, na_action="ignore").astype("category")
    if pd.api.types.is_integer_dtype(column) and not column.isna().any() and column.abs().max() < 2**31:
        return column.astype(np.int32)
    return column.astype(np.float32)


def _zarr(path: Path, adata: Any) -> None:
    write_zarr(adata, path)
