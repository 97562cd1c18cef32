"""Checks of a stress card that read other tables of the same samples: other layers, other seeds, changed items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError
from biosae.interpret.resampled import Number, Order, concordance, pearson, spearman
from biosae.interpret.stress_checks import Claim, Found
from biosae.stats.correlation import as_columns, rank_columns
from biosae.stats.effects import auroc
from biosae.stats.features import decoder

LAYER_AUROC = 0.8
N_RANDOM = 200
"""Random directions whose largest cosine is the null of a matched atom."""


def _same(claim: Claim, other: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the claim that the other table has too, and its rows, joined by id."""
    index = pd.Index(other.obs_names)
    if not index.is_unique:
        raise InputError(f"ids repeat in the table {name!r}")
    at = index.get_indexer(claim.obs.index)
    if not (at >= 0).any():
        raise InputError(f"the table {name!r} has none of these samples; encode the same samples")
    mine = np.flatnonzero(at >= 0)
    return mine, at[mine]


def layer(claim: Claim, layers: Mapping[str, Any]) -> Found:
    """Rank correlation with the best latent of every other layer; latents are chosen in one half of the patients and
    looked at in the other.
    """
    if not layers:
        return claim.no("no other layers were given (layers=)")
    half = _halves(claim)
    if half is None:
        return claim.no(
            "fewer than 2 patients with each class: latents of other layers cannot be chosen in other patients"
        )
    own, pairs, rows = Order(claim.v), [], []
    used = np.ones(len(claim.y), dtype=bool)
    for name, table in layers.items():
        mine, theirs = _same(claim, table, name)
        present = np.zeros(len(claim.y), dtype=bool)
        present[mine] = True
        used &= present
        columns = as_columns(sp.csr_matrix(table.X[theirs]))
        for side in (0, 1):
            choose, see = mine[half[mine] == side], mine[half[mine] != side]
            if any(len(set(claim.y[part])) < 2 for part in (choose, see)):
                return claim.no(f"the samples of layer {name!r} hold one class in half of the patients")
            area = auroc(rank_columns(columns[half[mine] == side]), claim.y[choose])
            best = int(np.argmax(np.abs(area - 0.5)))
            values = np.zeros(len(claim.y))
            values[mine] = np.sign(area[best] - 0.5) * columns[:, [best]].toarray().ravel()
            pairs.append((Order(values), np.isin(np.arange(len(claim.y)), see)))
            order, seen = pairs[-1]
            rows.append({
                "layer": name, "latent": str(table.var_names[best]), "auroc": order.auroc(claim.y, seen.astype(float)),
                "rho": spearman(own, order, seen.astype(float)), "n_samples": len(see),
                "n_patients": len(np.unique(claim.groups[see])),
            })  # fmt: skip

    def mean(weight: np.ndarray) -> float:
        found = [spearman(own, order, weight * seen) for order, seen in pairs]
        return float(np.clip(found, 0.0, 1.0).mean()) if np.isfinite(found).all() else float("nan")

    table = pd.DataFrame(rows)
    areas = table.groupby("layer", sort=False)["auroc"].mean()
    number = claim.interval(mean, used=used, classes=claim.y.astype(int), what="the rank correlation")
    reading = (
        f"mean rank correlation with the best latent of {len(layers)} other layers "
        f"({', '.join(f'{k} AUROC {a:.2f}' for k, a in areas.items())}); {(areas > LAYER_AUROC).mean():.0%} of them "
        f"above {LAYER_AUROC}"
    )
    return number, reading, table


def _halves(claim: Claim) -> np.ndarray | None:
    """0 or 1 of every row: patients dealt to two halves, those with the same classes evenly; None if not possible."""
    kind = np.bincount(claim.groups, claim.y, claim.n_patients) > 0
    kind = kind.astype(int) + 2 * (np.bincount(claim.groups, ~claim.y, claim.n_patients) > 0)
    side, rng, turn = np.zeros(claim.n_patients, dtype=int), np.random.default_rng(claim.random_state), 0
    for value in np.unique(kind):
        for patient in rng.permutation(np.flatnonzero(kind == value)):
            side[patient] = turn % 2
            turn += 1
    half = side[claim.groups]
    whole = all(len(set(claim.y[half == s])) == 2 for s in (0, 1))
    return half if whole else None


def seeds(claim: Claim, tables: Sequence[Any]) -> Found:
    """Correlation of codes with the latent of nearest atom in dictionaries of other seeds."""
    if not tables:
        return claim.no("no dictionaries of other seeds were given (seeds=)")
    signed = bool((claim.adata.X.data if sp.issparse(claim.adata.X) else claim.adata.X).min(initial=0) < 0)
    try:
        atoms = [decoder(table).astype(np.float64) for table in (claim.adata, *tables)]
    except InputError as error:
        return claim.no(str(error))
    atom = _unit(atoms[0][[claim.at]])[0]
    rng = np.random.default_rng(claim.random_state)
    random = _unit(rng.standard_normal((N_RANDOM, len(atom))))
    rows, codes, used = [], [], np.ones(len(claim.y), dtype=bool)
    for number, (table, other) in enumerate(zip(tables, atoms[1:])):
        mine, theirs = _same(claim, table, f"seed {number}")
        if other.shape[1] != len(atom):
            raise InputError(f"atoms of seed {number} have {other.shape[1]} numbers, not {len(atom)}")
        live = np.flatnonzero((other**2).sum(axis=1) > 0)
        cosine, null = _unit(other[live]) @ atom, random @ _unit(other[live]).T
        cosine, null = (np.abs(cosine), np.abs(null)) if signed else (cosine, null)
        best = int(live[cosine.argmax()])
        values = np.zeros(len(claim.y))
        values[mine] = np.asarray(sp.csr_matrix(table.X)[theirs][:, [best]].todense()).ravel()
        if signed and _unit(other[[best]])[0] @ atom < 0:
            values = -values
        present = np.isin(np.arange(len(claim.y)), mine)
        used &= present
        codes.append(values)
        area = Order(claim.sign * values).auroc(claim.y, present.astype(float))
        rows.append({
            "seed": number, "latent": str(table.var_names[best]), "cosine": float(cosine.max()),
            "cosine_null_q95": float(np.quantile(null.max(axis=1), 0.95)),
            "correlation": pearson(claim.z, values, present.astype(float)), "auroc": area, "swapped": bool(area <= 0.5),
        })  # fmt: skip

    def mean(weight: np.ndarray) -> float:
        found = [pearson(claim.z, values, weight) for values in codes]
        return float(np.clip(np.nan_to_num(found), 0.0, 1.0).mean()) if claim.z.any() else float("nan")

    result = claim.interval(mean, used=used, classes=claim.y.astype(int), what="the correlation")
    if len(tables) < 2 and result.status in ("ok", "few_groups"):
        said = "one other seed: two or more are wanted"
        result = Number(
            result.score, result.low, result.high, result.n_patients, result.n_samples, "few_seeds",
            "; ".join(filter(None, (said, result.reason))),
        )  # fmt: skip
    table = pd.DataFrame(rows)
    reading = (
        f"nearest atoms of {len(tables)} other seeds: cosine {table['cosine'].min():.2f} to "
        f"{table['cosine'].max():.2f} "
        f"(chance below {table['cosine_null_q95'].max():.2f}); the label is lost in {table['swapped'].mean():.0%}"
    )
    return result, reading, table


def _unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)


def perturbation(claim: Claim, tables: Mapping[str, Any]) -> Found:
    """Concordance of codes before and after a change that does not touch the label; the worst change counts."""
    if not tables:
        return claim.no("no changed items were given (perturbed=)")
    rows, codes, used = [], [], np.ones(len(claim.y), dtype=bool)
    for name, table in tables.items():
        mine, theirs = _same(claim, table, name)
        if claim.latent not in table.var_names:
            raise InputError(f"the table {name!r} has no latent {claim.latent!r}; encode it with the same dictionary")
        values = np.zeros(len(claim.y))
        values[mine] = np.asarray(sp.csr_matrix(table[:, [claim.latent]].X)[theirs].todense()).ravel()
        present = np.isin(np.arange(len(claim.y)), mine)
        used &= present
        codes.append(values)
        weight = present.astype(float)
        rows.append({
            "change": name, "concordance": concordance(claim.z, values, weight),
            "correlation": pearson(claim.z, values, weight),
            "auroc_before": Order(claim.v).auroc(claim.y, weight),
            "auroc_after": Order(claim.sign * values).auroc(claim.y, weight), "n_samples": len(mine),
        })  # fmt: skip

    def worst(weight: np.ndarray) -> float:
        found = [concordance(claim.z, values, weight) for values in codes]
        return float(np.clip(np.nan_to_num(found), 0.0, 1.0).min()) if claim.z.any() else float("nan")

    number = claim.interval(worst, used=used, classes=claim.y.astype(int), what="the concordance")
    table = pd.DataFrame(rows)
    at = table["concordance"].fillna(0).idxmin()
    return number, f"least concordance {table['concordance'][at]:.2f}, after {table['change'][at]}", table
