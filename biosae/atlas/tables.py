"""Figures of every latent, its associations, its confounders and its neighbours, as the page's columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.atlas.packing import number, numbers, texts
from biosae.export.shareable import redacted
from biosae.interpret.names import FIELDS
from biosae.pl import results
from biosae.reports.run import Run

N_BINS = 24
N_NEIGHBOURS = 5
MOST_ROWS = 60_000
"""Associations that the page holds at most; of runs with more, the first of each latent."""
FLAGS = ("technical", "not_separable", "mixed", "undetermined", "neither", "biology")
"""Flags of confounding, the gravest first."""
CORRECTIONS = {"bh": "Benjamini-Hochberg", "by": "Benjamini-Yekutieli", "holm": "Holm", "bonferroni": "Bonferroni"}
_BLOCK = 1024


def latents(run: Run, codes: sp.csc_matrix) -> dict[str, Any]:
    """One value a latent: how often and how strongly it fires, in whom, and what it was called before."""
    var = run.adata.var
    out: dict[str, Any] = {"id": list(map(str, run.adata.var_names))}
    for column in ("density", "mean_active", "max", "min"):
        if column in var:
            out[column] = numbers(var[column])
    for column in ("n_active", "n_active_patients"):
        if column in var:
            out[column] = [int(v) for v in var[column]]
    if "patient" in run.adata.obs:
        out["top_share"] = numbers(_largest_share(codes, run.adata.obs["patient"]), digits=3)
    known = None if run.show_ids else run.pseudonyms
    for column in FIELDS:
        held = var[column] if column in var else pd.Series("", index=var.index)
        out[f"given_{column}"] = redacted(["" if pd.isna(v) else str(v) for v in held], known)
    return out


def _largest_share(codes: sp.csc_matrix, patient: pd.Series) -> np.ndarray:
    """Share of a latent's activation that the patient with most of it carries."""
    at, levels = pd.factorize(patient)
    known = np.flatnonzero(at >= 0)
    member = sp.csr_matrix((np.ones(len(known)), (at[known], known)), shape=(len(levels), codes.shape[0]))
    sums = (member @ abs(codes)).tocsc()
    total = np.asarray(sums.sum(axis=0)).ravel()
    most = np.asarray(sums.max(axis=0).todense()).ravel()
    return np.divide(most, total, out=np.full(len(total), np.nan), where=total > 0)


def histograms(codes: sp.csc_matrix) -> list[dict[str, Any] | None]:
    """Counts of the codes that are not 0, in bins of equal width from the least (or 0) to the largest."""
    out = []
    for j in range(codes.shape[1]):
        values = codes.data[codes.indptr[j] : codes.indptr[j + 1]]
        if not len(values):
            out.append(None)
            continue
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        counts, _ = np.histogram(values, bins=N_BINS, range=(low, high))
        out.append({"low": number(low), "high": number(high), "counts": counts.tolist()})
    return out


def associations(run: Run) -> dict[str, Any]:
    """Rows of the latents' family, those of one latent together, its strongest evidence first; refused ones last."""
    table = run.associations
    table = table[table["source"] == "latent"].reset_index(drop=True)
    place = pd.Series(np.arange(run.adata.n_vars), index=run.adata.var_names.astype(str))
    table = table[table["latent"].astype(str).isin(place.index)]
    first = pd.Series(np.arange(len(table)), index=results.ranked(table).index.append(_unranked(table)))
    latent = table["latent"].astype(str).map(place)
    order = pd.DataFrame({"latent": latent, "rank": first.reindex(table.index)}).sort_values(["latent", "rank"])
    table, latent, rank = table.loc[order.index], order["latent"], order["rank"]
    total = len(table)
    if total > MOST_ROWS:
        keep = table.groupby(latent.to_numpy()).cumcount() < max(1, MOST_ROWS // max(run.adata.n_vars, 1))
        table, latent, rank = table[keep.to_numpy()], latent[keep.to_numpy()], rank[keep.to_numpy()]
    out: dict[str, Any] = {"latent": [int(v) for v in latent], "rank": [int(v) for v in rank], "n_all": total}
    for column in ("target", "effect", "unit", "status", "contrast"):
        values = table[column] if column in table else [None] * len(table)
        words, at = texts(values)
        out[column] = {"words": [_word(run, column, w) for w in words], "at": at}
    out["null"] = [number(results.null_value(w)) for w in texts(table["effect"])[0]]
    for column in ("estimate", "ci_low", "ci_high", "p", "q", "p_maxt", "n_units", "n_groups", "n_samples"):
        if column in table and table[column].notna().any():
            out[column] = numbers(table[column])
    return out


def _unranked(table: pd.DataFrame) -> pd.Index:
    """Rows that no ranking holds: not tested."""
    return table.index.difference(results.ranked(table).index, sort=False)


def _word(run: Run, column: str, word: str) -> str:
    if column == "effect":
        return results.effect_name(word)
    return word.replace("_", " ") if column in ("status", "unit") else run.redact(word)


def confounders(run: Run) -> list[list[dict[str, Any]]]:
    """Of each latent its flags, one a technical factor."""
    found: dict[str, list[dict[str, Any]]] = {}
    table = run.tables.get("confounders")
    if table is not None and {"latent", "flag"} <= set(table):
        for row in table.to_dict("records"):
            found.setdefault(str(row["latent"]), []).append(
                {
                    "factor": run.redact(row.get("factor", "technical factor")),
                    "flag": str(row["flag"]).replace("_", " "),
                    "technical": number(row.get("eta2_technical")),
                    "biology": number(row.get("eta2_biology")),
                }
            )
    words = [flag.replace("_", " ") for flag in FLAGS]
    for rows in found.values():
        rows.sort(key=lambda r: words.index(r["flag"]) if r["flag"] in words else len(words))
    return [found.get(str(name), []) for name in run.adata.var_names]


def neighbours(decoder: np.ndarray) -> list[list[list[float]]]:
    """Of each latent the latents whose decoder directions are nearest, with their cosine."""
    norm = np.linalg.norm(decoder, axis=1, keepdims=True)
    unit = (decoder / np.where(norm > 0, norm, 1)).astype(np.float32)
    n = min(N_NEIGHBOURS, len(unit) - 1)
    out = []
    for start in range(0, len(unit), _BLOCK):
        cosine = unit[start : start + _BLOCK] @ unit.T
        cosine[np.arange(len(cosine)), np.arange(start, start + len(cosine))] = -2
        best = np.argpartition(-cosine, n - 1, axis=1)[:, :n] if n > 0 else np.empty((len(cosine), 0), int)
        for row, at in zip(cosine, best):
            at = at[np.argsort(-row[at], kind="stable")]
            out.append([[int(j), number(row[j], digits=3)] for j in at])
    return out


def about(run: Run) -> list[list[str]]:
    """Facts that a reader needs to judge the numbers, as pairs of label and value."""
    facts, adata = run.facts, run.adata
    identity, sae = facts.get("identity", {}) or {}, facts.get("sae", {}) or {}
    metrics = facts.get("metrics") or sae.get("metrics") or {}
    patients = adata.obs["patient"].nunique() if "patient" in adata.obs else None
    encoder = ", ".join(str(identity[k]) for k in ("encoder", "layer", "pool") if identity.get(k) is not None)
    size = f"{adata.n_vars:,} latents" + (f", k = {sae['k']}" if sae.get("k") is not None else "")
    rows = [
        ("Encoder", encoder),
        ("Dictionary", ", ".join(str(v) for v in (sae.get("architecture") or sae.get("class"), size) if v)),
        ("Unexplained variance", number(metrics.get("fvu"), digits=3)),
        ("Rows", f"{adata.n_obs:,}"),
        ("Patients", f"{patients:,}" if patients is not None else "not known: no test holds for new patients"),
        ("Unit of the tests", str(run.choices.get("unit") or _only(run.associations, "unit")).replace("_", " ")),
        ("Correction", CORRECTIONS.get(run.choices.get("correction"), run.choices.get("correction"))),
        ("Covariates", ", ".join(map(str, run.choices.get("covariates") or []))),
        ("Strata", run.choices.get("strata")),
        ("Codes of a sample with tokens", facts.get("tokens") if facts.get("tokens") != "none" else None),
        ("Licence of the encoder", identity.get("licence")),
    ]
    return [[label, run.redact(value)] for label, value in rows if value not in (None, "")]


def _only(table: pd.DataFrame, column: str) -> str:
    return ", ".join(table[column].astype(str).unique()[:3]) if column in table else ""
