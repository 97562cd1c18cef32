"""Do single latents line up with parts that a mask names? Chosen on training rows, judged on held-out patients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError
from biosae.interpret.masks import displaced
from biosae.interpret.probe import RIDGE, log_loss, prevalence_loss, probes
from biosae.interpret.rows import enough_groups, groups_of, joined, samples_of
from biosae.stats import cluster_bootstrap
from biosae.stats.precision import Resampled, average_precision

TOP = 16
COLUMNS = (
    "class", "latent", "weight", "bias", "loss", "loss_prevalence", "probe_r", "ap", "ap_low", "ap_high", "ap_place",
    "prevalence", "purity", "n_top", "n_top_samples", "n_train", "n_positive_train", "n_test", "n_positive_test",
    "n_samples_test", "n_groups_test", "status",
)  # fmt: skip


def alignment(
    adata: Any,
    labels: pd.DataFrame,
    *,
    split: str = "split",
    train: str = "train",
    test: str = "test",
    groups: str | None = "patient",
    share: float = 0.5,
    top: int = TOP,
    ridge: float = RIDGE,
    n_null: int = 0,
    n_draws: int = 2000,
    random_state: int = 0,
) -> pd.DataFrame:
    """For every class the latent whose one-variable probe fits it best, judged on rows held out.

    On training rows ``sigma(w z_j + b)`` is fitted for every latent, and ``j*`` is the one of least training loss. On
    test rows ``Probe R = 1 - L / L_pi``, L_pi the loss of the training prevalence alone, and the tie-exact average
    precision of ``w z + b``.

    Parameters
    ----------
    adata
        Codes, a row a token or a sample (:func:`biosae.encode` with ``tokens=None`` for tokens).
    labels
        Classes of the same rows, joined by index: shares from 0 to 1 (:func:`token_parts`) or booleans; NaN is unknown
        and left out for that class alone.
    split, train, test
        Column of ``obs`` and its values for the two parts. Every other value is left out.
    groups
        Column of independent groups, resampled for the interval; none of them may be in both parts. None: the samples
        themselves (``sample_id``).
    share
        A row belongs to a class from this share on.
    top
        Rows of which ``purity`` is the share of the most frequent class.
    ridge
        Of the probe.
    n_null
        Repeats of everything with masks of other samples (:func:`displaced`); needs rows of tokens.
    n_draws
        Resamples of the interval of ``ap``; 0 for none.
    random_state
        Seed of resamples and displaced masks.

    Returns
    -------
    DataFrame
        A row a class: ``class, latent, weight, bias, loss, loss_prevalence, probe_r, ap, ap_low, ap_high`` (95 %,
        groups resampled, for the latent that was chosen), ``ap_place`` (score: how often that place of the grid holds
        the class in training; NaN without places), ``prevalence`` (of the test rows: the expected AP of any constant
        score), ``purity`` (share of the most frequent label, a row's largest class of at least ``share``) among
        ``n_top`` rows of ``n_top_samples`` samples on which the latent is highest (lowest, where codes are signed and w
        < 0), ``n_train, n_positive_train, n_test, n_positive_test, n_samples_test, n_groups_test, status``; with
        ``n_null`` also ``ap_null, probe_r_null``, means over repeats. ``status``: ``ok``, ``absent_train``,
        ``absent_test`` (no value), ``all_positive``, ``few_groups`` (3 to 19: the interval is too narrow),
        ``too_few_groups`` (fewer than 3: no interval).

    Raises
    ------
    InputError
        If rows, columns or parts do not fit.
    StatisticsError
        If a group lies in both parts.

    References
    ----------
    Stevens et al. 2025, arXiv 2511.17735. There average precision of a batch is that of the order in which ties happen
    to stand, and a class absent from the test rows has 0; see :func:`alignment_summary` for both.
    """
    obs, labels, parts = joined(adata, labels, split=split, train=train, test=test)
    if not 0 < share <= 1 or top < 1:
        raise InputError(f"share={share!r} must be above 0 and at most 1, top={top!r} at least 1")
    unit = groups_of(obs, groups, parts)
    parts = {part: _in_order(obs, rows) for part, rows in parts.items()}
    codes = sp.csr_matrix(adata.X)
    fitted = {part: sp.csc_matrix(codes[rows], dtype=np.float64) for part, rows in parts.items()}
    table = _table(adata, fitted, labels, obs, parts, unit, share, top, ridge, n_draws, random_state)
    if n_null:
        nulls = []
        for i in range(n_null):
            moved = labels.copy()
            for part, rows in parts.items():
                number = 2 * i + (part == "test")
                moved.iloc[rows] = displaced(
                    labels.iloc[rows], samples_of(obs).iloc[rows], random_state=random_state + 1 + number
                ).to_numpy()
            nulls.append(_table(adata, fitted, moved, obs, parts, unit, share, top, ridge, 0, random_state))
        for name in ("ap", "probe_r"):
            table[f"{name}_null"] = np.mean([null[name].to_numpy(float) for null in nulls], axis=0)
    table.attrs["biosae"] = {
        "share": share, "top": top, "ridge": ridge, "n_null": n_null, "groups": unit.name,
        "independent": unit.name != "sample_id", "random_state": random_state,
    }  # fmt: skip
    return table


def alignment_summary(table: pd.DataFrame, *, threshold: float = 0.3) -> pd.Series:
    """Means of an alignment table over its classes.

    Parameters
    ----------
    table
        Of :func:`alignment`, of one model.
    threshold
        Average precision from which a class is covered.

    Returns
    -------
    Series
        ``probe_r, map, coverage, purity, map_place, n_classes, n_absent, n_trivial`` (classes so frequent that a
        constant score covers them), means over the classes of which average
        precision is known, and ``map_absent_0``: the mean with 0 for classes without a test row, as the source has it.

    Raises
    ------
    InputError
        If the table is of several models.
    """
    n_models = table["model"].nunique() if "model" in table else 1
    if n_models > 1:
        raise InputError(
            f"the table is of {n_models} models, whose means would be mixed; use "
            "table.groupby('model', sort=False).apply(bs.interpret.alignment_summary)"
        )
    known = table[table["ap"].notna()]
    values = {
        "probe_r": known["probe_r"].mean(),
        "map": known["ap"].mean(),
        "coverage": (known["ap"] >= threshold).mean() if len(known) else np.nan,
        "purity": known["purity"].mean(),
        "map_place": known["ap_place"].mean(),
    }
    values |= {f"{n}_null": known[f"{n}_null"].mean() for n in ("ap", "probe_r") if f"{n}_null" in known}
    trivial = int((known["prevalence"] >= threshold).sum())
    values |= {"n_classes": len(known), "n_absent": len(table) - len(known), "n_trivial": trivial}
    return pd.Series({**values, "map_absent_0": table["ap"].fillna(0).mean()})


def purity(scores: np.ndarray, labels: np.ndarray, k: int) -> tuple[float, int]:
    """Share of the most frequent label among the k highest positive scores.

    Parameters
    ----------
    scores
        (n,); only items above 0 can be among the k.
    labels
        (n, c), one-hot; items without a label count for none.
    k
        Items; fewer where fewer are above 0.

    Returns
    -------
    float, int
        Purity, NaN where nothing is above 0, and how many items were looked at. Of items tied at the k-th place each
        counts by the chance of being taken.
    """
    above = np.flatnonzero(scores > 0)
    if not len(above):
        return float("nan"), 0
    k = min(k, len(above))
    least = -np.partition(-scores[above], k - 1)[k - 1]
    sure, tied = above[scores[above] > least], above[scores[above] == least]
    found = labels[sure].sum(0) + labels[tied].sum(0) * (k - len(sure)) / len(tied)
    return float(found.max() / k), k


def _table(
    adata: Any, codes: Mapping[str, sp.csc_matrix], labels: pd.DataFrame, obs: pd.DataFrame,
    parts: Mapping[str, np.ndarray], unit: pd.Series, share: float, top: int, ridge: float, n_draws: int,
    random_state: int,
) -> pd.DataFrame:  # fmt: skip
    values = labels.to_numpy()
    held = np.zeros((len(parts["test"]), values.shape[1]))
    seen = ~np.isnan(values[parts["test"]]).all(axis=1)  # rows of which nothing is known are neither pure nor impure
    majority = np.nan_to_num(values[parts["test"]], nan=-1.0)
    some = majority.max(1) >= share
    held[np.flatnonzero(some), majority.argmax(1)[some]] = 1
    samples = samples_of(obs).iloc[parts["test"]].to_numpy()[seen]
    rows = []
    for c, name in enumerate(labels.columns):
        known = {part: ~np.isnan(values[at, c]) for part, at in parts.items()}
        y = {part: values[at, c][known[part]] >= share for part, at in parts.items()}
        row = dict.fromkeys(COLUMNS, np.nan) | {"class": name, "latent": None}
        in_test = unit.iloc[parts["test"]].to_numpy()[known["test"]]
        row |= {
            "n_train": len(y["train"]), "n_positive_train": int(y["train"].sum()), "n_test": len(y["test"]),
            "n_positive_test": int(y["test"].sum()), "n_groups_test": len(set(in_test)),
            "n_samples_test": samples_of(obs).iloc[parts["test"]][known["test"]].nunique(),
        }  # fmt: skip
        row["status"] = _status(y)
        if row["status"] == "ok":
            row |= _judged(adata, codes, known, y, ridge, held[seen], seen, top, samples)
            row["ap_place"] = _place(obs, parts, known, y)
            G = row["n_groups_test"]
            row["status"] = enough_groups(G)
            if n_draws and G >= 3:
                score = row["weight"] * codes["test"][:, [adata.var_names.get_loc(row["latent"])]].toarray().ravel()
                row["ap_low"], row["ap_high"] = _interval(
                    score[known["test"]], y["test"], in_test, n_draws, random_state
                )
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _in_order(obs: pd.DataFrame, rows: np.ndarray) -> np.ndarray:
    """Rows by sample and place in its grid, so that a token of one sample stands where that of another does."""
    part = obs.iloc[rows]
    places = [part[name].to_numpy() for name in ("token_col", "token_row") if name in part]
    return rows[np.lexsort([*places, np.unique(samples_of(part), return_inverse=True)[1]])]


def _status(y: Mapping[str, np.ndarray]) -> str:
    for part in ("train", "test"):
        if not y[part].any():
            return f"absent_{part}"
        if y[part].all():
            return "all_positive"
    return "ok"


def _judged(
    adata: Any, codes: Mapping[str, sp.csc_matrix], known: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray],
    ridge: float, held: np.ndarray, seen: np.ndarray, top: int, samples: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """The latent that fits the training rows best, and its numbers on the test rows."""
    train = codes["train"] if known["train"].all() else codes["train"][known["train"]]
    fitted = probes(train, y["train"], ridge=ridge)
    j = int(np.argmin(fitted.loss))
    w, b = float(fitted.weight[j]), float(fitted.bias[j])
    z = codes["test"][:, [j]].toarray().ravel()
    mine = z[known["test"]]
    loss, base = log_loss(mine, y["test"], w, b), prevalence_loss(fitted.prevalence, y["test"])
    shown = (-z if w < 0 and z.min() < 0 else z)[seen]
    pure, n_top = purity(shown, held, top)
    first = np.argsort(-shown, kind="stable")[:n_top]
    return {
        "latent": adata.var_names[j], "weight": w, "bias": b, "loss": loss, "loss_prevalence": base,
        "probe_r": 1 - loss / base, "ap": average_precision(y["test"], w * mine), "prevalence": float(y["test"].mean()),
        "purity": pure, "n_top": n_top, "n_top_samples": len(set(samples[first])),
    }  # fmt: skip


def _place(
    obs: pd.DataFrame, parts: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray]
) -> float:
    """Average precision on the test rows of how often their place in the grid held the class in training."""
    if not {"token_row", "token_col"} <= set(obs):
        return float("nan")
    places = obs["token_row"].to_numpy() * (int(obs["token_col"].max()) + 1) + obs["token_col"].to_numpy()
    train, test = (places[parts[part]][known[part]] for part in ("train", "test"))
    size = int(places.max()) + 1
    seen = np.bincount(train, minlength=size)
    score = np.divide(np.bincount(train, y["train"], size), seen, out=np.zeros(size), where=seen > 0)
    return average_precision(y["test"], score[test])


def _interval(
    score: np.ndarray, y: np.ndarray, groups: np.ndarray, n_draws: int, random_state: int
) -> tuple[float, float]:
    """95 % interval of average precision, groups resampled."""
    _, number = np.unique(groups, return_inverse=True)
    G = int(number.max()) + 1
    resampled = Resampled(score, y, number)
    found = cluster_bootstrap(
        np.arange(G),
        lambda drawn: float(resampled(np.bincount(drawn, minlength=G)[:, None].astype(np.float64))[0]),
        n_draws=n_draws,
        random_state=random_state,
    )
    return found.low, found.high
