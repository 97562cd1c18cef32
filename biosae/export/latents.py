"""One function that writes latents for another tool."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from biosae.errors import InputError, nearest
from biosae.export import tables, viewers
from biosae.export.shareable import shareable
from biosae.files import write_h5ad


def _h5ad(adata: Any, path: Path) -> None:
    write_h5ad(path, adata)


FORMATS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "h5ad": (_h5ad, (".h5ad",)),
    "zarr": (tables.write_zarr, (".zarr",)),
    "parquet": (tables.write_parquet, (".parquet",)),
    "npz": (tables.write_npz, (".npz",)),
    "faiss": (tables.write_faiss, (".faiss",)),
    "spatialdata": (viewers.write_spatialdata, (".zarr", ".h5ad")),
    "cellxgene": (viewers.write_cellxgene, (".h5ad",)),
}
"""Format -> what writes it, and the suffixes that its file may have."""


def write(
    adata: Any,
    path: str | os.PathLike,
    *,
    format: str | None = None,
    columns: Sequence[str] = (),
    show_ids: bool = False,
    licence: str | None = None,
    **options: Any,
) -> Path:
    """Write latents as a file of another tool, without patient identifiers and with the encoder's terms.

    Parameters
    ----------
    adata
        Latents of :func:`biosae.encode`.
    path
        The file, or folder (``.zarr``).
    format
        ``h5ad``, ``zarr``, ``parquet``, ``npz``, ``faiss``, ``spatialdata`` or ``cellxgene``; None: by the
        suffix, where one format has it first.
    columns, show_ids, licence
        As of :func:`shareable`.
    **options
        Of ``faiss``: ``use_rep="embedding"``, ``metric="cosine"``, ``index="Flat"`` (a factory string). Of
        ``spatialdata``: ``region="slide"``.

    Returns
    -------
    Path
        What was written.

    Raises
    ------
    InputError
        For an unknown format, suffix or option, or latents that the format cannot hold; the message says why.
    MissingExtraError
        For ``faiss`` without the package.
    """
    path = Path(path)
    if format is None:
        format = next((name for name, (_, suffixes) in FORMATS.items() if path.suffix == suffixes[0]), None)
        if format is None:
            raise InputError(f"{path.name!r} has no suffix that says its format; pass format=, one of {list(FORMATS)}")
    if format not in FORMATS:
        raise InputError(f"format={format!r} is unknown; {nearest(format, FORMATS)}")
    writer, suffixes = FORMATS[format]
    if path.suffix not in suffixes:
        raise InputError(f"format={format!r} is written as {' or '.join(suffixes)}; name the file accordingly")
    takes = list(inspect.signature(writer).parameters)[2:]
    for name in options:
        if name not in takes:
            valid = nearest(name, takes) if takes else "it takes none"
            raise InputError(f"format={format!r} has no option {name!r}; {valid}")
    writer(shareable(adata, columns=columns, show_ids=show_ids, licence=licence), path, **options)
    return path
