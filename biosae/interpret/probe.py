"""Logistic probes of one latent each, for all latents of sparse codes at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.special import expit

from biosae.errors import InputError

RIDGE = 1e-8
ENTRIES = 2_000_000
"""Stored codes that are worked through at a time."""
_ROUNDS = 60
_HALVINGS = 30


@dataclass
class Probes:
    """Probes ``sigma(w z_j + b)`` of one label, one a latent."""

    weight: np.ndarray
    """(m,)."""
    bias: np.ndarray
    """(m,)."""
    loss: np.ndarray
    """(m,) mean negative log-likelihood in nats, without the ridge."""
    prevalence: float
    loss_prevalence: float
    """That of the prevalence alone."""


def probes(codes: Any, y: Any, *, ridge: float = RIDGE) -> Probes:
    """Fit ``sigma(w z_j + b)`` for every latent j by ``mean NLL + (ridge / 2) (w^2 + (b - b0)^2)``.

    ``b0`` is the logit of the prevalence. Newton steps with halving, in columns scaled to a largest code of 1; zeros of
    a column are one term.

    Parameters
    ----------
    codes
        (n, m), sparse or dense.
    y
        (n,) boolean, with both values.
    ridge
        Above 0, so that latents that separate the classes have a solution.

    Raises
    ------
    InputError
        If the label has one value, lengths differ, or ``ridge`` is not above 0.

    References
    ----------
    Stevens et al. 2025, arXiv 2511.17735.
    """
    codes = sp.csc_matrix(codes, dtype=np.float64)
    y = np.asarray(y).astype(bool).ravel()
    if len(y) != codes.shape[0]:
        raise InputError(f"{len(y)} labels for codes of {codes.shape[0]} rows")
    if not ridge > 0:
        raise InputError(f"ridge={ridge!r} must be above 0")
    if y.all() or not y.any():
        raise InputError("the label has one value in these rows; a probe needs both")
    prevalence = float(y.mean())
    m = codes.shape[1]
    weight, bias, loss = np.zeros(m), np.zeros(m), np.zeros(m)
    start = 0
    while start < m:
        limit = codes.indptr[start] + ENTRIES
        stop = max(start + 1, int(np.searchsorted(codes.indptr, limit, side="right")) - 1)
        part = slice(start, min(stop, m))
        weight[part], bias[part], loss[part] = _fit(codes[:, part], y, prevalence, ridge)
        start = stop
    return Probes(weight, bias, loss, prevalence, _loss_of(prevalence, prevalence))


def log_loss(codes: np.ndarray, y: np.ndarray, weight: float, bias: float) -> float:
    """Mean negative log-likelihood of a probe on other rows: codes (n,), y (n,) boolean."""
    return float(np.mean(np.logaddexp(0, np.where(y, -1.0, 1.0) * (weight * codes + bias))))


def _loss_of(expected: float, observed: float) -> float:
    """Mean negative log-likelihood of a constant probability where the share ``observed`` is positive."""
    return float(-observed * np.log(expected) - (1 - observed) * np.log1p(-expected))


def prevalence_loss(expected: float, y: np.ndarray) -> float:
    """Mean negative log-likelihood of a constant probability on rows y (n,) boolean."""
    return _loss_of(expected, float(np.mean(y)))


def _fit(codes: sp.csc_matrix, y: np.ndarray, prevalence: float, ridge: float) -> tuple[np.ndarray, ...]:
    """Weights, biases and losses (m,) of a block of columns."""
    n, m = codes.shape
    b0 = np.log(prevalence / (1 - prevalence))
    filled = np.diff(codes.indptr)
    column = np.repeat(np.arange(m), filled)
    scale = np.ones(m)
    largest = np.abs(codes).max(axis=0).toarray().ravel()
    scale[largest > 0] = largest[largest > 0]
    z = codes.data / scale[column]
    sign = np.where(y[codes.indices], -1.0, 1.0)
    positive = np.bincount(column, y[codes.indices], m)
    zeros = np.stack([y.sum() - positive, n - filled - (y.sum() - positive)])  # positives, negatives at 0
    penalty = ridge / scale**2
    w, b = np.zeros(m), np.full(m, b0)
    value = _objective(z, sign, column, zeros, penalty, ridge, b0, n, w, b)
    open_ = filled > 0
    for _ in range(_ROUNDS):
        live = open_[column]
        zl, sl, cl = z[live], sign[live], column[live]
        p = expit(sl * (w[cl] * zl + b[cl]))
        h = p * (1 - p)
        p0 = expit(b)
        g_b = (np.bincount(cl, sl * p, m) - zeros[0] * (1 - p0) + zeros[1] * p0) / n + ridge * (b - b0)
        g_w = np.bincount(cl, sl * p * zl, m) / n + penalty * w
        h_bb = (np.bincount(cl, h, m) + (zeros[0] + zeros[1]) * p0 * (1 - p0)) / n + ridge
        h_wb = np.bincount(cl, h * zl, m) / n
        h_ww = np.bincount(cl, h * zl * zl, m) / n + penalty
        h_ww, h_bb = h_ww * (1 + 1e-12) + 1e-300, h_bb * (1 + 1e-12) + 1e-300
        det = np.maximum(h_ww * h_bb - h_wb**2, 1e-14 * h_ww * h_bb)
        step_w, step_b = (h_bb * g_w - h_wb * g_b) / det, (h_ww * g_b - h_wb * g_w) / det
        decrement = g_w * step_w + g_b * step_b
        open_ &= decrement > 1e-13
        if not open_.any():
            break
        size = np.where(open_, 1.0, 0.0)
        for _ in range(_HALVINGS):
            tried = _objective(z, sign, column, zeros, penalty, ridge, b0, n, w - size * step_w, b - size * step_b)
            worse = (tried > value) & (size > 0)
            if not worse.any():
                break
            size = np.where(worse, size / 2, size)
        better = tried <= value
        w, b = np.where(better, w - size * step_w, w), np.where(better, b - size * step_b, b)
        value = np.where(better, tried, value)
        open_ &= better
    loss = value - (penalty * w**2 + ridge * (b - b0) ** 2) / 2
    return w / scale, b, loss


def _objective(z, sign, column, zeros, penalty, ridge, b0, n, w, b):
    m = len(w)
    inside = np.bincount(column, np.logaddexp(0, sign * (w[column] * z + b[column])), m)
    at_zero = zeros[0] * np.logaddexp(0, -b) + zeros[1] * np.logaddexp(0, b)
    return (inside + at_zero) / n + (penalty * w**2 + ridge * (b - b0) ** 2) / 2
