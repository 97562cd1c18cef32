"""Principal variance component analysis: how much of all variance goes with patient, site, scanner and diagnosis."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import linalg, optimize

from biosae.errors import InputError
from biosae.stats.adjust import is_categorical
from biosae.stats.confounding import overlaps
from biosae.stats.features import feature_sets
from biosae.stats.nested import in_memory
from biosae.stats.sources import principal_components

LEAST = 3
"""Components that are used at least, as in the original PVCA."""
MAX_LEVELS = 12
"""Most values of a number that may be a factor."""
LOG_RATIO = (-7.0, 8.0)
"""Range of the logarithm of a factor's standard deviation over the residual one."""


def pvca(
    adata: Any, factors: Sequence[str], *, features: Sequence[str] | None = None, without: Sequence[str] = (),
    share: float = 0.6, max_components: int = 50, interactions: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Shares of the variance of embeddings and latents that go with each factor; they and the residual sum to 1.

    Principal components up to ``share`` of the variance (at least 3, at most ``max_components``); of each the variance
    components of all factors as random effects, by REML; their shares averaged with the eigenvalues as weights
    (Boedigheimer et al. 2008; Li, Bushel, Chu and Wolfinger 2009). Shares are of the variance of samples: with several
    samples a patient, name the patient as a factor, or what patients differ in goes to site and scanner.

    Parameters
    ----------
    adata
        Latents.
    factors
        Categorical columns of ``obs``; rows without one of them are left out.
    features, without
        As in :func:`readout`, without ``pca``.
    share, max_components
        Which components are used.
    interactions
        True adds every pair of factors, ``"site:label"``, unless it divides the samples as one of the two does.

    Returns
    -------
    DataFrame
        A row a (set, factor), the last factor ``residual``: ``features, factor, share, n_levels, n_components,
        explained`` (share of all variance in these components), ``n_samples, status``. Status ``unidentifiable``
        (NaN): two factors divide the samples alike, or a factor has as many levels as there are samples;
        ``one_class``: a factor has one level. ``attrs["overlap"]``: counts of the first factor by each other.

    Raises
    ------
    InputError
        If a column is absent or a number of many values, or no row has all of them.
    """
    adata = in_memory(adata)
    factors = [factors] if isinstance(factors, str) else list(factors)
    if not factors:
        raise InputError("factors is empty; name at least one column of obs")
    for name in factors:
        if name not in adata.obs:
            raise InputError(f"{name!r} is not a column of obs; columns: {', '.join(map(str, adata.obs.columns))}")
        if not is_categorical(adata.obs[name]) and adata.obs[name].nunique() > MAX_LEVELS:
            raise InputError(f"{name!r} is a number of many values; cut it into classes, for example with pandas.qcut")
    known = adata.obs[factors].notna().all(axis=1).to_numpy()
    if not known.any():
        raise InputError(f"no row has all of {', '.join(factors)}")
    adata = adata[known]
    codes = {name: pd.factorize(adata.obs[name].astype(str))[0] for name in factors}
    status = _status(codes, adata.n_obs)
    if interactions and status == "ok":
        codes |= _pairs(codes, adata.n_obs)
    names = [*codes, "residual"]
    rows = []
    for name, X in feature_sets(adata, features, without=without).items():
        shares, used, explained = np.full(len(names), np.nan), 0, np.nan
        if status == "ok":
            scores, total = _scores(X, max_components)
            values = (scores**2).sum(axis=0)
            reach = np.cumsum(values) / total
            used = min(len(values), max(LEAST, int(np.searchsorted(reach, share - 1e-12)) + 1))
            explained = float(reach[used - 1])
            parts = np.stack([variance_components(scores[:, k], list(codes.values())) for k in range(used)])
            parts /= parts.sum(axis=1, keepdims=True)
            shares = values[:used] @ parts / values[:used].sum()
        for factor, value in zip(names, shares):
            rows.append({
                "features": name, "factor": factor, "share": value,
                "n_levels": int(codes[factor].max()) + 1 if factor in codes else adata.n_obs, "n_components": used,
                "explained": explained, "n_samples": adata.n_obs, "status": status,
            })  # fmt: skip
    out = pd.DataFrame(rows)
    out.attrs["overlap"] = overlaps(adata.obs, factors[:1], factors[1:])
    return out


def _status(codes: dict[str, np.ndarray], n: int) -> str:
    levels = {name: int(c.max()) + 1 for name, c in codes.items()}
    if min(levels.values()) < 2:
        return "one_class"
    if max(levels.values()) == n:
        return "unidentifiable"
    for a, b in itertools.combinations(codes, 2):
        if levels[a] == levels[b] == _joint(codes[a], codes[b]).max() + 1:
            return "unidentifiable"
    return "ok"


def _joint(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return pd.factorize(a * (int(b.max()) + 1) + b)[0]


def _pairs(codes: dict[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    out = {}
    for a, b in itertools.combinations(codes, 2):
        both = _joint(codes[a], codes[b])
        if max(codes[a].max(), codes[b].max()) < both.max() < n - 1:
            out[f"{a}:{b}"] = both
    return out


def _scores(X: Any, n: int) -> tuple[np.ndarray, float]:
    """Scores (rows, c) of the first components, and the sum of squares of all."""
    if sp.issparse(X) and min(X.shape) > 500:
        from sklearn.decomposition import PCA

        X = sp.csr_matrix(X, dtype=np.float64)
        scores = PCA(n, svd_solver="arpack", random_state=0).fit_transform(X)
        mean = np.asarray(X.mean(axis=0)).ravel()
        return scores, float(X.multiply(X).sum() - X.shape[0] * mean @ mean)
    X = np.asarray(X.toarray() if sp.issparse(X) else X, dtype=np.float64)
    X = X - X.mean(axis=0)
    return principal_components(X, n=n)[0], float((X**2).sum())


def variance_components(y: np.ndarray, codes: Sequence[np.ndarray]) -> np.ndarray:
    """REML variances of crossed or nested random factors and the residual, (K + 1,).

    ``y = mu + sum_k Z_k u_k + e``. With ``theta_k = sd(u_k) / sd(e)`` the profiled REML deviance is
    ``log |Lambda Z'Z Lambda + I| + log (1' V^-1 1) + (n - 1) log (r^2 / (n - 1))`` up to a constant (Bates et al., J
    Stat Softw 67, 1, 2015); it depends on the data through sums over levels only, and the factor with the most levels
    is eliminated first. A variance may be 0.
    """
    y = np.asarray(y, dtype=np.float64)
    spread = max(float(y.std()), 1e-300)
    y = (y - y.mean()) / spread
    order = np.argsort([-int(c.max()) for c in codes], kind="stable")
    sums = _Sums(y, [np.asarray(codes[k]) for k in order])
    best = None
    for start in (0.0, -2.0):
        found = optimize.minimize(
            lambda t: sums.deviance(np.exp(t))[0], np.full(len(codes), start), method="L-BFGS-B",
            bounds=[LOG_RATIO] * len(codes), options={"ftol": 1e-13, "gtol": 1e-7},
        )  # fmt: skip
        if best is None or found.fun < best.fun:
            best = found
    theta = np.exp(best.x)
    deviance, residual = sums.deviance(theta)
    for k in np.argsort(theta):  # a variance at the lower end of the range is 0 if that is no worse
        tried = np.where(np.arange(len(theta)) == k, 0.0, theta)
        there = sums.deviance(tried)
        if there[0] <= deviance + 1e-7:
            theta, (deviance, residual) = tried, there
    out = np.empty(len(codes) + 1)
    out[order] = theta**2 * residual
    out[-1] = residual
    return out * spread**2


class _Sums:
    """What the REML deviance needs of the data; the first factor's block is diagonal."""

    def __init__(self, y: np.ndarray, codes: list[np.ndarray]) -> None:
        n = len(y)
        Z = [sp.csr_matrix((np.ones(n), (np.arange(n), c)), shape=(n, int(c.max()) + 1)) for c in codes]
        rest = sp.hstack(Z[1:], format="csr") if len(Z) > 1 else sp.csr_matrix((n, 0))
        self.n, self.yy = n, float(y @ y)
        self.first = np.bincount(codes[0]).astype(np.float64)
        self.cross, self.gram = (Z[0].T @ rest).toarray(), (rest.T @ rest).toarray()
        right = np.column_stack([np.ones(n), y])
        self.right_first, self.right = Z[0].T @ right, rest.T @ right
        self.sums = np.array([[n, y.sum()], [y.sum(), self.yy]])
        self.which = np.repeat(np.arange(len(Z) - 1), [z.shape[1] for z in Z[1:]])

    def deviance(self, theta: np.ndarray) -> tuple[float, float]:
        """Profiled REML deviance less its constant, and the residual variance."""
        t, scale = theta[0], theta[1:][self.which]
        diagonal = t**2 * self.first + 1.0
        cross = t * self.cross * scale
        inner = self.gram * scale[:, None] * scale + np.eye(len(scale)) - cross.T @ (cross / diagonal[:, None])
        L = np.linalg.cholesky(inner)
        top = t * self.right_first / np.sqrt(diagonal)[:, None]
        below = self.right * scale[:, None] - (cross / np.sqrt(diagonal)[:, None]).T @ top
        below = linalg.solve_triangular(L, below, lower=True) if len(scale) else below
        left = self.sums - top.T @ top - below.T @ below
        rss = max(left[1, 1] - left[0, 1] ** 2 / left[0, 0], 1e-14 * self.yy)
        logdet = np.log(diagonal).sum() + 2 * np.log(np.diag(L)).sum()
        residual = rss / (self.n - 1)
        return float(logdet + np.log(left[0, 0]) + (self.n - 1) * np.log(residual)), float(residual)
