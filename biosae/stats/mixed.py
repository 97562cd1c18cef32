"""Linear mixed model: a random intercept of each group, and of subgroups nested in it, by REML or ML.

``y = X b + u_g + v_s + e`` with variances ``tau2`` (groups, patients), ``tau2_sub`` (subgroups, slides of a patient)
and ``sigma2``. The likelihood is profiled over ``b`` and ``sigma2``; what is left is a function of the ratios
``tau2/sigma2`` that needs sums over groups only, so no matrix of rows is ever formed (Bates et al., J Stat Softw 67,
1, 2015, section 3). Degrees of freedom: Satterthwaite, as in lmerTest (Kuznetsova et al., J Stat Softw 82, 13, 2017).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from biosae.errors import InputError, StatisticsError, nearest
from biosae.stats.nested import intraclass_correlation

ESTIMATORS = ("anova", "reml")
STEP = 1e-30
"""Imaginary step of exact derivatives (Squire and Trapp, SIAM Rev 40, 110, 1998)."""


@dataclass
class _Sums:
    """Everything the likelihood needs of ``W = [X, y]``: cross-products, and sums of rows by subgroup."""

    total: np.ndarray
    parts: np.ndarray
    size: np.ndarray
    group: np.ndarray
    n: int
    G: int

    @property
    def k(self) -> int:
        return self.total.shape[0] - 1


def _sums(y: np.ndarray, X: np.ndarray, codes: np.ndarray, subcodes: np.ndarray | None) -> _Sums:
    W = np.column_stack([X, y])
    if subcodes is None:
        fine, group = codes, np.arange(int(codes.max()) + 1)
    else:
        pairs, fine = np.unique(np.column_stack([codes, subcodes]), axis=0, return_inverse=True)
        fine, group = fine.ravel(), pairs[:, 0]
        if len(np.unique(pairs[:, 1])) < len(pairs):
            raise StatisticsError(
                "subgroups cut across groups: every subgroup (slide) must lie in one group (patient); name them apart"
            )
    size = np.bincount(fine).astype(np.float64)
    parts = np.column_stack([np.bincount(fine, weights=w) for w in W.T])
    return _Sums(W.T @ W, parts, size, group, len(y), int(codes.max()) + 1)


def _add(group: np.ndarray, values: np.ndarray, G: int) -> np.ndarray:
    out = np.zeros((G, *values.shape[1:]), dtype=values.dtype)
    np.add.at(out, group, values)
    return out


def _profile(ratios: np.ndarray, sums: _Sums, reml: bool) -> dict[str, Any]:
    """Deviance of the ratios (group, subgroup) and its exact gradient; complex ratios are allowed."""
    first, second = ratios
    k, G = sums.k, sums.G
    a = 1.0 / (1.0 + second * sums.size)
    inner = a[:, None] * sums.parts
    u = _add(sums.group, inner, G)
    c = _add(sums.group, a * sums.size, G)
    b = 1.0 / (1.0 + first * c)
    M = sums.total - second * (inner.T @ sums.parts) - first * ((b[:, None] * u).T @ u)
    h = inner - (first * b[sums.group] * a * sums.size)[:, None] * u[sums.group]
    dM = [-(((b**2)[:, None] * u).T @ u), -(h.T @ h)]
    share = a * sums.size
    dlogdet = [(c * b).sum(), (share - first * b[sums.group] * share**2).sum()]
    logdet = np.log(1.0 + second * sums.size).sum() + np.log(1.0 + first * c).sum()
    A = M[:k, :k]
    coef = np.linalg.solve(A, M[:k, k])
    rss = M[k, k] - M[k, :k] @ coef
    v = np.r_[-coef, 1.0]
    free = sums.n - k if reml else sums.n
    deviance = logdet + free * (1.0 + np.log(2.0 * np.pi * rss / free))
    drss = [v @ D @ v for D in dM]
    gradient = [dl + free * dr / rss for dl, dr in zip(dlogdet, drss, strict=True)]
    if reml:
        sign, size = np.linalg.slogdet(A)
        deviance = deviance + size + (np.log(sign) if np.iscomplexobj(A) else 0.0)
        gradient = [g + np.trace(np.linalg.solve(A, D[:k, :k])) for g, D in zip(gradient, dM, strict=True)]
    return {"deviance": deviance, "gradient": np.array(gradient), "A": A, "coef": coef, "rss": rss, "drss": drss,
            "free": free}  # fmt: skip


def _one_ratio(sums: _Sums, reml: bool) -> float:
    """The ratio of the groups that minimises the deviance: every local minimum on a grid, then Brent on the slope."""
    if sums.size.max() == 1:
        return 0.0  # one row a group: the two variances are one
    scale = float(np.mean(sums.size))
    grid = np.r_[0.0, np.geomspace(1e-5, 1e5, 26) / scale]
    found = [_profile((g, 0.0), sums, reml) for g in grid]
    slope = np.array([f["gradient"][0] for f in found])
    best, lowest = 0.0, found[0]["deviance"]
    for i in np.flatnonzero((slope[:-1] < 0) & (slope[1:] >= 0)):
        root = optimize.brentq(
            lambda g: _profile((g, 0.0), sums, reml)["gradient"][0], grid[i], grid[i + 1], xtol=1e-14, rtol=1e-13
        )
        value = _profile((root, 0.0), sums, reml)["deviance"]
        if value < lowest:
            best, lowest = root, value
    if slope[-1] < 0 and found[-1]["deviance"] < lowest:
        raise StatisticsError("the groups' values do not vary within groups: take one row a group (unit=groups)")
    return float(best)


def _two_ratios(sums: _Sums, reml: bool) -> np.ndarray:
    def both(r: np.ndarray) -> tuple[float, np.ndarray]:
        found = _profile(r, sums, reml)
        return float(found["deviance"]), found["gradient"]

    starts = [(0.0, 0.0), (0.3, 0.3), (1.0, 0.0), (0.0, 1.0), (3.0, 3.0)]
    fits = [optimize.minimize(both, s, jac=True, method="L-BFGS-B", bounds=[(0, None)] * 2) for s in starts]
    best = min(fits, key=lambda f: f.fun).x
    for _ in range(20):
        gradient, H = both(best)[1], _curvature(best, sums, reml)
        free = (best > 0) | (gradient < 0)
        if not free.any() or np.linalg.eigvalsh(H[np.ix_(free, free)])[0] <= 0:
            break
        step = np.zeros(2)
        step[free] = np.linalg.solve(H[np.ix_(free, free)], gradient[free])
        new = np.maximum(best - step, 0.0)
        done = np.abs(new - best).max() <= 1e-13 * (1.0 + new.max())
        best = new
        if done:
            break
    return best


def _curvature(ratios: np.ndarray, sums: _Sums, reml: bool) -> np.ndarray:
    """Second derivatives (2, 2) of the profiled deviance."""
    ratios = np.asarray(ratios, dtype=complex)
    rows = [_profile(ratios + 1j * STEP * np.eye(2)[i], sums, reml)["gradient"].imag / STEP for i in range(2)]
    return np.array(rows)


def fit_lmm(
    y: np.ndarray,
    X: np.ndarray,
    *,
    codes: np.ndarray,
    subcodes: np.ndarray | None = None,
    reml: bool = True,
) -> dict[str, Any]:
    """Linear mixed model with a random intercept of the group, optionally of subgroups nested in it.

    Parameters
    ----------
    y
        Target (n,).
    X
        Design (n, k) of full column rank, with intercept.
    codes
        Group (patient) of every row, 0 to G - 1.
    subcodes
        Subgroup (slide) of every row, each within one group; None for groups alone.
    reml
        False maximises the likelihood itself, for tests that compare fixed effects.

    Returns
    -------
    dict
        ``coef`` (k,), ``cov`` (k, k), ``df`` (k,) Satterthwaite, ``scores`` (n, k) and ``bread`` (k, k) for
        :func:`biosae.stats.robust.sandwich`, ``loglik``, ``converged``, ``note`` (``"boundary"`` where a variance is
        0), ``tau2``, ``tau2_sub``, ``sigma2``, ``icc`` = tau2 / (tau2 + tau2_sub + sigma2).

    Raises
    ------
    StatisticsError
        If subgroups cut across groups, or no variation is left within groups.
    LinAlgError
        If the design determines the target.
    """
    y, X = np.asarray(y, np.float64), np.asarray(X, np.float64)
    shift = y.mean()  # fewer digits are lost; the design has an intercept, so only its coefficient moves
    level = np.linalg.lstsq(X, np.full(len(y), shift), rcond=None)[0]
    sums = _sums(y - X @ level, X, codes, subcodes)
    if sums.n <= sums.k:
        raise StatisticsError(f"{sums.n} rows cannot carry {sums.k} coefficients")
    free = y - X @ np.linalg.lstsq(X, y, rcond=None)[0]
    if free @ free <= 1e-22 * ((y - shift) ** 2).sum():
        raise np.linalg.LinAlgError("the design determines the target, which leaves no variance to estimate")
    ratios = np.array([_one_ratio(sums, reml), 0.0]) if subcodes is None else _two_ratios(sums, reml)
    found = _profile(ratios, sums, reml)
    sigma2 = float(found["rss"] / found["free"])
    bread = np.linalg.inv(found["A"])
    e = y - X @ (found["coef"] + level)
    df = _satterthwaite(ratios, sums, reml, subcodes is None)
    variances = ratios * sigma2
    total = float(variances.sum() + sigma2)
    return {
        "coef": found["coef"] + level, "cov": sigma2 * bread, "df": df,
        "scores": X * _weighted(e, ratios, codes, subcodes)[:, None], "bread": bread,
        "loglik": float(-0.5 * found["deviance"]), "converged": True,
        "note": "boundary" if (variances[: 1 if subcodes is None else 2] <= 1e-10 * total).any() else "",
        "tau2": float(variances[0]), "tau2_sub": float(variances[1]), "sigma2": sigma2,
        "icc": float(variances[0]) / total,
    }  # fmt: skip


def _weighted(e: np.ndarray, ratios: np.ndarray, codes: np.ndarray, subcodes: np.ndarray | None) -> np.ndarray:
    """``V^-1 e`` (n,) with V in units of sigma2."""
    first, second = ratios
    if subcodes is None:
        size = np.bincount(codes)
        return e - (first / (1.0 + first * size) * np.bincount(codes, weights=e))[codes]
    fine = np.unique(subcodes, return_inverse=True)[1].ravel()
    size = np.bincount(fine)

    def inner(v: np.ndarray) -> np.ndarray:
        return v - (second / (1.0 + second * size) * np.bincount(fine, weights=v))[fine]

    one, e = inner(np.ones_like(e)), inner(e)
    c, s = np.bincount(codes, weights=one), np.bincount(codes, weights=e)
    return e - (first / (1.0 + first * c) * s)[codes] * one


def _satterthwaite(ratios: np.ndarray, sums: _Sums, reml: bool, alone: bool) -> np.ndarray:
    """``2 f^2 / (g' A g)`` of every coefficient: f its variance, g the gradient of f in the variance parameters, A
    twice the inverse Hessian of the deviance. A variance of 0 is taken as known, as lmerTest does in effect.
    """
    found = _profile(ratios, sums, reml)
    s2, free = found["rss"] / found["free"], found["free"]
    on = [i for i in range(1 if alone else 2) if ratios[i] > 0]
    H = np.zeros((1 + len(on), 1 + len(on)))
    H[0, 0] = free / s2**2
    bread = np.linalg.inv(found["A"])
    g = [np.diag(bread)]
    for place, i in enumerate(on, start=1):
        point = np.asarray(ratios, dtype=complex) + 1j * STEP * np.eye(2)[i]
        moved = _profile(point, sums, reml)
        # the deviance before sigma2 is profiled out: logdets + free log s2 + rss / s2
        slope = moved["gradient"] - free * np.array(moved["drss"]) / moved["rss"] + np.array(moved["drss"]) / s2
        for other, j in enumerate(on, start=1):
            H[place, other] = slope[j].imag / STEP
        H[0, place] = H[place, 0] = -found["drss"][i] / s2**2
        g.append(s2 * np.diag(np.linalg.inv(moved["A"])).imag / STEP)
    g = np.array(g)
    values, vectors = np.linalg.eigh(H / np.sqrt(np.outer(np.diag(H), np.diag(H))))
    scaled = vectors.T @ (g / np.sqrt(np.diag(H))[:, None])
    kept = values > 1e-10
    spread = 2.0 * (scaled[kept] ** 2 / values[kept][:, None]).sum(axis=0)
    return 2.0 * (s2 * np.diag(bread)) ** 2 / spread


def likelihood_ratio(
    y: np.ndarray, X: np.ndarray, *, codes: np.ndarray, subcodes: np.ndarray | None = None
) -> tuple[float, float]:
    """``2 (l1 - l0)`` of the last column of X by maximum likelihood, and its p from chi-squared with 1 df.

    Too small with few groups; the t with Satterthwaite degrees of freedom is the one to report.
    """
    l1, l0 = (fit_lmm(y, D, codes=codes, subcodes=subcodes, reml=False)["loglik"] for D in (X, X[:, :-1]))
    statistic = max(0.0, 2.0 * (l1 - l0))
    return statistic, float(stats.chi2.sf(statistic, 1))


def icc(
    values: np.ndarray, codes: np.ndarray, *, estimator: str = "reml", X: np.ndarray | None = None
) -> dict[str, float]:
    """Intraclass correlation of values within groups, its 95 % interval, and the design effect.

    ``anova``: ``(MSB - MSW) / (MSB + (n0 - 1) MSW)``, which may be negative, with the interval of Searle from F, exact
    for groups of one size (n0 otherwise). ``reml``: ``tau2 / (tau2 + sigma2)``, 0 or more, with the profile
    likelihood's interval. Design effect ``1 + (n0 - 1) ICC`` with ``n0 = (N - sum n_g^2 / N) / (G - 1)``, not below 1.

    Parameters
    ----------
    values
        Values (n,).
    codes
        Group of every value.
    estimator
        ``"anova"`` or ``"reml"``.
    X
        Covariates with intercept (n, k) whose effect is taken out (``reml`` only).

    Returns
    -------
    dict
        ``icc, ci_low, ci_high, design_effect, n_effective, n0, n_groups``.

    Raises
    ------
    InputError
        For an unknown estimator, values that are not finite, or covariates with ``anova``.
    StatisticsError
        With fewer than 2 groups, one row a group throughout, or values that do not vary (``reml``: within groups).
    """
    if estimator not in ESTIMATORS:
        raise InputError(f"unknown estimator {estimator!r}; {nearest(estimator, ESTIMATORS)}")
    if X is not None and estimator == "anova":
        raise InputError("estimator='anova' takes no covariates; use 'reml'")
    y, codes = np.asarray(values, np.float64), np.unique(codes, return_inverse=True)[1].ravel()
    if len(y) != len(codes) or not np.isfinite(y).all():
        raise InputError(
            f"{len(y)} values and {len(codes)} groups: give one finite value a row, and leave out the others"
        )
    size = np.bincount(codes).astype(np.float64)
    G, N = len(size), len(y)
    if G < 2 or G == N:
        raise StatisticsError("the intraclass correlation needs 2 groups, one of them with several rows")
    centred = y - (np.bincount(codes, weights=y) / size)[codes]
    if not np.ptp(y) or (estimator == "reml" and centred @ centred <= 1e-24 * ((y - y.mean()) ** 2).sum()):
        raise StatisticsError("the values do not vary within groups, so that their likelihood has no maximum")
    n0 = (N - (size**2).sum() / N) / (G - 1)
    if estimator == "anova":
        rho = float(intraclass_correlation(y, codes))
        mean = np.bincount(codes, weights=y) / size
        within = ((y - mean[codes]) ** 2).sum() / (N - G)
        F = (size * (mean - y.mean()) ** 2).sum() / (G - 1) / within if within > 0 else np.inf
        low, high = ((f - 1.0) / (f + n0 - 1.0) if np.isfinite(f) else 1.0
                     for f in (F / stats.f.ppf(q, G - 1, N - G) for q in (0.975, 0.025)))  # fmt: skip
    else:
        sums = _sums(y - y.mean(), np.ones((N, 1)) if X is None else X, codes, None)
        best = _one_ratio(sums, True)
        top = _profile((best, 0.0), sums, True)["deviance"] + stats.chi2.ppf(0.95, 1)

        def above(log_ratio: float) -> float:
            return float(_profile((np.exp(log_ratio), 0.0), sums, True)["deviance"] - top)

        centre = np.log(max(best, 1e-8 / n0))
        low = 0.0
        if _profile((0.0, 0.0), sums, True)["deviance"] > top:
            low = np.exp(optimize.brentq(above, centre - 40.0, centre))
        far = centre + 1.0
        while above(far) < 0:
            far += 1.0
        high = np.exp(optimize.brentq(above, centre, far))
        rho, low, high = (float(r / (1.0 + r)) for r in (best, low, high))
    effect = max(1.0, 1.0 + (n0 - 1.0) * rho)
    return {
        "icc": rho, "ci_low": float(low), "ci_high": float(high), "design_effect": float(effect),
        "n_effective": float(N / effect), "n0": float(n0), "n_groups": G,
    }  # fmt: skip
