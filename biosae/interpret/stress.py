"""Stress card of a latent: does its meaning survive other doses, layers, contexts, look-alikes and seeds?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, StatisticsError, nearest
from biosae.interpret import stress_checks as checks
from biosae.interpret import stress_probes as probes
from biosae.interpret import stress_tables as tables
from biosae.interpret.resampled import Number
from biosae.stats.adjust import is_categorical
from biosae.stats.features import positions
from biosae.stats.nested import codes_of, in_memory

DIRECTIONS = ("auto", "higher", "lower")
THRESHOLDS = {
    "association": 0.5, "dose": 0.6, "layer": 0.5, "context": 0.5, "contradiction": 0.8, "neighbours": 0.8,
    "look_alikes": 0.8, "seeds": 0.7, "perturbation": 0.7,
}  # fmt: skip
"""Least score of each check. They are conventions of this package, not of the literature."""
VERDICTS = ("passed", "failed", "unclear", "no_interval", "refused")
COLUMNS = [
    "latent", "target", "check", "of", "score", "ci_low", "ci_high", "threshold", "verdict", "n_patients", "n_samples",
    "status", "reason", "reading",
]  # fmt: skip


@dataclass(frozen=True)
class StressCard:
    """What the checks found. ``table`` has a row a check, ``details`` the numbers behind each."""

    latent: str
    target: str
    claim: str
    """The statement that is tested, in words."""
    table: pd.DataFrame = field(repr=False)
    details: dict[str, pd.DataFrame] = field(repr=False)
    """``dose``, ``layer``, ``context:<column>``, ``contradiction``, ``neighbours``, ``look_alikes:<name>``, ``seeds``,
    ``perturbation``: those that could be made."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not a number is None."""

        def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
            return table.astype(object).where(table.notna(), None).to_dict("records")

        return {
            "latent": self.latent, "target": self.target, "claim": self.claim, "checks": rows(self.table),
            "details": {name: rows(table) for name, table in self.details.items()},
        }  # fmt: skip

    def _repr_html_(self) -> str:
        import html

        return f"<p>{html.escape(self.claim)}</p>{self.table[COLUMNS[2:]].to_html(index=False)}"


def stress(
    adata: Any,
    latent: str,
    target: str,
    *,
    positive: str | None = None,
    cut: float | None = None,
    direction: str = "auto",
    context: str | Sequence[str] = (),
    off_targets: str | Sequence[str] = (),
    look_alikes: str | Sequence[str] | Mapping[str, Any] = (),
    layers: Mapping[str, Any] | None = None,
    seeds: Sequence[Any] = (),
    perturbed: Mapping[str, Any] | None = None,
    view: np.ndarray | None = None,
    groups: str = "patient",
    top: float = 0.1,
    only: Sequence[str] | None = None,
    random_state: int = 0,
) -> StressCard:
    """Test the statement "this latent goes with this label" under conditions in which it may break.

    Every check gives a number in [0, 1], higher is sturdier, with the patients and samples it stands on and a 95 %
    interval over patients (bootstrap of whole patients); what cannot be measured is a row with its reason. Checks:

    * ``association``: AUROC of the latent for the label.
    * ``dose``: share of dose steps (0, 0.5, 1, 2, 4, 8 times the typical code) at which adding the latent to the
      embedding raises a probe of the label further, and more than 95 % of random latents of like density do, while
      probes of other columns lose less than 10 %. Probes are read on patients they were not fitted to.
    * ``layer``: mean rank correlation with the best latents of other layers, chosen in other patients.
    * ``context``: with ``A_s`` the AUROC in each stratum and ``A`` that of all rows, ``(min A_s - 0.5) /
      (max(A, A_s) - 0.5)``: the part of the largest effect that the worst stratum keeps.
    * ``contradiction``: share of the strongest firings that have the label (signed codes: of both ends).
    * ``neighbours``: AUROC for telling the strongest examples from those of the 5 nearest latents by decoder cosine.
    * ``look_alikes``: one minus the share of a look-alike above the threshold that finds 95 % of the label.
    * ``seeds``: correlation of codes with the latent of nearest atom in dictionaries of other seeds.
    * ``perturbation``: concordance of codes before and after a change of the items that does not touch the label.

    Parameters
    ----------
    adata
        Latents of :func:`biosae.encode`, (n, m).
    latent
        Name of the latent.
    target
        Column of ``obs``: a label, or a number with ``cut``.
    positive
        Class that the latent is said to mark. Needed for more than two classes; of two, the second in sorted order.
    cut
        A numeric target counts as positive above this value.
    direction
        Whether high or low codes go with the label; ``"auto"`` takes the side of the AUROC in these rows.
    context
        Columns of strata (organ, stain, site); a row of the card for each.
    off_targets
        Columns whose probes must not suffer from a dose: labels, or numbers (split at their median). Default: those
        of ``context``.
    look_alikes
        Columns of ``obs`` (booleans, or 0 and 1), or a mapping of names to them or to masks (arrays (n,) in the order
        of the table, or Series by sample id): items that resemble the label and are not it. Items that have the label
        are left out.
    layers
        Name of a layer -> latents of the same samples there.
    seeds
        Latents of the same samples by dictionaries fitted alike with other seeds; two or more.
    perturbed
        Name of a change (crop, hue, swapped leads) -> latents of the same samples after it, by the same dictionary.
    view
        Embeddings (n, d2) of another encoder with which neighbours are told apart; default ``obsm["embedding"]``.
    groups
        Column of the patients.
    top
        Share of the firings that count as the strongest.
    only
        Checks to make; all by default.
    random_state
        Seed of folds, controls and resamples.

    Returns
    -------
    StressCard
        ``table``: ``latent, target, check, of, score, ci_low, ci_high, threshold, verdict, n_patients, n_samples,
        status, reason, reading``. ``verdict``: ``passed`` if the whole interval lies at or above the threshold (above
        0.5 for the association), ``failed`` if it lies below, ``unclear``, ``no_interval`` or ``refused``.

    Raises
    ------
    InputError
        For unknown names, a target that is not cut to two classes, or tables of other samples.
    StatisticsError
        Without a column of patients, or if the label has one class.

    References
    ----------
    After Ronge, Maier and Eberhardt 2026, arXiv 2601.03047; the scores are definitions of this package.
    """
    if direction not in DIRECTIONS:
        raise InputError(f"direction={direction!r}; {nearest(direction, DIRECTIONS)}")
    if not 0 < top <= 1:
        raise InputError(f"top={top} must lie in (0, 1]")
    unknown = [name for name in only or () if name not in THRESHOLDS]
    if unknown:
        raise InputError(f"no check {unknown[0]!r}; {nearest(unknown[0], THRESHOLDS)}")
    claim = _claim(adata, latent, target, positive, cut, direction, groups, random_state)
    strata = [context] if isinstance(context, str) else list(context)
    others = [off_targets] if isinstance(off_targets, str) else list(off_targets)
    _known(claim.obs, [*strata, *others])
    if view is not None and len(view) != adata.n_obs:
        raise InputError(f"view has {len(view)} rows, the table {adata.n_obs}")
    likes = _look_alikes(claim, adata.n_obs, look_alikes)
    rows: list[tuple[str, str, Number, str]] = []
    details: dict[str, pd.DataFrame] = {}

    def note(check: str, of: str, found: tuple[Number, str, pd.DataFrame | None], key: str | None = None) -> None:
        number, reading, detail = found
        rows.append((check, of, number, reading))
        if detail is not None:
            details[key or check] = detail

    seen = None if view is None else np.asarray(view)[claim.rows]
    single = {
        "association": lambda: checks.association(claim),
        "dose": lambda: probes.dose(claim, others or strata, random_state=random_state),
        "layer": lambda: tables.layer(claim, layers or {}),
        "contradiction": lambda: checks.contradiction(claim, top=top),
        "neighbours": lambda: probes.neighbours(claim, seen),
        "seeds": lambda: tables.seeds(claim, list(seeds)),
        "perturbation": lambda: tables.perturbation(claim, perturbed or {}),
    }
    wanted = list(THRESHOLDS) if only is None else list(only)
    for check in THRESHOLDS:
        if check not in wanted:
            continue
        if check == "context":
            for column in strata:
                note("context", column, checks.context(claim, column), f"context:{column}")
            if not strata:
                note("context", "", claim.no("no column of strata was named (context=)"))
        elif check == "look_alikes":
            for name, mask in likes.items():
                note("look_alikes", name, checks.look_alike(claim, mask), f"look_alikes:{name}")
            if not likes:
                note("look_alikes", "", claim.no("no look-alikes were named (look_alikes=)"))
        else:
            note(check, "", single[check]())
    table = pd.DataFrame([_row(latent, target, *row) for row in rows], columns=COLUMNS)
    return StressCard(str(latent), str(target), claim.text, table, details)


def _row(latent: str, target: str, check: str, of: str, number: Number, reading: str) -> dict[str, Any]:
    least = THRESHOLDS[check]
    if number.status == "refused":
        verdict = "refused"
    elif np.isnan(number.low):
        verdict = "no_interval"
    elif np.isnan(number.score):  # an interval only
        verdict = "unclear"
    elif number.low > least or (number.low == least and check != "association"):
        verdict = "passed"
    else:
        verdict = "failed" if number.high < least else "unclear"
    return {
        "latent": str(latent), "target": str(target), "check": check, "of": of, "score": number.score,
        "ci_low": number.low, "ci_high": number.high, "threshold": least, "verdict": verdict,
        "n_patients": number.n_patients, "n_samples": number.n_samples, "status": number.status,
        "reason": number.reason, "reading": reading,
    }  # fmt: skip


def _known(obs: pd.DataFrame, names: Sequence[str]) -> None:
    for name in names:
        if name not in obs:
            raise InputError(f"{name!r} is not a column of obs; columns: {', '.join(map(str, obs.columns))}")


def _claim(
    adata: Any, latent: str, target: str, positive: str | None, cut: float | None, direction: str, groups: str,
    random_state: int,
) -> checks.Claim:  # fmt: skip
    adata = in_memory(adata)
    obs = adata.obs
    _known(obs, [target])
    if groups not in obs:
        raise StatisticsError(
            f"obs has no column {groups!r}, so nothing says which samples are independent; name it with groups="
        )
    at = int(positions(adata, [latent])[0])
    rows, y, label = _label(obs[target], target, positive, cut)
    kept = np.flatnonzero(rows)
    y = y[kept]
    if not len(kept) or y.all() or not y.any():
        raise StatisticsError(
            f"{label!r} holds in {int(y.sum())} of {len(kept)} samples: there is nothing to tell apart"
        )
    part = adata[kept]
    z = np.asarray(sp.csr_matrix(part.X[:, [at]]).todense(), dtype=np.float64).ravel()
    sign = {"higher": 1, "lower": -1}.get(direction) or (1 if checks.Order(z).auroc(y, np.ones(len(z))) >= 0.5 else -1)
    text = f"{'high' if sign > 0 else 'low'} {latent} goes with {label}"
    return checks.Claim(part, kept, str(latent), at, z, sign, y, codes_of(part.obs, groups)[0], text, random_state)


def _label(
    column: pd.Series, name: str, positive: str | None, cut: float | None
) -> tuple[np.ndarray, np.ndarray, str]:  # fmt: skip
    """Rows with a value, which of them are positive, and the label in words."""
    known = column.notna().to_numpy()
    if not is_categorical(column) and not set(pd.unique(column.dropna())) <= {0, 1}:
        values = column.to_numpy(np.float64, na_value=np.nan)
        if cut is None:
            raise InputError(
                f"{name!r} is a number; say above which value it counts with cut= (median: {np.nanmedian(values):g})"
            )
        return known, np.where(known, values, -np.inf) > cut, f"{name} > {cut:g}"
    if cut is not None:
        raise InputError(f"{name!r} is a label; cut= is for numbers, name a class with positive=")
    if not is_categorical(column) or pd.api.types.is_bool_dtype(column):
        true = column.astype("Float64").fillna(0).to_numpy(float) > 0
        if positive is None or str(positive) in ("1", "1.0", "True"):
            return known, true, name
        if str(positive) in ("0", "0.0", "False"):
            return known, known & ~true, f"not {name}"
        raise InputError(f"{name!r} is 0 or 1; {nearest(positive, ('1', '0'))}")
    texts = column.astype("string")
    classes = sorted(texts.dropna().unique())
    if positive is None and len(classes) != 2:
        raise InputError(f"{name!r} has {len(classes)} classes; name one with positive=: {', '.join(classes[:20])}")
    wanted = classes[-1] if positive is None else str(positive)
    if wanted not in classes:
        raise InputError(f"{name!r} has no class {wanted!r}; {nearest(wanted, classes)}")
    return known, (texts == wanted).fillna(False).to_numpy(bool), f"{name} = {wanted}"


def _look_alikes(claim: checks.Claim, n: int, given: Any) -> dict[str, np.ndarray]:
    """Masks (rows of the claim,) by name."""
    named = {given: given} if isinstance(given, str) else given
    named = dict(named) if isinstance(named, Mapping) else {str(name): name for name in named}
    out = {}
    for name, value in named.items():
        if isinstance(value, str):
            _known(claim.obs, [value])
            column = claim.obs[value]
            if not set(pd.unique(column.dropna().astype(str))) <= {"0", "1", "0.0", "1.0", "True", "False"}:
                raise InputError(f"look-alikes are booleans or 0 and 1; {value!r} is not: pass a mask (n,)")
            out[name] = column.astype(str).isin(("1", "1.0", "True")).to_numpy()
            continue
        by_id = isinstance(value, pd.Series)
        if by_id and not value.index.is_unique:
            raise InputError(f"ids repeat in the mask of {name!r}")
        mask = np.asarray(value.reindex(claim.obs.index) if by_id else value, dtype=object)
        if not by_id and mask.shape != (n,):
            raise InputError(f"the mask of {name!r} has shape {mask.shape}, the table has {n} rows")
        if not set(pd.unique(mask)) <= {0, 1}:
            raise InputError(f"the mask of {name!r} must be True or False for every row of the table, without gaps")
        out[name] = (mask if by_id else mask[claim.rows]).astype(bool)
    return out
