"""Candidates from faiss, for more dense rows than an exact search has time for."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

from biosae.errors import InputError, require


def rows_for(matrix: np.ndarray, norm: np.ndarray, metric: str) -> np.ndarray:
    if metric == "cosine":
        matrix = matrix / np.where(norm > 0, norm, 1)[:, None]
    return np.ascontiguousarray(matrix, dtype=np.float32)


def build_or_check(wanted: Any, matrix: Any, norm: np.ndarray, metric: str) -> Any:
    """The faiss index itself, built by a factory string or checked."""
    if sp.issparse(matrix) or metric == "jaccard":
        raise InputError(
            "faiss is for dense embeddings (use_rep='embedding') by cosine, dot or Euclidean distance; leave "
            "faiss=None for sparse codes, whose exact search is fast"
        )
    library = require("faiss", extra="index")
    kind = library.METRIC_L2 if metric == "euclidean" else library.METRIC_INNER_PRODUCT
    if not isinstance(wanted, str):
        if wanted.metric_type != kind:
            raise InputError(
                f"metric={metric!r} needs a faiss index of "
                + ("L2 distance (METRIC_L2)" if metric == "euclidean" else "METRIC_INNER_PRODUCT")
            )
        if wanted.ntotal != matrix.shape[0] or wanted.d != matrix.shape[1]:
            raise InputError(
                f"the faiss index holds {wanted.ntotal} rows of {wanted.d}, the data {matrix.shape[0]} of "
                f"{matrix.shape[1]}; build it anew from these data"
            )
        _holds(wanted, rows_for(matrix[:64], norm[:64], metric))
        return wanted
    try:
        index = library.index_factory(matrix.shape[1], wanted, kind)
        rows = rows_for(matrix, norm, metric)
        index.train(rows)
        index.add(rows)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"faiss cannot build {wanted!r} for {matrix.shape} ({str(error)[-200:]})") from None
    return index


def _holds(index: Any, rows: np.ndarray) -> None:
    """Refuse a faiss index whose first rows are others than these; compressed ones may be off by half their length."""
    try:
        held = np.stack([index.reconstruct(i) for i in range(len(rows))])
    except RuntimeError:  # this kind of index gives no rows back
        return
    off = np.linalg.norm(held - rows, axis=1) > 0.5 * np.linalg.norm(rows, axis=1)
    if off.mean() > 0.5:
        raise InputError(
            "the faiss index holds other rows, another order, or (for cosine) rows that are not of unit length; build "
            "it anew from these data"
        )
