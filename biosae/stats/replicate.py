"""Choose on one part, test once on another, with the direction fixed beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError, StatisticsError
from biosae.stats.association import associate, directed
from biosae.stats.frame import SCORES, principal_components
from biosae.stats.multiplicity import holm
from biosae.stats.nested import in_memory
from biosae.stats.ranking import strength, summary
from biosae.stats.status import TESTED


def replicate(
    adata: Any,
    targets: str | Sequence[str],
    *,
    unit: str,
    split: str = "split",
    discovery: str | Sequence[str] | None = None,
    replication: Any = "test",
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
    """Best feature of each source for each target on the discovery part, tested once on the replication part.

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
        ``adata``, otherwise ``"train"``.
    controls
        True also replicates the best raw dimension and component; components are fitted on the discovery rows alone.
    n_permutations
        Draws of the family-wise ``p_maxt`` of the chosen feature on the discovery part.
    replication_unit, replication_strata, replication_groups, replication_assume_independent
        Override the setting for a second cohort; with a second AnnData strata default to none.

    Returns
    -------
    DataFrame
        One row a (target, source): ``target, source, latent, method, effect, contrast, estimate_discovery,
        estimate_replication, ci_low, ci_high`` (replication, 95 % two-sided), ``p_discovery, q_discovery,
        p_maxt_discovery, p_replication`` (one-sided in the direction found), ``p_holm`` (over the targets of a
        source), ``sign_agrees, replicated`` (``p_holm < 0.05``; missing where nothing could be tested), ``shrinkage``
        (replication over discovery effect), ``n_units_*, n_groups_*, n_samples_*, status_discovery,
        status_replication, groups_shared, inference``. With strata ``n_strata, n_same_sign``. ``groups_shared`` counts
        patients that are in both parts: above 0 the second part is not independent, only held out.

    Raises
    ------
    StatisticsError
        If a part is empty or the parts share samples.
    InputError
        If the second AnnData has other latents, or the two classes of a target differ between the parts.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    adata = in_memory(adata)
    second = not isinstance(replication, str) and hasattr(replication, "obs")
    if second:
        if list(map(str, replication.var_names)) != list(map(str, adata.var_names)):
            raise InputError("the second cohort has other latents; encode it with the same SAE")
        first = adata if discovery is None else _part(adata, split, discovery)
        other = in_memory(replication)
        decoders = [a.varm["decoder"] for a in (first, other) if "decoder" in a.varm]
        if len(decoders) == 2 and not np.array_equal(np.asarray(decoders[0]), np.asarray(decoders[1])):
            raise InputError(
                "the two cohorts were encoded with different SAEs (their decoders differ); encode both with one"
            )
    else:
        first, other = _part(adata, split, discovery or "train"), _part(adata, split, replication)
        shared_rows = set(first.obs_names) & set(other.obs_names)
        if shared_rows:
            raise StatisticsError(
                f"{len(shared_rows)} samples are in both parts; choose discovery and replication apart"
            )
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
    best = summary(found)
    claimed = assume_independent if replication_assume_independent is None else replication_assume_independent
    chosen_method = dict(zip(best["target"], best["method"]))
    again = {
        target: _again(
            _only(other, best.loc[(best["target"] == target) & (best["latent"] != ""), ["source", "latent"]]), target,
            unit=replication_unit or unit, groups=replication_groups or groups,
            strata=replication_strata if second else strata,
            assume_independent=claimed,
            **{**how, "method": _method_for(other, target, chosen_method[target], covariates)},
        )
        for target in targets
        if (best.loc[best["target"] == target, "latent"] != "").any()
    }  # fmt: skip
    shared = _shared(first, other, groups, replication_groups or groups)
    for _, b in best.iterrows():
        _same_classes(b, again.get(b["target"]))
    rows = [_row(b, again.get(b["target"]), shared, bool(strata)) for _, b in best.iterrows()]
    out = pd.DataFrame(rows)
    out["p_holm"] = np.nan
    for source in out["source"].unique():
        here = out["source"] == source
        out.loc[here, "p_holm"] = holm(out.loc[here, "p_replication"].astype(float))
    replicated = pd.array(out["p_holm"] < 0.05, dtype="boolean")
    replicated[out["p_holm"].isna().to_numpy()] = pd.NA
    out.insert(list(out.columns).index("sign_agrees") + 1, "replicated", replicated)
    out.insert(list(out.columns).index("p_replication") + 1, "p_holm", out.pop("p_holm"))
    out.attrs["biosae"] = {
        **found.attrs["biosae"], "split": None if second else split, "second_cohort": second, "groups_shared": shared,
        "replication_unit": replication_unit or unit,
    }  # fmt: skip
    return out


def _again(adata: Any, target: str, **how: Any) -> pd.DataFrame:
    """``associate`` with one-sided p in the direction of the estimate."""
    return directed(adata, [target], **{**(associate.__kwdefaults__ or {}), **how})


def _same_classes(best: pd.Series, again: pd.DataFrame | None) -> None:
    """The direction of a difference means the same in both parts only if the classes and their order are the same."""
    if again is None or not best["contrast"]:
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


def _part(adata: Any, split: str, value: str | Sequence[str]) -> Any:
    if split not in adata.obs:
        raise InputError(f"{split!r} is not a column of obs; make one with biosae.data.split, or give a second AnnData")
    values = [value] if isinstance(value, str) else list(value)
    mask = adata.obs[split].astype(str).isin([str(v) for v in values]).to_numpy()
    if not mask.any():
        raise StatisticsError(
            f"no sample has {split} {value!r}; there are: {', '.join(sorted(map(str, adata.obs[split].unique())))}"
        )
    return adata[mask]


def _only(adata: Any, chosen: pd.DataFrame) -> Any:
    """The samples with the chosen latent, raw dimension and component alone, so that nothing else is tested."""
    import anndata
    import scipy.sparse as sp

    names = chosen.loc[chosen["source"] == "latent", "latent"].tolist()
    out = anndata.AnnData(X=sp.csr_matrix(adata[:, names].X), obs=adata.obs, var=adata[:, names].var)
    for source, key in (("raw", "embedding"), ("pca", SCORES)):
        index = [int(name.rsplit("_", 1)[1]) for name in chosen.loc[chosen["source"] == source, "latent"]]
        if key in adata.obsm:
            out.obsm[key] = np.asarray(adata.obsm[key])[:, index]
    return out


def _shared(first: Any, other: Any, groups: str, other_groups: str) -> int | None:
    if groups not in first.obs or other_groups not in other.obs:
        return None
    return len(set(first.obs[groups].dropna().astype(str)) & set(other.obs[other_groups].dropna().astype(str)))


def _row(best: pd.Series, again: pd.DataFrame | None, shared: int | None, stratified: bool) -> dict[str, Any]:
    row = {
        "target": best["target"], "source": best["source"], "latent": best["latent"], "method": best["method"],
        "effect": best["effect"], "contrast": best["contrast"], "estimate_discovery": best["estimate"],
        "estimate_replication": np.nan, "ci_low": np.nan, "ci_high": np.nan, "p_discovery": best["p"],
        "q_discovery": best["q"], "p_maxt_discovery": best.get("p_maxt", np.nan), "p_replication": np.nan,
        "sign_agrees": pd.NA, "shrinkage": np.nan,
        "n_units_discovery": best["n_units"], "n_units_replication": 0, "n_groups_discovery": best["n_groups"],
        "n_groups_replication": 0, "n_samples_discovery": best["n_samples"], "n_samples_replication": 0,
        "status_discovery": best["status"], "status_replication": "", "groups_shared": shared, "inference": "",
    }  # fmt: skip
    test = None if again is None else again[again["source"] == best["source"]]
    if test is None or len(test) == 0 or best["latent"] == "":
        return row
    test = test.iloc[0]
    same = test["effect"] == best["effect"]
    row |= {
        "estimate_replication": test["estimate"], "ci_low": test["ci_low"], "ci_high": test["ci_high"],
        "status_replication": test["status"], "inference": test["inference"],
        **{f"{n}_replication": test[n] for n in ("n_units", "n_groups", "n_samples")},
    }  # fmt: skip
    if stratified and "n_strata" in test:
        row |= {"n_strata": test["n_strata"], "n_same_sign": test["n_same_sign"]}
    before, after = (float(strength(pd.DataFrame([r])).iloc[0]) for r in (best, test))
    has_direction = best["effect"] != "epsilon_squared"
    if np.isfinite(before) and np.isfinite(after):
        agrees = bool(np.sign(before) == np.sign(after))
        row["sign_agrees"] = agrees if has_direction else pd.NA
        row["shrinkage"] = after / before if same and before else np.nan
        if test["status"] in TESTED and np.isfinite(test["p"]):
            p, side = float(test["p"]), float(test["p_side"])
            row["p_replication"] = p if not has_direction else side if agrees else 1 - side
    return row
