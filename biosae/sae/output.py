"""Containers in which ``transform`` gives codes, chosen as in scikit-learn by ``set_output``."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import scipy.sparse

from biosae.errors import InputError, MissingExtraError, nearest

CONTAINERS = ("default", "pandas", "polars")
LARGEST_TABLE = 2 * 1024**3
"""Bytes of a dense table that ``polars``, which has no sparse columns, may take."""


def wanted(estimator: Any) -> str:
    """Container asked for by ``set_output``, else by scikit-learn's own configuration, else ``default``."""
    own = getattr(estimator, "_sklearn_output_config", {}).get("transform")
    if own is not None:
        return own
    sklearn = sys.modules.get("sklearn")
    return sklearn.get_config()["transform_output"] if sklearn else "default"


def check(container: str) -> str:
    """The container, if it is one.

    Raises
    ------
    InputError
    """
    if container not in CONTAINERS:
        raise InputError(f"transform={container!r} is no output; {nearest(container, CONTAINERS)}")
    return container


def packed(codes: scipy.sparse.csr_matrix, container: str, *, names: np.ndarray, index: Any) -> Any:
    """Codes (n, m) in a container, with latents as columns and, in pandas, the rows' own index.

    Raises
    ------
    InputError
        If a dense table would take more than 2 GiB.
    MissingExtraError
        If polars is not installed.
    """
    if container == "pandas":
        pd = importlib.import_module("pandas")  # asked for by name; this room stands without it
        return pd.DataFrame.sparse.from_spmatrix(codes, index=index, columns=names)
    if container == "polars":
        size = 4 * codes.shape[0] * codes.shape[1]
        if size > LARGEST_TABLE:
            raise InputError(
                f"polars has no sparse columns: {codes.shape[0]} x {codes.shape[1]} codes would take "
                f"{size / 2**30:.1f} GiB; keep the sparse default, or transform fewer rows"
            )
        try:
            pl = importlib.import_module("polars")
        except ImportError:
            raise MissingExtraError("polars output needs polars: pip install polars") from None
        return pl.DataFrame(codes.toarray(), schema=[str(name) for name in names], orient="row")
    return codes
