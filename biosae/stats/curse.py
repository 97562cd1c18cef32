"""Winner's curse: effects that were chosen for being large, corrected for the choice."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import special

from biosae.errors import InputError, StatisticsError, nearest
from biosae.stats.ranking import ranked
from biosae.stats.scale import back, natural
from biosae.stats.status import TESTED

METHODS = ("conditional", "shrinkage")
_KEPT = [
    "latent", "target", "source", "method", "effect", "contrast", "estimate", "ci_low", "ci_high", "p", "q", "p_maxt",
    "n_units", "n_groups", "n_samples", "status",
]  # fmt: skip
_BISECTIONS = 80


def carried(result: pd.DataFrame, *, carry: int | str = 1, alpha: float = 0.05) -> pd.DataFrame:
    """Rows of each target and source that are taken on, the strongest first, and the p below which one was taken.

    Parameters
    ----------
    result
        Table of :func:`biosae.stats.associate`.
    carry
        A number: so many of each target and source, in the order of :func:`biosae.stats.ranked`. ``"significant"``:
        all with ``q <= alpha`` or ``p_maxt <= alpha``.
    alpha
        Level of ``"significant"``.

    Returns
    -------
    DataFrame
        Columns of ``result`` and ``p_threshold``: the p at which a row would just not have been taken, all other rows
        being what they are. By rank it is the p of the first row that was left behind (1 where none was). By ``q`` it
        is ``alpha p / q`` of the last row taken, which for Benjamini-Hochberg is ``alpha R / m``; by ``p_maxt``
        likewise.

    Raises
    ------
    InputError
        For another ``carry``.
    """
    whole = isinstance(carry, (int, np.integer)) and not isinstance(carry, bool) and carry >= 1
    if not whole and carry != "significant":
        raise InputError(f"carry={carry!r}; give 'significant' or a number of 1 or more")
    keys, parts = ["target", "source"], []
    limits = _by_q(result, alpha) if carry == "significant" else {}
    for (_, source), part in result.groupby(keys, sort=False):
        order = ranked(part)
        if carry == "significant":
            order = order[order["status"].isin(TESTED)]
            maxt = order["p_maxt"].astype(float) if "p_maxt" in order else pd.Series(np.nan, index=order.index)
            by_maxt = order[maxt <= alpha]
            limit = limits.get(source, 0.0)
            if len(by_maxt):
                last = by_maxt.iloc[-1]
                limit = max(limit, float(last["p"]) * alpha / float(last["p_maxt"]))
            parts.append(order[(order["q"] <= alpha) | (maxt <= alpha)].assign(p_threshold=limit))
        else:
            behind = order["p"].iloc[carry:].dropna()
            parts.append(order.head(carry).assign(p_threshold=float(behind.iloc[0]) if len(behind) else 1.0))
    return pd.concat(parts) if parts else result.iloc[:0].assign(p_threshold=np.nan)


def _by_q(result: pd.DataFrame, alpha: float) -> dict[str, float]:
    """For each source, the family of ``q``: the p at which a row would just have been called."""
    out = {}
    for source, part in result[result["q"] <= alpha].groupby("source"):
        last = part.loc[part["p"].astype(float).idxmax()]
        out[source] = float(last["p"]) * alpha / float(last["q"]) if last["q"] > 0 else float(last["p"])
    return out


def winners_curse(
    result: pd.DataFrame, *, select: int | str = "significant", alpha: float = 0.05, method: str = "conditional",
    level: float = 0.95,
) -> pd.DataFrame:  # fmt: skip
    """Estimates of the features that were chosen, corrected for having been chosen.

    Parameters
    ----------
    result
        Whole table of :func:`biosae.stats.associate`, chosen and not chosen rows alike.
    select
        How rows were chosen: ``"significant"`` (``q`` or ``p_maxt`` at most ``alpha``), or a number: the first so many
        of each target and source.
    alpha
        Level of ``"significant"``.
    method
        ``"conditional"``: maximum of the likelihood given that the row was chosen, and the interval that covers in
        ``level`` of the experiments in which it is. ``"shrinkage"``: mean of the posterior under a prior estimated
        from all tested rows of the target and source, and its central interval; it does not depend on how rows were
        chosen.
    level
        Of the intervals.

    Returns
    -------
    DataFrame
        One row a chosen feature, the strongest of each target and source first: what names it, ``estimate, ci_low,
        ci_high, p, q, n_units, n_groups``, and ``p_threshold`` (see :func:`carried`), ``estimate_corrected,
        ci_low_corrected, ci_high_corrected`` on the scale of the effect, and ``retained``, corrected over naive
        estimate on the scale where no effect is 0. NaN for effects without direction or interval (Kruskal-Wallis) and
        for rows without p.

    Raises
    ------
    InputError
        For unknown options.
    StatisticsError
        If the table has no rows.

    Notes
    -----
    On the effect's own scale (Fisher's z, logit of the AUROC, logarithm of ratios) ``z = theta / se`` is taken as
    normal with mean ``mu`` and chosen where ``|z| > c``. Then

    ``L(mu) = phi(z - mu) / (Phi(mu - c) + Phi(-mu - c))``

    whose maximum solves ``E(Z | |Z| > c; mu) = z`` (Zhong and Prentice, Biostatistics 9, 621, 2008; Ghosh, Zou and
    Wright, Am J Hum Genet 82, 1064, 2008). The interval inverts the distribution of ``Z`` given the choice. Choice by
    rank conditions on the first row left behind. ``c`` stands to ``z`` as the normal quantile of ``p_threshold`` to
    that of ``p``, since the p of biosae may be more cautious than the interval.

    The prior is a mixture of normals around 0 of many widths, its weights by EM (Stephens, Biostatistics 18, 275,
    2017). Latents that go together make its weights less certain than their number suggests.

    Both shrink an estimate that only just passed a great deal, and one far beyond the threshold hardly at all. The
    conditional maximum gives too little where the effect is near the threshold, the naive estimate too much.
    """
    if method not in METHODS:
        raise InputError(f"method={method!r}; {nearest(method, METHODS)}")
    if not 0 < level < 1:
        raise InputError(f"level={level}; it must lie between 0 and 1")
    if len(result) == 0:
        raise StatisticsError("the table of associations is empty")
    taken = carried(result, carry=select, alpha=alpha)
    theta, se = natural(taken)
    if method == "conditional":
        mu, low, high = _conditional_rows(taken, theta, se, level)
    else:
        mu, low, high = (np.full(len(taken), np.nan) for _ in range(3))
        for key, part in result.groupby(["target", "source"], sort=False):
            here = np.flatnonzero(((taken["target"] == key[0]) & (taken["source"] == key[1])).to_numpy())
            family = part[part["status"].isin(TESTED)]
            if len(here) and len(family):
                mu[here], low[here], high[here] = shrunk(theta[here], se[here], *natural(family), level=level)
    known = (taken["p"].notna() & np.isfinite(theta) & np.isfinite(se)).to_numpy()
    out = taken[[c for c in _KEPT if c in taken]].reset_index(drop=True)
    out["p_threshold"] = taken["p_threshold"].to_numpy()
    for name, value in (("estimate_corrected", mu), ("ci_low_corrected", low), ("ci_high_corrected", high)):
        out[name] = np.where(known, back(value, taken["effect"]), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        out["retained"] = np.where(known, mu / theta, np.nan)
    out.attrs["biosae"] = {**result.attrs.get("biosae", {}), "winners_curse": method, "select": select, "alpha": alpha}
    return out


def _conditional_rows(
    taken: pd.DataFrame, theta: np.ndarray, se: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corrected values and bounds on the scale of each effect."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.abs(theta) / se
        of_p = special.ndtri(np.clip(taken["p"].to_numpy(np.float64) / 2, 1e-300, 0.5))
        of_limit = special.ndtri(np.clip(taken["p_threshold"].to_numpy(np.float64) / 2, 1e-300, 0.5))
        c = z * np.where(of_p < 0, np.clip(of_limit / of_p, 0.0, 1.0), 0.0)
    mu, low, high = (np.full(len(z), np.nan) for _ in range(3))
    use = np.isfinite(z) & np.isfinite(c)
    mu[use], low[use], high[use] = conditional(z[use], c[use], level=level)
    side = np.where(theta < 0, -1.0, 1.0)
    low, high = np.where(side > 0, low, -high), np.where(side > 0, high, -low)
    return side * mu * se, low * se, high * se


def conditional(z: np.ndarray, c: np.ndarray, *, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Conditional maximum-likelihood estimate of the mean of ``z ~ N(mu, 1)`` given ``|z| > c``, and its interval.

    Parameters
    ----------
    z, c
        (rows,), ``z >= c >= 0``. With ``c = 0`` the answer is ``z`` and ``z -/+ 1.96``.
    level
        Of the equal-tailed interval.
    """
    z, c = np.broadcast_arrays(np.asarray(z, dtype=np.float64), np.asarray(c, dtype=np.float64))

    def chosen(mu: np.ndarray) -> np.ndarray:
        return np.logaddexp(special.log_ndtr(mu - c), special.log_ndtr(-mu - c))

    def mean(mu: np.ndarray) -> np.ndarray:
        density = (np.exp(-((c - s * mu) ** 2) / 2 - chosen(mu)) / np.sqrt(2 * np.pi) for s in (1, -1))
        return mu + next(density) - next(density)

    def beyond(mu: np.ndarray) -> np.ndarray:
        return np.exp(special.log_ndtr(mu - z) - chosen(mu))

    tail = (1 - level) / 2
    estimate = np.where(c > 0, _root(lambda mu: mean(mu) - z, np.zeros_like(z), z), z)
    low = _root(lambda mu: beyond(mu) - tail, -z - 10, z + 10)
    high = _root(lambda mu: beyond(mu) - (1 - tail), -z - 10, z + 10)
    return estimate, low, high


def _root(rising, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Root of a rising function, by bisection in every row."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = rising(middle) < 0
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def shrunk(
    theta: np.ndarray, se: np.ndarray, all_theta: np.ndarray, all_se: np.ndarray, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Posterior mean and central interval of each ``theta`` under a prior estimated from ``all_theta``.

    ``theta_j ~ N(beta_j, se_j^2)``, ``beta_j ~ sum_k pi_k N(0, tau_k^2)`` with ``tau_0 = 0``; ``pi`` by EM.
    """
    use = np.isfinite(all_theta) & np.isfinite(all_se) & (all_se > 0)
    tau2, weight = _prior(all_theta[use], all_se[use]) if use.any() else (np.zeros(1), np.ones(1))
    share = _shares(theta, se, tau2, weight)
    factor = tau2 / (tau2 + se[:, None] ** 2)
    means, sds = factor * theta[:, None], np.sqrt(factor) * se[:, None]

    def below(x: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.where(sds > 0, special.ndtr((x[:, None] - means) / sds), x[:, None] >= means)
        return (share * part).sum(axis=1)

    span = np.abs(theta) + 10 * se
    tail = (1 - level) / 2
    low, high = (_root(lambda x, p=p: below(x) - p, -span, span) for p in (tail, 1 - tail))
    return (share * means).sum(axis=1), low, high


def _prior(theta: np.ndarray, se: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances of the components and their weights."""
    widest = 2 * np.sqrt(max(float((theta**2 - se**2).max()), 0.0))
    finest = float(se.min()) / 10
    if widest <= finest:
        return np.array([0.0]), np.array([1.0])
    n = int(np.ceil(np.log(widest / finest) / np.log(np.sqrt(2)))) + 1
    tau2 = np.concatenate([[0.0], np.geomspace(finest, widest, n) ** 2])
    weight = np.full(len(tau2), 1 / len(tau2))
    likelihood = _likelihood(theta, se, tau2)
    for _ in range(1000):
        new = weight * (likelihood / (likelihood @ weight)[:, None]).mean(axis=0)
        done = np.abs(new - weight).max() < 1e-6
        weight = new
        if done:
            break
    return tau2, weight


def _likelihood(theta: np.ndarray, se: np.ndarray, tau2: np.ndarray) -> np.ndarray:
    """Density of each row under each component over that of its likeliest one, (rows, components)."""
    total = tau2 + se[:, None] ** 2
    log = -np.log(total) / 2 - theta[:, None] ** 2 / total / 2
    return np.exp(log - log.max(axis=1, keepdims=True))


def _shares(theta: np.ndarray, se: np.ndarray, tau2: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Posterior probability of each component, (rows, components)."""
    share = weight * _likelihood(theta, se, tau2)
    return share / share.sum(axis=1, keepdims=True)
