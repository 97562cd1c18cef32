"""Dark matter: how much of a reconstruction error a linear map of the embedding predicts, and how much it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from biosae.errors import InputError
from biosae.sae.coder import Coder
from biosae.sae.metrics import fvu
from biosae.sae.rows import Held, Rows

RCOND = 1e-9
"""Singular values below this share of the largest one count as zero."""


@dataclass(frozen=True)
class LinearFit:
    """Least squares y = x B (+ b), fitted on some rows and evaluated on others."""

    weights: np.ndarray
    """B, (d, q)."""
    intercept: np.ndarray
    """b, (q,); 0 without intercept."""
    r2: float
    """Mean over the targets of 1 - SSE / SST on the evaluated rows, SST about their mean; constant targets left out."""
    r2_pooled: float
    """1 - sum SSE / sum SST."""
    r2_targets: np.ndarray
    """Of each target, (q,); NaN where it is constant on the evaluated rows."""
    rank: int
    """Rank of the fitted x."""

    def predict(self, X: np.ndarray) -> np.ndarray:
        """x B + b, (n, q)."""
        return np.asarray(X, np.float64) @ self.weights + self.intercept


def linear_fit(X: Any, target: Any, *, held: Any, intercept: bool = True, rcond: float = RCOND) -> LinearFit:
    """Predict a target linearly on rows that the fit has not seen.

    Parameters
    ----------
    X
        Predictors, (n, d): the embedding itself, or of the same rows another layer, L0, a label ...
    target
        (n,) or (n, q), such as the nonlinear error.
    held
        Rows to evaluate on, bool (n,); the others are fitted.
    intercept
        Fit a constant too. The released code of the paper does so in one script and not in the others.
    rcond
        Relative cut of singular values.

    Raises
    ------
    InputError
        If there are not more rows to fit than predictors, or fewer than two to evaluate.
    """
    X, Y = _table("X", X), _table("target", target)
    held = np.asarray(held, bool)
    if not len(X) == len(Y) == len(held):
        raise InputError(f"X, target and held have {len(X)}, {len(Y)} and {len(held)} rows; they must be the same rows")
    A = np.column_stack([X, np.ones(len(X))]) if intercept else X
    if (~held).sum() <= A.shape[1] or held.sum() < 2:
        raise InputError(
            f"{(~held).sum()} rows to fit {A.shape[1]} weights and {held.sum()} to evaluate: a fit needs more rows "
            "than weights, better ten times more; embed more samples"
        )
    solution, _, rank, _ = np.linalg.lstsq(A[~held], Y[~held], rcond=rcond)
    error = np.square(Y[held] - A[held] @ solution).sum(0)
    spread = np.square(Y[held] - Y[held].mean(0)).sum(0)
    varies = spread > 1e-12 * np.square(Y[held]).sum(0)
    each = np.full(Y.shape[1], np.nan)
    each[varies] = 1 - error[varies] / spread[varies]
    return LinearFit(
        solution[: X.shape[1]],
        solution[-1] if intercept else np.zeros(Y.shape[1]),
        float(np.nanmean(each)) if varies.any() else float("nan"),
        float(1 - error[varies].sum() / spread[varies].sum()) if varies.any() else float("nan"),
        each,
        int(rank),
    )


@dataclass(frozen=True)
class ErrorReport:
    """How the error e = x - x_hat splits into x B* and the rest; see :func:`error_report`."""

    n_fit: int
    """Rows of the regressions."""
    n_evaluated: int
    """Rows on which all numbers are taken."""
    by: str
    """What was kept together in this split: ``groups``, ``patient``, ``sample`` or ``row``."""
    fvu: float
    """Of x_hat."""
    fvu_nonlinear: float
    """Of x_hat + x B*: what is left after the linear correction."""
    linear_share: float
    """Pooled R2 of the error vector about zero: 1 - sum ||e - x B*||^2 / sum ||e||^2."""
    r2_vec: float
    """R2 of predicting the error vector: mean over dimensions."""
    r2_vec_pooled: float
    """The same pooled over dimensions, so that each counts by its variance."""
    r2_norm: Mapping[str, float]
    """R2 of predicting the (squared) norm of ``error``, ``linear``, ``nonlinear``, ``x``, ``x_hat`` from x."""
    baselines: Mapping[str, float]
    """R2 of predicting the (squared) norm of the error from ``norm`` (||x||), ``l0`` and what was given."""
    vector: LinearFit
    """The fit of the error vector."""

    def linear(self, X: Any) -> np.ndarray:
        """Linear error x B*, float32 (n, d)."""
        return self.vector.predict(_table("X", X)).astype(np.float32)

    def nonlinear(self, X: Any, x_hat: Any) -> np.ndarray:
        """Nonlinear error e - x B*, float32 (n, d)."""
        X = _table("X", X)
        return (X - _table("x_hat", x_hat) - self.vector.predict(X)).astype(np.float32)

    def substitutes(self, X: Any, x_hat: Any) -> dict[str, np.ndarray]:
        """What to put in place of x in the rest of the encoder or in a probe, to see which part of the error matters.

        Returns
        -------
        dict of ndarray (n, d)
            ``x_hat``; ``with_linear`` = x_hat + linear error; ``with_nonlinear`` = x_hat + nonlinear error.
        """
        x_hat = _table("x_hat", x_hat).astype(np.float32)
        return {
            "x_hat": x_hat,
            "with_linear": x_hat + self.linear(X),
            "with_nonlinear": x_hat + self.nonlinear(X, x_hat),
        }


def error_report(
    X: Any,
    reconstruction: Any,
    *,
    groups: Any = None,
    share: float = 0.5,
    intercept: bool = False,
    norm_intercept: bool = True,
    norm_power: int = 2,
    others: Mapping[str, Any] | None = None,
    rcond: float = RCOND,
    random_state: int | None = None,
) -> ErrorReport:
    """Split the error of a dictionary into a part that is linear in the embedding and the rest.

    ``e = x - x_hat``, ``B* = argmin_B sum ||e - x B||^2`` on one part of the rows; on the other part ``R2_vec`` and
    ``R2_norm`` of predicting e and ||e||^2, and the FVU of x_hat + x B*.

    Parameters
    ----------
    X
        Embeddings (n, d), array or :class:`biosae.Embeddings`; held in memory as float64.
    reconstruction
        A fitted coder, or x_hat (n, d).
    groups
        Label (patient) of each row or sample: a group is fitted or evaluated, never both. None: the ``patient`` column
        of the embeddings if there is one; tokens of a sample stay together; otherwise rows are split.
    share
        Share of the rows to evaluate on.
    intercept
        Of the vector fit. The paper has none: a common offset of e then shows up as far as x can express it.
    norm_intercept
        Of the fits of norms and their baselines.
    norm_power
        Predict ||e||^2 (2) or ||e|| (1).
    others
        Further predictors of the error norm, name to (n,) or (n, q).
    rcond
        Relative cut of singular values.
    random_state
        Of the split.

    Raises
    ------
    InputError
        If shapes do not fit, or too few rows or groups are left on one side.

    Notes
    -----
    The released code cuts shuffled rows at 150,000; rows of one patient are alike, so here whole groups are on one
    side. It takes the FVU over all rows, the fitted ones included; here it is of the evaluated rows.

    References
    ----------
    Engels, Riggs and Tegmark 2024, Decomposing the dark matter of sparse autoencoders, arXiv 2410.14670.
    """
    if norm_power not in (1, 2):
        raise InputError(f"norm_power={norm_power!r} must be 1 or 2")
    rows = Rows(X)
    if rows.n is None:
        raise InputError("an error report needs one table, not chunks")
    held = Held.draw(rows, groups=groups, share=share, rng=np.random.default_rng(random_state))
    out = held.mask(0, rows.n)
    if not 0 < out.sum() < rows.n:
        raise InputError(
            f"a split of {rows.n} rows by {held.by} leaves one side empty; it needs 20 rows and two groups of similar "
            "size: give more rows, or other groups"
        )
    x = np.concatenate([block for _, block in rows.blocks()])
    predictors = {"norm": np.linalg.norm(x, axis=1)}
    if isinstance(reconstruction, Coder):
        codes = reconstruction.codes(X)
        x_hat = reconstruction.inverse_transform(codes, like=X)
        predictors["l0"] = codes.getnnz(1)
    else:
        x_hat = np.asarray(reconstruction, np.float32)
    if x_hat.shape != x.shape:
        raise InputError(f"X has shape {x.shape}, the reconstruction {x_hat.shape}; they must be the same rows")
    x, x_hat = x.astype(np.float64), x_hat.astype(np.float64)
    e = x - x_hat
    vector = linear_fit(x, e, held=out, intercept=intercept, rcond=rcond)
    linear = vector.predict(x)
    parts = {"error": e, "linear": linear, "nonlinear": e - linear, "x": x, "x_hat": x_hat}
    square = np.square(e).sum(1)

    def norm_r2(predictor: Any, part: np.ndarray) -> float:
        target = np.square(part).sum(1) ** (norm_power / 2)
        return linear_fit(predictor, target, held=out, intercept=norm_intercept, rcond=rcond).r2

    spread, total = float(np.square(x[out] - x[out].mean(0)).sum()), float(np.square(x[out]).sum())
    left, before = float(np.square((e - linear)[out]).sum()), float(square[out].sum())
    return ErrorReport(
        n_fit=int((~out).sum()),
        n_evaluated=int(out.sum()),
        by=held.by,
        fvu=fvu(before, spread, total),
        fvu_nonlinear=fvu(left, spread, total),
        linear_share=1 - left / before if before > 0 else float("nan"),
        r2_vec=vector.r2,
        r2_vec_pooled=vector.r2_pooled,
        r2_norm={name: norm_r2(x, part) for name, part in parts.items()},
        baselines={name: norm_r2(values, e) for name, values in (predictors | dict(others or {})).items()},
        vector=vector,
    )


def _table(name: str, values: Any) -> np.ndarray:
    if not isinstance(values, np.ndarray) and callable(getattr(values, "blocks", None)):
        values = np.concatenate([block for _, block in Rows(values).blocks()])
    table = np.asarray(values, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or not np.isfinite(table).all():
        raise InputError(f"{name} must be a table of finite numbers with one line a row, found shape {table.shape}")
    return table
