"""The public ``fit``: one full model a latent, for a shortlist that a screen or a hypothesis has named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, StatisticsError, nearest
from biosae.stats.adjust import MAX_R2, MAX_VIF, basis, column_of, is_categorical, log_volume, residual, share_explained
from biosae.stats.bootstrap import LEAST_DRAWS
from biosae.stats.cox_screen import MIN_EVENTS
from biosae.stats.frame import Frame, Target
from biosae.stats.inference import FEW
from biosae.stats.models import MODELS, Model, Rows, fitted, inference
from biosae.stats.nested import codes_of, in_memory, largest, roles
from biosae.stats.sources import Source
from biosae.stats.status import TESTED
from biosae.stats.training import sae_training

MAX_LATENTS = 500
"""Latents that are fitted in one call; more is a screen."""
ERRORS = ("auto", "model", "cr1", "cr2", "jackknife", "bootstrap", "wild", "wider")
NESTED = ("aggregate", "cluster")
MAX_JACKKNIFE = 200
"""Up to this many groups ``auto`` leaves out one at a time where there is no CR2."""
LEAST_GROUPS = 40
"""Groups in which a latent must fire for CR1 or the bootstrap to hold their level."""
COLUMNS = [
    "latent", "target", "model", "estimate", "se", "ci_low", "ci_high", "statistic", "df", "p", "effect", "ratio",
    "ratio_low", "ratio_high", "scale", "n_units", "n_groups", "n_samples", "n_events", "n_active", "status", "note",
    "errors", "inference", "contrast", "unit",
]  # fmt: skip


def fit(
    adata: Any,
    target: str,
    *,
    latents: Sequence[str] | pd.DataFrame,
    model: str,
    unit: str,
    covariates: Sequence[str] = (),
    strata: str | None = None,
    groups: str = "patient",
    nested: str = "aggregate",
    aggregate: str = "mean",
    subgroups: str | None = None,
    exposure: str | None = None,
    event: str | None = None,
    errors: str = "auto",
    standardise: bool = True,
    n_bootstrap: int = LEAST_DRAWS,
    min_active: int = 10,
    min_active_groups: int = 5,
    assume_independent: bool = False,
    random_state: int = 0,
) -> pd.DataFrame:
    """Fit a full model of the target on each latent of a shortlist, with the errors that its design needs.

    Latents are fitted one at a time, ``target ~ covariates + strata + latent``. Rules of what is a unit and what is
    independent are those of :func:`associate`.

    Parameters
    ----------
    adata
        Latents of :func:`biosae.encode`: ``X`` (n_samples, m) codes, ``obs`` the samples.
    target
        Column of ``obs``: a number (``ols``, ``lmm``), a label of two classes (``logistic``, ``glmm_binomial``), a
        count (``poisson``, ``negbin``, ``zip``, ``zinb``, ``glmm_poisson``), an ordered category or number
        (``ordinal``), a time above 0 (``cox``).
    latents
        Names, or a table with a column ``latent`` such as rows of :func:`associate`; at most 500. Choosing them by
        the same rows makes their p and intervals too good: see :func:`replicate`.
    model
        ``ols``, ``logistic``, ``poisson``, ``negbin``, ``zip``, ``zinb``, ``ordinal``, ``cox``, ``lmm`` (random
        intercept of the group), ``glmm_binomial``, ``glmm_poisson`` (the same, by adaptive quadrature).
    unit, groups, nested, aggregate, covariates, exposure, event, assume_independent
        As for :func:`associate`. Mixed models need several units a group: ``unit="sample"``.
    strata
        Column with an intercept of its own for each value; for ``cox`` with a baseline hazard of its own.
    subgroups
        ``lmm``: column of subgroups, each in one group (slides of a patient), with a random intercept too.
    errors
        ``"auto"``: units independent: HC2 with Satterthwaite degrees of freedom for ``ols``, ``poisson``, ``negbin``,
        HC1 for ``zip``, the wider of the model's and HC1 for ``cox``, else those of the model; dependent: CR2 with
        Satterthwaite degrees of freedom for ``ols``, ``logistic``, ``poisson``, ``negbin``, leaving out one group at a
        time for ``zip``, ``zinb``, ``ordinal``, ``cox`` (beyond 200 groups CR1), the model's for mixed models
        (``glmm``: below 40 groups the jackknife). Or ``"model"``, ``"cr2"``, ``"wider"`` (of the model's and CR1),
        ``"jackknife"`` (one group left out at a time; t), ``"wild"`` (``ols``; null imposed), and with 40 groups or
        more ``"cr1"`` (t, the design's Satterthwaite degrees of freedom, at most groups - 1) and ``"bootstrap"`` (of
        groups). A latent that fires in fewer than 40 groups, or fewer than 40 groups with an event, get the jackknife
        in place of these two; ``errors`` of the row says so.
    standardise
        True: effects for one standard deviation of the latent over the units; False: for one unit of it.
    n_bootstrap
        Resamples, at least 2000.
    min_active, min_active_groups
        A latent that fires in fewer samples or groups keeps its estimate and gets no p, nor does any with fewer than 3
        events (groups with events) for ``cox``.
    random_state
        Seed of the bootstrap.

    Returns
    -------
    DataFrame
        One row a latent.

        * ``latent, target, model, unit``
        * ``estimate, se, ci_low, ci_high``: coefficient of the latent (95 %), on the log scale for all but slopes;
          ``effect`` says which: ``slope, log_odds_ratio, log_rate_ratio, log_cumulative_odds_ratio,
          log_hazard_ratio``; ``ratio, ratio_low, ratio_high``: its exponential
        * ``statistic, df, p``: t with ``df`` degrees of freedom (infinite: normal); not adjusted for multiplicity
        * ``scale``: what of the latent the estimate is for (its standard deviation, or 1)
        * ``n_units, n_groups`` (independent groups), ``n_samples, n_events`` (units of the second class, events, or
          the sum of counts), ``n_active`` (units in which the latent fires)
        * ``status`` (:data:`biosae.stats.STATUS`), ``note`` (``boundary``: a variance or inflation is 0;
          ``few_events``: Firth's penalty; ``quasi``: counts are not whole), ``errors, inference``: how p was obtained;
          ``contrast``
        * of the model, where it has them: ``loglik`` (``lmm``: restricted, of the design with intercept, covariates as
          they are, dummies, and the latent over ``scale``), ``aic, r2, sigma2, tau2, tau2_sub, icc, alpha, alpha_se,
          p_overdispersion, pearson_chi2_df, inflation, p_proportional, p_proportional_all, concordance,
          p_schoenfeld``

        ``attrs["biosae"]`` holds all choices.

    Raises
    ------
    StatisticsError
        More than 500 latents; independence unknown; errors that the design or model cannot have.
    InputError
        Unknown columns, latents, model or options that do not go together.

    Notes
    -----
    Measured error rates: docs/statistics.md, "Nested data and shortlist models".
    """
    options = {k: v for k, v in locals().items() if k not in ("adata", "target", "latents")}
    names = _names(adata, latents)
    chosen = _checked(target, **options)
    covariates = [covariates] if isinstance(covariates, str) else list(covariates)
    if target in {*map(column_of, covariates), strata}:
        raise InputError(f"{target!r} is both the target and a covariate or stratum")
    part = in_memory(adata, names)
    rows_are, groups, independent = roles(
        part.obs, unit=unit, groups=groups, nested=nested, assume_independent=assume_independent
    )
    frame = Frame(
        part, rows_are, groups, covariates, strata, None, independent, aggregate, exposure, event,
        counts=chosen.target == "count",
    )  # fmt: skip
    found = frame.target(target)
    y = _outcome(found, part.obs[target], target, model, chosen)
    rows, sized = _rows(frame, found, y, chosen, subgroups)
    how = _errors(errors, chosen, rows, model, groups)
    X = part.X if sp.issparse(part.X) else sp.csr_matrix(part.X)
    V = frame.columns(Source("latent", X, names), found)[0]
    gate = (min_active, min_active_groups, rows_are)
    table = pd.DataFrame(
        [_one(name, V[:, [j]], rows, chosen, how, standardise, n_bootstrap, gate, random_state)
         for j, name in enumerate(names)]
    )  # fmt: skip
    if len(found.classes) == 2 and chosen.target in ("two", "numeric"):
        table["contrast"] = f"{found.classes[1]} over {found.classes[0]}"
    for words in (["adjusted for samples a unit"] if sized else []) + ["independence assumed"] * assume_independent:
        table["inference"] = table["inference"].where(table["inference"] == "", table["inference"] + f"; {words}")
    table = table.assign(target=target, model=model, unit=rows_are, n_samples=len(found.samples))
    extra = [c for c in table if c not in COLUMNS]
    table = table.reindex(columns=[*COLUMNS, *extra])
    table.attrs["biosae"] = {
        "target": target, **options, "covariates": covariates, "errors": how, "classes": found.classes,
        "groups": None if frame.group_of is None else groups, "n_units": len(y), "n_groups": rows.groups,
        "strata_left_out": found.strata_left_out, "n_latents": len(names), "n_tested": int(table["p"].notna().sum()),
        "sae_training": sae_training(adata, groups, rows=found.samples),
    }  # fmt: skip
    return table


def _names(adata: Any, latents: Sequence[str] | pd.DataFrame) -> list[str]:
    if not hasattr(adata, "obs") or not hasattr(adata, "var_names"):
        raise InputError(f"adata is a {type(adata).__name__}; pass the AnnData of biosae.encode")
    if isinstance(latents, pd.DataFrame):
        if "latent" not in latents:
            raise InputError("the table of latents has no column 'latent'; pass rows of associate, or names")
        latents = latents["latent"]
    names = list(dict.fromkeys([latents] if isinstance(latents, str) else map(str, latents)))
    if not names:
        raise InputError("latents is empty; name at least one")
    unknown = [name for name in names if name not in adata.var_names]
    if unknown:
        raise InputError(
            f"no latent {unknown[0]!r} (nor {len(unknown) - 1} others); latents are {adata.var_names[0]} to "
            f"{adata.var_names[-1]}. Of a table with controls keep the rows with source 'latent'"
        )
    if len(names) > MAX_LATENTS:
        raise StatisticsError(
            f"{len(names)} latents; full models are for a shortlist of at most {MAX_LATENTS}. Screen them with "
            "associate and fit its best rows, result.head(20)"
        )
    return names


def _checked(target: str, *, model, unit, nested, subgroups, exposure, event, errors, n_bootstrap, **_) -> Model:
    for name, value, known in (("model", model, MODELS), ("errors", errors, ERRORS), ("nested", nested, NESTED)):
        if value not in known:
            raise InputError(f"{name}={value!r}; {nearest(value, known)}")
    chosen = MODELS[model]
    if nested == "cluster" and unit == "sample":
        raise InputError("nested='cluster' takes unit= as the groups of samples: name the column, such as 'patient'")
    if exposure and chosen.target != "count":
        raise InputError(f"model {model!r} takes no exposure; counts in an area or time need 'poisson' or 'negbin'")
    if bool(event) != (chosen.target == "time"):
        raise InputError(
            f"model {model!r} takes no event=" if event else
            "model='cox' needs event=, the column that is 1 where the time ended in the event and 0 where censored"
        )  # fmt: skip
    if subgroups and model != "lmm":
        raise InputError(f"model {model!r} takes no subgroups; nested random intercepts need 'lmm'")
    if subgroups and nested != "cluster" and unit != "sample":
        raise InputError("subgroups need unit='sample': pooled units have no subgroups left")
    if errors == "bootstrap" and n_bootstrap < LEAST_DRAWS:
        raise InputError(f"n_bootstrap={n_bootstrap}: take at least {LEAST_DRAWS}")
    if errors == "wild" and model != "ols":
        raise StatisticsError("errors='wild' resamples residuals of least squares: model='ols'; others: 'bootstrap'")
    if errors == "cr2" and chosen.working is None:
        able = ", ".join(name for name, row in MODELS.items() if row.working)
        raise StatisticsError(f"errors='cr2' is for {able}; for {model!r} use 'auto', 'jackknife' or 'bootstrap'")
    if chosen.random and errors == "bootstrap":
        raise StatisticsError(
            f"model {model!r} takes errors='model', 'jackknife' or 'cr1': a patient drawn twice is not two patients"
        )
    return chosen


def _outcome(found: Target, column: pd.Series, name: str, model: str, chosen: Model) -> np.ndarray:
    """The target as the model takes it (n_units,)."""
    labels, n = is_categorical(column), len(found.classes)
    ordered = isinstance(column.dtype, pd.CategoricalDtype) and column.cat.ordered
    wrong = {
        "numeric": n > 2 and "a number",
        "two": n != 2 and bool(np.ptp(found.y) if len(found.y) else 0) and "a label of two classes",
        "count": labels and "a count",
        "time": labels and "a time",
        "ordered": labels and not ordered and "an ordered category (pandas.Categorical(..., ordered=True)) or a number",
    }[chosen.target]
    if wrong:
        raise InputError(
            f"model {model!r} needs {wrong}; target {name!r} is {f'a label of {n} classes' if n else 'a number'}"
        )
    return found.y.astype(np.float64)


def _rows(frame: Frame, found: Target, y: np.ndarray, chosen: Model, subgroups: str | None) -> tuple[Rows, bool]:
    """Everything but the latent: ``X`` holds the intercept (where the model has one), covariates and strata."""
    n = len(y)
    parts = [] if found.C is None else [found.C]
    if found.strata is not None and chosen.target != "time":
        parts.append(pd.get_dummies(found.strata, drop_first=True).to_numpy(np.float64))
    sized = found.sizes is not None and largest(frame.aggregate) > 0
    if sized:
        parts.append(np.log(found.sizes)[:, None])
    C = np.hstack(parts) if parts else np.empty((n, 0))
    Q = basis(C, n) * np.sqrt(max(n, 1))
    subcodes = None
    if subgroups:
        subcodes = codes_of(frame.adata.obs.iloc[found.samples], subgroups)[0]
    strata = found.strata if chosen.target == "time" else None
    rows = Rows(y, Q, found.offset, found.event, strata, found.groups.codes, subcodes, log_volume(C) if n else 0.0)
    return rows, sized


def _errors(errors: str, chosen: Model, rows: Rows, model: str, groups: str) -> str:
    if chosen.random and rows.groups == 1:
        raise StatisticsError(
            f"model {model!r} needs several {groups}s, and all units lie in one; use 'ols' or 'logistic'"
        )
    if chosen.random and rows.codes is None:
        raise StatisticsError(
            f"model {model!r} needs several units in a {groups}, and here every unit is a group of its own; take "
            "unit='sample', or a model without random intercepts"
        )
    asked = errors
    if errors == "auto":
        errors = chosen.independent if rows.codes is None else chosen.dependent
        if errors == "jackknife" and rows.groups > MAX_JACKKNIFE:
            errors = "cr1"
        if chosen.random and chosen.ratio and rows.groups < LEAST_GROUPS:
            errors = "jackknife"
    if errors == "model" and rows.codes is not None and not chosen.random:
        raise StatisticsError(
            f"errors='model' takes all {len(rows.y)} units as independent, but they lie in {rows.groups} groups; use "
            "'auto', or assume_independent=True, which is written into the result"
        )
    if errors in ("cr1", "bootstrap") and rows.groups < LEAST_GROUPS and asked != "auto":
        raise StatisticsError(
            f"errors={errors!r} with {rows.groups} groups rejects true nulls too often; it needs {LEAST_GROUPS}. Use "
            "'auto' or 'jackknife'" + (", or 'wild'" if model == "ols" else "")
        )
    return errors


def _one(
    name: str, v: Any, rows: Rows, chosen: Model, how: str, standardise: bool, n_bootstrap: int,
    gate: tuple[int, int, str], random_state: int,
) -> dict[str, Any]:  # fmt: skip
    x = v.toarray().ravel() if sp.issparse(v) else np.asarray(v, np.float64).ravel()
    scale = float(x.std(ddof=1)) if standardise and len(x) > 1 else 1.0
    row: dict[str, Any] = {
        "latent": name, "effect": chosen.effect, "scale": scale, "n_units": len(x), "n_groups": rows.groups,
        "n_active": int((x != 0).sum()), "note": "", "inference": "", "contrast": "",
        "n_events": _events(rows, chosen), "status": _status(x, rows, chosen, gate),
        "errors": how,
    }  # fmt: skip
    if row["status"] in ("one_class", "too_small", "dead", "constant", "unidentifiable"):
        return row
    # the fit sees a centred latent of unit deviation: with an intercept nothing else changes
    spread = float(x.std(ddof=1))
    Q = rows.X if chosen.intercept else rows.X[:, 1:]
    own = Rows(**{**vars(rows), "X": np.column_stack([Q, (x - x.mean()) / spread])})
    found = fitted(chosen, own)
    if found is None or found["note"] in ("separated", "one_class", "no_events", "singular") or not found["converged"]:
        note = "not_converged" if found is None else found["note"]
        known = {"separated": "separated", "one_class": "one_class", "no_events": "one_class"}
        return {**row, "status": known.get(note, "not_converged")}
    by = scale / spread
    estimate = float(found["coef"][own.X.shape[1] - 1])
    tested = row["status"] in TESTED
    row |= {k: float(v) for k, v in found.items() if k in _EXTRAS and np.isscalar(v)}
    row |= chosen.extras(own, found) if chosen.extras else {}
    if chosen.random and not chosen.ratio:  # restricted likelihoods depend on the units of the design
        row["loglik"] -= rows.log_volume - np.log(by)
    row |= {"estimate": estimate * by, "note": found["note"]}
    if rows.groups >= 3:
        carry = [x != 0] + ([] if rows.event is None else [rows.event > 0])
        firing = min(len(np.unique(rows.codes[r])) if rows.codes is not None else int(r.sum()) for r in carry)
        if how in ("cr1", "bootstrap") and firing < LEAST_GROUPS:
            row["errors"] = how = "jackknife"
        made = inference(chosen, own, found, estimate, how, n_bootstrap, random_state)
        low, high = made["low"] * by, made["high"] * by
        row |= {"se": made["se"] * by, "ci_low": low, "ci_high": high}
        if tested and np.isnan(made["p"]):
            row["status"] = "too_sparse"
        elif tested:
            row |= {k: made[k] for k in ("statistic", "df", "p")} | {"inference": made["how"]}
    if chosen.ratio:
        with np.errstate(over="ignore"):
            row |= {"ratio" + end: float(np.exp(row.get(key, np.nan)))
                    for end, key in (("", "estimate"), ("_low", "ci_low"), ("_high", "ci_high"))}  # fmt: skip
    return row


_EXTRAS = (
    "loglik", "aic", "r2", "sigma2", "tau2", "tau2_sub", "icc", "alpha", "alpha_se", "p_overdispersion",
    "pearson_chi2_df", "inflation", "p_proportional", "p_proportional_all",
)  # fmt: skip


def _events(rows: Rows, chosen: Model) -> float:
    counted = {"two": rows.y, "count": rows.y, "time": rows.event}.get(chosen.target)
    return float(counted.sum()) if counted is not None else np.nan


def _status(x: np.ndarray, rows: Rows, chosen: Model, gate: tuple[int, int, str]) -> str:
    n, G, k = len(x), rows.groups, rows.X.shape[1]
    min_active, min_groups, unit = gate
    fired = x != 0
    active = int(fired.sum())
    if n == 0 or not np.ptp(rows.y) or (rows.event is not None and not rows.event.any()):
        return "one_class"
    if n < max(3, k + 2):
        return "too_small"
    if not active:
        return "dead"
    if not np.ptp(x):
        return "constant"
    Q = rows.X / np.sqrt(n)
    centred = x - x.mean()
    left = residual(x, Q)
    if left @ left < centred @ centred / MAX_VIF or (chosen.target != "time" and share_explained(rows.y, Q) > MAX_R2):
        return "unidentifiable"
    if G < 3:
        return "too_few_groups"
    firing = active if rows.codes is None else len(np.unique(rows.codes[fired]))
    if rows.event is not None:
        ended = rows.event > 0
        if (ended.sum() if rows.codes is None else len(np.unique(rows.codes[ended]))) < MIN_EVENTS:
            return "too_sparse"
    if firing < min(min_groups, G) or ((unit == "sample" or rows.codes is not None) and active < min_active):
        return "too_sparse"
    return "few_groups" if G < FEW else "ok"
