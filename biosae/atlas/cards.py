"""Stress cards on the page: those that were given, and those of the latents that stand first for a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from biosae.atlas.packing import number
from biosae.errors import BiosaeError
from biosae.interpret.stress import StressCard, stress
from biosae.pl import results
from biosae.reports.run import Run
from biosae.settings import settings

_FEW_LEVELS = 12


def stress_cards(
    run: Run, given: Sequence[StressCard], *, n: int, random_state: int
) -> dict[str, list[dict[str, Any]]]:
    """Latent -> its cards as plain values. Cards that are given come first; ``n`` more are made here.

    A card is made for the latents that stand first for each target, in turn, with what a run folder holds: strata of
    the technical factors. A number as target is cut at its median. Layers, seeds, look-alikes and altered items are
    refused on such a card; make one with :func:`biosae.interpret.stress` to have them.
    """
    from tqdm.auto import tqdm

    out: dict[str, list[dict[str, Any]]] = {}
    for card in given:
        out.setdefault(card.latent, []).append(_plain(run, card))
    made = {(card.latent, card.target) for card in given}
    chosen = [pair for pair in _leading(run, n) if pair not in made] if n else []
    for latent, target in tqdm(chosen, desc="stress cards", disable=not settings.progress or not chosen):
        try:
            card = stress(run.adata, latent, target, random_state=random_state, **_question(run, target))
        except BiosaeError as error:
            out.setdefault(latent, []).append({"target": run.redact(target), "claim": run.redact(error), "checks": []})
        else:
            out.setdefault(latent, []).append(_plain(run, card))
    return out


def _leading(run: Run, n: int) -> list[tuple[str, str]]:
    """``n`` pairs of latent and target: the first of each target, then the second of each, ..."""
    rows = results.ranked(run.associations[run.associations["source"] == "latent"])
    rows = rows[rows["target"].isin(run.adata.obs.columns) & rows["latent"].isin(run.adata.var_names)]
    turn = rows.groupby("target").cumcount()
    rows = rows.assign(_turn=turn).sort_values("_turn", kind="stable").drop_duplicates(["latent", "target"])
    return [(str(r.latent), str(r.target)) for r in rows.head(n).itertuples()]


def _question(run: Run, target: str) -> dict[str, Any]:
    """How a target is cut to two classes, and the columns of strata."""
    obs = run.adata.obs
    column = obs[target]
    question: dict[str, Any] = {"context": _strata(run, target)}
    if pd.api.types.is_numeric_dtype(column) and column.dtype != bool and set(column.dropna().unique()) - {0, 1}:
        question["cut"] = float(column.median())
    elif column.nunique() > 2:
        question["positive"] = str(column.astype(str).value_counts().index[0])
    return question


def _strata(run: Run, target: str) -> list[str]:
    obs = run.adata.obs
    named = [c for c in ("site", "scanner", "location", "collector", "slide") if c in obs and c != target]
    return [c for c in named if 2 <= obs[c].nunique() <= _FEW_LEVELS][:3]


def _plain(run: Run, card: StressCard) -> dict[str, Any]:
    keys = ("score", "ci_low", "ci_high", "threshold", "n_patients", "n_samples")
    checks = [
        {
            "check": str(row["check"]).replace("_", " "),
            "of": run.redact(row["of"]),
            "verdict": str(row["verdict"]).replace("_", " "),
            "reason": run.redact(row["reason"] or ""),
            "reading": run.redact(row["reading"] or ""),
            **{key: number(row[key], digits=3) for key in keys},
        }
        for row in card.table.to_dict("records")
    ]
    return {"target": run.redact(card.target), "claim": run.redact(card.claim), "checks": checks}
