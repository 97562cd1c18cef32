"""Reading an association table: what was tested, what was best, what was refused."""

from __future__ import annotations

import numpy as np
import pandas as pd

from biosae import stats
from biosae.errors import InputError, nearest
from biosae.pl.style import count

REQUIRED = ("latent", "target", "estimate", "p", "q", "status")

_EFFECTS = {
    "pearson_r": "Pearson r",
    "pearson": "Pearson r",
    "r": "Pearson r",
    "spearman_rho": "Spearman ρ",
    "spearman": "Spearman ρ",
    "rho": "Spearman ρ",
    "kendall_tau": "Kendall τ",
    "partial_r": "partial r",
    "partial_rho": "partial Spearman ρ",
    "auroc": "AUROC",
    "cliffs_delta": "Cliff's δ",
    "cliff_delta": "Cliff's δ",
    "cohens_d": "Cohen's d",
    "cohen_d": "Cohen's d",
    "hedges_g": "Hedges' g",
    "eta2": "η²",
    "epsilon2": "ε²",
    "epsilon_squared": "ε²",
    "odds_ratio": "odds ratio",
    "rate_ratio": "rate ratio a SD",
    "hazard_ratio": "hazard ratio a SD",
    "cumulative_odds_ratio": "cumulative odds ratio a SD",
}


def check(result: pd.DataFrame) -> pd.DataFrame:
    """An association table with a ``source`` and a ``unit`` column, or an error that names what is missing.

    Raises
    ------
    InputError
        If a required column is absent.
    """
    missing = [c for c in REQUIRED if c not in result]
    if missing:
        raise InputError(
            f"the association table has no column {', '.join(map(repr, missing))}; pass the table that "
            "biosae.stats.associate returned"
        )
    defaults = {"source": "latent", "unit": "sample", "effect": "effect", "n_units": np.nan, "n_samples": np.nan}
    return result.assign(**{k: v for k, v in defaults.items() if k not in result})


def choose(result: pd.DataFrame, *, source: str | None = None, target: str | None = None) -> pd.DataFrame:
    """Rows of one source and one target; an unknown name is an error that lists the valid ones.

    Raises
    ------
    InputError
        If the table has no such source or target.
    """
    result = check(result)
    for column, value in (("source", source), ("target", target)):
        if value is None:
            continue
        known = result[column].astype(str).unique()
        if value not in known:
            raise InputError(f"no rows with {column} {value!r}; {nearest(value, known)}")
        result = result[result[column].astype(str) == value]
    return result


def was_tested(result: pd.DataFrame) -> pd.Series:
    """True where a p-value was reported."""
    return result["p"].notna()


def effect_name(effect: object) -> str:
    """Name of an effect measure as it is printed on an axis.

    >>> effect_name("spearman_rho"), effect_name("something_new")
    ('Spearman ρ', 'something new')
    """
    return _EFFECTS.get(str(effect).lower(), str(effect).replace("_", " "))


def effect_label(effects: pd.Series) -> str:
    """Axis label for the effect measures in a table: one name, or all of them."""
    names = list(dict.fromkeys(effect_name(e) for e in effects.dropna()))
    return " / ".join(names[:3]) + (" / ..." if len(names) > 3 else "") if names else "effect"


def null_value(effect: object) -> float:
    """Value of an effect measure when there is no association: 0.5 for AUROC, 1 for ratios, else 0."""
    name = str(effect).lower()
    if "auroc" in name or name == "auc":
        return 0.5
    return 1.0 if "ratio" in name or name in ("irr", "hr", "or", "rr") else 0.0


def ranked(result: pd.DataFrame) -> pd.DataFrame:
    """Rows that can be shown, the strongest evidence first, as :func:`biosae.stats.ranked` orders them."""
    result = check(result)
    return stats.ranked(result) if len(result) else result


def best(result: pd.DataFrame) -> pd.DataFrame:
    """The best-ranked row of every (target, source), targets in the table's order, latent before raw before PCA."""
    result = check(result).reset_index(drop=True)
    first = ranked(result).drop_duplicates(["target", "source"])
    targets = {t: i for i, t in enumerate(result["target"].unique())}
    sources = {"latent": 0, "raw": 1, "pca": 2}
    key = pd.DataFrame({"t": first["target"].map(targets), "s": first["source"].map(sources).fillna(3)})
    return first.loc[key.sort_values(["t", "s"]).index].reset_index(drop=True)


def status_counts(result: pd.DataFrame) -> pd.Series:
    """Number of rows that were not tested, by status."""
    return result.loc[~was_tested(result), "status"].astype(str).value_counts()


def sentence(result: pd.DataFrame, *, noun: str = "latent") -> str:
    """``1,012 latents tested in 24 patients; not tested: dead 12, too sparse 40``."""
    tested = result[was_tested(result)]
    one = len(set(result["target"])) == 1
    tests = f"{count(len(tested), noun)} tested" if one else f"{count(len(tested), 'test')} of {noun}s"
    text = tests + (f" in {units_phrase(tested)}" if len(tested) else "")
    refused = status_counts(result)
    if len(refused):
        text += "; not tested: " + ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in refused.items())
    return text


def units_phrase(rows: pd.DataFrame) -> str:
    """``24 patients (3,600 samples)``: the n behind rows of an association table, as a range where it varies."""

    def span(values: pd.Series) -> str:
        low, high = int(values.min()), int(values.max())
        return f"{low:,}" if low == high else f"{low:,}–{high:,}"

    parts = []
    for unit, group in rows.groupby(rows["unit"].astype(str), sort=False):
        n = group["n_units"].dropna()
        if n.empty:
            continue
        noun = str(unit).replace("_", " ")
        text = f"{span(n)} {noun}" + ("" if n.max() == 1 else "s")
        samples = group["n_samples"].dropna()
        if unit != "sample" and len(samples):
            text += f" ({span(samples)} samples)"
        parts.append(text)
    return ", ".join(parts) if parts else "an unstated number of units"


def threshold_p(result: pd.DataFrame, *, alpha: float = 0.05) -> float | None:
    """A p between the largest that passes ``q <= alpha`` and the smallest that does not; None where nothing passes.

    It is their geometric mean, so that the line of a volcano plot runs between the two and through no point.
    """
    passing, failing = result.loc[result["q"] <= alpha, "p"], result.loc[result["q"] > alpha, "p"]
    if passing.empty:
        return None
    upper = failing.min() if len(failing) else 1.0
    return float(np.sqrt(max(passing.max(), 1e-300)) * np.sqrt(max(upper, 1e-300)))
