"""Does taking out the latents of a nuisance repair a classifier that was trained on confounded patients?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError
from biosae.stats.drop import Cells, balanced, by_unit, cells, divide, draw, rows_of, size_of
from biosae.stats.features import decoder, embedding, row_scale
from biosae.stats.readout import probe

SIZES = (2, 5, 10, 20, 50, 100, 500)
SMALLEST_GAP = 0.001
"""Below this gap between the clean and the biased classifier nothing can be repaired, and the score is 0."""


def score(clean: Any, biased: Any, ablated: Any) -> Any:
    """``(A_ablated - A_biased) / (A_clean - A_biased)``, 0 where the denominator is below 0.001.

    >>> round(float(score(0.92, 0.62, 0.80)), 12)
    0.6
    """
    clean, biased, ablated = (np.asarray(v, dtype=np.float64) for v in (clean, biased, ablated))
    gap = clean - biased
    with np.errstate(invalid="ignore"):
        return np.where(gap < SMALLEST_GAP, 0.0, (ablated - biased) / np.where(gap < SMALLEST_GAP, 1.0, gap))


def spurious_removal(
    adata: Any, target: str, nuisance: str, *, groups: str = "patient", n_latents: Sequence[int] = SIZES,
    classes: Sequence[str] | None = None, levels: Sequence[str] | None = None, n_repeats: int = 10, test: float = 0.3,
    max_rows: int = 100, C: float = 1.0, ablation: str = "zero", n_random: int = 20,
    n_bootstrap: int = 1000, random_state: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Spurious correlation removal (Karvonen et al. 2025, SAEBench), with patients instead of rows subsampled.

    A classifier of the target is trained on patients in whom the nuisance is the target (in every second repeat, its
    opposite), another on as many patients of whom each of the four cells has a quarter; both are tested on patients
    left out, the four cells weighing alike. Latents are ranked on the balanced training patients by
    ``|(mean z_j given nuisance 1 - mean z_j given nuisance 0) (w . d_j)|``, w the weights of a classifier of the
    nuisance there, and the first n (of those not 0) are ablated from the test embeddings, the reconstruction error
    kept (:func:`ablate`). The score is the share of the gap that this closes. SAEBench trains linear probes with AdamW
    and an L1 penalty; here they are logistic regressions with an L2 penalty on scaled embeddings, fitted to the
    optimum, so that nothing depends on batches or epochs.

    Parameters
    ----------
    adata
        Latents with ``obsm["embedding"]`` and ``varm["decoder"]``.
    target, nuisance
        Columns of ``obs`` with two values (diagnosis; scanner); of more, name two with ``classes`` and ``levels``.
    groups
        Column of independent groups. A group with rows in several cells counts in each, never in both parts.
    n_latents
        Numbers of latents to ablate.
    n_repeats, test
        Divisions of the patients, and the share left out in each; accuracies are means over them.
    max_rows
        Rows of a group and cell at most; groups weigh alike.
    C
        Inverse strength of the L2 penalty.
    ablation
        ``"zero"`` sets latents to 0, as SAEBench does, which also moves the classifier's threshold; ``"mean"`` sets
        them to their mean over the balanced training patients, which does not.
    n_random
        Sets of as many other active latents, as a control.
    n_bootstrap
        Resamples of patients for 95 % percentile intervals, the classifiers given.

    Returns
    -------
    DataFrame
        A row a (direction, n): ``direction`` (``target``: latents of the nuisance are ablated and the target is read;
        ``nuisance``: the reverse), ``reported`` (the direction of lower biased accuracy, as SAEBench reports),
        ``n_latents, n_used`` (fewer where effects are 0; mean over repeats), ``accuracy_clean, accuracy_biased,
        accuracy_ablated, scr, ci_low, ci_high, scr_random, scr_random_sd`` (mean and spread of the random sets),
        ``n_train, n_groups, n_samples, status``. Status ``unidentifiable`` (NaN): a cell of target by nuisance is
        empty; ``too_few_groups``: one has fewer than 4 groups. ``attrs["overlap"]``: counts of both labels.

    Raises
    ------
    InputError
        For absent columns, embeddings or decoder, other than two values, or codes that do not add up to embeddings.
    """
    if min(n_latents, default=-1) < 0 or ablation not in ("zero", "mean"):
        raise InputError("n_latents must be numbers of latents, none below 0, and ablation 'zero' or 'mean'")
    design = cells(
        adata, target, nuisance, groups, classes=classes, levels=levels, max_rows=max_rows, random_state=random_state
    )
    x, W = embedding(design.adata).astype(np.float64), decoder(design.adata).astype(np.float64)
    Z = sp.csc_matrix(design.adata.X, dtype=np.float64)
    scale = np.ravel(row_scale(design.adata, x.astype(np.float32)))
    rows = []
    for direction in ("target", "nuisance"):
        found = None
        if design.status == "ok":
            turned = design if direction == "target" else _swapped(design)
            found = _direction(
                turned, x, W, Z, scale, n_latents, n_repeats, test, C, ablation, n_random, n_bootstrap, random_state
            )
        for k, n in enumerate(n_latents):
            row = {"direction": direction, "reported": False, "n_latents": int(n)}
            row |= found[k] if found else dict.fromkeys(_MEASURED, np.nan)
            row |= {"n_groups": len(np.unique(design.group)), "n_samples": len(design.y), "status": design.status}
            rows.append(row)
    out = pd.DataFrame(rows)
    if design.status == "ok":
        first = out.groupby("direction", sort=False)["accuracy_biased"].first()
        out["reported"] = out["direction"] == first.idxmin()
    out.insert(0, "target", target)
    out.insert(1, "nuisance", nuisance)
    out.attrs["overlap"] = design.overlap
    return out


_MEASURED = (
    "n_used", "accuracy_clean", "accuracy_biased", "accuracy_ablated", "scr", "ci_low", "ci_high", "scr_random",
    "scr_random_sd", "n_train",
)  # fmt: skip


def _swapped(design: Cells) -> Cells:
    """Target and nuisance exchanged."""
    return replace(design, y=design.c, c=design.y, cell=2 * (design.cell % 2) + design.cell // 2)


def _direction(
    design, x, W, Z, scale, n_latents, n_repeats, test, C, ablation, n_random, n_bootstrap, random_state
) -> list[dict[str, float]]:
    rng = np.random.default_rng(random_state)
    G = int(design.group.max()) + 1
    times = rng.multinomial(G, np.full(G, 1.0 / G), size=n_bootstrap).astype(np.float64)
    names = ["clean", "biased", *range(len(n_latents))]
    point = {k: [] for k in names}
    resampled = {k: [] for k in names}
    chance = np.full((len(n_latents), n_random, n_repeats), np.nan)
    used, sizes = np.zeros((len(n_latents), n_repeats)), []
    for r in range(n_repeats):
        flip = bool(r % 2)
        train, held = divide(design, rng, test=test)
        n = size_of(design, train, flip)
        sizes.append(n)
        even, odd = (draw(design, train, step, n, rng, flip) for step in (0.0, 1.0))
        rows, weight = rows_of(design, even)
        clean, other = (_fit(x[rows], label[rows], weight, C) for label in (design.y, design.c))
        at, own = rows_of(design, odd)
        biased = _fit(x[at], design.y[at], own, C)
        effect = _effects(Z[rows], design.c[rows], weight, W @ other[0])
        ranked = np.argsort(-effect, kind="stable")[: int((effect > 0).sum())]
        seen, _ = rows_of(design, held)
        along = W @ biased[0]
        centre = np.asarray(Z[rows].T @ weight) / weight.sum() if ablation == "mean" else np.zeros(len(W))
        logit = x[seen] @ biased[0] + biased[1]
        part, y = Z[seen], design.y[seen]
        cell, own_group = design.cell[held], design.unit_group[held]

        def note(key, values, seen=seen, held=held, cell=cell, own_group=own_group, y=y):
            share = by_unit(design, (values > 0) == y, seen, held)
            point[key].append(balanced(share, cell))
            resampled[key].append(_resampled(share, cell, times[:, own_group]))

        def without(latents, part=part, along=along, centre=centre, logit=logit, seen=seen):
            moved = part[:, latents] @ along[latents] - centre[latents] @ along[latents]
            return logit - (scale[seen] if len(scale) > 1 else scale[0]) * moved

        note("clean", x[seen] @ clean[0] + clean[1])
        note("biased", logit)
        for k, wanted in enumerate(n_latents):
            chosen = ranked[:wanted]
            used[k, r] = len(chosen)
            note(k, without(chosen))
            rest = ranked[wanted:]
            for s in range(n_random):
                some = rng.choice(rest, min(len(chosen), len(rest)), replace=False)
                chance[k, s, r] = balanced(by_unit(design, (without(some) > 0) == y, seen, held), cell)
    mean = {k: float(np.mean(v)) for k, v in point.items()}
    again = {k: np.mean(v, axis=0) for k, v in resampled.items()}
    out = []
    for k in range(len(n_latents)):
        interval = np.nanquantile(score(again["clean"], again["biased"], again[k]), [0.025, 0.975])
        random = score(mean["clean"], mean["biased"], chance[k].mean(axis=1))
        scr = float(score(mean["clean"], mean["biased"], mean[k]))
        spread = float(random.std(ddof=1)) if n_random > 1 else np.nan
        accuracies = (mean["clean"], mean["biased"], mean[k])
        values = (used[k].mean(), *accuracies, scr, *map(float, interval), float(random.mean()), spread)
        out.append(dict(zip(_MEASURED, (*values, float(np.mean(sizes))))))
    return out


def _fit(x: np.ndarray, y: np.ndarray, weight: np.ndarray, C: float) -> tuple[np.ndarray, float]:
    """Weights (d,) and intercept of a logistic regression, in units of the embedding."""
    model = probe(False, C=C).fit(x, y, logisticregression__sample_weight=weight)
    scaler, probe_ = model[0], model[-1]
    w = probe_.coef_[0] / scaler.scale_
    return w, float(probe_.intercept_[0] - w @ scaler.mean_)


def _effects(Z: Any, c: np.ndarray, weight: np.ndarray, along: np.ndarray) -> np.ndarray:
    """``|(mean z_j given c = 1 - mean z_j given c = 0) (w . d_j)|`` of every latent, units weighing alike."""
    one, zero = (weight * (c == v) / (weight * (c == v)).sum() for v in (1, 0))
    return np.abs((Z.T @ (one - zero)) * along)


def _resampled(share: np.ndarray, cell: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Balanced accuracies (B,) with units counted ``times`` (B, units)."""
    member = np.eye(4)[cell]
    total = times @ member
    with np.errstate(invalid="ignore"):  # a cell without units in a resample is left out; NaN if there is none at all
        share = np.divide(times @ (member * share[:, None]), total, out=np.zeros_like(total), where=total > 0)
        return share.sum(axis=1) / (total > 0).sum(axis=1)
