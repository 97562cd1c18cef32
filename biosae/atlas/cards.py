"""Stress cards on the page: those that were given, and those of the latents that stand first for a target."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import anndata
import pandas as pd

from biosae.atlas.packing import number
from biosae.errors import BiosaeError, InputError, nearest
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
    the technical factors. It is marked as ``chosen``: the same samples chose the latent. A number as target is cut at
    its median, of many classes that with the largest codes is taken. Layers, seeds, look-alikes and altered items are
    refused on such a card; make one with :func:`biosae.interpret.stress` to have them.

    Raises
    ------
    InputError
        If a card that was given is of a latent that the run does not have.
    """
    from tqdm.auto import tqdm

    out: dict[str, list[dict[str, Any]]] = {}
    unknown = [card.latent for card in given if card.latent not in run.adata.var_names]
    if unknown:
        raise InputError(f"cards has one of {unknown[0]!r}; {nearest(unknown[0], run.adata.var_names)}")
    for card in given:
        out.setdefault(card.latent, []).append(_plain(run, card))
    made = {(card.latent, card.target) for card in given}
    chosen = [pair for pair in _leading(run, n) if pair not in made] if n else []
    adata = _nameless(run)
    for latent, target in tqdm(chosen, desc="stress cards", disable=not settings.progress or not chosen):
        try:
            card = stress(adata, latent, target, random_state=random_state, **_question(run, latent, target))
        except BiosaeError as error:
            card = {"target": run.redact(target), "claim": run.redact(error), "checks": []}
        else:
            card = _plain(run, card) | {"chosen": True}
        out.setdefault(latent, []).append(card)
    return out


def _leading(run: Run, n: int) -> list[tuple[str, str]]:
    """``n`` pairs of latent and target: the first of each target, then the second of each, ..."""
    rows = results.ranked(run.associations[run.associations["source"] == "latent"])
    rows = rows[rows["target"].isin(run.adata.obs.columns) & rows["latent"].isin(run.adata.var_names)]
    turn = rows.groupby("target").cumcount()
    rows = rows.assign(_turn=turn).sort_values("_turn", kind="stable").drop_duplicates(["latent", "target"])
    return [(str(r.latent), str(r.target)) for r in rows.head(n).itertuples()]


def _nameless(run: Run) -> Any:
    """The latents with pseudonyms of slides: a card names the stratum in which a latent is worst."""
    adata = run.adata
    if run.show_ids or "slide" not in adata.obs:
        return adata
    obs = adata.obs.assign(slide=adata.obs["slide"].map(run.pseudonym, na_action="ignore"))
    out = anndata.AnnData(adata.X, obs=obs, var=adata.var, obsm=dict(adata.obsm), varm=dict(adata.varm))
    out.uns = adata.uns
    return out


def _question(run: Run, latent: str, target: str) -> dict[str, Any]:
    """How a target is cut to two classes, and the columns of strata. Of many classes that with the largest codes."""
    obs = run.adata.obs
    column = obs[target]
    question: dict[str, Any] = {"context": _strata(run, target)}
    if pd.api.types.is_numeric_dtype(column) and column.dtype != bool and set(column.dropna().unique()) - {0, 1}:
        question["cut"] = float(column.median())
    elif column.nunique() > 2:
        codes = pd.Series(run.adata[:, latent].X.toarray().ravel(), index=obs.index)
        question["positive"] = str(codes.groupby(column.astype("string")).mean().abs().idxmax())
    return question


def _strata(run: Run, target: str) -> list[str]:
    obs = run.adata.obs
    named = [c for c in ("site", "scanner", "location", "collector", "slide") if c in obs and c != target]
    return [c for c in named if 2 <= obs[c].nunique() <= _FEW_LEVELS][:3]


def _reading(run: Run, row: dict[str, Any]) -> str:
    """What a check found; of strata also ids that are too short to be looked for in any text."""
    text = run.redact(row["reading"] or "")
    if run.show_ids or row["check"] != "context" or row["of"] not in ("slide", "patient"):
        return text
    return re.sub(r"(?<=worst: ).*(?=; 1 - spread)", lambda m: run.pseudonyms.get(m.group(0), m.group(0)), text)


def _plain(run: Run, card: StressCard) -> dict[str, Any]:
    keys = ("score", "ci_low", "ci_high", "threshold", "n_patients", "n_samples")
    checks = [
        {
            "check": str(row["check"]).replace("_", " "),
            "of": run.redact(row["of"]),
            "verdict": str(row["verdict"]).replace("_", " "),
            "reason": run.redact(row["reason"] or ""),
            "reading": _reading(run, row),
            **{key: number(row[key], digits=3) for key in keys},
        }
        for row in card.table.to_dict("records")
    ]
    return {"target": run.redact(card.target), "claim": run.redact(card.claim), "checks": checks}
