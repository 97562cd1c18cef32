"""From answers to scores: balanced accuracy, F1, PPV at the natural prevalence, with intervals over patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError
from biosae.interpret.explain.items import Items
from biosae.interpret.explain.questions import Answer, parse
from biosae.interpret.explain.trials import N_INTRUDER, Trial, texts
from biosae.stats import cluster_bootstrap
from biosae.stats.effects import logit_interval

MEASURES = {
    "detection": ("balanced_accuracy", 0.5),
    "fuzzing": ("balanced_accuracy", 0.5),
    "intruder": ("accuracy", 1 / N_INTRUDER),
    "simulation": ("pearson", 0.0),
    "embedding": ("auroc", 0.5),
}
"""Scorer -> what ``estimate`` is, and its value by chance."""
STATUS = {
    "ok": "scored",
    "few_groups": "scored; 3 to 19 patients, so the interval is too narrow",
    "too_few_groups": "scored on fewer than 3 patients: no interval",
    "dead": "the latent never fires",
    "too_sparse": "it fires in fewer samples than choose(min_active=...) asks for: not scored, which is not 0",
    "not_asked": "nothing was written about it, or no item can be used: none has a map, or it fires everywhere",
    "no_answers": "no answer of one class could be read",
    "constant": "the rater, or the latent, gives the same level everywhere",
}
"""Status of a row -> meaning. ``too_few_groups`` without an estimate: it fires in fewer than 3 patients of a part."""


def ppv(recall: Any, specificity: Any, prevalence: Any) -> Any:
    """Share of positive answers that are right where a share ``prevalence`` of items is positive (Bayes).

    ``PPV = r p / (r p + (1 - s) (1 - p))``; NaN where nothing is called positive.

    >>> round(float(ppv(0.9, 0.9, 0.01)), 3), round(float(ppv(0.9, 0.9, 0.001)), 4)
    (0.083, 0.0089)
    """
    right = np.asarray(recall, float) * prevalence
    wrong = (1 - np.asarray(specificity, float)) * (1 - np.asarray(prevalence, float))
    with np.errstate(invalid="ignore", divide="ignore"):
        return right / (right + wrong)


def confusion(tp: int, fp: int, fn: int, tn: int) -> dict[str, float]:
    """Recall, specificity, balanced accuracy, precision and F1 of a table of counts; NaN where one does not exist.

    >>> confusion(40, 10, 10, 40)["f1"], confusion(40, 10, 10, 40)["balanced_accuracy"]
    (0.8, 0.8)
    """

    def share(a: float, b: float) -> float:
        return a / b if b else float("nan")

    recall, specificity = share(tp, tp + fn), share(tn, tn + fp)
    return {
        "recall": recall, "specificity": specificity, "balanced_accuracy": (recall + specificity) / 2,
        "precision": share(tp, tp + fp), "f1": share(2 * tp, 2 * tp + fp + fn),
    }  # fmt: skip


def score(
    trials: Sequence[Trial],
    answers: Sequence[Answer],
    *,
    items: Items,
    scorers: Sequence[str] | None = None,
    random_state: int = 0,
) -> pd.DataFrame:
    """Scores of every latent that was to be scored, one row a latent, tail and scorer.

    Parameters
    ----------
    trials, answers
        Questions and their answers, in the same order.
    items
        What the trials were made from.
    scorers
        Which were asked for; None: those of the trials.
    random_state
        Seed of the bootstrap over patients.

    Returns
    -------
    DataFrame
        ``latent, tail, scorer, measure, estimate, ci_low, ci_high, chance, status``; ``n`` (answers used),
        ``n_unparsed`` (missing or unclear answers, not used), ``n_groups`` (patients of the answers that the estimate
        is of); of yes/no scorers ``tp, fp, fn, tn, recall, specificity, precision, f1`` over active and random silent
        items; of detection also ``specificity_near``, ``specificity_cofiring``, ``prevalence``, ``ppv`` at it, and
        ``ppv_low``, the same with recall and specificity at the lower ends of their 95 % Wilson intervals, each patient
        counted once. Latents that could not be scored have their ``status`` (:data:`STATUS`) and NaN.

    Raises
    ------
    InputError
        If there is not one answer a trial.
    """
    if len(trials) != len(answers):
        raise InputError(f"{len(answers)} answers to {len(trials)} trials; pass one a trial, in order")
    table = pd.DataFrame(
        [
            (t.scorer, t.latent, t.tail, t.kind, t.group, t.truth, parse(a.text, t.question.form, t.question.size))
            for t, a in zip(trials, answers)
        ],
        columns=["scorer", "latent", "tail", "kind", "group", "truth", "said"],
    )
    parts = dict(iter(table.groupby(["scorer", "latent", "tail"], sort=False)))
    rows = []
    for scorer in dict.fromkeys(table["scorer"]) if scorers is None else scorers:
        for fact in items.latents.itertuples():
            row = {"latent": fact.latent, "tail": fact.tail, "scorer": scorer, "prevalence": fact.prevalence}
            part = parts.get((scorer, fact.latent, fact.tail))
            if fact.status != "ok":
                row["status"] = fact.status
            elif part is None:
                row["status"] = "not_asked"
            else:
                row |= _SCORE[scorer](part, fact.prevalence, random_state)
            rows.append(row)
    return _table(rows)


def score_embedding(
    items: Items,
    explanations: Any,
    *,
    embed_text: Callable[[list[str]], Any],
    images: Any,
    random_state: int = 0,
) -> pd.DataFrame:
    """Does the cosine of explanation and item, in a space that both share, tell active from silent items?

    Parameters
    ----------
    items, explanations
        As in :func:`trials`.
    embed_text
        Texts to vectors (n, d): the text tower of an image-text encoder.
    images : DataFrame
        Vectors (d) of the items by its image tower, indexed by sample id.

    Returns
    -------
    DataFrame
        As of :func:`score`; ``estimate`` is the AUROC of active against random silent items.

    Raises
    ------
    InputError
        If scoring items are not in ``images`` or repeat there, or the two spaces differ in width.
    """
    if not images.index.is_unique:
        raise InputError("sample ids repeat in images; keep one row of each: images[~images.index.duplicated()]")
    written = texts(explanations, items)
    keys = [key for key in items.scored if key in written]
    T = np.asarray(embed_text([written[key] for key in keys]), float) if keys else np.empty((0, images.shape[1]))
    if T.shape != (len(keys), images.shape[1]):
        raise InputError(f"texts gave {T.shape}, images have {images.shape[1]} columns; use one image-text encoder")
    T = T / np.maximum(np.linalg.norm(T, axis=1, keepdims=True), 1e-12)
    rows = []
    for fact in items.latents.itertuples():
        key = (fact.latent, fact.tail)
        row = {"latent": key[0], "tail": key[1], "scorer": "embedding", "prevalence": fact.prevalence}
        if fact.status != "ok" or key not in written:
            rows.append(row | {"status": fact.status if fact.status != "ok" else "not_asked"})
            continue
        part = items.of(*key, "score")
        part = part[part["kind"].isin(["active", "random"])]
        absent = part["sample_id"][~part["sample_id"].isin(images.index)]
        if len(absent):
            raise InputError(f"images lacks {len(absent)} of the scoring items, such as {absent.iloc[0]!r}")
        V = images.loc[part["sample_id"]].to_numpy(float)
        cosine = V @ T[keys.index(key)] / np.maximum(np.linalg.norm(V, axis=1), 1e-12)
        truth = (part["kind"] == "active").to_numpy()
        found = _interval(part["group"], lambda i, c=cosine, t=truth: auroc(c[i], t[i]), truth, random_state)
        rows.append(row | {"n": len(part), "n_unparsed": 0, **found})
    return _table(rows)


def auroc(values: np.ndarray, truth: np.ndarray) -> float:
    """Probability that a true row has the higher value, ties counting half; NaN with one class."""
    from scipy.stats import rankdata

    n = int(truth.sum())
    if not 0 < n < len(truth):
        return float("nan")
    return float((rankdata(values)[truth].sum() - n * (n + 1) / 2) / (n * (len(truth) - n)))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The distribution of scores: one row a scorer (and ``explanations``, where there is such a column).

    ``n_latents, n_scored``, ``median, q25, q75`` of the estimate, ``n_above`` (interval wholly above chance),
    ``f1_weighted`` = sum of ``f_j F1_j`` over sum of ``f_j``, f the natural prevalence, ``n_unparsed`` and
    ``unscored`` (status and number, as text).
    """
    keys = [c for c in ("explanations", "scorer") if c in table]
    rows = []
    for key, part in table.groupby(keys, sort=False):
        done = part[part["estimate"].notna()]
        q25, median, q75 = done["estimate"].quantile([0.25, 0.5, 0.75])
        rest = part.loc[part["estimate"].isna(), "status"].value_counts()
        weight = done["prevalence"].where(done["f1"].notna())
        rows.append({
            **dict(zip(keys, key)), "measure": part["measure"].iloc[0], "chance": part["chance"].iloc[0],
            "n_latents": len(part), "n_scored": len(done), "median": median, "q25": q25, "q75": q75,
            "n_above": int((done["ci_low"] > done["chance"]).sum()),
            "f1_weighted": (weight * done["f1"]).sum() / weight.sum() if weight.sum() > 0 else np.nan,
            "n_unparsed": int(part["n_unparsed"].sum()),
            "unscored": ", ".join(f"{status} {n}" for status, n in rest.items()),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _yes_no(part: pd.DataFrame, prevalence: float, seed: int) -> dict[str, Any]:
    detection = part["scorer"].iloc[0] == "detection"
    used = part[part["said"].notna()]
    plain = used[used["kind"].isin(["active", "random"])]
    truth, said = plain["truth"].to_numpy(bool), plain["said"].to_numpy(bool)
    counts = {
        "tp": int((truth & said).sum()), "fp": int((~truth & said).sum()), "fn": int((truth & ~said).sum()),
        "tn": int((~truth & ~said).sum()),
    }  # fmt: skip
    found = confusion(**counts)
    row: dict[str, Any] = {"n": len(used), "n_unparsed": len(part) - len(used), **counts, **found}
    del row["balanced_accuracy"]

    def balanced(i: np.ndarray) -> float:
        t, s = truth[i], said[i]
        n = t.sum()
        return float((s[t].sum() / n + (~s[~t]).sum() / (len(t) - n)) / 2) if 0 < n < len(t) else float("nan")

    row |= _interval(plain["group"], balanced, truth, seed)
    if detection:
        for kind in ("near", "cofiring"):
            hard = used.loc[used["kind"] == kind, "said"].to_numpy(bool)
            row[f"specificity_{kind}"] = float((~hard).mean()) if len(hard) else np.nan
        row["ppv"] = float(ppv(found["recall"], found["specificity"], prevalence))
        row["ppv_low"] = float(
            ppv(
                _wilson_low(found["recall"], plain.loc[truth, "group"].nunique()),
                _wilson_low(found["specificity"], plain.loc[~truth, "group"].nunique()),
                prevalence,
            )
        )
    return row


def _choice(part: pd.DataFrame, prevalence: float, seed: int) -> dict[str, Any]:
    used = part[part["said"].notna()]
    right = (used["said"] == used["truth"]).to_numpy(bool)
    row = {"n": len(used), "n_unparsed": len(part) - len(used)}
    return row | _interval(used["group"], lambda i: float(right[i].mean()) if len(i) else float("nan"), None, seed)


def _maps(part: pd.DataFrame, prevalence: float, seed: int) -> dict[str, Any]:
    used = part[part["said"].notna()]
    row = {"n": len(used), "n_unparsed": len(part) - len(used)}
    if used.empty:
        return row | {"status": "no_answers"}
    x = [np.asarray(v, float).ravel() for v in used["said"]]
    y = [np.asarray(v, float).ravel() for v in used["truth"]]
    sums = np.array([(len(a), a.sum(), b.sum(), a @ a, b @ b, a @ b) for a, b in zip(x, y)])

    def pearson(i: np.ndarray) -> float:
        n, sx, sy, sxx, syy, sxy = sums[i].sum(axis=0)
        vx, vy = n * sxx - sx**2, n * syy - sy**2
        return float((n * sxy - sx * sy) / np.sqrt(vx * vy)) if vx > 0 and vy > 0 else float("nan")

    return row | _interval(used["group"], pearson, None, seed, empty="constant", share=False)


_SCORE = {"detection": _yes_no, "fuzzing": _yes_no, "intruder": _choice, "simulation": _maps}


def _interval(
    groups: pd.Series,
    statistic: Callable,
    classes: np.ndarray | None,
    seed: int,
    *,
    empty: str = "no_answers",
    share: bool = True,
) -> dict[str, Any]:
    """Estimate, 95 % interval over patients (at least 3) and status.

    Where no resample of a share differs (every answer right), the bound is the exact binomial one of as many trials as
    patients: never an interval of no width.
    """
    n_groups = groups.nunique()
    estimate = statistic(np.arange(len(groups))) if len(groups) else float("nan")
    row = {"estimate": estimate, "n_groups": n_groups, "ci_low": np.nan, "ci_high": np.nan}
    if not np.isfinite(estimate):
        return row | {"status": empty}
    if n_groups < 3:
        return row | {"status": "too_few_groups"}
    found = cluster_bootstrap(groups.to_numpy(str), statistic, classes=classes, random_state=seed)
    low, high = found.low, found.high
    if share and high - low < 1e-12:
        bounds = logit_interval(np.array([estimate]), np.zeros(1), critical=1.96, n_min=n_groups)
        low, high = (float(bound[0]) for bound in bounds)
    return row | {"ci_low": low, "ci_high": high, "status": "ok" if n_groups >= 20 else "few_groups"}


def _wilson_low(share: float, n: int) -> float:
    """Lower end of the 95 % Wilson interval of a share among ``n``."""
    if not n:
        return float("nan")
    z = 1.959963984540054
    middle, spread = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, float((middle - spread) / (1 + z * z / n)))


_COLUMNS = (
    "latent", "tail", "scorer", "measure", "estimate", "ci_low", "ci_high", "chance", "status", "n", "n_unparsed",
    "n_groups", "tp", "fp", "fn", "tn", "recall", "specificity", "precision", "f1", "specificity_near",
    "specificity_cofiring", "prevalence", "ppv", "ppv_low",
)  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    measures = [MEASURES[row["scorer"]] for row in rows]
    named = [row | {"measure": measure, "chance": chance} for row, (measure, chance) in zip(rows, measures)]
    table = pd.DataFrame(named, columns=_COLUMNS)
    counts = ["n", "n_unparsed", "n_groups", "tp", "fp", "fn", "tn"]
    return table.astype({**dict.fromkeys(counts, "Int64")})
