"""Tests of every latent against counts, labels and measurements: the public ``associate`` and its summary."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError, nearest
from biosae.stats import multiplicity, schemes
from biosae.stats.adjust import MAX_R2, basis, column_of, design, determined, share_explained
from biosae.stats.correlation import rank_target
from biosae.stats.frame import Frame, Target
from biosae.stats.methods import METHODS
from biosae.stats.nested import roles
from biosae.stats.permutation import now_testing
from biosae.stats.screen import Options, screen, table_of
from biosae.stats.sources import sources
from biosae.stats.training import sae_training

NESTED = ("aggregate", "cluster")
PERMUTE = ("auto", "between", "within", "spatial")
POOLING = ("fixed", "random")
AT_ONCE = 64
"""Targets of the same samples whose products with the latents are made together."""
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
        Latents of :func:`biosae.encode`: ``X`` (n_samples, m) sparse codes, ``obs`` the samples. ``X`` may be backed by
        its file or a dask array of rows: it is then read block by block (see docs/how-to/larger-than-memory.md).
    targets
        Columns of ``obs``: numbers, or labels (text, category, boolean; numbers that are all 0 or 1 count as a label).
        Rows without a value are left out for that target alone.
    unit
        ``"sample"``, or a column of ``obs`` (patient, slide, ...): latents are pooled to it by ``aggregate``, numbers
        by mean; a label must be constant within the unit. Units of the same patient are never taken as independent.
    method
        ``"auto"`` (numbers: Spearman; two classes: AUROC; more: Kruskal-Wallis; with covariates: Spearman, two classes
        coded 0/1), ``pearson``, ``spearman``, ``auroc``, ``wilcoxon``, ``welch``, ``fisher``, ``kruskal``, ``ols``,
        ``poisson``, ``negbin``, ``ordinal`` or ``cox``.
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
        their scores), or a scheme by name, which needs ``n_permutations`` and whose p then is ``p``: ``"between"``
        (groups as wholes), ``"within"`` (samples within their group, taken as exchangeable there) or ``"spatial"``
        (the tiles of each slide shifted as a whole, by ``obsm["spatial"]`` and the column ``slide``, else ``groups``).
    groups
        Column of independent groups.
    nested
        ``"aggregate"`` pools samples to ``unit``; ``"cluster"`` keeps samples as rows and takes ``unit`` as groups
        (refused where several of these, such as slides, share a value of ``groups``).
    pooling
        Strata are combined with ``"fixed"`` or ``"random"`` effects (DerSimonian and Laird; p not below that of the
        mean effect).
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
        ``mean``, ``fraction_active``, ``max`` or ``top5`` (mean of the 5 largest; any number) of the codes within a
        unit (controls: the same, but the mean instead of ``fraction_active``).
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
        and, with strata, ``n_strata, n_same_sign, q_heterogeneity, p_heterogeneity, i2, tau2``. ``contrast`` says which
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
    result = directed(adata, targets, **options)
    result.pop("p_side")
    return result


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
    for name, value in (("n_permutations", n_permutations), ("random_state", random_state), ("n_fits", n_fits)):
        if not isinstance(value, (int, np.integer)) or value < 0:
            raise InputError(f"{name}={value!r}; give a whole number of 0 or more")
    overlapping = set(targets) & {*map(column_of, covariates), strata}
    if overlapping:
        raise InputError(f"{sorted(overlapping)[0]!r} is both a target and a covariate or stratum")
    if adata.X is None:
        raise InputError("adata has no X: the codes of biosae.encode are missing")
    if not adata.n_obs or not adata.n_vars:
        raise InputError(f"there are {adata.n_obs} samples and {adata.n_vars} latents: nothing to test")
    rows_are, groups, independent = roles(
        adata.obs, unit=unit, groups=groups, nested=nested, assume_independent=assume_independent
    )
    frame = Frame(
        adata, rows_are, groups, covariates, strata, blocks, independent, aggregate, exposure, event,
        counts=method in METHODS and METHODS[method].counts,
    )  # fmt: skip
    if permute != "auto":
        schemes.check(permute, n_permutations=n_permutations, strata=strata)
    features = [s for s in sources(adata, controls=controls, pooled=rows_are != "sample") if s.names]
    kinds = list(dict.fromkeys(source.name for source in features))
    if n_permutations and len(features) > len(kinds):
        raise InputError(
            "p_maxt needs all latents at once, and the codes are larger than memory: pool them to patients "
            "(unit='patient'), or take fewer latents (adata[:, names].to_memory())"
        )
    units = [frame.target(name) for name in targets]
    chosen = [
        _choose(method, target, name, covariates, strata, exposure, event) for name, target in zip(targets, units)
    ]
    options = Options(
        n_permutations, random_state, permute, pooling, n_fits, aggregate, min_active, min_active_groups, rows_are,
        "; independence assumed" if assume_independent else "",
    )  # fmt: skip
    facts = {
        name: {
            "method": how, "classes": target.classes, "n_units": target.n_units, "n_groups": target.groups.n,
            "strata_left_out": target.strata_left_out,
        }
        for name, target, how in zip(targets, units, chosen)
    }  # fmt: skip
    parts: dict[tuple[int, int], dict] = {}
    for together in _batches(units, chosen):
        first, how = units[together[0]], chosen[together[0]]
        if covariates and first.n_units:
            shared = design(first.table, covariates, rank=how == "spearman")
            Q = basis(shared, first.n_units)
        for place in together:
            target, name = units[place], targets[place]
            if covariates and target.n_units and np.ptp(target.y):
                target.C, rank = shared, how == "spearman"
                if share_explained(rank_target(target.y) if rank else target.y, Q) > MAX_R2:
                    reason = determined(target.y, target.table, covariates, target=name, rank=rank)
                    facts[name]["unidentifiable"] = reason
                    warnings.warn(reason, stacklevel=3)
            if permute != "auto":
                target.parts = frame.parts(target, permute, name)
        for at, source in enumerate(features):
            columns, cache = frame.columns(source, first)
            peers = [units[place].y for place in together]
            for nth, place in enumerate(together):
                now_testing(targets[place], source.name)
                part = screen(source, columns, cache, units[place], how, options, peers, nth)
                parts[place, at] = part | {"target": targets[place]}
            del columns, cache  # or two parts of codes larger than memory are held at once
    rows = [parts[place, at] for place in range(len(targets)) for at in range(len(features))]
    extra = ["n_groups", "contrast", "inference"] + (["p_maxt"] if n_permutations else [])
    extra += [column for column in ("fit", "n_events") if any(column in part for part in rows)]
    extra += ["n_strata", "n_same_sign", "q_heterogeneity", "p_heterogeneity", "i2", "tau2"] if strata else []
    result = table_of(rows, [*COLUMNS, *extra, "p_side"])
    q = np.full(len(result), np.nan)
    for kind in kinds:
        here = np.flatnonzero(result["source"].to_numpy() == kind) if len(kinds) > 1 else slice(None)
        families = result["target"].to_numpy()[here] if correction == "hierarchical" else None
        q[here] = multiplicity.correct(result["p"].to_numpy()[here], correction=correction, families=families)
    result["q"] = q
    tested = result["source"].to_numpy()[result["p"].notna().to_numpy()]
    result.attrs["biosae"] = {
        "unit": unit, "groups": None if frame.group_of is None else groups, "aggregate": aggregate, "method": method,
        "covariates": covariates, "strata": strata, "blocks": blocks, "controls": controls, "correction": correction,
        "n_permutations": n_permutations, "permute": permute, "nested": nested, "pooling": pooling,
        "exposure": exposure, "event": event, "random_state": random_state, "min_active": min_active,
        "min_active_groups": min_active_groups, "assume_independent": assume_independent, "targets": facts,
        "m_tested": {kind: int((tested == kind).sum()) for kind in kinds}, "n_samples": int(adata.n_obs),
        "sae_training": sae_training(adata, groups),
    }  # fmt: skip
    return result


def _batches(units: list[Target], chosen: list[str]) -> list[list[int]]:
    """Places of targets that have a value in the same samples and are tested alike, at most :data:`AT_ONCE`."""
    found: dict[tuple[bytes, str], list[int]] = {}
    for place, (target, how) in enumerate(zip(units, chosen)):
        found.setdefault((target.key, how), []).append(place)
    return [every[i : i + AT_ONCE] for every in found.values() for i in range(0, len(every), AT_ONCE)]


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
    if not fits[chosen.target] and len(target.y) and np.ptp(target.y):  # without two values there is nothing to fit
        usable = [m for m, row in METHODS.items() if fits[row.target] and not row.event]
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
