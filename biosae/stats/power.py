"""What a study can show: the smallest effect that its patients can confirm, patients that an effect needs, power."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike
from scipy import optimize, stats

from biosae.errors import InputError, StatisticsError
from biosae.stats.association import associate
from biosae.stats.correlation import as_columns, moments
from biosae.stats.frame import Frame, Target
from biosae.stats.inference import FEW, MIN_DRAWS, VERY_FEW
from biosae.stats.nested import in_memory, indicator
from biosae.stats.permutation import MAX_EXACT
from biosae.stats.sources import Source


def _quantiles(alpha: float, power: float, m: float) -> tuple[float, float]:
    if not (0 < alpha < 1 and 0 < power < 1 and m >= 1):
        raise InputError(f"alpha={alpha}, power={power}, m={m}: give shares between 0 and 1, and at least one test")
    return float(stats.norm.isf(alpha / m / 2)), float(stats.norm.ppf(power))


def detectable(
    n: ArrayLike, *, alpha: float = 0.05, power: float = 0.8, m: float = 1, design_effect: ArrayLike = 1.0
) -> np.ndarray:
    """Smallest ``|r|`` that n units confirm: ``tanh((z_{1 - alpha/2m} + z_power) / sqrt(n / deff - 3))``.

    Parameters
    ----------
    n
        Units.
    alpha, power
        Two-sided level and power.
    m
        Tests that share the level (Bonferroni). For a false discovery rate give ``alpha`` times the expected share of
        discoveries and ``m=1``.
    design_effect
        By which units of the same patient count less (:func:`design_effect`).

    Returns
    -------
    ndarray
        As ``n``; NaN for 3 or fewer effective units.

    Raises
    ------
    InputError
        For shares outside (0, 1) or fewer than one test.
    """
    z = sum(_quantiles(alpha, power, m))
    left = np.asarray(n, dtype=np.float64) / design_effect - 3
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(left > 0, np.tanh(z / np.sqrt(left)), np.nan)[()]


def sample_size(
    r: ArrayLike, *, alpha: float = 0.05, power: float = 0.8, m: float = 1, design_effect: ArrayLike = 1.0
) -> np.ndarray:
    """Units that confirm a correlation r: ``deff (((z_{1 - alpha/2m} + z_power) / atanh r)^2 + 3)``, to be rounded up.

    Parameters as for :func:`detectable`, whose inverse it is.

    >>> round(float(sample_size(0.3)), 2)
    84.93
    """
    z = sum(_quantiles(alpha, power, m))
    with np.errstate(divide="ignore"):
        return (np.asarray(design_effect) * ((z / np.arctanh(np.abs(np.asarray(r, np.float64)))) ** 2 + 3))[()]


def auroc_error(area: ArrayLike, n1: ArrayLike, n0: ArrayLike) -> np.ndarray:
    """Standard error of an AUROC by Hanley and McNeil (Radiology 143, 29, 1982).

    ``Var = [A (1 - A) + (n1 - 1)(Q1 - A^2) + (n0 - 1)(Q2 - A^2)] / (n1 n0)``, ``Q1 = A / (2 - A)``, ``Q2 = 2 A^2 / (1 +
    A)``: exact for exponential scores, a guide for others.

    >>> round(float(auroc_error(0.75, 50, 50)), 7)
    0.0488365
    """
    A, n1, n0 = (np.asarray(v, np.float64) for v in (area, n1, n0))
    q1, q2 = A / (2 - A), 2 * A**2 / (1 + A)
    return np.sqrt((A * (1 - A) + (n1 - 1) * (q1 - A**2) + (n0 - 1) * (q2 - A**2)) / (n1 * n0))[()]


def detectable_auroc(
    n1: float, n0: float, *, alpha: float = 0.05, power: float = 0.8, m: float = 1, design_effect: float = 1.0
) -> float:
    """Smallest AUROC above 0.5 that n1 and n0 units confirm: ``A - 0.5 = z_alpha se(0.5) + z_power se(A)``.

    NaN where not even an AUROC of 1 can be told from 0.5. Parameters as for :func:`detectable`; errors by
    :func:`auroc_error` times the root of the design effect.
    """
    z_alpha, z_power = _quantiles(alpha, power, m)
    wide = math.sqrt(design_effect)

    def gap(area: float) -> float:
        return area - 0.5 - wide * (z_alpha * auroc_error(0.5, n1, n0) + z_power * auroc_error(area, n1, n0))

    if min(n1, n0) < 1 or gap(1.0) <= 0:
        return float("nan")
    return float(optimize.brentq(gap, 0.5, 1.0, xtol=1e-12))


def sample_size_auroc(
    area: float, *, share: float = 0.5, alpha: float = 0.05, power: float = 0.8, m: float = 1,
    design_effect: float = 1.0,
) -> float:  # fmt: skip
    """Units of which ``share`` are positive that confirm an AUROC, to be rounded up; see :func:`detectable_auroc`.

    Raises
    ------
    InputError
        For an AUROC of 0.5 or outside (0, 1), or a share outside (0, 1).
    """
    area = max(area, 1 - area)
    if not (0.5 < area < 1 and 0 < share < 1):
        raise InputError(f"AUROC {area} of share {share}: give an AUROC in (0, 1) other than 0.5 and a share in (0, 1)")
    z_alpha, z_power = _quantiles(alpha, power, m)

    def gap(n: float) -> float:
        errors = (auroc_error(a, n * share, n * (1 - share)) for a in (0.5, area))
        return area - 0.5 - math.sqrt(design_effect) * sum(z * e for z, e in zip((z_alpha, z_power), errors))

    low = 1 / min(share, 1 - share)
    return low if gap(low) > 0 else float(optimize.brentq(gap, low, 1e12, xtol=1e-9))


def _detectable_epsilon(n: float, classes: int, alpha: float, power: float, m: float) -> float:
    """Share of rank variance between classes at which the chi-squared of Kruskal and Wallis has the power."""
    critical = stats.chi2.isf(alpha / m, classes - 1)
    load = optimize.brentq(lambda x: stats.ncx2.sf(critical, classes - 1, x) - power, 1e-6, 1e5)
    return load / (load + n)


def design_effect(X: Any, codes: np.ndarray, *, y: np.ndarray | None = None) -> pd.DataFrame:
    """Intraclass correlation of every column within groups, and how much less a row counts for it.

    ``deff = 1 + (sum n_g^2 / N - 1) ICC_x ICC_y`` (Moulton, J Econometrics 32, 385, 1986), which is ``1 + (n - 1)
    ICC_x`` for groups of one size and a target that is constant in them; ICC by analysis of variance, negative ones
    count as 0.

    Parameters
    ----------
    X
        Columns (n, m), sparse or dense.
    codes
        Group of every row.
    y
        Target (n,) whose association with X is asked for; None takes it as constant within groups (``ICC_y = 1``).

    Returns
    -------
    DataFrame
        ``icc, design_effect, n_effective`` (``n / deff``) of every column; NaN for constant columns, and where no group
        has two rows (``design_effect`` 1).

    Raises
    ------
    StatisticsError
        With fewer than 2 groups.
    """
    V, codes = as_columns(X), np.unique(codes, return_inverse=True)[1].ravel()
    size = np.bincount(codes).astype(np.float64)
    G, N = len(size), len(codes)
    if G < 2:
        raise StatisticsError("a design effect needs at least 2 groups")
    of_y = 1.0 if y is None else float(np.nan_to_num(np.clip(_icc(as_columns(np.asarray(y)[:, None]), codes)[0], 0, 1)))
    icc = _icc(V, codes)
    deff = 1 + ((size**2).sum() / N - 1) * np.clip(icc, 0, 1) * of_y
    deff = np.ones_like(deff) if G == N else deff
    return pd.DataFrame({"icc": icc, "design_effect": deff, "n_effective": N / deff})


def _icc(V: Any, codes: np.ndarray, step: int = 2000) -> np.ndarray:
    """``(MSB - MSW) / (MSB + (n0 - 1) MSW)`` of every column; see ``nested.intraclass_correlation``."""
    size = np.bincount(codes).astype(np.float64)
    G, N = len(size), len(codes)
    if G == N:
        return np.full(V.shape[1], np.nan)
    A, n0 = indicator(codes, G), (N - (size**2).sum() / N) / (G - 1)
    out = []
    for start in range(0, V.shape[1], step):
        part = V[:, start : start + step]
        mean, ss = moments(part)
        total = A @ part
        total = total.toarray() if sp.issparse(total) else total
        between = (size[:, None] * (total / size[:, None] - mean) ** 2).sum(axis=0)
        msb, msw = between / (G - 1), np.maximum(ss - between, 0.0) / (N - G)
        with np.errstate(divide="ignore", invalid="ignore"):
            out.append(np.where(ss > 0, (msb - msw) / (msb + (n0 - 1) * msw), np.nan))
    return np.concatenate(out) if out else np.empty(0)


def power(
    adata: Any,
    targets: str | Sequence[str],
    *,
    unit: str,
    m: int | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
    groups: str = "patient",
    aggregate: str = "mean",
    assume_independent: bool = False,
) -> pd.DataFrame:
    """The smallest effect on each target that these patients can confirm: to be read before the screen.

    Parameters
    ----------
    adata
        Latents.
    targets
        Columns of ``obs``.
    unit, groups, aggregate, assume_independent
        As for :func:`biosae.stats.associate`.
    m
        Tests that share ``alpha`` (Bonferroni, as ``p_maxt`` at worst); None takes every latent with every target.
    alpha, power
        Level and power.

    Returns
    -------
    DataFrame
        One row a target: ``target, classes`` (sizes), ``n_units, n_groups, m, icc_median, icc_q25, icc_q75`` (of the
        latents within groups), ``design_effect, design_effect_q25, design_effect_q75`` (median and quartiles over
        latents; 1 for independent units), ``n_effective, effect, detectable, smallest_p, sentence``. ``smallest_p`` is
        what rearranging few groups can give at best; where it is above ``alpha / m`` nothing can be confirmed and
        ``detectable`` is NaN.

    Raises
    ------
    StatisticsError, InputError
        As :func:`biosae.stats.associate`.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    adata = in_memory(adata)
    m = m or max(adata.n_vars * len(targets), 1)
    frame = Frame(adata, unit, groups, assume_independent=assume_independent, aggregate=aggregate)
    X = adata.X if sp.issparse(adata.X) else sp.csr_matrix(adata.X)
    rows = []
    for name in targets:
        found = frame.target(name)
        codes = None if frame.group_of is None else frame.group_of[found.samples]
        icc, deff = np.full(3, np.nan), np.ones(3)
        if codes is not None and 2 <= len(np.unique(codes)) < len(codes):
            icc = _quartiles(design_effect(X[found.samples], codes)["icc"])
        if found.groups.codes is not None and found.groups.n >= 2:
            pooled = X[found.samples] if found.unit_codes is None else None
            if pooled is None:
                pooled = frame.columns(Source("latent", X, list(adata.var_names)), found)[0]
            y = None if found.groups.constant else found.y
            deff = np.nan_to_num(_quartiles(design_effect(pooled, found.groups.codes, y=y)["design_effect"]), nan=1.0)
        size = np.bincount(found.y.astype(int), minlength=len(found.classes)) if found.classes else []
        n_effective, floor = found.n_units / deff[0], _smallest_p(found, size)
        one_value = not len(found.y) or not np.ptp(found.y)
        if not found.classes:
            effect, value = "pearson_r", float(detectable(n_effective, alpha=alpha, power=power, m=m))
        elif len(found.classes) <= 2:
            effect, size = "auroc", [*size, 0][:2]
            value = detectable_auroc(*size[::-1], alpha=alpha, power=power, m=m, design_effect=deff[0])
        else:
            effect, value = "epsilon_squared", _detectable_epsilon(n_effective, len(found.classes), alpha, power, m)
        if one_value or found.groups.n < 3 or floor > alpha / m:
            value = float("nan")
        rows.append({
            "target": name, "classes": ", ".join(f"{c} {k}" for c, k in zip(found.classes, size)),
            "n_units": found.n_units, "n_groups": found.groups.n, "m": m,
            "icc_median": icc[0], "icc_q25": icc[1], "icc_q75": icc[2], "design_effect": deff[0],
            "design_effect_q25": deff[1], "design_effect_q75": deff[2], "n_effective": n_effective,
            "effect": effect, "detectable": value, "smallest_p": floor,
            "sentence": _sentence(found, unit, groups, m, effect, value, floor, alpha, power),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _quartiles(values: pd.Series) -> np.ndarray:
    known = values.dropna()
    return np.quantile(known, [0.5, 0.25, 0.75]) if len(known) else np.full(3, np.nan)


def _smallest_p(found: Target, size: Sequence[int]) -> float:
    """What the rearrangement of few groups, or the flips of their scores, can give at best; 0 where no such bound."""
    G, constant = found.groups.n, found.groups.constant
    if G < 2 or (not constant and G >= VERY_FEW) or G >= FEW:
        return 0.0
    if not constant:
        return 2.0 ** (1 - G)
    ways = math.factorial(G)
    if len(size) == 2:
        k = int(size[1])
        if found.groups.codes is not None:
            k = len(np.unique(found.groups.codes[found.y == 1]))
        ways = math.comb(G, k) / (2 if 2 * k == G else 1)
    return 1.0 / ways if ways <= MAX_EXACT else 1.0 / (MIN_DRAWS + 1)


def _sentence(
    found: Target, unit: str, groups: str, m: int, effect: str, value: float, floor: float, alpha: float, power: float
) -> str:
    who = f"{found.n_units:,} {unit}s"
    if found.groups.codes is not None:
        who += f" of {found.groups.n:,} {groups}s"
    tests = f"{m:,} tests" if m > 1 else "one test"
    if np.isnan(value):
        why = f": rearranging {found.groups.n} {groups}s gives no p below {floor:.2g}" if floor > alpha / m else ""
        return f"With {who} and {tests} nothing can be confirmed{why}."
    value = math.ceil(100 * value - 1e-9) / 100
    shown = {
        "pearson_r": f"|r| > {value:.2f}",
        "auroc": f"an AUROC above {value:.2f} or below {1 - value:.2f}",
        "epsilon_squared": f"a share of rank variance above {value:.2f}",
    }[effect]
    how = f"{100 * power:.0f} % power, level {alpha:g} over all tests"
    return f"With {who} and {tests} only {shown} can be confirmed ({how})."


def power_by_thinning(
    adata: Any,
    target: str,
    *,
    latents: Sequence[str],
    unit: str,
    method: str = "auto",
    shares: Sequence[float] = (0.25, 0.5, 0.75),
    m: int = 1,
    alpha: float = 0.05,
    n_draws: int = 100,
    groups: str = "patient",
    random_state: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """How often a part of the patients would have confirmed what all of them show.

    Patients are drawn without replacement (within classes where the label is constant in them) and the latent is
    tested again. It is the power for the effect as estimated here: too high for latents chosen as the best of many.

    Parameters
    ----------
    adata, target, unit, method, groups, options
        As for :func:`biosae.stats.associate`.
    latents
        Names.
    shares
        Shares of patients kept.
    m, alpha
        A draw confirms where ``p < alpha / m``.
    n_draws
        Draws a share.
    random_state
        Seed.

    Returns
    -------
    DataFrame
        ``latent, target, share, n_groups, n_draws, power, ci_low, ci_high`` (Clopper-Pearson), and ``n_withheld``, the
        draws in which the latent had no p.

    Raises
    ------
    InputError
        If ``groups`` is not a column, or a share lies outside (0, 1].
    """
    if groups not in adata.obs or target not in adata.obs:
        raise InputError(f"power_by_thinning draws {groups}s: both {groups!r} and {target!r} must be columns of obs")
    if any(not 0 < share <= 1 for share in shares):
        raise InputError(f"shares={list(shares)}; give shares of patients in (0, 1]")
    latents = [latents] if isinstance(latents, str) else list(latents)
    part = in_memory(adata, latents)
    part = part[part.obs[target].notna().to_numpy()]
    codes, names = pd.factorize(part.obs[groups])
    per = part.obs.groupby(codes, observed=True)[target]
    kind = pd.factorize(per.first())[0] if (per.nunique() < 2).all() and per.first().nunique() < 10 else None
    rng, rows = np.random.default_rng(random_state), []
    for share in shares:
        p = np.full((n_draws, len(latents)), np.nan)
        for draw in range(n_draws):
            kept = np.zeros(len(names), dtype=bool)
            for c in [None] if kind is None else np.unique(kind):
                own = np.arange(len(names)) if c is None else np.flatnonzero(kind == c)
                kept[rng.choice(own, max(1, round(share * len(own))), replace=False)] = True
            table = associate(
                part[kept[codes]], target, unit=unit, method=method, groups=groups, controls=False,
                random_state=random_state, **options,
            )  # fmt: skip
            p[draw] = table.set_index("latent").loc[latents, "p"]
        hits = (p < alpha / m).sum(axis=0)
        low, high = stats.beta.ppf(0.025, hits, n_draws - hits + 1), stats.beta.ppf(0.975, hits + 1, n_draws - hits)
        rows += [
            (name, target, share, int(kept.sum()), n_draws, hits[j] / n_draws, np.nan_to_num(low[j]),
             1.0 if hits[j] == n_draws else high[j], int(np.isnan(p[:, j]).sum()))
            for j, name in enumerate(latents)
        ]  # fmt: skip
    columns = ["latent", "target", "share", "n_groups", "n_draws", "power", "ci_low", "ci_high", "n_withheld"]
    return pd.DataFrame(rows, columns=columns)
