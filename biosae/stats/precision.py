"""Average precision that does not depend on the order of ties, for sparse codes and rankings that are full of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.special import digamma

from biosae.errors import InputError


def average_precision(y: Any, scores: Any) -> float:
    """Average precision, its expectation over all orders of tied scores.

    ``AP = (1/P) sum_groups sum_t (r/n) (R + (t - t0 - 1)(r - 1)/(n - 1) + 1) / t``, where a group of n tied items with
    r positives fills places t0 + 1 to t0 + n and R positives stand before it. scikit-learn's
    ``average_precision_score`` takes a tied group as one step, which is less where positives are rare in it.

    Parameters
    ----------
    y
        (n,) whether an item is positive.
    scores
        (n,) higher first.

    Returns
    -------
    float
        NaN where nothing is positive.

    Raises
    ------
    InputError
        If the lengths differ, a score is NaN, or a label is neither 0 nor 1.

    References
    ----------
    McSherry and Najork 2008, ECIR (expectation over ties); Stevens et al. 2025, arXiv 2511.17735.

    >>> round(average_precision([1, 0, 0, 1], [1, 1, 0, 0]), 5)
    0.66667
    """
    y, scores = checked_ranking(y, scores)
    if not y.any():
        return float("nan")
    _, place = np.unique(-scores, return_inverse=True)
    return tied_precision(np.bincount(place), np.bincount(place, y))


def checked_ranking(y: Any, scores: Any) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) boolean and scores (n,) float64, or :class:`InputError` where they are not one of each an item."""
    y, scores = np.asarray(y), np.asarray(scores, np.float64)
    if y.ndim != 1 or y.shape != scores.shape:
        raise InputError(f"labels have shape {y.shape}, scores {scores.shape}; one value an item in both")
    if np.isnan(scores).any() or not np.isin(y, (0, 1)).all():
        raise InputError("scores must be numbers and labels 0 or 1; leave out items for which either is NaN or unknown")
    return y.astype(bool), scores


def tied_precision(n: np.ndarray, r: np.ndarray) -> float:
    """Average precision of one ranking, from the sizes n (g,) of its ties, highest first, and the positives r (g,) in
    each; at least one is positive."""
    column = np.zeros(len(n), np.int64)
    return float(_precision(n, np.asarray(r, np.float64)[:, None], column, 1)[0, 0])


def average_precisions(codes: Any, labels: Any) -> np.ndarray:
    """Tie-exact average precision of every column of codes for every column of labels.

    Parameters
    ----------
    codes
        (n, m), sparse or dense; higher codes first, zeros stand between positive and negative ones.
    labels
        (n, c), boolean.

    Returns
    -------
    ndarray (m, c)
        NaN where a label has no positive.

    Raises
    ------
    InputError
        If rows differ in number, a code is NaN, or a label is neither 0 nor 1.
    """
    codes, labels = sp.csc_matrix(codes, dtype=np.float64), np.asarray(labels)
    if labels.ndim != 2 or len(labels) != codes.shape[0]:
        raise InputError(f"codes have shape {codes.shape}, labels {labels.shape}; both need a row an item")
    if np.isnan(codes.data).any() or not np.isin(labels, (0, 1)).all():
        raise InputError("codes must be numbers and labels 0 or 1; leave out rows for which either is NaN or unknown")
    column, n, r = _ties(codes, labels.astype(bool))
    return _precision(n, r, column, codes.shape[1])


def _ties(codes: sp.csc_matrix, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups of tied items of every column of codes (n, m), highest first: column (g,) ascending, items (g,), and
    positives (g, c) of the labels (n, c)."""
    codes = codes.copy()
    codes.eliminate_zeros()
    n, m = codes.shape
    filled = np.diff(codes.indptr)
    column = np.r_[np.repeat(np.arange(m), filled), np.arange(m)]  # the zeros of a column are one more entry
    value = np.r_[codes.data, np.zeros(m)]
    order = np.lexsort((-value, column))
    first = np.r_[True, (np.diff(column[order]) != 0) | (np.diff(value[order]) != 0)][: len(order)]
    start = np.flatnonzero(first)
    size = np.r_[np.ones(codes.nnz), n - filled]
    there = labels[codes.indices].astype(np.float64)
    at_zero = labels.sum(0, dtype=np.float64) - _by_column(there, codes.indptr)
    held = np.concatenate([there, at_zero])[order]
    if not len(start):
        return column, size, held
    return column[order][start], np.add.reduceat(size[order], start), np.add.reduceat(held, start, axis=0)


def _by_column(rows: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Sums of rows (nnz, c) over the columns of a CSC matrix, (m, c)."""
    total = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0)])
    return total[indptr[1:]] - total[indptr[:-1]]


def _precision(n: np.ndarray, r: np.ndarray, column: np.ndarray, m: int) -> np.ndarray:
    """Average precision (m, c) of tie groups: items n (g,), positives r (g, c), column (g,) ascending."""
    n = n.astype(np.float64)
    first = np.searchsorted(column, np.arange(m + 1))
    before = np.r_[0.0, np.cumsum(n)]
    t0 = before[:-1] - before[first[column]]
    passed = np.concatenate([np.zeros((1, r.shape[1])), np.cumsum(r, axis=0)])
    R = passed[:-1] - passed[first[column]]
    gain = _gain(n, r, t0, R)
    added = np.concatenate([np.zeros((1, r.shape[1])), np.cumsum(gain, axis=0)])
    positives = passed[first[1:]] - passed[first[:-1]]
    total = added[first[1:]] - added[first[:-1]]
    return np.divide(total, positives, out=np.full(total.shape, np.nan), where=positives > 0)


def _gain(n: np.ndarray, r: np.ndarray, t0: np.ndarray, R: np.ndarray) -> np.ndarray:
    """What each tie group adds to P times the average precision, by ``sum_t 1/t = psi(t0 + n + 1) - psi(t0 + 1)``."""
    n, t0 = n[:, None], t0[:, None]
    slope = np.divide(r - 1, n - 1, out=np.zeros(r.shape), where=n > 1)
    steps = digamma(t0 + n + 1) - digamma(t0 + 1)
    inside = (R + 1 - (t0 + 1) * slope) * steps + slope * n
    return np.where(r > 0, r / np.maximum(n, 1) * inside, 0.0)


class Resampled:
    """Average precision of one score on resamples of whole groups (images, patients).

    Parameters
    ----------
    scores
        (n,).
    y
        (n,) boolean.
    groups
        (n,) whole numbers from 0: the group of each item.
    """

    def __init__(self, scores: np.ndarray, y: np.ndarray, groups: np.ndarray) -> None:
        _, place = np.unique(-scores, return_inverse=True)
        shape = (int(place.max()) + 1, int(groups.max()) + 1)
        self.items = sp.csr_matrix((np.ones(len(y)), (place, groups)), shape=shape)
        self.positives = sp.csr_matrix((y.astype(np.float64), (place, groups)), shape=shape)
        most = shape[1] * int(np.bincount(groups).max())  # the largest group, every time
        self.harmonic = np.r_[0.0, np.cumsum(1.0 / np.arange(1, most + 1))]

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """Average precision where group g is drawn ``counts[g, b]`` times (whole numbers, G in all): (G, b) -> (b,);
        NaN without positives."""
        n, r = self.items @ counts, self.positives @ counts
        last, R = np.cumsum(n, axis=0), np.cumsum(r, axis=0) - r
        t0 = last - n
        slope = np.divide(r - 1, n - 1, out=np.zeros(r.shape), where=n > 1)
        steps = self.harmonic[np.rint(last).astype(np.intp)] - self.harmonic[np.rint(t0).astype(np.intp)]
        inside = (R + 1 - (t0 + 1) * slope) * steps + slope * n
        gain = np.where(r > 0, r / np.maximum(n, 1) * inside, 0.0).sum(0)
        positives = r.sum(0)
        return np.divide(gain, positives, out=np.full(gain.shape, np.nan), where=positives > 0)
