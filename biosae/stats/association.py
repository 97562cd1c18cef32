"""Tests of every latent against counts, labels and measurements: the public ``associate`` and its summary."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError, nearest
from biosae.stats import multiplicity
from biosae.stats.adjust import MAX_R2, MAX_VIF, basis, column_of, design, determined, projected, share_explained
from biosae.stats.correlation import Columns, moments, n_active, rank_columns, rank_target
from biosae.stats.frame import Frame, Source, Target, sources
from biosae.stats.inference import FEW
from biosae.stats.methods import METHODS, by_size
from biosae.stats.nested import in_memory, indicator
from biosae.stats.problem import Problem, Result
from biosae.stats.status import TESTED
from biosae.stats.training import sae_training

NESTED = ("aggregate", "cluster")
PERMUTE = ("auto", "between", "within", "spatial")
POOLING = ("fixed", "random")
COLUMNS = [
    "latent", "target", "method", "unit", "estimate", "ci_low", "ci_high", "statistic", "p", "q", "n_units",
    "n_samples", "status", "effect", "source",
]  # fmt: skip


def associate(
    adata: Any,
    targets: str | Sequence[str],
    *,
    unit: str,
    method: str = "auto",
    covariates: Sequence[str] = (),
    strata: str | None = None,
    controls: bool = True,
    correction: str = "bh",
    n_permutations: int = 0,
    permute: str = "auto",
    blocks: str | None = None,
    groups: str = "patient",
    nested: str = "aggregate",
    aggregate: str = "mean",
    pooling: str = "fixed",
    exposure: str | None = None,
    event: str | None = None,
    n_fits: int = 50,
    min_active: int = 10,
    min_active_groups: int = 5,
    assume_independent: bool = False,
    random_state: int = 0,
) -> pd.DataFrame:
    """Test every latent against every target, with controls, at the right unit of inference.

    Parameters
    ----------
    adata
        Latents of :func:`biosae.encode`: ``X`` (n_samples, m) sparse codes, ``obs`` the samples.
    targets
        Columns of ``obs``: numbers, or labels (text, category, boolean; numbers that are all 0 or 1 count as a label).
        Rows without a value are left out for that target alone.
    unit
        ``"sample"``, or a column of ``obs`` (patient, slide, ...): latents are pooled to it by ``aggregate``, numbers
        by mean; a label must be constant within the unit. Units of the same patient are never taken as independent.
    method
        ``"auto"`` (numbers: Spearman; two classes: AUROC; more: Kruskal-Wallis; with covariates: Spearman, two classes
        coded 0/1), ``pearson``, ``spearman``, ``auroc``, ``wilcoxon``, ``welch``, ``fisher``, ``kruskal`` or ``ols``.
    covariates
        Columns to adjust for (partial correlation, or regression with ``ols``): numbers, labels (dummies), and
        ``"spline(age)"`` or ``"spline(age, df=4)"`` for a natural cubic spline of a number.
    strata
        Column within which estimates are made and then combined (fixed effect; ranks are taken within strata).
    controls
        True also tests the raw embedding dimensions and principal components, each a family of its own (``source``).
    correction
        ``bh``, ``by``, ``storey``, ``holm`` or ``bonferroni`` over all (latent, target) pairs of a source that have a
        p; ``hierarchical`` first over targets, then over the latents of a target.
    n_permutations
        Draws for ``p_maxt``, the family-wise p over the columns of a source for one target (Westfall-Young).
    blocks
        Column within which units or groups may be exchanged (site); it must be constant within a group.
    permute
        What is rearranged for permutation p: ``"auto"`` (groups where the target is constant in them, else the signs of
        their scores), ``"between"`` (groups), ``"within"`` (samples within their group, taken as exchangeable there) or
        ``"spatial"`` (tiles of a slide shifted as a whole, by ``obsm["spatial"]``).
    groups
        Column of independent groups.
    nested
        ``"aggregate"`` pools samples to ``unit``; ``"cluster"`` keeps samples as rows and takes ``unit`` as groups.
    pooling
        Strata are combined with ``"fixed"`` or ``"random"`` effects.
    exposure
        Column of areas, hours or the like in which counts were made, for ``poisson`` and ``negbin``; counts and
        exposures of a unit are added up.
    event
        Column that is 1 where the time ended in the event and 0 where it was censored, for ``cox``; the target is the
        time.
    n_fits
        ``poisson``, ``negbin``, ``cox``, ``ordinal``: columns with the smallest p whose estimate is a full fit; the
        others have the first Newton step from no effect (column ``fit`` says which).
    aggregate
        ``mean``, ``fraction_active`` or ``max`` of the codes within a unit (controls: mean, or max).
    min_active, min_active_groups
        A latent that fires in fewer samples, or in fewer groups (or in fewer than all if there are fewer), keeps its
        estimate and gets no p.
    assume_independent
        True takes every unit as independent whatever ``groups`` says; it is written into the result.
    random_state
        Seed of the permutations, the same for every target.

    Returns
    -------
    DataFrame
        One row a (source, feature, target): ``latent, target, method, unit, estimate, ci_low, ci_high, statistic, p,
        q, n_units, n_samples, status, effect, source, n_groups, contrast, inference``, with ``p_maxt`` if asked for
        and, with strata, ``n_strata, n_same_sign, q_heterogeneity, p_heterogeneity, i2``. ``contrast`` says which
        class is higher when the effect is positive. What is not tested has its ``status``
        (:data:`biosae.stats.STATUS`) and NaN. Choices and family sizes are in ``attrs["biosae"]``.

    Raises
    ------
    StatisticsError
        If independence is unknown, units cut across groups, or a label varies within a unit.
    InputError
        For unknown columns, methods or options that do not go together.

    Notes
    -----
    Formulas, defaults and their measured error rates: docs/statistics.md. Intervals are 95 %.
    """
    options = {k: v for k, v in locals().items() if k not in ("adata", "targets")}
    return directed(adata, targets, **options).drop(columns="p_side")


def directed(
    adata: Any, targets: str | Sequence[str], *, unit: str, method: str, covariates: Sequence[str], strata: str | None,
    controls: bool, correction: str, n_permutations: int, permute: str, blocks: str | None, groups: str, nested: str,
    aggregate: str, pooling: str, exposure: str | None, event: str | None, n_fits: int, min_active: int,
    min_active_groups: int, assume_independent: bool, random_state: int,
) -> pd.DataFrame:  # fmt: skip
    """``associate`` with a further column ``p_side``, the one-sided p in the direction of the estimate."""
    if not hasattr(adata, "obs") or not hasattr(adata, "var_names"):
        raise InputError(
            f"adata is a {type(adata).__name__}; pass the AnnData of biosae.encode (read a file with anndata.read_h5ad)"
        )
    targets = [targets] if isinstance(targets, str) else list(targets)
    if not targets:
        raise InputError("targets is empty; name at least one column of obs")
    covariates = [covariates] if isinstance(covariates, str) else list(covariates)
    if correction not in multiplicity.CORRECTIONS:
        raise InputError(f"unknown correction {correction!r}; {nearest(correction, multiplicity.CORRECTIONS)}")
    if method != "auto" and method not in METHODS:
        raise InputError(f"unknown method {method!r}; {nearest(method, ['auto', *METHODS])}")
    if covariates and strata:
        raise InputError("give covariates or strata, not both; a stratum can also be one of the covariates")
    for name, value, known in (
        ("nested", nested, NESTED), ("permute", permute, PERMUTE), ("pooling", pooling, POOLING),
    ):  # fmt: skip
        if value not in known:
            raise InputError(f"{name}={value!r}; {nearest(value, known)}")
    if nested == "cluster" and unit == "sample":
        raise InputError("nested='cluster' takes unit= as the groups of samples: name the column, such as 'patient'")
    if n_permutations < 0:
        raise InputError("n_permutations must not be negative")
    overlapping = set(targets) & {*map(column_of, covariates), strata}
    if overlapping:
        raise InputError(f"{sorted(overlapping)[0]!r} is both a target and a covariate or stratum")
    if not adata.n_obs or not adata.n_vars:
        raise InputError(f"there are {adata.n_obs} samples and {adata.n_vars} latents: nothing to test")
    adata = in_memory(adata)
    rows_are, groups = ("sample", unit) if nested == "cluster" else (unit, groups)
    frame = Frame(
        adata, rows_are, groups, covariates, strata, blocks, assume_independent, aggregate, exposure, event,
        counts=method in METHODS and METHODS[method].counts,
    )  # fmt: skip
    features = [s for s in sources(adata, controls=controls) if s.names]
    tables, facts = [], {}
    for name in targets:
        target = frame.target(name)
        chosen = _choose(method, target, name, covariates, strata, exposure, event)
        facts[name] = {
            "method": chosen,
            "classes": target.classes,
            "n_units": target.n_units,
            "n_groups": target.groups.n,
            "strata_left_out": target.strata_left_out,
        }
        if covariates and target.n_units and np.ptp(target.y):
            rank = chosen == "spearman"
            target.C = design(target.table, covariates, rank=rank)
            reason = determined(target.y, target.table, covariates, target=name, rank=rank)
            if reason:
                facts[name]["unidentifiable"] = reason
                warnings.warn(reason, stacklevel=3)
        for source in features:
            columns, cache = frame.columns(source, target)
            table = _one(
                source, columns, cache, target, chosen, n_permutations, random_state,
                (min_active, min_active_groups, rows_are), aggregate, permute, pooling, n_fits,
            )  # fmt: skip
            table.insert(1, "target", name)
            if assume_independent:
                table["inference"] = table["inference"].where(
                    table["inference"] == "", table["inference"] + "; independence assumed"
                )
            tables.append(table)
    result = pd.concat(tables, ignore_index=True)
    result["unit"] = rows_are
    result["q"] = np.nan
    for source in features:
        here = result["source"] == source.name
        part = result[here]
        result.loc[here, "q"] = multiplicity.correct(part["p"], correction=correction, families=part["target"])
    extra = ["n_groups", "contrast", "inference"] + (["p_maxt"] if n_permutations else [])
    extra += [name for name in ("fit", "n_events") if name in result]
    extra += ["n_strata", "n_same_sign", "q_heterogeneity", "p_heterogeneity", "i2"] if strata else []
    result = result.reindex(columns=[*COLUMNS, *extra, "p_side"])
    tested = result.loc[result["p"].notna(), "source"].value_counts()
    result.attrs["biosae"] = {
        "unit": unit, "groups": None if frame.group_of is None else groups, "aggregate": aggregate, "method": method,
        "covariates": covariates, "strata": strata, "blocks": blocks, "controls": controls, "correction": correction,
        "n_permutations": n_permutations, "permute": permute, "nested": nested, "pooling": pooling,
        "exposure": exposure, "event": event, "random_state": random_state, "min_active": min_active,
        "min_active_groups": min_active_groups, "assume_independent": assume_independent, "targets": facts,
        "m_tested": {s.name: int(tested.get(s.name, 0)) for s in features}, "n_samples": int(adata.n_obs),
        "sae_training": sae_training(adata, groups),
    }  # fmt: skip
    return result


def _choose(
    method: str, target: Target, name: str, covariates: list[str], strata: str | None, exposure: str | None,
    event: str | None,
) -> str:  # fmt: skip
    """Settle ``auto`` and check that the method fits the target."""
    kind = {0: "numeric", 1: "two", 2: "two"}.get(len(target.classes), "classes")
    if method == "auto":
        method = {"numeric": "spearman", "two": "spearman" if covariates else "auroc", "classes": "kruskal"}[kind]
    chosen = METHODS[method]
    fits = {
        "two": kind == "two",
        "any": kind in ("numeric", "two"),
        "classes": bool(target.classes),
        "numeric": kind == "numeric",
        "ordered": target.ordered,
    }
    if not fits[chosen.target]:
        usable = [m for m, row in METHODS.items() if fits[row.target] and row.event == bool(event)]
        what = "a number" if kind == "numeric" else f"a label of {len(target.classes)} classes"
        raise InputError(
            f"method {method!r} does not fit target {name!r}, {what}; methods that do: {', '.join(usable)}"
        )
    if covariates and not chosen.covariates:
        able = [m for m, row in METHODS.items() if row.covariates]
        raise InputError(
            f"method {method!r} takes no covariates; with them use {', '.join(able)} (two classes are coded 0/1)"
        )
    if exposure and not chosen.counts:
        raise InputError(f"method {method!r} takes no exposure; counts in an area or time need 'poisson' or 'negbin'")
    if bool(event) != chosen.event:
        raise InputError(
            f"method {method!r} takes no event=; times to an event need method='cox'" if event else
            "method='cox' needs event=, the column that is 1 where the time ended in the event and 0 where censored"
        )  # fmt: skip
    if strata and not chosen.strata:
        able = [m for m, row in METHODS.items() if row.strata]
        raise InputError(f"method {method!r} takes no strata; with them use {', '.join(able)}")
    return method


def _one(
    source: Source, V: Columns, cache: dict, target: Target, method: str, n_permutations: int, random_state: int,
    gate: tuple[int, int, str], aggregate: str, permute: str, pooling: str, n_fits: int,
) -> pd.DataFrame:  # fmt: skip
    m = V.shape[1]
    C = target.C
    status, testable, too_few = _status(source, V, target, C, method, gate)
    problem = Problem(
        V, target.y, len(target.classes), C, target.strata, target.groups, testable, target.units_blocks,
        target.offset, target.event, 0 if too_few else n_permutations, random_state, permute, pooling, n_fits, cache,
    )  # fmt: skip
    none = np.full(m, np.nan)
    table = dict.fromkeys(("estimate", "ci_low", "ci_high", "statistic", "p", "p_maxt"), none)
    inference, extra = "", {}
    hopeless = np.isin(status, ("one_class", "too_small")).all()
    if not hopeless:
        found: Result = METHODS[method].run(problem)
        identified = status != "unidentifiable"
        estimate = np.where(identified, found.estimate, np.nan)
        if method == "auroc":
            estimate = np.where(np.isin(status, ("dead", "constant")), 0.5, estimate)
        elif method == "wilcoxon":
            estimate = np.where(status == "dead", np.nan, np.where(status == "constant", 0.0, estimate))
        else:
            estimate = np.where(np.isin(status, ("dead", "constant")), np.nan, estimate)
        varies = (not too_few) & identified & ~np.isin(status, ("dead", "constant"))
        p, p_maxt, how = found.inference.p, found.inference.p_maxt, found.inference.how
        p_side = none if found.inference.p_side is None else found.inference.p_side
        tested = np.isin(status, TESTED)
        status = np.where(tested & np.isnan(p), "too_sparse", status)  # no variance between groups to test with
        if target.sizes is not None and target.n_units > 3 and (method != "welch" or aggregate == "max"):
            again = by_size(problem, method, target.sizes)
            p, p_maxt = np.maximum(p, again.p), np.maximum(p_maxt, again.p_maxt)
            p_side = none if again.p_side is None else np.maximum(p_side, again.p_side)
            how += f"; not below the p adjusted for samples a unit ({again.how})"
            status = np.where(np.isin(status, TESTED) & np.isnan(p), "unidentifiable", status)
        tested = np.isin(status, TESTED)
        table = {
            "estimate": estimate,
            "ci_low": np.where(varies, found.low, np.nan),
            "ci_high": np.where(varies, found.high, np.nan),
            "statistic": np.where(tested, found.inference.statistic, np.nan),
            "p": np.where(tested, np.minimum(p, 1.0), np.nan),
            "p_maxt": np.where(tested, np.minimum(p_maxt, 1.0), np.nan),
            "p_side": np.where(tested, p_side, np.nan),
        }
        inference = how + (
            f"; max-T: {found.inference.how_maxt}" if n_permutations and found.inference.how_maxt else ""
        )
        extra = found.extra
    out = pd.DataFrame({"latent": source.names, "method": method, **table, **extra})
    out["status"] = status
    out["n_samples"], out["n_groups"] = len(target.samples), target.groups.n
    if "n_units" not in out:
        out["n_units"] = target.n_units
    elif target.unit_codes is None:
        out["n_samples"] = out["n_units"]
    out["effect"], out["source"] = METHODS[method].effect, source.name
    two = len(target.classes) == 2
    ends = two or (METHODS[method].target == "ordered" and bool(target.classes))
    out["contrast"] = f"{target.classes[-1]} over {target.classes[0]}" if ends else ""
    out["inference"] = np.where(out["p"].notna(), inference, "")
    return out


def _status(
    source: Source, V: Columns, target: Target, C: np.ndarray | None, method: str, gate: tuple[int, int, str]
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Status of each column, which columns may be tested, and whether there are fewer than 3 groups."""
    n, m = V.shape
    G = target.groups.n
    min_active, min_groups, unit = gate
    y = target.y if target.offset is None else target.y / np.exp(target.offset)  # a rate
    if n == 0 or not np.ptp(y) or (target.event is not None and not target.event.any()):
        return np.full(m, "one_class", dtype=object), np.zeros(m, bool), False
    status = np.full(m, "few_groups" if 3 <= G < FEW else "ok", dtype=object)
    active, (_, ss) = n_active(V), moments(V)
    if source.name == "latent":
        if target.groups.codes is None:
            firing_groups = active
        else:
            fired = indicator(target.groups.codes, G) @ (V != 0).astype(np.float64)
            firing_groups = np.asarray((fired > 0).sum(axis=0)).ravel()
        sparse = firing_groups < min(min_groups, G)
        if unit == "sample" or target.groups.codes is not None:
            sparse |= active < min_active
        status[sparse] = "too_sparse"
    too_few = G < 3
    if too_few:
        status[status != "too_sparse"] = "too_few_groups"
    if C is not None:
        Q = basis(C, n)
        y = rank_target(y) if method == "spearman" else y
        total, left = projected(rank_columns(V) if method == "spearman" else V, Q)[1:]
        if share_explained(y, Q) > MAX_R2:
            status[:] = "unidentifiable"
        with np.errstate(divide="ignore", invalid="ignore"):
            status[left < total / MAX_VIF] = "unidentifiable"
        if n - Q.shape[1] - 1 < 1:
            status[:] = "too_small"
    if n < 3:
        status[:] = "too_small"
    status[(ss == 0) & (active > 0)] = "constant"
    status[active == 0] = "dead"
    if n < 3 or (C is not None and n - basis(C, n).shape[1] - 1 < 1):
        status[:] = "too_small"
    return status, np.isin(status, TESTED), too_few
