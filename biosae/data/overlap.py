"""How far a label can be told apart from a confounder: cross-tables, Cramér's V, correlation ratio."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

N_CATEGORIES = 10  # a number with more distinct values than this is cut at its quartiles
FEW_PATIENTS, FEW_SAMPLES = 3, 5  # a cell with fewer (but some) is near-empty


def label_by_confounder(obs: pd.DataFrame, *, label: str, confounder: str) -> tuple[dict[str, Any], pd.DataFrame]:
    """Cross-table of a label and a confounder, and measures of their association.

    Rows that miss either are left out. For the table, a numeric label with more than 10 distinct values is cut at its
    quartiles; if a quarter or more of the samples share the smallest value (often 0), that value is a level of its own
    and the others are cut at their tertiles. The correlation ratio uses the values themselves.

    Parameters
    ----------
    obs
        Table of samples, with a ``patient`` column if patients are known.
    label, confounder
        Columns.

    Returns
    -------
    summary
        ``label, confounder, n_samples, n_patients, n_label_levels, n_confounder_levels, cramers_v,
        cramers_v_corrected, eta_squared, n_empty_cells, n_near_empty_cells, n_single_levels, inseparable, n_parts,
        parts``.
        A near-empty cell holds 1 or 2 patients (1 to 4 samples where patients are unknown, or are the confounder).
        ``n_single_levels`` counts confounder levels that hold one label only; ``inseparable`` says that all of them do.
        ``n_parts`` counts the connected parts of the table: labels of different parts share no level of the confounder,
        not even through other labels, so that the difference between them cannot be estimated beside the confounder
        (Searle 1971, Linear Models, connectedness). ``parts`` names the labels of each part.
    cells
        One row a cell: ``label, confounder, label_level, confounder_level, n_samples, n_patients``.

    Notes
    -----
    ``V = sqrt(chi2 / (n min(r - 1, c - 1)))`` over samples (Cramér 1946); the corrected value removes its upward bias
    in small tables (Bergsma 2013, J. Korean Stat. Soc. 42, 323). ``eta_squared`` is the share of the variance of a
    numeric label that lies between confounder levels. Neither knows about patients, hence no p-value is given.
    """
    known = obs[obs[label].notna() & obs[confounder].notna()]
    numeric = pd.api.types.is_numeric_dtype(known[label]) and not pd.api.types.is_bool_dtype(known[label])
    cut = numeric and known[label].nunique() > N_CATEGORIES
    levels = _quartiles(known[label].astype(float)) if cut else known[label].astype(str)
    frame = pd.DataFrame({"label_level": levels, "confounder_level": known[confounder].astype(str)})
    samples = pd.crosstab(frame["label_level"], frame["confounder_level"])
    units, few = samples, FEW_SAMPLES
    patients = None
    if "patient" in known:
        frame["patient"] = known["patient"]
        unique = frame.drop_duplicates()
        patients = pd.crosstab(unique["label_level"], unique["confounder_level"])
        if not any(c in known and known[c].equals(known[confounder]) for c in ("patient", "slide")):
            units, few = patients, FEW_PATIENTS
    single = int(((samples > 0).sum(axis=0) == 1).sum())
    comparable = min(samples.shape) > 1
    v, corrected = cramers_v(samples.to_numpy())
    summary = {
        "label": label,
        "confounder": confounder,
        "n_samples": len(known),
        "n_patients": known["patient"].nunique() if "patient" in known else None,
        "n_label_levels": samples.shape[0],
        "n_confounder_levels": samples.shape[1],
        "cramers_v": v,
        "cramers_v_corrected": corrected,
        "eta_squared": eta_squared(known[label].to_numpy(float), known[confounder]) if numeric else np.nan,
        "n_empty_cells": int((units == 0).to_numpy().sum()),
        "n_near_empty_cells": int(((units > 0) & (units < few)).to_numpy().sum()),
        "n_single_levels": single,
        "inseparable": comparable and single == samples.shape[1],
        "n_parts": len(parts := connected_parts(samples)),
        "parts": " | ".join(", ".join(map(str, part)) for part in parts),
    }
    cells = samples.reset_index().melt(id_vars="label_level", value_name="n_samples")
    cells["n_patients"] = pd.NA if patients is None else patients.reset_index().melt(id_vars="label_level")["value"]
    cells.insert(0, "confounder", confounder)
    cells.insert(0, "label", label)
    return summary, cells


def connected_parts(table: pd.DataFrame) -> list[list[Any]]:
    """Row labels of a table of counts, by connected part of the graph in which each filled cell joins row and column.

    >>> connected_parts(pd.DataFrame([[3, 0], [2, 0], [0, 5]], index=["scab", "rust", "healthy"]))
    [['scab', 'rust'], ['healthy']]
    """
    from scipy.sparse import bmat, csr_matrix
    from scipy.sparse.csgraph import connected_components

    filled = csr_matrix((table.to_numpy() > 0).astype(np.int8))
    _, part = connected_components(bmat([[None, filled], [filled.T, None]]), directed=False)
    part = part[: len(table)]
    return [[name for name, p in zip(table.index, part) if p == number] for number in pd.unique(part)]


def cramers_v(table: np.ndarray) -> tuple[float, float]:
    """Cramér's V of a table of counts without empty rows or columns, plain and bias-corrected; NaN for one level.

    >>> cramers_v(np.array([[5, 0], [0, 5]]))
    (1.0, 1.0)
    """
    table = np.asarray(table, float)
    n, (r, c) = table.sum(), table.shape
    if min(r, c) < 2 or n < 2:
        return np.nan, np.nan
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / n
    phi2 = ((table - expected) ** 2 / expected).sum() / n
    phi2_corrected = max(0.0, phi2 - (r - 1) * (c - 1) / (n - 1))
    freedom = min(r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)) - 1
    corrected = np.sqrt(phi2_corrected / freedom) if freedom > 0 else np.nan
    return float(np.sqrt(phi2 / min(r - 1, c - 1))), float(corrected)


def eta_squared(values: np.ndarray, groups: pd.Series) -> float:
    """Correlation ratio: sum of squares between groups over the total; NaN for a constant."""
    series = pd.Series(np.asarray(values, float))
    means = series.groupby(groups.to_numpy()).transform("mean")
    total = ((series - series.mean()) ** 2).sum()
    return float(((means - series.mean()) ** 2).sum() / total) if total > 0 else np.nan


def _quartiles(values: pd.Series) -> pd.Series:
    """Bins as ordered categories named by their range, smallest first."""
    lowest = values == values.min()
    if lowest.mean() >= 0.25:
        bins = pd.qcut(values[~lowest], 3, labels=False, duplicates="drop").add(1).reindex(values.index, fill_value=0)
    else:
        bins = pd.qcut(values, 4, labels=False, duplicates="drop")
    spans = values.groupby(bins).agg(["min", "max"])
    names = [f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in spans.itertuples(index=False)]
    codes = bins.rank(method="dense").astype(int) - 1
    return pd.Series(pd.Categorical.from_codes(codes, names, ordered=True), index=values.index)
