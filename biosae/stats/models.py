"""Full models for a shortlist of latents: which function fits each, what it is given, and its errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from biosae.stats.bootstrap import cluster_bootstrap
from biosae.stats.cox import fit_cox
from biosae.stats.glmm import fit_glmm
from biosae.stats.loglinear import fit_negbin, fit_poisson
from biosae.stats.mixed import fit_lmm
from biosae.stats.ordinal import fit_ordinal
from biosae.stats.regression import fit_logistic, fit_ols
from biosae.stats.robust import cr2, sandwich, wild_bootstrap
from biosae.stats.survival import concordance, schoenfeld
from biosae.stats.zeros import fit_zinb, fit_zip


@dataclass
class Rows:
    """What one fit is made from: units in rows, the latent the last column of ``X``."""

    y: np.ndarray
    X: np.ndarray
    offset: np.ndarray | None = None
    event: np.ndarray | None = None
    strata: np.ndarray | None = None
    codes: np.ndarray | None = None
    subcodes: np.ndarray | None = None
    log_volume: float = 0.0
    """Logarithm of the volume of the covariates as they were given, over that of ``X`` without the latent."""

    def take(self, rows: np.ndarray) -> Rows:
        """The same for some rows, each as often as it is named."""
        parts = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **parts)

    @property
    def groups(self) -> int:
        return len(self.y) if self.codes is None else int(self.codes.max()) + 1


@dataclass(frozen=True)
class Model:
    """A row of the table of models."""

    fit: Callable[[Rows], dict[str, Any]]
    effect: str
    target: str
    """``numeric``, ``two`` classes, ``ordered``, ``count`` or ``time``."""
    independent: str = "model"
    """Errors that ``auto`` takes where units are independent."""
    dependent: str = "jackknife"
    """Errors that ``auto`` takes where they are not."""
    working: Callable[[Rows, dict[str, Any]], tuple[np.ndarray, np.ndarray]] | None = None
    """Design and residuals of the least squares that the fit ends in, for CR2; None where it ends in none."""
    extras: Callable[[Rows, dict[str, Any]], dict[str, float]] | None = None
    intercept: bool = True
    random: bool = False
    """Has a random intercept of the group."""

    @property
    def ratio(self) -> bool:
        return self.effect != "slope"


def _linear(rows: Rows, found: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return rows.X, found["residuals"]


def _logit(rows: Rows, found: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    root = np.sqrt(np.maximum(found["weights"], 1e-12))
    return rows.X * root[:, None], found["residuals"] / root


def _log(rows: Rows, found: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    mu, spread = found["mu"], 1.0 + found["alpha"] * found["mu"]
    root = np.sqrt(np.maximum(mu / spread, 1e-12))
    return rows.X * root[:, None], (rows.y - mu) / spread / root


def _cox(rows: Rows) -> dict[str, Any]:
    return fit_cox(rows.y, rows.event, rows.X, strata=rows.strata)


def _survival(rows: Rows, found: dict[str, Any]) -> dict[str, float]:
    """Harrell's C of the whole linear predictor, and the test that the latent's hazard ratio does not change."""
    risk = rows.X @ found["coef"]
    tested = schoenfeld(rows.y, rows.event, rows.X, strata=rows.strata)
    return {
        "concordance": concordance(rows.y, rows.event, risk, strata=rows.strata),
        "p_schoenfeld": float(tested["p"].iloc[rows.X.shape[1] - 1]),
    }


MODELS: dict[str, Model] = {
    "ols": Model(
        lambda r: fit_ols(r.y, r.X), "slope", "numeric", independent="cr2", dependent="cr2", working=_linear
    ),
    "logistic": Model(
        lambda r: fit_logistic(r.y, r.X), "log_odds_ratio", "two", dependent="cr2", working=_logit
    ),
    "poisson": Model(
        lambda r: fit_poisson(r.y, r.X, offset=r.offset), "log_rate_ratio", "count",
        independent="cr2", dependent="cr2", working=_log,
    ),
    "negbin": Model(
        lambda r: fit_negbin(r.y, r.X, offset=r.offset), "log_rate_ratio", "count",
        independent="cr2", dependent="cr2", working=_log,
    ),
    "zip": Model(lambda r: fit_zip(r.y, r.X, offset=r.offset), "log_rate_ratio", "count", independent="cr1"),
    "zinb": Model(lambda r: fit_zinb(r.y, r.X, offset=r.offset), "log_rate_ratio", "count"),
    "ordinal": Model(lambda r: fit_ordinal(r.y, r.X), "log_cumulative_odds_ratio", "ordered", intercept=False),
    "cox": Model(
        _cox, "log_hazard_ratio", "time", extras=_survival, intercept=False, independent="wider"
    ),
    "lmm": Model(
        lambda r: fit_lmm(r.y, r.X, codes=r.codes, subcodes=r.subcodes), "slope", "numeric",
        dependent="model", random=True,
    ),
    "glmm_binomial": Model(
        lambda r: fit_glmm(r.y, r.X, codes=r.codes, family="binomial"), "log_odds_ratio", "two",
        dependent="model", random=True,
    ),
    "glmm_poisson": Model(
        lambda r: fit_glmm(r.y, r.X, codes=r.codes, family="poisson", offset=r.offset), "log_rate_ratio", "count",
        dependent="model", random=True,
    ),
}  # fmt: skip


def fitted(chosen: Model, rows: Rows) -> dict[str, Any] | None:
    """The fit, or None where its equations have no solution."""
    try:
        return chosen.fit(rows)
    except np.linalg.LinAlgError:
        return None


def inference(
    chosen: Model, rows: Rows, found: dict[str, Any], estimate: float, how: str, n_bootstrap: int, random_state: int
) -> dict[str, Any]:
    """Standard error, interval, statistic, degrees of freedom and p of the last coefficient, and their description."""
    at, G = rows.X.shape[1] - 1, rows.groups
    kind = "groups" if rows.codes is not None else "units"
    if how == "wild":
        out = wild_bootstrap(rows.y, rows.X, codes=rows.codes, random_state=random_state)
        se = abs(estimate / out["statistic"]) if out["statistic"] else np.nan
        return {**out, "se": se, "df": np.nan}
    if how in ("bootstrap", "jackknife"):
        codes = np.arange(len(rows.y)) if rows.codes is None else rows.codes

        def coefficient(chosen_rows: np.ndarray) -> float:
            taken = rows.take(chosen_rows)
            X = taken.X if chosen.intercept else np.column_stack([np.ones(len(taken.y)), taken.X])
            if np.linalg.matrix_rank(X) < X.shape[1]:
                return np.nan
            again = fitted(chosen, taken)
            settled = again is not None and again["converged"] and again["note"] not in ("separated", "one_class")
            return float(again["coef"][at]) if settled else np.nan

        if how == "jackknife":
            left_out = np.array([coefficient(np.flatnonzero(codes != g)) for g in range(G)])
            se = float(np.sqrt((G - 1) / G * ((left_out - estimate) ** 2).sum()))  # NaN if one fit does not exist
            df, words = min(_group_df(rows), _design_df(rows, chosen)), f"{kind} left out one at a time"
        else:
            classes = rows.y if chosen.target == "two" else rows.event
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                drawn = cluster_bootstrap(
                    codes, coefficient, classes=classes, n_draws=n_bootstrap, random_state=random_state
                )
            p = max(drawn.p(), float(2 * stats.t.sf(abs(estimate) / drawn.se, G - 1)) if drawn.se > 0 else np.nan)
            return {
                "se": drawn.se, "low": drawn.low, "high": drawn.high, "statistic": estimate / drawn.se, "df": G - 1,
                "p": p, "how": f"{drawn.how}, percentile interval; p the larger of percentile and t",
            }  # fmt: skip
    elif how == "model":
        se = float(np.sqrt(max(found["cov"][at, at], 0.0)))
        df, words = _model_df(rows, found, at), "errors of the model"
    elif how == "cr2":
        V, dfs = cr2(*chosen.working(rows, found), codes=rows.codes)
        se, df, words = float(np.sqrt(V[at, at])), float(dfs[at]), f"CR2 over {G} {kind}, Satterthwaite df"
    else:
        V = sandwich(found["bread"], found["scores"], codes=rows.codes, kind="cr1")
        se, df = float(np.sqrt(V[at, at])), min(G - 1.0, _design_df(rows, chosen))
        words = f"CR1 over {G} {kind}"
        if how == "wider":
            se = max(se, float(np.sqrt(max(found["cov"][at, at], 0.0))))
            words = f"wider of model and {words}"
    t = estimate / se if se > 0 else np.nan
    half = stats.t.ppf(0.975, df) * se
    law = f"t, {df:.4g} df" if np.isfinite(df) else "normal"
    return {"se": se, "low": estimate - half, "high": estimate + half, "statistic": t, "df": df,
            "p": float(2.0 * stats.t.sf(abs(t), df)), "how": f"{words}, {law}"}  # fmt: skip


def _model_df(rows: Rows, found: dict[str, Any], at: int) -> float:
    """Satterthwaite (``lmm``), residual (``ols``), those of groups (``glmm``), or infinite."""
    df = found.get("df", np.inf)
    if rows.codes is not None and "sigma2" not in found:
        return _group_df(rows)
    if np.ndim(df):
        return float(df[at])
    return float(df) if "sigma2" in found else np.inf


def _group_df(rows: Rows) -> float:
    """Groups less the columns that are constant in them, the intercept among these."""
    if rows.codes is None:
        return rows.groups - 1.0
    first = np.unique(rows.codes, return_index=True)[1]
    constant = int((np.abs(rows.X - rows.X[first][rows.codes]) <= 1e-9).all(axis=0).sum())
    return float(max(rows.groups - max(constant, 1), 1))


def _design_df(rows: Rows, chosen: Model) -> float:
    """Satterthwaite degrees of freedom that the design gives least squares: few where few groups carry the latent."""
    X = rows.X if chosen.intercept else np.column_stack([np.ones(len(rows.y)), rows.X])
    return float(cr2(X, np.zeros(len(X)), codes=rows.codes)[1][-1])
