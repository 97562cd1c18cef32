"""Are the p-values what they claim: quantiles against uniform, and a statistic against its permutations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from biosae.errors import InputError
from biosae.pl import results, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def qq(result: pd.DataFrame, *, target: str | None = None, ax: Axes | None = None) -> Axes:
    """Observed against expected -log10 p, one line a source, with the 95 % band of independent uniform p.

    Under no association the dots follow the diagonal; dots above it from the very left mean that p-values are too
    small throughout (dependence that the test ignored, such as tiles of one patient), dots above it on the right only
    are signal. The legend gives the median of the chi-squared statistics over its expectation (lambda; Devlin and
    Roeder, Biometrics 55, 997, 1999): near 1 where most latents are unassociated and the test is sound, below 1 where
    it is conservative.

    Parameters
    ----------
    result : DataFrame
        Table of :func:`biosae.stats.associate`.
    target : str, optional
        One target; with None all tests of a source are drawn together.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If a column or the target is absent, or nothing was tested.
    """
    rows = results.choose(result, target=target)
    rows = rows[results.was_tested(rows)]
    if rows.empty:
        raise InputError("no test in this table has a p-value, so there is nothing to draw; its status column says why")
    with style.paper():
        ax = style.axes(ax, (3.2, 3.0))
        most = int(rows["source"].value_counts().max())
        _band(ax, most)
        for source, part in rows.groupby(rows["source"].astype(str), sort=False):
            p = np.sort(part["p"].to_numpy(float))
            expected = -np.log10((np.arange(1, len(p) + 1) - 0.5) / len(p))
            ax.scatter(
                expected, -np.log10(np.clip(p, 1e-300, 1.0)), s=7, linewidths=0, rasterized=len(p) > 3000,
                color=style.SOURCE_COLOURS.get(source, style.INK), marker=style.SOURCE_MARKERS.get(source, "o"),
                label=f"{style.SOURCE_NAMES.get(source, source)}, λ = {inflation(p):.2f} (n = {len(p):,})",
            )  # fmt: skip
        ax.set_xlabel("expected −log$_{10}$ p")
        ax.set_ylabel("observed −log$_{10}$ p")
        ax.legend(loc="upper left", bbox_to_anchor=(0.0, -0.22), handletextpad=0.2)
        ax.set_title(style.wrap(f"n = {results.units_phrase(rows)}; band: 95 % of uniform p", width=48))
    return ax


def inflation(p: np.ndarray) -> float:
    """Median of the 1-df chi-squared quantiles of ``p`` over that of uniform p, 0.4549."""
    return float(stats.chi2.isf(np.median(p), 1) / stats.chi2.median(1))


def _band(ax: Axes, n: int) -> None:
    """Pointwise 95 % band of order statistics of n uniform numbers: beta(k, n - k + 1)."""
    k = np.unique(np.geomspace(1, n, 200).astype(int))
    expected = -np.log10((k - 0.5) / n)
    low, high = (-np.log10(stats.beta.ppf(q, k, n - k + 1)) for q in (0.975, 0.025))
    ax.fill_between(expected, low, high, color=style.MUTED, alpha=0.35, linewidth=0, zorder=0)
    ax.plot([0, expected.max()], [0, expected.max()], color=style.INK, linewidth=0.7, zorder=0)


def null(
    draws: Any, *, observed: float, p: float | None = None, label: str = "statistic", n: str = "",
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Distribution of a statistic over permutations, with the observed value and the level 0.05 of its size.

    Parameters
    ----------
    draws : array_like (n_draws,)
        Statistics of the permuted data: of one latent, or the largest absolute one of all latents (max-T).
    observed : float
        The statistic of the data as they are.
    p : float, optional
        p-value to print; by default ``(b + 1) / (B + 1)`` of absolute values.
    label : str
        What the statistic is.
    n : str
        The n behind it, such as ``"40 patients"``.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If there are no finite draws or ``observed`` is not finite.
    """
    draws = np.asarray(draws, dtype=float).ravel()
    draws = draws[np.isfinite(draws)]
    if not len(draws) or not np.isfinite(observed):
        raise InputError("draws holds no finite number, or observed is not finite: there is nothing to draw")
    count = int((np.abs(draws) >= abs(observed) * (1 - 1e-9)).sum())
    p = (count + 1) / (len(draws) + 1) if p is None else p
    one_sided = draws.min() >= 0
    edge = np.quantile(np.abs(draws), 0.95)
    with style.paper():
        ax = style.axes(ax, (3.2, 2.5))
        ax.hist(draws, bins=min(60, max(10, len(draws) // 25)), color=style.MUTED, linewidth=0)
        for x in [edge] if one_sided else [-edge, edge]:
            ax.axvline(x, color=style.INK, linewidth=0.7, linestyle=(0, (4, 3)))
        ax.axvline(observed, color=style.PALETTE["vermilion"], linewidth=1.6)
        ax.annotate(
            f"observed\n{style.number(observed)}", (observed, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -2),
            textcoords="offset points", va="top", fontsize=7, color=style.PALETTE["vermilion"],
        )  # fmt: skip
        ax.margins(x=0.12)
        ax.set_ylim(0, 1.25 * ax.get_ylim()[1])  # room for the label
        ax.set_xlabel(f"{label} after permutation")
        ax.set_ylabel("permutations")
        of = f"{n}; " if n else ""
        ax.set_title(style.wrap(f"{of}{len(draws):,} permutations, p = {style.p_value(p)}; dashed: 5 %", width=48))
    return ax
