"""Codes as files of other tools: AnnData, Zarr, Parquet, NumPy, faiss."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, require
from biosae.files import atomic_path, canonical_json, write_json

ROWS = 8192
"""Rows of codes that are dense at a time, and rows of a row group of Parquet."""


def write_zarr(adata: Any, path: Path) -> None:
    """AnnData as a Zarr folder, which replaces an older one as a whole."""
    if path.exists() and not any((path / name).is_file() for name in ("zarr.json", ".zgroup")):
        raise InputError(f"{path} exists and is no Zarr folder; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Writing zarr v2")  # the format is anndata's own choice
            adata.write_zarr(folder / "new")
        if path.exists():
            path.rename(folder / "old")
        (folder / "new").rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_parquet(adata: Any, path: Path) -> None:
    """One row a sample: columns of ``obs``, then a float32 column a latent, 0 where it is silent.

    The schema's metadata has a key ``biosae`` with JSON: ``format``, ``version``, ``licence``, ``identity`` and
    ``names`` of latents.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    twice = [c for c in adata.obs if c in adata.var_names]
    if twice:
        raise InputError(f"obs has a column {twice[0]!r}, which is also the name of a latent; rename the column")
    obs = pa.Table.from_pandas(adata.obs, preserve_index=True)
    fields = [pa.field(str(name), pa.float32()) for name in adata.var_names]
    about = {"format": "biosae.codes", "version": 1, **_about(adata), "names": _names(adata)}
    schema = pa.schema(
        [*obs.schema, *fields], metadata={**(obs.schema.metadata or {}), b"biosae": canonical_json(about)}
    )
    codes = sp.csr_matrix(adata.X, dtype=np.float32)
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for start in range(0, adata.n_obs, ROWS):
            dense = codes[start : start + ROWS].toarray()
            part = [*obs.slice(start, ROWS).columns, *(pa.array(column) for column in np.asfortranarray(dense).T)]
            writer.write_table(pa.Table.from_arrays(part, schema=schema))


def write_npz(adata: Any, path: Path) -> None:
    """Codes as ``scipy.sparse.load_npz`` reads them, with the arrays ``obs_names``, ``var_names`` and ``metadata``.

    ``metadata`` is JSON text as in :func:`write_parquet`.
    """
    codes = sp.csr_matrix(adata.X, dtype=np.float32)
    codes.sort_indices()
    about = {"format": "biosae.codes", "version": 1, **_about(adata), "names": _names(adata)}
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez_compressed(
            stream, data=codes.data, indices=codes.indices, indptr=codes.indptr, shape=np.array(codes.shape),
            format=np.array(b"csr"), obs_names=np.array(adata.obs_names, dtype=str),
            var_names=np.array(adata.var_names, dtype=str), metadata=np.array(canonical_json(about)),
        )  # fmt: skip


def write_faiss(
    adata: Any, path: Path, *, use_rep: str = "embedding", metric: str = "cosine", index: str = "Flat"
) -> None:
    """A faiss index of the rows of ``obsm[use_rep]``, and beside it ``<name>.json`` with ids and terms.

    ``index`` is a factory string of faiss. By ``metric="cosine"`` rows have unit length and the product is compared:
    divide queries by their length too.
    """
    from biosae.search import Index

    faiss = require("faiss", extra="index")
    if use_rep == "X":
        raise InputError("faiss holds dense rows: name a key of obsm, such as use_rep='embedding'; for codes write npz")
    built = Index(adata, use_rep=use_rep, metric=metric, faiss=index)
    with atomic_path(path) as temporary:
        faiss.write_index(built.faiss, str(temporary))
    about = {
        "format": "biosae.faiss", "version": 1, **_about(adata), "ids": list(map(str, adata.obs_names)),
        "use_rep": use_rep, "metric": metric, "index": index, "dim": built.n_features,
    }  # fmt: skip
    write_json(path.with_name(path.name + ".json"), about)


def _about(adata: Any) -> dict[str, Any]:
    content = adata.uns["biosae"]
    return {"licence": content["licence"], "identity": content.get("identity")}


def _names(adata: Any) -> dict[str, str]:
    """Names that people gave to latents."""
    given = adata.var["name"].astype(object) if "name" in adata.var else pd.Series(dtype=object)
    return {str(latent): str(name) for latent, name in given.dropna().items() if name}
