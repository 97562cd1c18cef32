"""Standard errors of a fitted model that hold when rows of one group depend on each other.

A fit hands over its *bread* ``B`` (k, k), the inverse of the information, and the *score* of every row ``s_i`` (k,),
the gradient of its log-likelihood at the optimum (for least squares ``x_i e_i`` with ``B = (X'X)^-1``). Everything
here is ``B (sum_g S_g S_g') B`` with ``S_g`` the scores of group g added up (Liang and Zeger, Biometrika 73, 13,
1986), and what must be done to it when there are few groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from biosae.errors import InputError, nearest
from biosae.stats.permutation import Draws, sign_flips

KINDS = ("cr0", "cr1")
WEIGHTS = ("rademacher", "webb")
WEBB = np.sqrt([0.5, 1.0, 1.5])
"""Magnitudes of Webb's six-point weights (Webb, Can J Econ 56, 839, 2023)."""


def group_sums(values: np.ndarray, codes: np.ndarray | None) -> np.ndarray:
    """Rows of ``values`` (n, k) added up by group, (G, k); as they are where ``codes`` is None."""
    if codes is None:
        return values
    out = np.zeros((int(codes.max()) + 1, values.shape[1]))
    np.add.at(out, codes, values)
    return out


def sandwich(
    bread: np.ndarray, scores: np.ndarray, *, codes: np.ndarray | None = None, kind: str = "cr1"
) -> np.ndarray:
    """Covariance (k, k) of coefficients, robust to what happens within groups.

    ``V = c B (sum_g S_g S_g') B``; ``cr0``: ``c = 1``; ``cr1``: ``c = G/(G-1) (N-1)/(N-K)``. With ``codes`` None every
    row is a group, which gives HC0 and HC1. Tests use t with ``G - 1`` degrees of freedom.

    Parameters
    ----------
    bread
        Inverse information (k, k).
    scores
        Score of every row (n, k).
    codes
        Group of every row, 0 to G - 1, or None.

    Raises
    ------
    InputError
        For an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind {kind!r}; {nearest(kind, KINDS)}")
    S = group_sums(scores, codes)
    G, N, K = len(S), len(scores), bread.shape[0]
    c = 1.0 if kind == "cr0" else G / (G - 1) * (N - 1) / (N - K)
    half = S @ bread
    return c * (half.T @ half)


def cr2(X: np.ndarray, residuals: np.ndarray, *, codes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Bias-reduced covariance of least squares, and the degrees of freedom of every coefficient.

    ``V = B (sum_g X_g' A_g e_g e_g' A_g X_g) B``, ``A_g = (I - X_g B X_g')^(-1/2)``, unbiased if rows are independent
    with one variance (Bell and McCaffrey, Survey Methodology 28, 169, 2002). Satterthwaite degrees of freedom under
    the same working model, ``(sum_g P_gg)^2 / sum_gh P_gh^2`` with ``P_gh`` the covariance of the groups' parts
    (Pustejovsky and Tipton, J Bus Econ Stat 36, 672, 2018). Where a group determines a coefficient, ``A_g`` is the
    pseudo-inverse. With ``codes`` None every row is a group (HC2).

    Parameters
    ----------
    X
        Design (n, k) of full column rank.
    residuals
        Residuals (n,) of least squares on X.
    codes
        Group of every row, 0 to G - 1, or None.

    Returns
    -------
    tuple
        Covariance (k, k) and degrees of freedom (k,).
    """
    n, k = X.shape
    codes = np.arange(n) if codes is None else codes
    values, vectors = np.linalg.eigh(X.T @ X)
    bread = (vectors / values) @ vectors.T
    order = np.argsort(codes, kind="stable")
    edges = np.flatnonzero(np.r_[True, np.diff(codes[order]) != 0, True])
    S, U, own = [], [], []
    for start, stop in itertools.pairwise(edges):
        rows = order[start:stop]
        Xg = X[rows]
        P, s, _ = np.linalg.svd(Xg @ (vectors / np.sqrt(values)), full_matrices=False)
        left = 1.0 - s**2
        shift = np.where(left > 1e-10, 1.0 / np.sqrt(np.maximum(left, 1e-10)), 0.0) - 1.0
        adjusted = Xg + P @ (shift[:, None] * (P.T @ Xg))  # A_g X_g
        S.append(adjusted.T @ residuals[rows])
        weights = adjusted @ bread  # column c: A_g X_g B c
        own.append((weights**2).sum(axis=0))
        U.append(Xg.T @ weights)
    S, U, own = np.array(S), np.array(U), np.array(own)
    half = S @ bread
    df = np.empty(k)
    for j in range(k):
        u, d = U[:, :, j], own[:, j]
        shared = np.einsum("gk,kl,gl->g", u, bread, u)
        inner = bread @ (u.T @ u)
        squares = (d**2).sum() - 2.0 * (d * shared).sum() + np.trace(inner @ inner)
        df[j] = (d - shared).sum() ** 2 / squares
    return half.T @ half, df


def wild_bootstrap(
    y: np.ndarray,
    X: np.ndarray,
    *,
    codes: np.ndarray | None = None,
    n_draws: int = 9999,
    weights: str = "rademacher",
    interval: bool = True,
    random_state: int = 0,
) -> dict[str, Any]:
    """Wild cluster bootstrap of the last coefficient of least squares, with the null hypothesis imposed.

    The residuals of the model without the last column are multiplied by one random weight a group, the full model is
    fitted to each draw, and its CR1 t is compared with that of the data (WCR of Cameron, Gelbach and Miller, Rev Econ
    Stat 90, 414, 2008). Up to 16 groups all ``2^(G-1)`` sign vectors are taken. The interval holds the values of the
    coefficient that the same test does not reject at 5 %.

    Parameters
    ----------
    y
        Target (n,).
    X
        Design (n, k) of full column rank, with intercept; the coefficient of its last column is tested.
    codes
        Group of every row, 0 to G - 1; None takes every row as a group.
    n_draws
        Draws where signs are not listed.
    weights
        ``"rademacher"`` (-1 or 1), or ``"webb"`` (six values, for fewer than about 10 groups).
    interval
        False leaves the interval out.

    Returns
    -------
    dict
        ``p, low, high, statistic`` (CR1 t) and ``how``.

    Raises
    ------
    InputError
        For unknown weights.
    """
    if weights not in WEIGHTS:
        raise InputError(f"unknown weights {weights!r}; {nearest(weights, WEIGHTS)}")
    n, k = X.shape
    codes = np.arange(n) if codes is None else codes
    G = int(codes.max()) + 1
    Q, _ = np.linalg.qr(X[:, :-1]) if k > 1 else (np.zeros((n, 1)), None)
    x, r = X[:, -1] - Q @ (Q.T @ X[:, -1]), y - Q @ (Q.T @ y)
    ss = x @ x
    slope = x @ r / ss
    full = np.column_stack([Q, x / np.sqrt(ss)])  # orthonormal, so that the bread is the identity
    left = group_sums(x[:, None] * full, codes)
    own = {name: np.bincount(codes, weights=x * v, minlength=G) for name, v in (("r", r), ("x", x))}
    right = {name: group_sums(v[:, None] * full, codes) for name, v in (("r", r), ("x", x))}
    if weights == "webb":
        draws = Draws(lambda: _webb(G, n_draws, random_state), n_draws, False)
    else:
        draws = sign_flips(G, n_draws=n_draws, random_state=random_state)
    blocks = list(draws.blocks())

    def t(value: float, V: np.ndarray) -> np.ndarray:
        a, C = own["r"] - value * own["x"], right["r"] - value * right["x"]
        spread = np.sqrt(((a[:, None] * V - left @ (C.T @ V)) ** 2).sum(axis=0))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(spread > 0, np.abs(a @ V) / spread, np.inf)

    def p_of(value: float) -> float:
        observed = t(value, np.ones((G, 1)))[0]
        count = sum(int((t(value, V) >= observed * (1.0 - 1e-9)).sum()) for V in blocks)
        return float(draws.p(np.float64(count)))

    bread = np.linalg.inv(X.T @ X)
    e = r - slope * x
    se = float(np.sqrt(sandwich(bread, X * e[:, None], codes=codes)[-1, -1]))
    low = high = np.nan
    if interval and draws.exact and draws.n_draws < 20:
        low, high = -np.inf, np.inf  # no p below 5 % exists
    elif interval and se > 0:
        low, high = (_bound(p_of, slope, step) for step in (-se, se))
    return {
        "p": p_of(0.0), "low": low, "high": high, "statistic": slope / se if se > 0 else np.nan,
        "how": f"wild bootstrap of {G} groups, {weights} weights, {draws.describe}",
    }  # fmt: skip


def _bound(p_of: Callable[[float], float], centre: float, step: float) -> float:
    """Where p falls through 5 % on one side of the estimate; infinite if it never does."""
    inside, outside = centre, centre + 2.0 * step
    for _ in range(20):
        if p_of(outside) <= 0.05:
            break
        inside, outside = outside, centre + 2.0 * (outside - centre)
    else:
        return float(np.sign(step) * np.inf)
    for _ in range(30):
        middle = 0.5 * (inside + outside)
        inside, outside = (inside, middle) if p_of(middle) <= 0.05 else (middle, outside)
        if abs(outside - inside) <= 1e-5 * abs(step):
            break
    return float(outside)


def _webb(G: int, n_draws: int, random_state: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(random_state)
    for start in range(0, n_draws, 1024):
        size = (G, min(1024, n_draws - start))
        yield rng.choice([-1.0, 1.0], size) * rng.choice(WEBB, size)
