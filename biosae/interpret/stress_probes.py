"""Checks of a stress card that read probes: dose response, and neighbours told apart."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import special

from biosae.errors import InputError
from biosae.interpret.resampled import Parts
from biosae.interpret.stress_checks import Claim, Found
from biosae.stats.adjust import is_categorical
from biosae.stats.features import decoder, embedding, row_scale
from biosae.stats.readout import probe

DOSES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""In units of the typical code: the median of the firings."""
MAX_LOSS = 0.10
"""Largest loss of an off-target probe, relative to its balanced accuracy without a dose."""
READABLE = 0.05
"""An off-target must be read this far above chance, or its loss says nothing."""
N_CONTROLS = 50
MIN_CONTROLS = 20
"""Fewer random latents have no 95 % quantile worth the name."""
N_NEIGHBOURS = 5
N_EXAMPLES = 30
FOLDS = 5


def folds(y: np.ndarray, groups: np.ndarray, random_state: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Train and test rows, patients whole, every class in each training part; empty where that cannot be."""
    from sklearn.model_selection import StratifiedGroupKFold

    n_splits = min(FOLDS, *(len(np.unique(groups[y == c])) for c in np.unique(y)))
    if n_splits < 2 or len(np.unique(y)) < 2:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        splits = StratifiedGroupKFold(n_splits, shuffle=True, random_state=random_state).split(y[:, None], y, groups)
        return [(train, test) for train, test in splits if len(np.unique(y[train])) == len(np.unique(y))]


def linear_probe(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Weights (d, classes) and intercepts of a logistic regression in units of the embedding."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = probe(False).fit(x, y, logisticregression__sample_weight=weight)
    scaler, last = model[0], model[-1]
    w = last.coef_ / scaler.scale_
    b = last.intercept_ - w @ scaler.mean_
    if len(w) == 1:
        w, b = np.vstack([0 * w, w]), np.r_[0.0, b]
    return w.T, b


def dose(claim: Claim, off_targets: Sequence[str], *, random_state: int) -> Found:
    """Share of dose steps that raise the label's probe, beyond random latents, while no off-target probe loses 10 %."""
    adata = claim.adata
    try:
        x = embedding(adata).astype(np.float64)
        scale = np.broadcast_to(np.asarray(row_scale(adata, x)).reshape(-1, 1), (len(x), 1))[:, 0]
        atoms = decoder(adata).astype(np.float64)
    except InputError as error:
        return claim.no(str(error))
    fires = claim.z != 0
    if not fires.any():
        return claim.no("the latent never fires in these samples")
    splits = folds(claim.y.astype(int), claim.groups, random_state)
    if not splits:
        return claim.no("a class of the label is in fewer than 2 patients: no probe can be read on patients left out")
    controls = controls_of(adata, claim.at, np.random.default_rng(random_state))[:N_CONTROLS]
    typical = _typical(adata, np.r_[claim.at, controls])
    moves = typical[:, None] * atoms[np.r_[claim.at, controls]]  # (1 + controls, d)
    alpha = np.array(DOSES)
    response = np.full((len(x), len(alpha)), np.nan)
    of_controls = np.zeros((len(controls), len(alpha)))
    for train, test in splits:
        w, b = linear_probe(x[train], claim.y[train].astype(int))
        base = x[test] @ (w[:, 1] - w[:, 0]) + b[1] - b[0]
        push = moves @ (w[:, 1] - w[:, 0])
        logits = base[:, None] + scale[test, None] * push[0] * alpha
        response[test] = special.expit(logits)
        for c in range(len(controls)):
            of_controls[c] += special.expit(base[:, None] + scale[test, None] * push[1 + c] * alpha).sum(axis=0)
    used = np.isfinite(response[:, 0])
    of_controls /= used.sum()
    right, lost = _off_targets(claim, x, moves[0], scale, off_targets, random_state)

    if len(controls) >= MIN_CONTROLS:
        band = claim.sign * (of_controls - of_controls[:, :1])
        least = np.quantile(band, 0.95, axis=0)
    else:
        band, least = np.full((1, len(alpha)), np.nan), np.zeros(len(alpha))
        lost.append(f"{len(controls)} other latents: no random controls")

    def curves(weight: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        mean = (weight * used) @ np.nan_to_num(response) / (weight * used).sum()
        return mean, {name: 1 - _balanced(hit, y, weight) for name, (hit, y) in right.items()}

    def steps(weight: np.ndarray) -> float:
        if not (weight * used).any():
            return float("nan")
        mean, losses = curves(weight)
        up = claim.sign * mean
        good = (up[1:] >= up[:-1]) & (up[1:] - up[0] > least[1:])
        for loss in losses.values():
            good &= loss[1:] < MAX_LOSS
        return float(good.mean())

    mean, losses = curves(np.ones(len(x)))
    rise = claim.sign * (mean - mean[0])
    table = pd.DataFrame({
        "dose": alpha, "response": mean, "rise": rise, "controls_median": np.median(band, axis=0),
        "controls_q05": np.quantile(band, 0.05, axis=0), "controls_q95": np.quantile(band, 0.95, axis=0),
        **{f"loss:{name}": loss for name, loss in losses.items()},
    })  # fmt: skip
    number = claim.interval(steps, used=used, classes=claim.y.astype(int), what="the dose response")
    safe = np.all([loss[1:] < MAX_LOSS for loss in losses.values()], axis=0) if losses else np.ones(len(rise) - 1, bool)
    window = alpha[1:][safe & (rise[1:] > 0)]
    reading = f"probe {mean[0]:.2f} at dose 0, {mean[2]:.2f} at 1, {mean[-1]:.2f} at {alpha[-1]:g}"
    reading += "" if claim.sign > 0 else " (it should fall)"
    reading += f"; monotone in {(np.diff(claim.sign * mean) >= 0).mean():.0%} of steps; "
    reading += f"window {window.min():g} to {window.max():g}" if len(window) else "no window"
    if len(controls) >= MIN_CONTROLS:
        reading += f"; at dose 1 beyond {(band[:, 2] < rise[2]).mean():.0%} of {len(controls)} random latents"
    reading += f"; off-targets {', '.join(losses)}" if losses else "; no off-target measured"
    return number, reading + "".join(f"; {note}" for note in lost), table


def _typical(adata: Any, at: np.ndarray) -> np.ndarray:
    """Median of the firings (absolute codes) of latents."""
    columns = sp.csc_matrix(sp.csr_matrix(adata.X)[:, at])
    parts = np.split(np.abs(columns.data.astype(np.float64)), columns.indptr[1:-1])
    return np.array([np.median(p[p > 0]) if (p > 0).any() else 0.0 for p in parts])


def controls_of(adata: Any, at: int, rng: np.random.Generator) -> np.ndarray:
    """Other live latents in random order, of those whose density is nearest."""
    X = sp.csr_matrix(adata.X)
    density = np.bincount(X.indices[X.data != 0], minlength=X.shape[1]) / X.shape[0]
    live = np.flatnonzero((density > 0) & (np.arange(len(density)) != at))
    gap = np.abs(np.log(density[live] / max(density[at], 1e-12)))
    return rng.permutation(live[np.argsort(gap, kind="stable")[: 4 * N_CONTROLS]])


def _balanced(hit: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Balanced accuracy at every dose over that without one."""
    found = []
    for c in range(int(y.max()) + 1):
        own = weight * (y == c)
        if own.sum() > 0:
            found.append(own @ hit / own.sum())
    accuracy = np.mean(found, axis=0)
    return accuracy / accuracy[0] if accuracy[0] > 0 else np.zeros_like(accuracy)


def _off_targets(
    claim: Claim, x: np.ndarray, move: np.ndarray, scale: np.ndarray, names: Sequence[str], random_state: int
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """For each readable off-target whether its probe is right (n, doses) and its classes (-1: not used)."""
    out, lost = {}, []
    alpha = np.array(DOSES)
    for name in names:
        y = _classes(claim.obs[name])
        known = np.flatnonzero(y >= 0)
        y = _common(y, known, claim.groups)
        known = np.flatnonzero(y >= 0)
        splits = folds(y[known], claim.groups[known], random_state) if len(known) else []
        if not splits:
            lost.append(f"{name} cannot be read on patients left out, so its loss is not measured")
            continue
        hit, seen = np.zeros((len(y), len(alpha))), np.zeros(len(y), dtype=bool)
        for train, test in splits:
            train, test = known[train], known[test]
            w, b = linear_probe(x[train], y[train], _balancing(y[train], claim.y[train]))
            base, push = x[test] @ w + b, move @ w
            for k, a in enumerate(alpha):
                hit[test, k] = (base + (a * scale[test])[:, None] * push).argmax(axis=1) == y[test]
            seen[test] = True
        y = np.where(seen, y, -1)
        accuracy = np.mean([hit[y == c, 0].mean() for c in range(y.max() + 1)])
        chance = 1 / (y.max() + 1)
        if accuracy < chance + READABLE:
            lost.append(f"{name} cannot be read (balanced accuracy {accuracy:.2f}, chance {chance:.2f})")
            continue
        out[name] = (hit, y)
    return out, lost


def _balancing(y: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Weights by which every class holds as much of the label as any other: a probe of the scanner should not be read
    from the label where the two go together.
    """
    cell = 2 * y + label
    size = np.bincount(cell)[cell]
    return len(y) / len(np.unique(cell)) / size


def _classes(column: pd.Series) -> np.ndarray:
    """Classes of every row, -1 where unknown; numbers of more than two values are split at their median."""
    if not is_categorical(column) and column.nunique() > 2:
        values = column.to_numpy(np.float64, na_value=np.nan)
        return np.where(np.isnan(values), -1, values > np.nanmedian(values)).astype(int)
    return pd.factorize(column.astype("string"), sort=True)[0]


def _common(y: np.ndarray, known: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Only classes of two or more patients, numbered from 0."""
    keep = [c for c in np.unique(y[known]) if len(np.unique(groups[y == c])) >= 2]
    number = {c: i for i, c in enumerate(keep)}
    return np.array([number.get(c, -1) for c in y])


def neighbours(claim: Claim, view: np.ndarray | None) -> Found:
    """AUROC for telling the strongest examples of a latent from those of its nearest latents, on patients left out."""
    adata = claim.adata
    try:
        x = embedding(adata) if view is None else np.asarray(view, dtype=np.float64)
        atoms = decoder(adata).astype(np.float64)
    except InputError as error:
        return claim.no(str(error))
    X = sp.csc_matrix(adata.X)
    signed = X.data.min(initial=0) < 0
    length = np.linalg.norm(atoms, axis=1)
    live = (np.diff(X.indptr) > 0) & (length > 0)
    if not live[claim.at]:
        return claim.no("the latent never fires in these samples")
    cosine = atoms @ atoms[claim.at] / np.where(length > 0, length, 1) / length[claim.at]
    closeness = np.abs(cosine) if signed else cosine
    closeness = np.where(live & (np.arange(len(live)) != claim.at), closeness, -np.inf)
    nearest = np.argsort(-closeness, kind="stable")[: min(N_NEIGHBOURS, int(np.isfinite(closeness).sum()))]
    mine = _strongest(X, claim.at)
    rows, parts, left_out = [], [], []
    for j in nearest:
        theirs = _strongest(X, int(j))
        pooled = np.r_[mine, theirs]
        y = np.r_[np.ones(len(mine), int), np.zeros(len(theirs), int)]
        splits = folds(y, claim.groups[pooled], claim.random_state)
        if not splits:
            left_out.append(str(adata.var_names[j]))
            continue
        told = Parts(list(_told_apart(x, pooled, y, splits)))
        parts.append(told)
        rows.append({
            "latent": str(adata.var_names[j]), "cosine": float(cosine[j]),
            "auroc": _within_folds(told, np.ones(len(x))), "n_own": len(mine), "n_other": len(theirs),
            "n_shared": len(np.intersect1d(mine, theirs)),
        })  # fmt: skip
    if not parts:
        return claim.no(
            f"strongest examples of the latent or of its {len(nearest)} nearest lie in fewer than 2 patients, so that "
            "no probe can be read on patients left out"
        )
    used = np.isin(np.arange(len(x)), np.concatenate([told.rows for told in parts]))

    def mean(weight: np.ndarray) -> float:
        return float(np.mean([_within_folds(told, weight) for told in parts]))

    number = claim.interval(mean, used=used, what="the AUROC")
    table = pd.DataFrame(rows)
    worst = table.loc[table["auroc"].fillna(0).idxmin()]
    reading = (
        f"hardest to tell from {worst['latent']} (cosine {worst['cosine']:.2f}, AUROC {worst['auroc']:.2f}, "
        f"{worst['n_shared']} of {worst['n_own']} examples shared)"
    )
    return number, reading + (f"; not told apart, too few patients: {', '.join(left_out)}" if left_out else ""), table


def _strongest(X: sp.csc_matrix, j: int) -> np.ndarray:
    """Rows of the largest absolute codes of a latent."""
    span = slice(X.indptr[j], X.indptr[j + 1])
    order = np.argsort(-np.abs(X.data[span]), kind="stable")[:N_EXAMPLES]
    return X.indices[span][order]


def _told_apart(
    x: np.ndarray, pooled: np.ndarray, y: np.ndarray, splits: list[tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of every fold: scores of its test rows, these rows of the table, and which are the latent's own."""
    for train, test in splits:
        w, _ = linear_probe(x[pooled[train]], y[train])
        yield x[pooled[test]] @ (w[:, 1] - w[:, 0]), pooled[test], y[test] == 1


def _within_folds(told: Parts, weight: np.ndarray) -> float:
    """AUROC over the pairs within folds."""
    right, pairs = told.pairs(weight)
    return float(right.sum() / pairs.sum()) if pairs.sum() > 0 else float("nan")
