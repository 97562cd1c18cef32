"""Massive dimensions of embeddings, taken out before a dictionary is trained.

They are found by :func:`biosae.encoders.massive_activations` (layers of an encoder) and
:func:`biosae.encoders.massive.massive_values` (one table); how they grow is fitted by
:func:`biosae.sae.analysis.fit_growth`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from biosae.errors import InputError, NotFittedError, nearest
from biosae.sae.config import Settings
from biosae.sae.rows import Rows

WAYS = ("clamp", "mean")


@dataclass(eq=False)
class MassiveDims(Settings):
    """Take the flagged dimensions out of the squared error, by limits or means of the training rows.

    One dimension that is a thousand times larger than the others holds nearly all of ||x||^2, and a dictionary trained
    with a squared error models nothing else.

    Attributes
    ----------
    dims_ : ndarray of int64
    mean_ : ndarray (len(dims_),), float32
        Means of the flagged dimensions.
    limit_ : float
        Largest magnitude of the other dimensions.
    """

    dims: Any = ()
    """Numbers of the flagged dimensions."""
    how: str = "mean"
    """``mean``: the training mean takes their place; ``clamp``: they keep their sign and are cut to the largest
    magnitude that any other dimension has in the training rows."""

    def fit(self, X: Any, y: Any = None) -> MassiveDims:
        """Means and limit from training rows (n, d), read in blocks.

        Raises
        ------
        InputError
            If a dimension does not exist, all are flagged, or ``how`` is not known.
        """
        if self.how not in WAYS:
            raise InputError(f"how={self.how!r} is not known; {nearest(self.how, WAYS)}")
        rows = Rows(X)
        dims = np.unique(np.asarray(list(self.dims), np.int64))
        if len(dims) and not (dims[0] >= 0 and dims[-1] < rows.d):
            raise InputError(f"dims {dims.tolist()} are not all among the {rows.d} dimensions of these rows")
        others = np.setdiff1d(np.arange(rows.d), dims)
        if not len(others):
            raise InputError("all dimensions are flagged; nothing would be left")
        total, n, limit = np.zeros(len(dims)), 0, 0.0
        for _, x in rows.blocks():
            total, n = total + x[:, dims].sum(0, dtype=np.float64), n + len(x)
            limit = max(limit, float(np.abs(x[:, others]).max()))
        self.dims_, self.mean_, self.limit_ = dims, (total / n).astype(np.float32), limit
        self.n_features_in_ = rows.d
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Rows with the flagged dimensions replaced, float32 (n, d); the others are as they were.

        Raises
        ------
        NotFittedError, InputError
            Before ``fit``; for rows of another width.
        """
        if not hasattr(self, "dims_"):
            raise NotFittedError("MassiveDims is not fitted yet: call fit(X) with training rows first")
        rows = Rows(X)
        if rows.d != self.n_features_in_:
            raise InputError(f"X has {rows.d} features, MassiveDims was fitted to {self.n_features_in_}")
        out = np.concatenate([x for _, x in rows.blocks()])
        out[:, self.dims_] = (
            self.mean_ if self.how == "mean" else np.clip(out[:, self.dims_], -self.limit_, self.limit_)
        )
        return out

    def fit_transform(self, X: Any, y: Any = None) -> np.ndarray:
        """``fit`` and ``transform`` of the same rows."""
        return self.fit(X).transform(X)
