"""How much accuracy is lost as a label and a nuisance (site, scanner) go together in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike

from biosae.errors import InputError
from biosae.stats.confounding import overlaps
from biosae.stats.features import feature_sets
from biosae.stats.nested import codes_of, in_memory
from biosae.stats.readout import probe

MIN_GROUPS = 4
"""Fewest groups in each cell of target by nuisance: two to train on and two to test."""


def average_drop(accuracy: ArrayLike) -> float:
    """``APD = mean_{s >= 1}(acc_s / acc_0) - 1`` of accuracies (steps, repeats), the first row without correlation.

    PathoROB (Koemen et al. 2025, arXiv 2507.17845).

    >>> round(average_drop([[0.90, 0.92], [0.88, 0.90], [0.80, 0.82]]), 6)
    -0.065942

    Raises
    ------
    InputError
        Without a second row, or for an accuracy of 0 in the first.
    """
    table = np.asarray(accuracy, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if len(table) < 2 or not (table[0] > 0).all():
        raise InputError("accuracies must be (steps, repeats) with 2 or more steps, and above 0 in the first")
    return float((table[1:] / table[0]).mean() - 1.0)


def performance_drop(
    adata: Any, target: str, nuisance: str, *, groups: str = "patient", without: Sequence[str] = (),
    features: Sequence[str] | None = None, classes: Sequence[str] | None = None, levels: Sequence[str] | None = None,
    steps: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0), n_repeats: int = 10, test: float = 0.3, max_rows: int = 100,
    random_state: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Accuracy for the target as it goes more and more with a nuisance in training, at a fixed number of patients.

    In every repeat patients are divided. Of those to train on, equally many are drawn at every step, the share
    ``(1 + correlation) / 2`` of them with nuisance = target (in every second repeat, with the opposite). Accuracy is
    the mean over the four cells of the patients left out, so that the nuisance is of no help there.

    Parameters
    ----------
    adata
        Latents.
    target, nuisance
        Columns of ``obs`` with two values; of more, name two with ``classes`` and ``levels``.
    groups
        Column of independent groups. A group with rows in several cells counts in each, never in both parts.
    without, features
        As in :func:`readout`.
    steps
        Correlations, the first of them 0.
    n_repeats, test
        Divisions, and the share of groups left out in each.
    max_rows
        Rows of a group and cell at most; groups weigh alike.

    Returns
    -------
    DataFrame
        A row a (set, step): ``features, target, nuisance, correlation, accuracy, sd, apd, apd_sd, n_train, n_groups,
        n_samples, status``. ``apd`` of the set (:func:`average_drop`), 0 where nothing is lost; ``sd`` over repeats,
        which share patients and are no interval. ``attrs["overlap"]``: counts of both labels.

    Raises
    ------
    InputError
        For unknown columns, latents or sets, other than two values, or steps that do not begin with 0.
    """
    steps = [float(s) for s in steps]
    if len(steps) < 2 or steps[0] != 0 or not all(0 <= s <= 1 for s in steps):
        raise InputError("steps must begin with 0, be at least two, and lie in [0, 1]")
    design = cells(
        adata, target, nuisance, groups, classes=classes, levels=levels, max_rows=max_rows, random_state=random_state
    )
    out = []
    for name, X in feature_sets(design.adata, features, without=without).items():
        rng = np.random.default_rng(random_state)  # the same patients for every set
        found = np.full((len(steps), n_repeats), np.nan)
        sizes = []
        for r in range(n_repeats if design.status == "ok" else 0):
            train, held = divide(design, rng, test=test)
            n = size_of(design, train, bool(r % 2))
            sizes.append(n)
            for k, step in enumerate(steps):
                units = draw(design, train, step, n, rng, bool(r % 2))
                rows, weight = rows_of(design, units)
                seen, _ = rows_of(design, held)
                model = probe(sp.issparse(X))
                model.fit(X[rows], design.y[rows], logisticregression__sample_weight=weight)
                right = model.predict(X[seen]) == design.y[seen]
                found[k, r] = balanced(by_unit(design, right, seen, held), design.cell[held])
        known = design.status == "ok"
        relative = found[1:] / found[0]
        for k, step in enumerate(steps):
            out.append({
                "features": name, "target": target, "nuisance": nuisance, "correlation": step,
                "accuracy": found[k].mean(), "sd": found[k].std(ddof=1) if n_repeats > 1 else np.nan,
                "apd": average_drop(found) if known else np.nan,
                "apd_sd": relative.mean(axis=0).std(ddof=1) if n_repeats > 1 else np.nan,
                "n_train": float(np.mean(sizes)) if sizes else np.nan, "n_groups": len(np.unique(design.group)),
                "n_samples": len(design.y), "status": design.status,
            })  # fmt: skip
    table = pd.DataFrame(out)
    table.attrs["overlap"] = design.overlap
    return table


@dataclass
class Cells:
    """Rows of two target classes by two levels of a nuisance, in groups."""

    adata: Any
    y: np.ndarray
    c: np.ndarray
    group: np.ndarray
    unit: np.ndarray
    """Rows of one group in one cell."""
    cell: np.ndarray
    """Cell ``2 y + c`` of each unit."""
    unit_group: np.ndarray
    target_classes: list[str]
    nuisance_classes: list[str]
    overlap: dict[str, Any]

    @property
    def status(self) -> str:
        """``ok``; ``unidentifiable`` with an empty cell; ``too_few_groups`` below :data:`MIN_GROUPS` groups in one."""
        least = np.bincount(self.cell, minlength=4).min()
        return "ok" if least >= MIN_GROUPS else "too_few_groups" if least else "unidentifiable"


def cells(
    adata: Any, target: str, nuisance: str, groups: str, *, classes: Sequence[str] | None = None,
    levels: Sequence[str] | None = None, max_rows: int = 100, random_state: int = 0,
) -> Cells:  # fmt: skip
    """Rows in the four cells of two classes by two levels, at most ``max_rows`` a group and cell.

    Raises
    ------
    InputError
        If a column is absent, or has not two values and two were not chosen.
    """
    adata = in_memory(adata)
    for name in (target, nuisance, groups):
        if name not in adata.obs:
            raise InputError(f"{name!r} is not a column of obs; columns: {', '.join(map(str, adata.obs.columns))}")
    chosen = [_two(adata.obs[name], name, given) for name, given in ((target, classes), (nuisance, levels))]
    held = [adata.obs[name].astype("string") for name in (target, nuisance)]
    known = np.logical_and(*(column.isin(two).to_numpy(bool) for column, two in zip(held, chosen)))
    rows = np.flatnonzero(known)
    y, c = ((column.iloc[rows] == two[1]).to_numpy(int) for column, two in zip(held, chosen))
    group = codes_of(adata.obs.iloc[rows], groups)[0]
    unit = np.unique(4 * group + 2 * y + c, return_inverse=True)[1]
    order = np.random.default_rng(random_state).permutation(len(rows))
    turn = np.empty(len(rows), dtype=int)
    turn[order] = pd.Series(unit[order]).groupby(unit[order]).cumcount().to_numpy()
    take = turn < max_rows
    rows, y, c, group, unit = rows[take], y[take], c[take], group[take], unit[take]
    first = np.unique(unit, return_index=True)[1]
    counts = overlaps(adata.obs.iloc[np.flatnonzero(known)], [target], [nuisance], unit=groups)
    part = adata[rows]
    return Cells(part, y, c, group, unit, (2 * y + c)[first], group[first], *chosen, counts)


def _two(column: pd.Series, name: str, given: Sequence[str] | None) -> list[str]:
    values = sorted(column.dropna().astype(str).unique()) if given is None else [str(v) for v in given]
    if len(values) != 2 or len(set(values)) != 2:
        raise InputError(f"{name!r} has {len(values)} values; name the two to compare")
    absent = [v for v in values if v not in set(column.dropna().astype(str))]
    if absent:
        raise InputError(f"no row has {name} {absent[0]!r}")
    return values


def divide(design: Cells, rng: np.random.Generator, *, test: float) -> tuple[np.ndarray, np.ndarray]:
    """Units to train and to test on, no group in both, about ``test`` of the groups of every pattern of cells."""
    pattern = np.bincount(design.unit_group, weights=2.0**design.cell).astype(int)
    held = np.zeros(len(pattern), dtype=bool)
    for kind in np.unique(pattern):
        members = rng.permutation(np.flatnonzero(pattern == kind))
        held[members[: max(1, round(test * len(members)))]] = len(members) > 1
    units = np.arange(len(design.cell))
    return units[~held[design.unit_group]], units[held[design.unit_group]]


def draw(
    design: Cells, train: np.ndarray, correlation: float, n: int, rng: np.random.Generator, flip: bool
) -> np.ndarray:
    """``n`` units (about) of the training side, of which the share ``(1 + correlation) / 2`` has nuisance = target.

    Cells of one kind are equally large; ``flip`` aligns target 1 with nuisance 0.
    """
    taken = []
    for cell in range(4):
        aligned = ((cell // 2) == (cell % 2)) != flip
        share = (1 + correlation) / 4 if aligned else (1 - correlation) / 4
        have = train[design.cell[train] == cell]
        taken.append(rng.permutation(have)[: round(share * n)])
    return np.concatenate(taken)


def size_of(design: Cells, train: np.ndarray, flip: bool) -> int:
    """Most units, a multiple of 4, that can be drawn without correlation and with all of it."""
    counts = np.bincount(design.cell[train], minlength=4)
    aligned = counts[[1, 2]] if flip else counts[[0, 3]]
    return int(4 * (min(4 * counts.min(), 2 * aligned.min()) // 4))


def rows_of(design: Cells, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of units, and weights by which every unit counts alike."""
    member = np.isin(design.unit, units)
    rows = np.flatnonzero(member)
    return rows, 1.0 / np.bincount(design.unit)[design.unit[rows]]


def by_unit(design: Cells, right: np.ndarray, rows: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Share of rows that are right, of every unit."""
    size = np.bincount(design.unit[rows], minlength=len(design.cell))
    return (np.bincount(design.unit[rows], weights=right, minlength=len(design.cell)) / np.maximum(size, 1))[units]


def balanced(share: np.ndarray, cell: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Mean over cells of the (weighted) mean over units."""
    weight = np.ones(len(cell)) if weight is None else weight
    total = np.bincount(cell, weights=weight, minlength=4)
    hit = np.bincount(cell, weights=weight * share, minlength=4)
    return float(np.mean(hit[total > 0] / total[total > 0]))
