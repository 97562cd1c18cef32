"""Which cell types (or other terms of an ontology) a latent is enriched in, tested at the level of patients."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, StatisticsError, nearest
from biosae.interpret.ontology import Ontology
from biosae.stats import associate, bh

COLUMNS = (
    "latent", "term", "name", "comparison", "parent", "depth", "auroc", "ci_low", "ci_high", "p", "q", "density_in",
    "density_out", "log2_ratio", "n_in", "n_out", "n_groups_in", "n_groups", "n_units", "status", "chosen",
)  # fmt: skip


FIXED = {"method", "controls", "covariates", "correction", "exposure", "event"}
"""Options of ``associate`` that are decided here."""


def enrichment(
    adata: Any,
    label: str,
    *,
    ontology: Ontology | None = None,
    unit: str = "sample",
    groups: str = "patient",
    min_in: int = 10,
    min_groups: int = 3,
    alpha: float = 0.05,
    random_state: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """Enrichment of every latent in every term, against all else and against the siblings of the term.

    A row carries its term and all that contain it. Each term is tested against all other rows and, within each broader
    term that has others too, against its siblings (the rest of that term): a latent of all lymphocytes is high in T
    cells against the rest and not against B cells. Tests are those of :func:`biosae.stats.associate`, whose p counts
    groups.

    Parameters
    ----------
    adata
        Codes, a row a cell, tile or token.
    label
        Column of ``obs`` with terms (ids or names); missing values are left out.
    ontology
        Which terms contain which (:func:`read_obo`, :class:`Ontology`). None: terms stand side by side.
    unit, groups, **options
        Of :func:`biosae.stats.associate` (``strata``, ``n_permutations``, ``assume_independent``, ...). The test is
        ``auroc``, which takes no covariates: a confounder with few values may be the ``strata``.
    min_in
        Rows in and out of a term below which it is listed but not tested.
    min_groups
        Groups with rows of the term, likewise.
    alpha
        Level of ``chosen``.
    random_state
        Seed.

    Returns
    -------
    DataFrame
        A row a latent, term and comparison: ``latent, term, name, comparison`` (``rest`` or ``siblings``), ``parent``
        (of siblings), ``depth``, ``auroc, ci_low, ci_high, p, q`` (one family a comparison), ``density_in,
        density_out`` (share of rows in which the latent fires), ``log2_ratio`` of mean codes (means of group means; NaN
        for signed codes), ``n_in, n_out`` (rows), ``n_groups_in, n_groups, n_units, status, chosen``. ``status``: that
        of the test, or ``too_few_in``, ``too_few_groups``. ``chosen`` marks for each latent the one enriched term (q <=
        alpha, AUROC above 0.5) that is deepest and also holds against its siblings in every broader term where they
        were tested. ``attrs["biosae"]``: ``unknown`` labels that are not in the ontology, and ``same_rows``: broader
        terms with the same rows as a narrower one, which stands for them.

    Raises
    ------
    InputError
        If the label is not in ``obs``, none of its values is in the ontology, or an option is set here.
    StatisticsError
        If fewer than two terms remain, or as :func:`biosae.stats.associate`.

    Notes
    -----
    Siblings: the parent-child rule of Grossmann et al. 2007, Bioinformatics 23, 3024, with a rank test in place of
    counts.
    """
    for name in sorted(FIXED & set(options)):
        raise InputError(f"enrichment takes no {name}: the test is the rank test 'auroc' of latents, with q by BH over "
                         "each comparison. A confounder may be the strata=")  # fmt: skip
    if label not in adata.obs:
        raise InputError(f"obs has no column {label!r}; {nearest(label, adata.obs.columns)}")
    values = adata.obs[label]
    labels = values.astype(object).where(values.notna(), None).map(lambda v: None if v is None else str(v)).to_numpy()
    ontology, members, unknown = _members(labels, ontology, label)
    same = _merged(members, ontology)
    known = np.logical_or.reduce(list(members.values()))
    plan = _plan(members, ontology, known)
    if not plan:
        raise StatisticsError(f"{label!r} has one term only ({next(iter(members))!r}); enrichment compares several")
    unit_of = adata.obs[groups].astype(str).to_numpy() if groups in adata.obs else None
    columns, facts = {}, []
    for number, (term, parent, inside, outside) in enumerate(plan):
        few = min(inside.sum(), outside.sum()) < min_in
        n_groups = len(set(unit_of[inside])) if unit_of is not None else np.nan
        status = "too_few_in" if few else "too_few_groups" if n_groups < min_groups else None
        name = f"_term_{number:05d}"
        if status is None:
            columns[name] = np.where(inside, 1.0, np.where(outside, 0.0, np.nan))
        facts.append({
            "key": name, "term": term, "name": ontology.names[term],
            "comparison": "rest" if parent is None else "siblings", "parent": parent, "depth": ontology.depth(term),
            "n_in": int(inside.sum()), "n_out": int(outside.sum()), "n_groups_in": n_groups, "refused": status,
        })  # fmt: skip
    try:
        tests = _tested(adata, columns, unit, groups, random_state, options)
    except InputError as error:
        named = {fact["key"]: f"{label!r} is {fact['term']!r}" for fact in facts}
        raise type(error)(re.sub(r"'?(_term_\d{5})'?", lambda found: named[found[1]], str(error))) from None
    codes = sp.csr_matrix(adata.X, dtype=np.float64)
    tables = [
        _one(fact, tests, adata.var_names, codes, inside, outside, unit_of)
        for fact, (_, _, inside, outside) in zip(facts, plan)
    ]
    out = pd.concat(tables, ignore_index=True)
    for comparison in ("rest", "siblings"):
        part = (out["comparison"] == comparison).to_numpy()
        out.loc[part, "q"] = bh(out.loc[part, "p"])
    out["chosen"] = _chosen(out, alpha)
    out = out[list(COLUMNS)]
    out.attrs["biosae"] = {"unknown": unknown, "same_rows": same, "unit": unit, "groups": groups, "alpha": alpha}
    return out


def _members(
    labels: np.ndarray, ontology: Ontology | None, label: str
) -> tuple[Ontology, dict[str, np.ndarray], dict[str, int]]:
    """Rows of every term, broader ones included, and the labels that the ontology does not know."""
    levels = sorted({v for v in labels if v is not None})
    if not levels:
        raise InputError(f"{label!r} is missing in every row")
    if ontology is None:
        ontology = Ontology({v: [] for v in levels})
    members: dict[str, np.ndarray] = {}
    unknown: dict[str, int] = {}
    for level in levels:
        rows, term = labels == level, ontology.term(level)
        if term is None:
            unknown[level] = int(rows.sum())
            continue
        for one in (term, *ontology.ancestors(term)):
            members[one] = members.get(one, False) | rows
    if not members:
        raise InputError(f"none of {label!r} ({', '.join(map(repr, levels[:5]))}) is a term of the ontology")
    return ontology, members, unknown


def _merged(members: dict[str, np.ndarray], ontology: Ontology) -> dict[str, str]:
    """Drop broader terms with the rows of a narrower one; returns dropped term -> the term that stands for it."""
    stands: dict[bytes, str] = {}
    same: dict[str, str] = {}
    for term in sorted(members, key=lambda t: (-ontology.depth(t), t)):
        key = np.packbits(members[term]).tobytes()
        if key in stands and term in ontology.ancestors(stands[key]):
            same[term] = stands[key]
        else:
            stands[key] = term
    for term in same:
        del members[term]
    return same


def _plan(
    members: dict[str, np.ndarray], ontology: Ontology, known: np.ndarray
) -> list[tuple[str, str | None, np.ndarray, np.ndarray]]:
    """Comparisons: term, broader term (None: all else), rows in, rows out."""
    plan = []
    for term, inside in members.items():
        rest = known & ~inside
        if rest.any():
            plan.append((term, None, inside, rest))
        for parent in _nearest(term, members, ontology):
            siblings = members[parent] & ~inside
            if siblings.any() and (known & ~members[parent]).any():  # else the siblings are the rest
                plan.append((term, parent, inside, siblings))
    return plan


def _nearest(term: str, members: dict[str, np.ndarray], ontology: Ontology) -> list[str]:
    """Broader terms that were kept, without those above another of them."""
    broader = [t for t in ontology.ancestors(term) if t in members]
    above = {a for t in broader for a in ontology.ancestors(t)}
    return [t for t in broader if t not in above]


def _tested(
    adata: Any, columns: dict[str, np.ndarray], unit: str, groups: str, random_state: int, options: dict[str, Any]
) -> pd.DataFrame | None:
    """Rows of associate, indexed by comparison and latent."""
    import anndata

    if not columns:
        return None
    obs = pd.concat([adata.obs, pd.DataFrame(columns, index=adata.obs_names)], axis=1)
    part = anndata.AnnData(sp.csr_matrix(adata.X), obs=obs, var=pd.DataFrame(index=adata.var_names))
    if "spatial" in adata.obsm:
        part.obsm["spatial"] = adata.obsm["spatial"]
    tests = associate(
        part, list(columns), unit=unit, groups=groups, method="auroc", controls=False, random_state=random_state,
        **options,
    )  # fmt: skip
    return tests.set_index(["target", "latent"])


def _one(
    fact: dict[str, Any], tests: pd.DataFrame | None, latents: pd.Index, codes: sp.csr_matrix, inside: np.ndarray,
    outside: np.ndarray, unit_of: np.ndarray | None,
) -> pd.DataFrame:  # fmt: skip
    """All latents of one comparison."""
    out = pd.DataFrame({"latent": latents})
    for key, value in fact.items():
        out[key] = value
    out["parent"] = out["parent"].astype(object)
    if fact["refused"] is None:
        found = tests.loc[fact["key"]].reindex(latents)
        kept = {"auroc": "estimate", **{c: c for c in ("ci_low", "ci_high", "p", "n_groups", "n_units", "status")}}
        for new, old in kept.items():
            out[new] = found[old].to_numpy()
    else:
        out = out.assign(auroc=np.nan, ci_low=np.nan, ci_high=np.nan, p=np.nan, n_groups=np.nan, n_units=np.nan)
        out["status"] = fact["refused"]
    means = []
    for side, rows in (("in", inside), ("out", outside)):
        part = codes[np.flatnonzero(rows)]
        out[f"density_{side}"] = np.asarray((part != 0).mean(axis=0)).ravel()
        number = np.unique(unit_of[rows], return_inverse=True)[1] if unit_of is not None else np.arange(rows.sum())
        weight = 1.0 / (np.bincount(number)[number] * (number.max() + 1))
        means.append(part.T @ weight)
    with np.errstate(divide="ignore", invalid="ignore"):
        out["log2_ratio"] = np.log2(means[0] / means[1])
    out.loc[(np.minimum(*means) < 0) | ((means[0] == 0) & (means[1] == 0)), "log2_ratio"] = np.nan
    if codes.nnz and codes.data.min() < 0:
        out["log2_ratio"] = np.nan
    out["q"] = np.nan
    return out


def _chosen(out: pd.DataFrame, alpha: float) -> np.ndarray:
    """For each latent the deepest enriched term that also holds against its siblings."""
    enriched = (out["q"] <= alpha) & (out["auroc"] > 0.5)
    tested = (out["comparison"] == "siblings") & out["p"].notna()
    fails = out[tested & ~enriched]
    fallen = set(zip(fails["latent"], fails["term"]))
    able = enriched & (out["comparison"] == "rest")
    able &= np.array([pair not in fallen for pair in zip(out["latent"], out["term"])], bool)
    first = out[able].sort_values(["depth", "auroc"], ascending=False, kind="stable").drop_duplicates("latent").index
    chosen = np.zeros(len(out), bool)
    chosen[first] = True
    return chosen
