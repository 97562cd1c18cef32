"""The claim of a stress card, and the checks that need its own codes alone. Each returns a number, a reading in words,
and the table behind it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.interpret.resampled import Number, Order, Parts, over_patients, refused
from biosae.stats.association import associate
from biosae.stats.strata import within_strata

Found = tuple[Number, str, pd.DataFrame | None]

MIN_CLASS = 5
"""Fewest samples of each class in a stratum, and of a look-alike."""
MIN_TOP = 20
"""Below this number of strongest firings there is an interval and no score."""
SENSITIVITY = 0.95


@dataclass
class Claim:
    """A latent said to go with a label, on the rows that have one."""

    adata: Any
    rows: np.ndarray
    """Rows of the user's table."""
    latent: str
    at: int
    z: np.ndarray
    """Codes of the latent (n,)."""
    sign: int
    """1 if high codes go with the label, -1 if low ones do."""
    y: np.ndarray
    groups: np.ndarray
    """Patient of every row, codes from 0."""
    text: str
    random_state: int

    @property
    def obs(self) -> pd.DataFrame:
        """Samples of the claim."""
        return self.adata.obs

    @property
    def v(self) -> np.ndarray:
        """Codes turned so that high goes with the label."""
        return self.sign * self.z

    @property
    def n_patients(self) -> int:
        """Patients of the claim."""
        return int(self.groups.max()) + 1

    def no(self, reason: str) -> Found:
        """A refusal on these rows."""
        return refused(reason, n_patients=self.n_patients, n_samples=len(self.y)), "", None

    def interval(self, statistic: Any, **options: Any) -> Number:
        """A number and its interval over the claim's patients."""
        return over_patients(statistic, self.groups, random_state=self.random_state, **options)


def _alone(claim: Claim, **columns: Any) -> Any:
    """A table of the one latent, turned, with the label and the patient."""
    import anndata

    obs = pd.DataFrame({"claim": claim.y.astype(int), "patient": claim.groups.astype(str)}, index=claim.obs.index)
    X = sp.csr_matrix(claim.v[:, None])
    return anndata.AnnData(X=X, obs=obs.assign(**columns), var=pd.DataFrame(index=[claim.latent]))


def association(claim: Claim) -> Found:
    """AUROC of the latent for the label, by :func:`biosae.stats.associate`."""
    row = associate(_alone(claim), "claim", unit="sample", method="auroc", controls=False).iloc[0]
    status, reason = str(row["status"]), ""
    if np.isnan(row["ci_low"]):
        reason = f"{int(row['n_groups'])} patients, status {status}: no interval"
    elif status == "few_groups":
        reason = f"{int(row['n_groups'])} patients: few independent groups"
    number = Number(
        float(row["estimate"]), float(row["ci_low"]), float(row["ci_high"]), claim.n_patients, len(claim.y), status,
        reason,
    )  # fmt: skip
    return number, f"{claim.text}: AUROC {row['estimate']:.2f}", None


def context(claim: Claim, column: str) -> Found:
    """What the worst stratum keeps of the largest effect."""
    known = claim.obs[column].notna().to_numpy()
    stratum = _names(claim.obs[column])
    usable, skipped = [], []
    for name in sorted(set(stratum[known])):
        own = known & (stratum == name)
        least = min(int(claim.y[own].sum()), int((~claim.y[own]).sum()))
        (usable if least >= MIN_CLASS else skipped).append(name)
    left_out = f"; left out, fewer than {MIN_CLASS} of a class: {', '.join(skipped[:6])}" if skipped else ""
    left_out += f" and {len(skipped) - 6} more" if len(skipped) > 6 else ""
    table = None
    if known.any():
        small = _alone(claim, stratum=pd.array(stratum, dtype="string"))[known].copy()
        if small.obs["claim"].nunique() == 2:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                table = within_strata(small, "claim", strata="stratum", unit="sample", method="auroc")
            table["used"] = table["stratum"].isin(usable)
    if len(usable) < 2:
        number, reading, _ = claim.no(
            f"{len(usable)} of {len(usable) + len(skipped)} strata of {column!r} hold both classes ({MIN_CLASS} "
            "samples each), two are needed: label and context cannot be told apart" + left_out
        )
        return number, reading, table
    used = known & np.isin(stratum, usable)
    own = [np.flatnonzero(used & (stratum == name)) for name in usable]
    sets = Parts([(claim.v[rows], rows, claim.y[rows]) for rows in (np.flatnonzero(used), *own)])

    def kept(weight: np.ndarray) -> float:
        found = sets.aurocs(weight)
        if not np.isfinite(found).all():
            return float("nan")
        largest = found.max()
        return float(np.clip((found[1:].min() - 0.5) / (largest - 0.5), 0.0, 1.0)) if largest > 0.5 else 0.0

    pooled, *parts = sets.aurocs(used.astype(float)).tolist()
    if max(pooled, *parts) <= 0.5:
        return claim.no("the latent is at chance pooled and in every stratum: there is no effect to keep")
    number = claim.interval(kept, used=used, classes=claim.y.astype(int), what="the score")
    if number.status == "no_interval":
        least, of = min(
            (len(np.unique(claim.groups[rows][claim.y[rows] == c])), name)
            for rows, name in zip(own, usable)
            for c in (True, False)
        )
        number = replace(number, reason=f"{number.reason}: in {column} {of} one class is of {least} patients only")
    worst = usable[int(np.argmin(parts))]
    spread = max(parts) - min(parts)
    apart = "; strata differ in level: one threshold does not serve all" if pooled < min(parts) else ""
    reading = (
        f"AUROC {pooled:.2f} pooled, {min(parts):.2f} to {max(parts):.2f} within {len(usable)} strata of {column} "
        f"(worst: {worst}; 1 - spread {1 - spread:.2f})" + apart + left_out
    )
    return number, reading, table


def _names(column: pd.Series) -> np.ndarray:
    """Strata as text, whole numbers without a decimal point."""
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return np.array([f"{v:g}" for v in column.to_numpy(np.float64, na_value=np.nan)], dtype=object)
    return column.astype("string").fillna("").to_numpy(object)


def contradiction(claim: Claim, *, top: float) -> Found:
    """Share of the strongest firings that agree with the claim; both ends of signed codes."""
    chosen = np.zeros(len(claim.z), dtype=bool)
    tails = []
    for end, value in (("upper", claim.z), ("lower", -claim.z)):
        fires = value > 0
        if not fires.any():
            continue
        n = int(np.ceil(top * fires.sum()))
        least = np.sort(value[fires])[-n]
        tail = fires & (value >= least)  # ties at the edge all count
        wanted = claim.y if (end == "upper") == (claim.sign > 0) else ~claim.y
        tails.append({
            "end": end, "n_firing": int(fires.sum()), "n_top": int(tail.sum()),
            "n_patients": len(np.unique(claim.groups[tail])), "contradiction_rate": float(1 - wanted[tail].mean()),
            "expected_by_chance": float(1 - wanted.mean()), "bimodality": _bimodality(value[fires]),
        })  # fmt: skip
        chosen |= tail
    if not tails:
        return claim.no("the latent never fires in these samples")
    agrees = np.where((claim.z > 0) == (claim.sign > 0), claim.y, ~claim.y).astype(float)

    def share(weight: np.ndarray) -> float:
        total = (weight * chosen).sum()
        return float((weight * chosen) @ agrees / total) if total > 0 else float("nan")

    number = claim.interval(share, used=chosen, what="the share")
    table = pd.DataFrame(tails)
    reading = "; ".join(
        f"{r['contradiction_rate']:.0%} of the {r['n_top']} strongest "
        f"{'' if r['end'] == 'upper' else 'negative '}codes contradict ({r['expected_by_chance']:.0%} by chance)"
        for r in tails
    )
    if chosen.sum() < MIN_TOP:
        reason = f"{int(chosen.sum())} strongest firings: a score needs {MIN_TOP}, so there is an interval only"
        if np.isnan(number.low):
            return refused(f"{reason}; {number.reason}", n_patients=number.n_patients,
                           n_samples=number.n_samples), reading, table  # fmt: skip
        number = Number(
            np.nan, number.low, number.high, number.n_patients, number.n_samples, "few_firings", reason
        )  # fmt: skip
    return number, reading, table


def _bimodality(values: np.ndarray) -> float:
    """Sarle's coefficient ``(skewness^2 + 1) / kurtosis`` (Ellison, Am J Hum Biol 14, 1987); 5/9 for a uniform, 1 for
    two points. NaN where values do not vary.
    """
    centred = values - values.mean()
    spread = (centred**2).mean()
    if spread <= 1e-12 * max(1.0, float((values**2).mean())):
        return float("nan")
    return float(((centred**3).mean() ** 2 / spread**3 + 1) / ((centred**4).mean() / spread**2))


def look_alike(claim: Claim, mask: np.ndarray) -> Found:
    """One minus the false alarms among look-alikes at the threshold that finds 95 % of the label."""
    other = mask & ~claim.y
    if other.sum() < MIN_CLASS:
        return claim.no(f"{int(other.sum())} look-alikes without the label, {MIN_CLASS} are needed")
    order, used = Order(claim.v), claim.y | other

    def quiet(weight: np.ndarray) -> float:
        return 1.0 - order.false_alarms(claim.y, other, weight, sensitivity=SENSITIVITY)[0]

    number = claim.interval(quiet, used=used, classes=claim.y.astype(int), what="the false-alarm rate")
    weight = used.astype(float)
    rate, threshold = order.false_alarms(claim.y, other, weight, sensitivity=SENSITIVITY)
    area = order.auroc(claim.y, weight)
    table = pd.DataFrame([{
        "false_alarms": rate, "threshold": claim.sign * threshold, "auroc": area, "n_label": int(claim.y.sum()),
        "n_look_alike": int(other.sum()),
    }])  # fmt: skip
    silent = " (that threshold lets silent items through)" if threshold == 0 else ""
    return number, f"{rate:.0%} false alarms at 95 % sensitivity{silent}; AUROC {area:.2f} against them", table
