"""Choose on one part, test once on another, with the direction fixed beforehand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.stats import parts
from biosae.stats.agreement import AGREEMENT, expected_power, size_agreement
from biosae.stats.association import associate, directed
from biosae.stats.curse import winners_curse
from biosae.stats.multiplicity import holm
from biosae.stats.nested import in_memory
from biosae.stats.ranking import strength, summary
from biosae.stats.scale import UNDIRECTED
from biosae.stats.sources import SCORES, principal_components
from biosae.stats.status import TESTED
from biosae.stats.training import sae_training


def replicate(
    adata: Any,
    targets: str | Sequence[str],
    *,
    unit: str,
    split: str | None = "split",
    discovery: str | Sequence[str] | None = None,
    replication: Any = "test",
    carry: int | str = 1,
    alpha: float = 0.05,
    discovery_share: float = 0.6,
    stratify: Sequence[str] | None = None,
    repeats: int = 1,
    near_duplicates: bool = False,
    method: str = "auto",
    strata: str | None = None,
    covariates: Sequence[str] = (),
    controls: bool = True,
    n_permutations: int = 999,
    groups: str = "patient",
    assume_independent: bool = False,
    replication_unit: str | None = None,
    replication_strata: str | None = None,
    replication_groups: str | None = None,
    replication_assume_independent: bool | None = None,
    random_state: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """Features of each source chosen for each target on the discovery part, tested once on the replication part.

    Parameters
    ----------
    adata
        Latents.
    targets
        Columns of ``obs``.
    unit, method, strata, covariates, groups, assume_independent, options
        As for :func:`associate`, for both parts unless overridden.
    split, discovery, replication
        Column of ``obs`` and the value(s) of it that make up each part. ``replication`` may instead be a second AnnData
        of the same latents (another cohort, encoded with the same SAE); ``discovery=None`` then takes all rows of
        ``adata``, otherwise ``"train"``. ``split=None`` deals whole patients to the parts here.
    carry
        How many features of each target and source are taken on: a number, or ``"significant"`` (all with ``q`` or
        ``p_maxt`` at most ``alpha`` on the discovery part).
    alpha
        Level of ``"significant"`` and of ``replicated``.
    discovery_share, stratify, repeats
        With ``split=None``: share of the patients in the discovery part; columns that are balanced between the parts
        (None: the targets, and ``site`` where there is one); how many splits are made, with seeds ``random_state``,
        ``random_state + 1``, ... Repeats share their patients: they show how much depends on the split and add no
        evidence.
    near_duplicates
        True counts the replication samples whose embedding has a cosine above 0.999 with one of the discovery part
        (``attrs["biosae"]["near_duplicates"]``, one number a repeat).
    controls
        True also replicates raw dimensions and components; components are fitted on the discovery rows alone.
    n_permutations
        Draws of the family-wise ``p_maxt`` on the discovery part.
    replication_unit, replication_strata, replication_groups, replication_assume_independent
        Override the setting for a second cohort; with a second AnnData strata default to none.

    Returns
    -------
    DataFrame
        One row a feature carried, or one without a name where a target and source have none: ``target, source, latent,
        method, effect, contrast, estimate_discovery, estimate_replication, ci_low, ci_high`` (replication, 95 %
        two-sided), ``p_discovery, q_discovery, p_maxt_discovery, p_replication`` (one-sided in the direction found),
        ``p_holm`` (over everything carried of a source), ``sign_agrees, replicated`` (``p_holm < alpha``; missing where
        nothing could be tested), ``shrinkage`` (replication over discovery effect), ``n_units_*, n_groups_*,
        n_samples_*, status_discovery, status_replication, groups_shared, inference, ci_low_discovery,
        ci_high_discovery``; the columns of :func:`biosae.stats.agreement.size_agreement` (``difference``,
        ``prediction_low``, ``consistent``, ...); ``estimate_corrected, ci_low_corrected, ci_high_corrected`` of
        :func:`biosae.stats.winners_curse` and ``power_expected``, the probability of replication at that size;
        ``n_groups_trained_on_discovery, n_groups_trained_on_replication`` (patients that the SAE was trained on) and
        ``independent_of_sae``: none of the replication part (missing where nobody can say). With strata ``n_strata,
        n_same_sign``; with ``split=None`` ``repeat, seed``. ``groups_shared`` counts patients that are in both parts:
        above 0 the second part is not independent, only held out. :func:`biosae.stats.replication_rate` sums it up.

    Raises
    ------
    StatisticsError
        If a part is empty, the parts share samples, or nothing says which samples are independent.
    InputError
        If the second AnnData has other latents, or the two classes of a target differ between the parts.

    Warns
    -----
    UserWarning
        If the SAE was trained on patients of the replication part.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    adata = in_memory(adata)
    second = not isinstance(replication, str) and hasattr(replication, "obs")
    dealt = split is None and not second
    if not 0 < alpha < 1:
        raise InputError(f"alpha={alpha}; it must lie between 0 and 1")
    if repeats < 1 or (repeats > 1 and not dealt):
        raise InputError(f"repeats={repeats}; it is 1 or more, and more than 1 only with split=None")
    how = {
        "unit": unit, "carry": carry, "alpha": alpha, "method": method, "covariates": covariates, "controls": controls,
        "strata": strata, "n_permutations": n_permutations, "groups": groups, "random_state": random_state,
        "assume_independent": assume_independent, "near_duplicates": near_duplicates,
        "again": {
            "unit": replication_unit or unit, "groups": replication_groups or groups,
            "strata": replication_strata if second else strata,
            "assume_independent":
                assume_independent if replication_assume_independent is None else replication_assume_independent,
        },
        **options,
    }  # fmt: skip
    if not dealt:
        pair = (
            parts.second_cohort(adata, replication, split or "split", discovery)
            if second
            else parts.disjoint(adata, split, discovery or "train", replication)
        )
        out = one_split(*pair, targets, **how)
        out.attrs["biosae"] |= {"split": None if second else split, "second_cohort": second}
    else:
        out = _dealt(adata, targets, repeats, discovery_share, stratify, how)
    warn_trained_on(out)
    return out


def _dealt(
    adata: Any, targets: list[str], repeats: int, share: float, stratify: Sequence[str] | None, how: dict[str, Any]
) -> pd.DataFrame:
    """Splits made here, one table after another."""
    by = parts.dealt_by(
        adata.obs, unit=how["unit"], groups=how["groups"], assume_independent=how["assume_independent"]
    )  # fmt: skip
    if stratify is None:
        stratify = list(dict.fromkeys([*targets, *(["site"] if "site" in adata.obs else [])]))
    stratify = [stratify] if isinstance(stratify, str) else list(stratify)
    tables = []
    for repeat in range(repeats):
        seed = how["random_state"] + repeat
        first = parts.discovery_part(adata.obs, by=by, stratify=stratify, share=share, random_state=seed)
        table = one_split(adata[first], adata[~first], targets, **how)
        tables.append(table.assign(repeat=repeat, seed=seed))
    out = pd.concat(tables, ignore_index=True)
    facts = [t.attrs["biosae"] for t in tables]
    out.attrs["biosae"] = facts[0] | {
        "split": None, "second_cohort": False, "discovery_share": share, "stratify": stratify, "split_by": by,
        "repeats": repeats, "seeds": [how["random_state"] + r for r in range(repeats)],
        "groups_shared": max((f["groups_shared"] or 0) for f in facts),
        "near_duplicates": [n for f in facts for n in f["near_duplicates"]],
    }  # fmt: skip
    return out


def warn_trained_on(out: pd.DataFrame) -> None:
    """Say so where a replication part holds patients that the SAE was trained on."""
    n = int(out["n_groups_trained_on_replication"].fillna(0).max()) if len(out) else 0
    if n or out["independent_of_sae"].eq(False).any():
        warnings.warn(
            f"the SAE was trained on {n or 'some'} of the patients that a replication is made on; its latents may owe "
            "something to them. Fit the SAE on the discovery part alone (fit_on), or replicate in patients that it has "
            "not seen",
            UserWarning,
            stacklevel=3,
        )


def one_split(
    first: Any, other: Any, targets: list[str], *, carry: int | str, alpha: float, method: str, unit: str,
    covariates: Sequence[str], controls: bool, strata: str | None, n_permutations: int, groups: str,
    assume_independent: bool, random_state: int, near_duplicates: bool, again: dict[str, Any], **options: Any,
) -> pd.DataFrame:  # fmt: skip
    """The table of :func:`replicate` for two parts; ``again`` holds the settings of the second."""
    first, other = first.copy(), other.copy()
    if controls and "embedding" in first.obsm and "embedding" in other.obsm:
        scores, mean, loadings = principal_components(np.asarray(first.obsm["embedding"]))
        first.obsm[SCORES] = scores
        other.obsm[SCORES] = (np.asarray(other.obsm["embedding"], np.float64) - mean) @ loadings
    else:
        controls = False
    how = {"method": method, "covariates": covariates, "controls": controls, "random_state": random_state, **options}
    found = associate(
        first, targets, unit=unit, strata=strata, groups=groups, assume_independent=assume_independent,
        n_permutations=n_permutations, **how,
    )  # fmt: skip
    best = _carried(found, carry, alpha)
    tested = {}
    for target, chosen in best.groupby("target", sort=False):
        chosen = chosen[chosen["latent"] != ""]
        if len(chosen):
            own = {**how, **again, "method": _method_for(other, target, chosen["method"].iloc[0], covariates)}
            tested[target] = directed(
                _only(other, chosen), [target], **{**(associate.__kwdefaults__ or {}), **own}
            )  # fmt: skip
            _same_classes(chosen.iloc[0], tested[target])
    rows = []
    for (target, source), chosen in best.groupby(["target", "source"], sort=False):
        table = tested.get(target)
        here = None if table is None else table[table["source"] == source]
        for at, (_, b) in enumerate(chosen.iterrows()):
            usable = here is not None and b["latent"] != "" and at < len(here)
            rows.append(_row(b, here.iloc[at] if usable else None, bool(again["strata"])))
    shared = parts.groups_shared(first, other, groups, again["groups"])
    out = _judged(pd.DataFrame(rows), alpha)
    out.insert(list(out.columns).index("inference"), "groups_shared", pd.Series([shared] * len(out), dtype=object))
    seen = [sae_training(part, by) for part, by in ((first, groups), (other, again["groups"]))]
    for name, part in zip(("discovery", "replication"), seen):
        out[f"n_groups_trained_on_{name}"] = pd.array(
            [pd.NA if part["n_groups_trained_on"] is None else part["n_groups_trained_on"]] * len(out), dtype="Int64"
        )
    independent = seen[1]["n_samples_trained_on"] == 0 if seen[1]["known"] else pd.NA
    out["independent_of_sae"] = pd.array([independent] * len(out), dtype="boolean")
    out.attrs["biosae"] = {
        **found.attrs["biosae"], "groups_shared": shared, "replication_unit": again["unit"], "carry": carry,
        "alpha": alpha, "sae_training": seen[0], "sae_training_replication": seen[1],
        "near_duplicates": [parts.near_duplicates(first, other)] if near_duplicates else [],
        "n_carried": {str(s): int((t["latent"] != "").sum()) for s, t in out.groupby("source", sort=False)},
    }  # fmt: skip
    return out


def _carried(found: pd.DataFrame, carry: int | str, alpha: float) -> pd.DataFrame:
    """Chosen rows with their corrected estimates; a row without a name for a target and source that have none."""
    chosen = winners_curse(found, select=carry, alpha=alpha)
    none = summary(found)
    kept = set(zip(chosen["target"], chosen["source"]))
    none = none[[pair not in kept for pair in zip(none["target"], none["source"])]].copy()
    none["latent"] = ""
    none[["estimate", "ci_low", "ci_high", "p", "q"]] = np.nan
    table = pd.concat([chosen, none.reindex(columns=chosen.columns)], ignore_index=True) if len(none) else chosen
    order = {pair: i for i, pair in enumerate(dict.fromkeys(zip(found["target"], found["source"])))}
    place = pd.Series([order[pair] for pair in zip(table["target"], table["source"])])
    return table.iloc[np.argsort(place.to_numpy(), kind="stable")].reset_index(drop=True)


def _judged(out: pd.DataFrame, alpha: float) -> pd.DataFrame:
    """Holm over everything carried of a source, and the verdict."""
    p_holm = pd.Series(np.nan, index=out.index)
    for source in out["source"].unique():
        here = out["source"] == source
        p_holm[here] = holm(out.loc[here, "p_replication"].astype(float))
    replicated = pd.array(p_holm < alpha, dtype="boolean")
    replicated[p_holm.isna().to_numpy()] = pd.NA
    out.insert(list(out.columns).index("sign_agrees") + 1, "replicated", replicated)
    out.insert(list(out.columns).index("p_replication") + 1, "p_holm", p_holm)
    out["consistent"] = pd.array(out["consistent"], dtype="boolean")
    out["power_expected"] = expected_power(out, alpha=alpha)
    return out


def _same_classes(best: pd.Series, again: pd.DataFrame) -> None:
    """The direction of a difference means the same in both parts only if the classes and their order are the same."""
    if not best["contrast"]:
        return
    other = again["contrast"].iloc[0]
    if other and other != best["contrast"] and (again["status"] != "one_class").any():
        raise InputError(
            f"target {best['target']!r} compares {best['contrast']} in the discovery part and {other} in the "
            "replication part; give both the same two classes, and the same order if they are categories"
        )


def _method_for(adata: Any, target: str, method: str, covariates: Sequence[str]) -> str:
    """The discovery's method; rank correlation and AUROC follow the kind of the second cohort's column by ``auto``."""
    if target in adata.obs and method in ("spearman", "auroc"):
        values = adata.obs[target].dropna()
        two = values.nunique() == 2 and set(values.unique()) <= {0, 1}
        if method == "spearman" and not pd.api.types.is_numeric_dtype(values):
            return "auto"
        if method == "auroc" and pd.api.types.is_numeric_dtype(values) and not two and values.dtype != bool:
            return "auto"
    return method


def _only(adata: Any, chosen: pd.DataFrame) -> Any:
    """The samples with the chosen latents, raw dimensions and components alone, so that nothing else is tested.

    Where no latent was chosen the first one goes along, since a table must have one; its test is not looked at.
    """
    import anndata
    import scipy.sparse as sp

    names = chosen.loc[chosen["source"] == "latent", "latent"].tolist() or [adata.var_names[0]]
    out = anndata.AnnData(X=sp.csr_matrix(adata[:, names].X), obs=adata.obs, var=adata[:, names].var)
    for source, key in (("raw", "embedding"), ("pca", SCORES)):
        index = [int(name.rsplit("_", 1)[1]) for name in chosen.loc[chosen["source"] == source, "latent"]]
        if key in adata.obsm:
            out.obsm[key] = np.asarray(adata.obsm[key])[:, index]
    if "spatial" in adata.obsm:
        out.obsm["spatial"] = adata.obsm["spatial"]
    return out


def _row(best: pd.Series, test: pd.Series | None, stratified: bool) -> dict[str, Any]:
    row = {
        "target": best["target"], "source": best["source"], "latent": best["latent"], "method": best["method"],
        "effect": best["effect"], "contrast": best["contrast"], "estimate_discovery": best["estimate"],
        "estimate_replication": np.nan, "ci_low": np.nan, "ci_high": np.nan, "p_discovery": best["p"],
        "q_discovery": best["q"], "p_maxt_discovery": best.get("p_maxt", np.nan), "p_replication": np.nan,
        "sign_agrees": pd.NA, "shrinkage": np.nan,
        "n_units_discovery": best["n_units"], "n_units_replication": 0, "n_groups_discovery": best["n_groups"],
        "n_groups_replication": 0, "n_samples_discovery": best["n_samples"], "n_samples_replication": 0,
        "status_discovery": best["status"], "status_replication": "", "inference": "",
        "ci_low_discovery": best["ci_low"], "ci_high_discovery": best["ci_high"],
        **(dict.fromkeys(AGREEMENT, np.nan) | {"consistent": pd.NA}),
        **{c: best[c] for c in ("estimate_corrected", "ci_low_corrected", "ci_high_corrected")},
    }  # fmt: skip
    if test is None:
        return row
    same = test["effect"] == best["effect"]
    row |= {
        "estimate_replication": test["estimate"], "ci_low": test["ci_low"], "ci_high": test["ci_high"],
        "status_replication": test["status"], "inference": test["inference"],
        **{f"{n}_replication": test[n] for n in ("n_units", "n_groups", "n_samples")}, **size_agreement(best, test),
    }  # fmt: skip
    if stratified and "n_strata" in test:
        row |= {"n_strata": test["n_strata"], "n_same_sign": test["n_same_sign"]}
    before, after = (float(strength(pd.DataFrame([r])).iloc[0]) for r in (best, test))
    has_direction = best["effect"] not in UNDIRECTED
    if np.isfinite(before) and np.isfinite(after):
        agrees = bool(np.sign(before) == np.sign(after))
        row["sign_agrees"] = agrees if has_direction else pd.NA
        row["shrinkage"] = after / before if same and before else np.nan
        if test["status"] in TESTED and np.isfinite(test["p"]):
            p, side = float(test["p"]), float(test["p_side"])
            row["p_replication"] = p if not has_direction else side if agrees else 1 - side
    return row
