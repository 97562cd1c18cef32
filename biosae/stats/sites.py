"""Does it hold in other hospitals: leave one site out, and estimates of every site with what they come to together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError, StatisticsError, nearest
from biosae.stats.meta import EFFECTS, combine
from biosae.stats.methods import EFFECT_NULL
from biosae.stats.nested import in_memory
from biosae.stats.ranking import strength
from biosae.stats.replicate import one_split, warn_trained_on
from biosae.stats.scale import back, natural
from biosae.stats.strata import within_strata

COMBINED = "combined"
_COLUMNS = [
    "site", "target", "source", "latent", "method", "effect", "contrast", "direction", "estimate_discovery", "estimate",
    "ci_low", "ci_high", "p", "sign_agrees", "opposite", "shrinkage", "n_units", "n_groups", "n_samples", "status",
    "status_discovery", "groups_shared", "independent_of_sae", "inference", "n_sites", "n_same_sign", "n_opposite",
    "n_latents", "tau2", "i2", "q_heterogeneity", "p_heterogeneity", "prediction_low", "prediction_high",
]  # fmt: skip
_HETEROGENEITY = ("tau2", "i2", "p_heterogeneity")


def leave_one_site_out(
    adata: Any,
    targets: str | Sequence[str],
    *,
    unit: str,
    site: str = "site",
    method: str = "auto",
    strata: str | None = None,
    covariates: Sequence[str] = (),
    controls: bool = True,
    effects: str = "random",
    n_permutations: int = 0,
    groups: str = "patient",
    assume_independent: bool = False,
    random_state: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """Choose a feature on all other sites and test it, once and one-sided, on the site left out; for every site.

    Parameters
    ----------
    adata
        Latents.
    targets
        Columns of ``obs``.
    site
        Column of sites (hospitals, scanners, cohorts). Rows without a site are left out.
    effects
        Held-out estimates are combined with ``"random"`` (sites differ) or ``"fixed"`` effects.
    unit, method, strata, covariates, controls, n_permutations, groups, assume_independent, random_state, options
        As for :func:`associate`.

    Returns
    -------
    DataFrame
        For each target and source one row a ``site``, then one named ``combined``.

        Rows of a site: ``latent`` chosen on the others, its ``direction`` (1, -1) and ``estimate_discovery`` there;
        ``estimate, ci_low, ci_high`` and ``p`` (one-sided in that direction) in the site; ``sign_agrees``;
        ``opposite``, the interval lies wholly on the other side of no effect; ``shrinkage``; ``n_units, n_groups,
        n_samples, status`` (``one_class`` where the site has one value of the target, ``too_small``,
        ``too_few_groups``, ...); ``groups_shared``, patients also seen elsewhere; ``independent_of_sae``.

        Row ``combined``: the held-out estimates put together on the scale of the effect, ``n_sites`` used,
        ``n_same_sign`` of them in the direction found, ``n_opposite``, ``n_latents`` different ones chosen, ``tau2``,
        ``i2, q_heterogeneity, p_heterogeneity`` and, for random effects and 3 sites or more, ``prediction_low,
        prediction_high``, where the effect in a further site would lie. ``direction`` is 0 where the chosen features
        point both ways: the estimate is then in the direction found, whatever it was.

    Raises
    ------
    InputError
        For unknown columns or options.
    StatisticsError
        If there are fewer than 2 sites.

    Warns
    -----
    UserWarning
        If the SAE was trained on patients of a site that is left out.

    Notes
    -----
    The interval of random effects is the wider of the normal one and Hartung and Knapp's, tau2 by REML
    (:func:`biosae.stats.combine`). Each site is tested once by a choice that never saw it, so no estimate carries a
    winner's curse. But each site also helps to choose for all others, so that the held-out results are not
    independent: where the choice hangs on chance they go astray together and the interval of the row ``combined`` is
    too narrow. Its ``p``, twice the mean of the sites' p, holds whatever the dependence (Vovk and Wang, Biometrika
    107, 791, 2020). The row speaks of the procedure, and of one latent only where ``n_latents`` is 1.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    if effects not in EFFECTS:
        raise InputError(f"effects={effects!r}; {nearest(effects, EFFECTS)}")
    if site in {*targets, *covariates, strata}:
        raise InputError(f"site={site!r} is also a target, covariate or stratum")
    for name in (site, *targets):
        if name not in adata.obs:
            raise InputError(f"{name!r} is not a column of obs; columns: {', '.join(map(str, adata.obs.columns))}")
    adata = in_memory(adata)
    values = adata.obs[site].astype("string")
    names = sorted(values.dropna().unique())
    if len(names) < 2:
        raise StatisticsError(f"{site!r} has {len(names)} value; leaving one out needs at least two sites")
    how = {
        "unit": unit, "carry": 1, "alpha": 0.05, "method": method, "covariates": covariates, "controls": controls,
        "strata": strata, "n_permutations": n_permutations, "groups": groups, "random_state": random_state,
        "assume_independent": assume_independent, "near_duplicates": False, **options,
    }  # fmt: skip
    how["again"] = {k: how[k] for k in ("unit", "groups", "strata", "assume_independent")}
    parts, facts = [], {}
    for name in names:
        inside = (values == name).to_numpy(bool, na_value=False)
        rest = values.notna().to_numpy() & ~inside
        able = [t for t in targets if all(_varies(adata.obs[t][m]) for m in (inside, rest))]
        if able:
            table = one_split(adata[rest], adata[inside], able, **how)
            facts[name] = table.attrs["biosae"]["sae_training_replication"]
            parts.append(table.assign(site=name))
        parts.append(_one_class(adata, name, inside, rest, [t for t in targets if t not in able]))
    table = _as_sites(pd.concat([p for p in parts if len(p)], ignore_index=True))
    warn_trained_on(table)
    rows = []
    for target in targets:
        of = table[table["target"] == target]
        sources = [s for s in of["source"].unique() if s] or [""]
        for source in sources:
            own = of[of["source"].isin([source, ""])].assign(source=source)
            rows += [own, pd.DataFrame([_together(own, effects)])]
    out = pd.concat(rows, ignore_index=True).reindex(columns=_COLUMNS)
    for column in ("sign_agrees", "opposite", "independent_of_sae"):
        out[column] = pd.array([pd.NA if pd.isna(v) else bool(v) for v in out[column]], dtype="boolean")
    out.attrs["biosae"] = {
        "site": site, "sites": names, "effects": effects, "sae_training": facts,
        **{k: v for k, v in how.items() if k not in ("again", "carry", "alpha", "near_duplicates")},
    }  # fmt: skip
    return out


def _varies(column: pd.Series) -> bool:
    return len(column.dropna().unique()) > 1


def _one_class(adata: Any, name: str, inside: np.ndarray, rest: np.ndarray, targets: list[str]) -> pd.DataFrame:
    """Rows of targets that have one value in the site, or in all other sites together."""
    rows = []
    for target in targets:
        here = adata.obs.loc[inside, target]
        row = {"site": name, "target": target, "source": "", "latent": "", "n_samples_replication": here.notna().sum()}
        row["status_replication"] = "" if _varies(here) else "one_class"
        row["status_discovery"] = "" if _varies(adata.obs.loc[rest, target]) else "one_class"
        rows.append(row)
    return pd.DataFrame(rows)


def _as_sites(table: pd.DataFrame) -> pd.DataFrame:
    """Columns of ``replicate`` under the names of a forest plot, with direction and the flag ``opposite``."""
    names = {f"{n}_replication": n for n in ("estimate", "p", "n_units", "n_groups", "n_samples", "status")}
    table = table.rename(columns=names)
    for column in ("estimate", "estimate_discovery", "p", "ci_low", "ci_high", "effect", "independent_of_sae"):
        if column not in table:
            table[column] = np.nan
    if "n_groups_trained_on_replication" not in table:
        table["n_groups_trained_on_replication"] = np.nan
    found = strength(pd.DataFrame({"estimate": table["estimate_discovery"], "effect": table["effect"]}))
    table["direction"] = np.sign(found)
    null = table["effect"].map(EFFECT_NULL).astype(float)
    beyond = np.where(table["direction"] > 0, table["ci_high"] < null, table["ci_low"] > null)
    known = (table["ci_low"].notna() & table["direction"].notna()).to_numpy()
    table["opposite"] = [bool(b) if k else pd.NA for b, k in zip(beyond, known)]
    return table


def _together(own: pd.DataFrame, effects: str) -> dict[str, Any]:
    """The row ``combined`` of one target and source."""
    row: dict[str, Any] = {
        "site": COMBINED, "target": own["target"].iloc[0], "source": own["source"].iloc[0], "latent": "",
        "n_sites": 0, "n_same_sign": 0, "n_opposite": 0, "status": "too_small",
    }  # fmt: skip
    effect = own["effect"].dropna()
    if effect.empty:
        return row
    same = own[own["effect"] == effect.mode().iloc[0]]
    theta, se = natural(same)
    direction = same["direction"].to_numpy(np.float64)
    use = np.isfinite(theta) & (se > 0) & (np.abs(direction) == 1)
    row |= {k: same[k].iloc[0] for k in ("method", "effect", "contrast")}
    if not use.any():
        return row
    side = direction[use]
    common = side[0] if (side == side[0]).all() else 0.0
    found = random_or_fixed((side * theta[use])[:, None], (se[use] ** 2)[:, None], effects)
    picked = same[use]
    p = picked["p"].astype(float).dropna()
    latents = picked["latent"].unique()
    row |= {
        "direction": common, "latent": latents[0] if len(latents) == 1 else "", "n_latents": len(latents),
        "n_sites": int(use.sum()), "n_same_sign": int((side * theta[use] > 0).sum()),
        "n_opposite": int(picked["opposite"].astype("boolean").sum()),
        "p": min(1.0, 2 * float(p.mean())) if len(p) else np.nan, "status": "ok",
        "q_heterogeneity": float(found["q"][0]), **{k: float(found[k][0]) for k in _HETEROGENEITY},
        **{k: picked[k].sum() for k in ("n_units", "n_groups", "n_samples")},
        "inference": f"{effects} effects of held-out sites; p twice their mean",
    }  # fmt: skip
    turn = -1.0 if common < 0 else 1.0
    for low, high in (("ci_low", "ci_high"), ("prediction_low", "prediction_high")):
        if low in found:
            ends = back(turn * np.array([found[low][0], found[high][0]]), np.array([row["effect"]] * 2))
            row[low], row[high] = (float(e) for e in ends[:: int(turn)])
    row["estimate"] = float(back(turn * found["estimate"], np.array([row["effect"]]))[0])
    return row


def random_or_fixed(theta: np.ndarray, variances: np.ndarray, effects: str) -> dict[str, np.ndarray]:
    """:func:`biosae.stats.combine`; for random effects REML, with the wider of the normal and Hartung-Knapp intervals.

    Parameters
    ----------
    theta, variances
        (k, m).
    effects
        ``"random"`` or ``"fixed"``.
    """
    found = combine(theta, variances, effects=effects, method="reml")
    if effects == "fixed":
        return found
    other = combine(theta, variances, effects="random", method="reml", hartung_knapp=True)
    with np.errstate(invalid="ignore"):
        wider = other["ci_high"] - other["ci_low"] > found["ci_high"] - found["ci_low"]
    for name in ("se", "df", "ci_low", "ci_high", "statistic", "p"):
        found[name] = np.where(wider, other[name], found[name])
    return found


def by_site(
    adata: Any, target: str, *, unit: str, site: str = "site", latents: Sequence[str] | None = None,
    controls: bool = False, **options: Any,
) -> pd.DataFrame:  # fmt: skip
    """Estimates of given latents in every site, and put together: the table of a forest plot.

    Parameters
    ----------
    adata
        Latents.
    target
        Column of ``obs``.
    site
        Column of sites.
    latents
        Names, chosen beforehand: choosing them for what they do in these sites makes every row too good
        (:func:`leave_one_site_out` chooses without the site). None takes all.
    unit, controls, options
        As for :func:`associate`.

    Returns
    -------
    DataFrame
        The table of :func:`biosae.stats.within_strata` with ``site`` for ``stratum`` (``pooled``, ``within`` where the
        method has strata, every site), then ``fixed`` and ``random``: the estimates of the sites put together, with
        ``n_strata`` (sites used), ``n_same_sign, q_heterogeneity, p_heterogeneity, i2, tau2`` and, for ``random``,
        ``prediction_low, prediction_high``. Their p is that of the combined estimate (Wald), with no correction over
        latents.

    Raises
    ------
    InputError
        If a latent or column is unknown.
    """
    table = within_strata(adata, target, strata=site, unit=unit, latents=latents, controls=controls, **options)
    facts = table.attrs
    names = sorted(adata.obs[site].astype("string").dropna().unique())
    like = table[table["stratum"] == "pooled"]
    m = len(like)
    rows = [table[table["stratum"] == name].tail(m) for name in names]
    effect = like["effect"].to_numpy()
    pairs = [natural(r) for r in rows]
    same = np.stack([(r["effect"].to_numpy() == effect) & r["estimate"].notna().to_numpy() for r in rows])
    theta = np.where(same, np.stack([p[0] for p in pairs]), np.nan)
    variances = np.where(same, np.stack([p[1] for p in pairs]) ** 2, np.nan)
    used = np.isfinite(theta) & (variances > 0)
    empty = ["estimate", "ci_low", "ci_high", "statistic", "p", "q", "p_maxt"]
    parts = [table]
    for kind in ("fixed", "random"):
        found = random_or_fixed(theta, variances, kind)
        part = like.copy()
        part[[c for c in empty if c in part]] = np.nan
        part["stratum"], part["inference"] = kind, f"{kind} effects of sites"
        for column in ("estimate", "ci_low", "ci_high", "prediction_low", "prediction_high"):
            if column in found:
                part[column] = back(found[column], effect)
        for column in ("statistic", "p", "n_strata", "n_same_sign", *_HETEROGENEITY):
            part[column] = found[column]
        part["q_heterogeneity"] = found["q"]
        for column in ("n_units", "n_groups", "n_samples"):
            counts = np.stack([r[column].to_numpy(np.float64) for r in rows])
            part[column] = np.where(used, counts, 0.0).sum(axis=0).astype(int)
        part["status"] = np.where(found["n_strata"] > 0, "ok", "too_small")
        parts.append(part)
    out = pd.concat(parts, ignore_index=True).rename(columns={"stratum": "site"})
    out.attrs = facts
    return out
