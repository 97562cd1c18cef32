"""How two cohorts differ: which latents fire more often in one, tested over patients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, StatisticsError, nearest
from biosae.search.proportions import effective_n, mcnemar, newcombe

COLUMNS = [
    "latent", "frequency_a", "frequency_b", "difference", "ci_low", "ci_high", "relative", "p", "q", "p_maxt", "status",
    "n_a", "n_b", "n_samples_a", "n_samples_b", "design", "inference",
]  # fmt: skip


def diff(
    adata: Any,
    by: str,
    *,
    cohorts: tuple[Any, Any] | None = None,
    document: str | None = None,
    n_tiles: int | None = None,
    min_frequency: float = 0.01,
    max_frequency: float = 1.0,
    paired: bool | None = None,
    covariates: Sequence[str] = (),
    blocks: str | None = None,
    groups: str = "patient",
    n_permutations: int = 9999,
    assume_independent: bool = False,
    random_state: int = 0,
) -> pd.DataFrame:
    """How often each latent fires in cohort A and in cohort B, with a patient-level permutation test of the difference.

    Parameters
    ----------
    adata
        Latents of :func:`biosae.encode`, both cohorts in one table (``anndata.concat`` of codes of the same SAE).
    by
        Column of ``obs`` that says which cohort a sample is of: hospital, scanner, season, trial arm.
    cohorts
        Values of ``by``: (A, B). None where there are just two.
    document
        None: the frequency of a patient is the share of samples in which the latent fires. A column such as
        ``"slide"``: the share of the patient's slides in which any sample fires, which grows with the number of
        samples; all documents are therefore cut to the same number at random.
    n_tiles
        Samples drawn of every document (without ``document``: of every patient in each cohort, the others kept as they
        are if None). None with ``document``: as many as the smallest has. What has fewer is left out and counted.
    min_frequency, max_frequency
        Latents whose frequency over both cohorts lies outside are not tested (status ``coverage``). The bounds look at
        both cohorts together, so that they do not favour either.
    paired
        None: patients in both cohorts are compared with themselves if all are in both, and as two groups if none is.
        Where only some are, say which: True keeps those in both, False those in one. Of a patient who has more samples
        (documents) in one cohort than in the other as many are drawn as the other has.
    covariates
        Columns to adjust p for (unpaired only). Frequencies and intervals stay as observed.
    blocks
        Column within which patients may be exchanged, such as the site where ``by`` is the scanner (unpaired only).
    groups
        Column of independent groups.
    n_permutations
        Random draws of ``p`` and ``p_maxt`` where there are too many arrangements to list (unpaired: at least 9,999);
        no p is below ``1 / (n_permutations + 1)``.
    assume_independent
        Every sample counts as a patient of its own; said aloud where patients are unknown.
    random_state
        Seed of draws of tiles and permutations.

    Returns
    -------
    DataFrame
        One row a latent, the strongest evidence first: ``latent, frequency_a, frequency_b`` (means over patients),
        ``difference`` (A - B) with 95 % interval ``ci_low, ci_high``, ``relative`` (difference over the larger of
        both), ``p, q`` (Benjamini-Hochberg over all with a p), ``p_maxt`` (family-wise), ``status``
        (``biosae.stats.STATUS``, and ``coverage``), ``n_a, n_b`` (patients), ``n_samples_a, n_samples_b, design``
        (``unpaired``, ``paired``), ``inference``. ``attrs["biosae"]`` holds the choices and what was left out.

    Raises
    ------
    InputError
        For unknown columns or values, or options that do not go together.
    StatisticsError
        If independence is unknown, a patient is in both cohorts without ``paired``, or either has none left.

    Notes
    -----
    Unpaired: :func:`biosae.stats.associate` of the patients' frequencies with the cohort, patients rearranged as wholes
    (``permute="between"``); where patients have unequal numbers of samples p is not below that adjusted for the number,
    and where the number nearly tells the cohort there is none (``unidentifiable``): give ``n_tiles``. Interval:
    Newcombe's (1998) from Wilson's limits of both, which for frequencies other than 0 and 1 are those of the number of
    patients that has the same variance (:func:`biosae.search.proportions.effective_n`). Paired: exact McNemar test
    where all are 0 or 1, else signs of the patients' differences flipped (all of them up to 16 patients), which are
    symmetric only between equal numbers of samples: one sample hardly ever shows a rare latent, forty do. Interval
    Newcombe's paired one (method 10) or t. After Jiang et al. (2025), arXiv 2512.10092, who have no test.
    """
    from biosae.stats.nested import in_memory

    a, b, codes = _cohorts(adata.obs, by, cohorts)
    unit = _units(adata.obs, groups, codes >= 0, assume_independent)
    keep = codes >= 0
    in_a, in_b = (set(unit[codes == side]) for side in (0, 1))
    both = in_a & in_b
    if paired is None:
        if both and (in_a | in_b) != both:
            raise StatisticsError(
                f"{len(both)} of {len(in_a | in_b)} {groups}s are in both {a!r} and {b!r}: paired=True compares those "
                "with themselves, paired=False leaves them out"
            )
        paired = bool(both)
    covariates = [covariates] if isinstance(covariates, str) else list(covariates)
    if paired and (len(covariates) or blocks):
        raise InputError("a paired comparison takes neither covariates nor blocks: a patient is compared with itself")
    keep &= np.isin(unit, list(both)) == bool(paired)
    tiles, kept_documents = _tiles(adata.obs, unit, codes, keep, document, n_tiles, random_state)
    table, X = _documents(in_memory(adata).X, unit, codes, keep, kept_documents, document)
    if paired:
        equal = _equal_numbers(table, random_state)
        table, X = table[equal].reset_index(drop=True), X[equal]
    left_out = {
        "samples_without_cohort": int((codes < 0).sum()),
        "samples_left_out": int((codes >= 0).sum() - table["size"].sum()),
        "patients_left_out": len((in_a | in_b) - set(table["unit"])),
    }  # fmt: skip
    units, place = np.unique(table["unit"].to_numpy(), return_inverse=True)
    side = table["cohort"].to_numpy()
    values = [_means(X[side == s], place[side == s], len(units)) for s in (0, 1)]
    present = [np.bincount(place[side == s], minlength=len(units)) > 0 for s in (0, 1)]
    if not all(p.any() for p in present):
        raise StatisticsError(f"no patient is left in {a!r} or in {b!r}; {left_out}")
    frequency = (values[0][present[0]].sum(axis=0) + values[1][present[1]].sum(axis=0)) / sum(p.sum() for p in present)
    covered = (frequency >= min_frequency) & (frequency <= max_frequency)
    if paired:
        found = _paired(*values, covered, n_permutations=n_permutations, random_state=random_state)
    else:
        found = _intervals([v[p] for v, p in zip(values, present)])
    out = pd.DataFrame({"latent": adata.var_names.to_numpy(), **found})
    if not paired:
        tests = _unpaired(
            adata, table, X[:, covered], adata.var_names[covered], covariates=covariates, blocks=blocks,
            n_permutations=n_permutations, random_state=random_state,
        )  # fmt: skip
        out = out.merge(tests, on="latent", how="left")
    uncovered = out["latent"].isin(adata.var_names[~covered])
    out.loc[uncovered, ["p", "p_maxt"]] = np.nan
    out.loc[uncovered, "status"] = np.where((frequency == 0)[uncovered.to_numpy()], "dead", "coverage")
    out["inference"] = out["inference"].where(out["p"].notna(), "")
    from biosae.stats import bh

    out["q"] = bh(out["p"].to_numpy(float))
    out["n_a"], out["n_b"] = (int(p.sum()) for p in present)
    out["n_samples_a"], out["n_samples_b"] = (int(table.loc[side == s, "size"].sum()) for s in (0, 1))
    out["design"] = "paired" if paired else "unpaired"
    order = pd.DataFrame({"p": out["p"], "size": -out["difference"].abs()})
    out = out.loc[order.sort_values(["p", "size"], kind="stable").index, COLUMNS].reset_index(drop=True)
    out.attrs["biosae"] = {
        "by": by, "a": str(a), "b": str(b), "document": document or "", "n_tiles": tiles or 0, "paired": bool(paired),
        "covariates": list(covariates), "m_tested": int(out["p"].notna().sum()), "unit": groups,
        "assume_independent": bool(assume_independent), **left_out,
    }  # fmt: skip
    return out


def _cohorts(obs: pd.DataFrame, by: str, cohorts: tuple[Any, Any] | None) -> tuple[Any, Any, np.ndarray]:
    """The values of both cohorts and, of every sample, 0 (A), 1 (B) or -1 (neither)."""
    if by not in obs:
        raise InputError(f"obs has no column {by!r}; {nearest(by, list(obs.columns))}")
    values = obs[by].astype(object)
    levels = sorted(values.dropna().unique(), key=str)
    if cohorts is None:
        if len(levels) != 2:
            raise InputError(f"{by!r} has {len(levels)} values; name two of them: cohorts=(A, B). {levels[:12]}")
        cohorts = (levels[0], levels[1])
    if len(cohorts) != 2 or cohorts[0] == cohorts[1]:
        raise InputError(f"cohorts={cohorts!r}: give two different values of {by!r}")
    for value in cohorts:
        if value not in levels:
            raise InputError(f"{by!r} has no value {value!r}; {nearest(str(value), levels)}")
    codes = np.full(len(obs), -1)
    for i, value in enumerate(cohorts):
        codes[(values == value).to_numpy(bool)] = i
    return cohorts[0], cohorts[1], codes


def _units(obs: pd.DataFrame, groups: str, wanted: np.ndarray, assume_independent: bool) -> np.ndarray:
    from biosae.stats.nested import require_groups

    if assume_independent:
        return np.arange(len(obs)).astype(str)
    require_groups(obs, groups)
    if missing := int(obs[groups].isna().to_numpy()[wanted].sum()):
        raise StatisticsError(f"{missing} samples of the two cohorts have no {groups}; leave them out")
    return obs[groups].astype(str).to_numpy()


def _tiles(
    obs: pd.DataFrame, unit: np.ndarray, codes: np.ndarray, keep: np.ndarray, document: str | None,
    n_tiles: int | None, random_state: int,
) -> tuple[int | None, np.ndarray]:  # fmt: skip
    """Samples drawn of each document, and of every sample the document (unit, cohort, document); ``keep`` is narrowed
    to those drawn.
    """
    if document is not None and document not in obs:
        raise InputError(f"obs has no column {document!r}; {nearest(document, list(obs.columns))}")
    if n_tiles is not None and n_tiles < 1:
        raise InputError(f"n_tiles={n_tiles}; give 1 or more")
    if document is not None:
        keep &= obs[document].notna().to_numpy()
    names = [unit, codes.astype(str)] + ([] if document is None else [obs[document].astype(str).to_numpy()])
    where = pd.MultiIndex.from_arrays(names).factorize()[0]
    if (document is None and n_tiles is None) or not keep.any():
        return None, where
    size = np.bincount(where[keep], minlength=where.max() + 1)
    n_tiles = int(size[size > 0].min()) if n_tiles is None else n_tiles
    order = np.random.default_rng(random_state).permutation(np.flatnonzero(keep))
    order = order[np.argsort(where[order], kind="stable")]
    rank = np.arange(len(order)) - np.searchsorted(where[order], where[order])
    drawn = order[(rank < n_tiles) & (size[where[order]] >= n_tiles)]
    keep[:] = False
    keep[drawn] = True
    return n_tiles, where


def _documents(
    X: Any, unit: np.ndarray, codes: np.ndarray, keep: np.ndarray, where: np.ndarray, document: str | None
) -> tuple[pd.DataFrame, sp.csr_matrix]:
    """One row a document (without: a sample): unit, cohort, row of obs, samples in it; and which latents fire there."""
    rows = np.flatnonzero(keep)
    size = np.ones(len(rows), int)
    on = sp.csr_matrix(sp.csr_matrix(X)[rows] != 0, dtype=np.float64)
    if document is not None and len(rows):
        _, first, inverse = np.unique(where[rows], return_index=True, return_inverse=True)
        member = sp.csr_matrix((np.ones(len(rows)), (inverse, np.arange(len(rows)))), shape=(len(first), len(rows)))
        on, rows, size = sp.csr_matrix((member @ on) > 0, dtype=np.float64), rows[first], np.bincount(inverse)
    return pd.DataFrame({"unit": unit[rows], "cohort": codes[rows], "row": rows, "size": size}), on


def _equal_numbers(table: pd.DataFrame, random_state: int) -> np.ndarray:
    """Rows drawn so that every unit has as many in one cohort as in the other; none of a unit that is in one only."""
    order = table.iloc[np.random.default_rng(random_state).permutation(len(table))]
    place = order.groupby(["unit", "cohort"]).cumcount().reindex(table.index)
    count = table.groupby("unit")["cohort"].agg(lambda cohort: min((cohort == 0).sum(), (cohort == 1).sum()))
    return (place < table["unit"].map(count)).to_numpy()


def _means(on: sp.csr_matrix, place: np.ndarray, n: int) -> np.ndarray:
    size = np.bincount(place, minlength=n)
    member = sp.csr_matrix((1.0 / size[place], (place, np.arange(len(place)))), shape=(n, len(place)))
    return np.asarray((member @ on).todense())


def _unpaired(
    adata: Any, table: pd.DataFrame, X: sp.csr_matrix, names: pd.Index, *,
    covariates: Sequence[str], blocks: str | None, n_permutations: int, random_state: int,
) -> pd.DataFrame:  # fmt: skip
    """p, p_maxt, status of the latents by the room of statistics."""
    import anndata

    from biosae.stats import associate
    from biosae.stats.adjust import column_of

    if not len(names):
        return pd.DataFrame({c: pd.Series(dtype=t) for c, t in _TEST.items()})
    wanted = list(dict.fromkeys([*map(column_of, covariates), *([blocks] if blocks else [])]))
    for name in wanted:
        if name not in adata.obs:
            raise InputError(f"obs has no column {name!r}; {nearest(name, list(adata.obs.columns))}")
    unit, cohort = (name + "_" * max(map(len, ["", *wanted])) for name in ("unit", "cohort"))  # none of the user's
    obs = adata.obs.iloc[table["row"].to_numpy()][wanted].copy()
    obs[unit] = table["unit"].to_numpy()
    obs[cohort] = pd.Categorical.from_codes(1 - table["cohort"].to_numpy(), ["b", "a"])
    found = associate(
        anndata.AnnData(X=X, obs=obs, var=pd.DataFrame(index=names)), cohort, unit=unit, groups=unit, method="pearson",
        controls=False, covariates=covariates, blocks=blocks, permute="between", n_permutations=n_permutations,
        random_state=random_state,
    )  # fmt: skip
    return found[list(_TEST)]


_TEST = {"latent": object, "p": float, "p_maxt": float, "status": object, "inference": object}


def _intervals(values: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Frequencies of two groups of patients, their difference and its interval."""
    f, n = [v.mean(axis=0) for v in values], [len(v) for v in values]
    if min(n) < 2:
        return _row(*f, np.full(len(f[0]), np.nan), np.full(len(f[0]), np.nan))
    own = [effective_n(v.mean(axis=0), v.var(axis=0, ddof=1) / len(v), len(v) - 1, len(v)) for v in values]
    return _row(*f, *newcombe(f[0], own[0], f[1], own[1]))


def _row(a: np.ndarray, b: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, np.ndarray]:
    larger = np.maximum(a, b)
    relative = np.divide(a - b, larger, out=np.full(len(a), np.nan), where=larger > 0)
    return {
        "frequency_a": a,
        "frequency_b": b,
        "difference": a - b,
        "ci_low": low,
        "ci_high": high,
        "relative": relative,
    }


def _paired(
    A: np.ndarray, B: np.ndarray, covered: np.ndarray, *, n_permutations: int, random_state: int
) -> dict[str, np.ndarray]:
    """The same patients in both cohorts: signs of their differences, or McNemar's test of yes and no."""
    from scipy.stats import t

    from biosae.stats.permutation import null_counts, sign_flips

    n, D = len(A), A - B
    binary = ((A == 0) | (A == 1)).all(axis=0) & ((B == 0) | (B == 1)).all(axis=0)
    f = [A.mean(axis=0), B.mean(axis=0)]
    with np.errstate(invalid="ignore", divide="ignore"):
        half = t.ppf(0.975, n - 1) * D.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.full(D.shape[1], np.nan)
        spread = np.sqrt(f[0] * (1 - f[0]) * f[1] * (1 - f[1]))
        phi = np.where(spread > 0, ((A * B).mean(axis=0) - f[0] * f[1]) / spread, 0.0)
        length = np.sqrt((D**2).sum(axis=0))
        observed = np.where(length > 0, D.sum(axis=0) / length, np.nan)
    low, high = newcombe(f[0], n, f[1], n, phi)
    firing = ((A != 0) | (B != 0)).sum(axis=0)
    active = firing >= min(5, n)
    status = np.where(firing == 0, "dead", np.where(~active, "too_sparse", "few_groups" if n < 20 else "ok")).astype(
        object
    )
    if n < 3:
        status[:] = "too_few_groups"
    tested = np.isin(status, ("ok", "few_groups")) & covered
    observed = np.where(tested & np.isnan(observed), 0.0, np.where(tested, observed, np.nan))
    unit = np.divide(D, length, out=np.zeros_like(D), where=length > 0)
    draws = sign_flips(n, n_draws=n_permutations, random_state=random_state)
    p, p_maxt, _ = null_counts(observed, draws, lambda signs: unit.T @ signs)
    exact = mcnemar((D > 0).sum(axis=0), (D < 0).sum(axis=0))
    p = np.where(binary & tested, exact, p)
    how = np.where(binary, f"exact McNemar test of {n} patients", f"signs of {n} patients flipped, {draws.describe}")
    return _row(*f, np.where(binary, low, f[0] - f[1] - half), np.where(binary, high, f[0] - f[1] + half)) | {
        "p": p, "p_maxt": np.where(tested, np.maximum(p_maxt, p), np.nan), "status": status, "inference": how,
    }  # fmt: skip
