"""Propose latents by one set of labels, audit them with another: how many of those inspected are worth it?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, StatisticsError, nearest
from biosae.interpret.rows import enough_groups, groups_of, joined, samples_of
from biosae.sae.labels import shuffled
from biosae.stats.precision import Resampled, average_precisions

BUDGETS = (10, 25, 50, 100)
POOLS = ("max", "mean")


def propose_audit(
    adata: Any,
    known: str,
    labels: pd.DataFrame,
    *,
    budgets: int | Sequence[int] = BUDGETS,
    threshold: float = 0.3,
    pool: str = "max",
    C: float = 1.0,
    split: str = "split",
    train: str = "train",
    test: str = "test",
    groups: str | None = "patient",
    share: float = 0.5,
    n_null: int = 99,
    n_draws: int = 2000,
    random_state: int = 0,
) -> pd.DataFrame:
    """Yield of latents proposed by a known label of samples and audited with masks that took no part in it.

    Codes of training samples are pooled and an L1 logistic regression is fitted for ``known``; latents are ranked by
    ``sum_c |W_cj|``. Of the first B the share with ``AP_j = max_h AP(z_j, h) >= threshold`` on test rows is the yield.

    Parameters
    ----------
    adata
        Codes of tokens with ``sample_id`` (:func:`biosae.encode` with ``tokens=None``), or of samples.
    known
        Column of ``obs`` with classes, one value a sample: the label that proposes.
    labels
        Classes that audit, as in :func:`alignment`; ``known`` must not be among them, nor be made from them.
    budgets
        Latents inspected; those above the number of latents are left out.
    threshold
        Average precision that counts as aligned.
    pool
        ``"max"`` or ``"mean"`` over a sample's rows. The maximum grows with the number of rows.
    C
        Inverse strength of the L1 penalty, on codes divided by their largest training magnitude.
    split, train, test, groups, share
        As in :func:`alignment`.
    n_null
        Shuffles of ``known`` between groups (within them where it varies there) with everything repeated.
    n_draws
        Resamples of test groups for the interval; 0 for none.
    random_state
        Seed.

    Returns
    -------
    DataFrame
        A row a budget: ``budget, yield, ci_low, ci_high`` (95 %, test groups resampled, for the latents as proposed),
        ``yield_any`` (of all latents that fire in the test rows: what choosing at random gives), ``null_mean,
        null_high`` (95th centile), ``p`` ``(b + 1) / (n_null + 1)``, ``n_proposed`` (latents with a weight), ``n_train,
        n_test`` (samples), ``n_groups_train, n_groups_test, status`` (``ok``, ``few_groups``: 3 to 19,
        ``too_few_groups``: fewer than 3 test groups and no interval, or ``nothing_proposed``).
        ``attrs["biosae"]["latents"]``: a table of latents in their order with ``weight``, ``ap`` and ``class`` (the
        best one).

    Raises
    ------
    InputError
        For unknown columns, budgets or pools, or a known label that audits itself.
    StatisticsError
        If groups lie in both parts, ``known`` varies within a sample or has one class in training, or no class is rarer
        than ``threshold``.

    Notes
    -----
    Latents of equal weight, above all those of weight 0, share their places: the yield is its expectation over their
    orders, so that it does not depend on how latents are numbered. The source sorts stably.

    References
    ----------
    Stevens et al. 2025, arXiv 2511.17735.
    """
    if pool not in POOLS:
        raise InputError(f"pool={pool!r} is unknown; {nearest(pool, POOLS)}")
    if known in labels.columns:
        raise InputError(f"{known!r} both proposes and audits; leave it out of the labels")
    obs, labels, parts = joined(adata, labels, split=split, train=train, test=test)
    if known not in obs:
        raise InputError(f"obs has no column {known!r}; {nearest(known, obs.columns)}")
    asked = np.atleast_1d(np.asarray(budgets))
    if asked.dtype.kind not in "iu" or not asked.size or asked.min() < 1 or asked.min() > adata.n_vars:
        raise InputError(f"budgets={budgets!r} must be whole numbers between 1 and the {adata.n_vars} latents")
    budgets = np.unique(asked[asked <= adata.n_vars]).tolist()
    unit = groups_of(obs, groups, parts)
    X, y, unit_of = _pooled(adata, obs, known, parts["train"], unit, pool)
    weight = _weights(X, y, C, random_state)
    codes = sp.csc_matrix(sp.csr_matrix(adata.X)[parts["test"]], dtype=np.float64)
    codes.eliminate_zeros()
    labels, frequent = _rare_enough(labels, parts["test"], share, threshold)
    values = labels.to_numpy()[parts["test"]]
    ap = _audited(codes, values, share)
    best = np.full(len(ap), np.nan)
    some = ~np.isnan(ap).all(1)
    best[some] = np.nanmax(ap[some], axis=1)
    hit = (best >= threshold).astype(float)
    live = np.diff(codes.indptr) > 0
    rng = np.random.default_rng([random_state, 1])
    inside = np.unique(unit_of, return_inverse=True)[1]
    nulls = np.array([
        [expected_yield(w, hit, b) for b in budgets]
        for w in (_weights(X, shuffled(y, inside, rng), C, random_state) for _ in range(n_null))
    ]).reshape(n_null, len(budgets))  # fmt: skip
    in_test = unit.iloc[parts["test"]].to_numpy()
    G = len(set(in_test))
    intervals = (
        _intervals(codes, values, share, weight, budgets, threshold, in_test, n_draws, random_state)
        if n_draws and G >= 3
        else [(np.nan, np.nan)] * len(budgets)
    )
    rows = []
    for i, b in enumerate(budgets):
        found = expected_yield(weight, hit, b)
        null = nulls[:, i]
        rows.append({
            "budget": b, "yield": found, "ci_low": intervals[i][0], "ci_high": intervals[i][1],
            "yield_any": float(hit[live].mean()) if live.any() else np.nan,
            "null_mean": null.mean() if n_null else np.nan,
            "null_high": np.quantile(null, 0.95) if n_null else np.nan,
            "p": (1 + (null >= found - 1e-12).sum()) / (n_null + 1) if n_null else np.nan,
            "n_proposed": int((weight > 0).sum()), "n_train": len(y),
            "n_test": samples_of(obs).iloc[parts["test"]].nunique(), "n_groups_train": len(set(unit_of)),
            "n_groups_test": G,
            "status": "nothing_proposed" if not weight.any() else enough_groups(G),
        })  # fmt: skip
    table = pd.DataFrame(rows)
    order = np.argsort(-weight, kind="stable")
    which = np.where(some, np.nan_to_num(ap, nan=-1).argmax(1), 0)
    names = np.where(some, labels.columns.to_numpy(dtype=object)[which], None)
    table.attrs["biosae"] = {
        "known": known, "pool": pool, "threshold": threshold, "C": C, "n_null": n_null, "groups": unit.name,
        "left_out": frequent,
        "latents": pd.DataFrame({"weight": weight, "ap": best, "class": names}, index=adata.var_names).iloc[order],
    }  # fmt: skip
    return table


def _rare_enough(
    labels: pd.DataFrame, rows: np.ndarray, share: float, threshold: float
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Classes whose share of test rows is below the threshold, and that of the others, which a silent latent passes."""
    values = labels.iloc[rows]
    prevalence = (values >= share).sum() / values.notna().sum()
    frequent = prevalence[prevalence >= threshold].to_dict()
    left = labels.drop(columns=list(frequent))
    if not left.shape[1] or prevalence.drop(list(frequent)).isna().all():
        raise StatisticsError(
            f"every class fills threshold={threshold:g} of the test rows or more, or is unknown there: a latent that "
            f"never fires would pass. Take a threshold above {max(frequent.values(), default=0):.2f}, or rarer classes"
        )
    return left, frequent


def expected_yield(weight: np.ndarray, hit: np.ndarray, budget: int) -> float:
    """Share of hits among the ``budget`` largest weights, expected over all orders of equal ones.

    >>> expected_yield(np.array([2.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0]), 2)
    0.25
    """
    least = -np.partition(-weight, budget - 1)[budget - 1]
    above, tied = weight > least, weight == least
    return float((hit[above].sum() + hit[tied].mean() * (budget - above.sum())) / budget)


def _pooled(
    adata: Any, obs: pd.DataFrame, known: str, rows: np.ndarray, unit: pd.Series, pool: str
) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Pooled codes of the training samples whose label is known, their class numbers, and their groups."""
    part = obs.iloc[rows]
    keep = part[known].notna().to_numpy()
    rows, part = rows[keep], part[keep]
    number, names = pd.factorize(samples_of(obs).iloc[rows])
    if not len(rows):
        raise StatisticsError(f"{known!r} is missing in every training row")
    classes, levels = pd.factorize(part[known].astype(str), sort=True)
    if len(levels) < 2:
        raise StatisticsError(f"{known!r} has one class ({levels[0]!r}) in training; it cannot propose")
    first = np.unique(number, return_index=True)[1]
    if (classes != classes[first][number]).any():
        raise StatisticsError(f"{known!r} varies within samples; it must have one value a sample")
    codes = sp.csr_matrix(adata.X)[rows].astype(np.float64)
    n = len(names)
    if pool == "mean":
        share = 1.0 / np.bincount(number)[number]
        X = sp.csr_matrix((share, (number, np.arange(len(rows)))), shape=(n, len(rows))) @ codes
    else:
        order = np.argsort(number, kind="stable")
        ends = np.cumsum(np.bincount(number))
        X = sp.vstack([
            sp.csr_matrix(codes[order[a:b]].max(axis=0)) for a, b in zip(np.r_[0, ends[:-1]], ends)
        ], format="csr")  # fmt: skip
    largest = abs(X).max(axis=0).toarray().ravel()
    scale = np.divide(1.0, largest, out=np.zeros(len(largest)), where=largest > 0)
    return sp.csr_matrix(X @ sp.diags(scale)), classes[first], unit.iloc[rows].to_numpy()[first]


def _weights(X: sp.csr_matrix, y: np.ndarray, C: float, random_state: int) -> np.ndarray:
    """``sum_c |W_cj|`` of L1 logistic regressions of each class against the rest (of one of two classes)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    total = np.zeros(X.shape[1])
    n_classes = int(y.max()) + 1
    for c in range(n_classes) if n_classes > 2 else [1]:
        model = LogisticRegression(penalty="l1", C=C, solver="liblinear", random_state=random_state, max_iter=200)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", message=".*penalty.*")  # scikit-learn 1.8 renames the argument
            total += np.abs(model.fit(X, y == c).coef_[0])
    return total


def _audited(codes: sp.csc_matrix, values: np.ndarray, share: float) -> np.ndarray:
    """Average precision (m, c) of every latent for every class, over the rows where the class is known."""
    out = np.empty((codes.shape[1], values.shape[1]))
    for c in range(values.shape[1]):
        there = ~np.isnan(values[:, c])
        part = codes if there.all() else codes[there]
        out[:, c] = average_precisions(part, values[there, c][:, None] >= share)[:, 0]
    return out


def _intervals(
    codes: sp.csc_matrix, values: np.ndarray, share: float, weight: np.ndarray, budgets: Sequence[int],
    threshold: float, groups: np.ndarray, n_draws: int, random_state: int,
) -> list[tuple[float, float]]:  # fmt: skip
    """95 % intervals of the yields: test groups are resampled, the proposal stays."""
    number = np.unique(groups, return_inverse=True)[1]
    G = int(number.max()) + 1
    draws = np.random.default_rng([random_state, 2]).multinomial(G, np.full(G, 1 / G), size=n_draws).T.astype(float)
    least = -np.partition(-weight, budgets[-1] - 1)[budgets[-1] - 1]
    chosen = np.flatnonzero(weight >= least)
    hits = np.zeros((len(weight), n_draws), bool)
    for j in chosen:
        score = codes[:, [j]].toarray().ravel()
        for c in range(values.shape[1]):
            there = ~np.isnan(values[:, c])
            y = values[there, c] >= share
            if y.any():
                ap = Resampled(score[there], y, number[there])(draws[: int(number[there].max()) + 1])
                hits[j] |= np.nan_to_num(ap) >= threshold
    return [
        tuple(np.quantile([expected_yield(weight, hits[:, b].astype(float), budget) for b in range(n_draws)], q)
              for q in (0.025, 0.975))
        for budget in budgets
    ]  # fmt: skip
