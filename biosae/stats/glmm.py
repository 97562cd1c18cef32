"""Generalised linear mixed model with a random intercept of each group: labels (logit) and counts (log).

``g(E[y_i | b]) = x_i' beta + offset_i + tau b_g(i)``, ``b_g ~ N(0, 1)``. The likelihood of a group is an integral over
its intercept, taken by Gauss-Hermite quadrature placed on its mode and curvature (Pinheiro and Bates, J Comput Graph
Stat 4, 12, 1995). Newton-Raphson on ``(beta, tau)``, with gradient and Hessian as means over the same nodes (Louis,
J R Stat Soc B 44, 226, 1982).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special

from biosae.errors import InputError, nearest
from biosae.stats.nested import indicator
from biosae.stats.regression import RUNAWAY, fit_logistic, separable

FAMILIES = ("binomial", "poisson")
WIDE = 3.0
"""Above this standard deviation of intercepts four times as many nodes are taken."""
MAX_SD = 20.0
"""A standard deviation of intercepts on the logit or log scale above this says that groups hold one value each."""


def _mean(family: str, eta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the family at the linear predictor."""
    if family == "binomial":
        mu = special.expit(eta)
        return mu, mu * (1.0 - mu)
    mu = np.exp(np.minimum(eta, 500.0))
    return mu, mu


def _log_density(family: str, y: np.ndarray, eta: np.ndarray) -> np.ndarray:
    """Log-probability less what does not depend on the predictor."""
    if family == "binomial":
        return y * eta - np.logaddexp(0.0, eta)
    return y * eta - np.exp(np.minimum(eta, 500.0))


class _Integral:
    """Likelihood of ``(beta, tau)`` with its derivatives; modes of the intercepts carry over between calls."""

    def __init__(self, y, X, offset, codes, family, n_points) -> None:
        self.y, self.X, self.offset, self.codes, self.family = y, X, offset, codes, family
        self.G = int(codes.max()) + 1
        self.A = indicator(codes, self.G)
        self.node, self.weight = np.polynomial.hermite.hermgauss(n_points)
        self.mode = np.zeros(self.G)
        self.constant = -float(special.gammaln(y + 1.0).sum()) if family == "poisson" else 0.0

    def _modes(self, eta: np.ndarray, tau: float) -> np.ndarray:
        """Mode of every group's intercept; returns its curvature."""
        b = self.mode
        for _ in range(100):
            mu, w = _mean(self.family, eta + tau * b[self.codes])
            curvature = 1.0 + tau**2 * np.bincount(self.codes, weights=w, minlength=self.G)
            step = (tau * np.bincount(self.codes, weights=self.y - mu, minlength=self.G) - b) / curvature
            b = b + np.clip(step, -1.0, 1.0)
            if np.abs(step).max() < 1e-10:
                break
        self.mode = b
        w = _mean(self.family, eta + tau * b[self.codes])[1]
        return 1.0 + tau**2 * np.bincount(self.codes, weights=w, minlength=self.G)

    def __call__(self, theta: np.ndarray, *, derivatives: bool = True) -> dict[str, np.ndarray]:
        beta, tau = theta[:-1], theta[-1]
        eta = self.X @ beta + self.offset
        sd = 1.0 / np.sqrt(self._modes(eta, tau))
        b = self.mode[:, None] + np.sqrt(2.0) * sd[:, None] * self.node
        each = eta[:, None] + tau * b[self.codes]
        log_f = self.A @ _log_density(self.family, self.y[:, None], each)
        log_f += np.log(self.weight) + self.node**2 - 0.5 * b**2 + np.log(sd)[:, None] - 0.5 * np.log(np.pi)
        group = special.logsumexp(log_f, axis=1)
        out = {"loglik": group.sum() + self.constant}
        if not derivatives:
            return out
        share = np.exp(log_f - group[:, None])  # posterior weight of every node (G, q)
        mu, w = _mean(self.family, each)
        e = self.y[:, None] - mu
        own, at = share[self.codes], b[self.codes]
        rows = np.column_stack([self.X * (own * e).sum(axis=1)[:, None], (own * e * at).sum(axis=1)])
        parts = [self.A @ (e * x[:, None]) for x in self.X.T] + [(self.A @ e) * b]
        S = np.stack(parts, axis=2)  # complete-data score of every node (G, q, k + 1)
        mean = np.einsum("gq,gqk->gk", share, S)
        Z = self.X * (own * w * at).sum(axis=1)[:, None]
        H = np.zeros((len(theta), len(theta)))
        H[:-1, :-1] = self.X.T @ (self.X * (own * w).sum(axis=1)[:, None])
        H[-1, :-1] = H[:-1, -1] = Z.sum(axis=0)
        H[-1, -1] = (own * w * at**2).sum()
        H -= np.einsum("gq,gqk,gql->kl", share, S, S, optimize=True) - mean.T @ mean
        return {**out, "gradient": mean.sum(axis=0), "information": H, "rows": rows}


def fit_glmm(
    y: np.ndarray,
    X: np.ndarray,
    *,
    codes: np.ndarray,
    family: str = "binomial",
    offset: np.ndarray | None = None,
    n_points: int = 25,
) -> dict[str, Any]:
    """Logistic or Poisson regression with a random intercept of the group, by maximum likelihood.

    Parameters
    ----------
    y
        0/1, or counts (n,).
    X
        Design (n, k) of full column rank, with intercept.
    codes
        Group (patient) of every row, 0 to G - 1.
    family
        ``"binomial"`` (logit) or ``"poisson"`` (log).
    offset
        Logarithm of the exposure (n,).
    n_points
        Nodes of the quadrature, at least 7 (lme4's ``nAGQ``; its default of 1 is the Laplace approximation, which is
        biased for few rows a group).

    Returns
    -------
    dict
        ``coef`` (k,), ``cov`` (k, k) from the observed information, ``scores`` (n, k + 1) and ``bread`` (k + 1,
        k + 1) with ``tau`` last, ``loglik``, ``converged``, ``note`` (``"boundary"`` where tau is 0, ``"separated"``
        where the likelihood has no maximum), ``tau2``, ``icc`` on the latent scale (``tau2 / (tau2 + pi^2/3)``,
        binomial; NaN for counts).

    Raises
    ------
    InputError
        For an unknown family or too few nodes.
    """
    if family not in FAMILIES:
        raise InputError(f"unknown family {family!r}; {nearest(family, FAMILIES)}")
    if n_points < 7:
        raise InputError("n_points must be at least 7")
    y, X = np.asarray(y, np.float64), np.asarray(X, np.float64)
    offset = np.zeros(len(y)) if offset is None else offset
    integral = _Integral(y, X, offset, codes, family, n_points)
    theta, converged = _newton(integral, np.r_[_start(y, X, offset, family), 0.5])
    if abs(theta[-1]) > WIDE:
        integral = _Integral(y, X, offset, codes, family, 4 * n_points + 1)
        theta, converged = _newton(integral, theta)
    k, tau = X.shape[1], abs(float(theta[-1]))
    theta[-1] = tau
    note = ""
    far = not converged or np.abs(X @ theta[:-1]).max() > RUNAWAY
    if family == "binomial" and (tau > MAX_SD or (far and separable(y, X))):
        note, converged = "separated", False
    elif tau < 1e-4:
        note, theta[-1] = "boundary", 0.0
    found = integral(theta)
    information = found["information"]
    if note == "boundary":  # tau is known to be 0: its row says nothing of beta
        information[-1, :-1] = information[:-1, -1] = 0.0
        information[-1, -1], found["rows"][:, -1], tau = 1.0, 0.0, 0.0
    bread = np.linalg.pinv(information, hermitian=True)
    return {
        "coef": theta[:-1], "cov": bread[:k, :k], "scores": found["rows"], "bread": bread,
        "loglik": float(found["loglik"]), "converged": converged, "note": note, "tau2": tau**2,
        "icc": tau**2 / (tau**2 + np.pi**2 / 3) if family == "binomial" else float("nan"),
    }  # fmt: skip


def _newton(integral: _Integral, theta: np.ndarray) -> tuple[np.ndarray, bool]:
    """Parameters where the score is 0, and whether the steps came to rest."""
    found = integral(theta)
    for _ in range(40):
        values, vectors = np.linalg.eigh(found["information"])
        values = np.maximum(np.abs(values), 1e-8 * np.abs(values).max())  # uphill even where it is not concave
        step = vectors @ ((vectors.T @ found["gradient"]) / values)
        decrement = step @ found["gradient"]
        if decrement < 1e-16 * (1.0 + abs(found["loglik"])):
            return theta, True
        size = min(1.0, 5.0 / max(np.abs(integral.X @ step[:-1]).max(), abs(step[-1]), 1e-300))
        while decrement > 1e-2 and size > 1e-4:  # nearer than that, quadrature's error would decide; the score is exact
            new = integral(theta + size * step, derivatives=False)["loglik"]
            if new >= found["loglik"] - 1e-12 * abs(new):
                break
            size /= 2.0
        theta = theta + size * step
        found = integral(theta)
        if np.abs(integral.X @ theta[:-1]).max() > 4 * RUNAWAY or abs(theta[-1]) > MAX_SD:
            break
    return theta, bool(decrement < 1e-8)


def _start(y: np.ndarray, X: np.ndarray, offset: np.ndarray, family: str) -> np.ndarray:
    """Coefficients without random intercepts, a few steps of scoring."""
    if family == "binomial":
        return fit_logistic(y, X, offset=offset, max_iter=5)["coef"]
    mu = y + 0.5
    for _ in range(5):
        eta = np.log(mu)
        beta = np.linalg.lstsq(X * np.sqrt(mu)[:, None], np.sqrt(mu) * (eta - offset + (y - mu) / mu), rcond=None)[0]
        mu = np.exp(np.clip(X @ beta + offset, -30.0, 30.0))
    return beta
