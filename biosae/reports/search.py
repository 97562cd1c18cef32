"""The sections on how two cohorts differ and on what a search finds."""

from __future__ import annotations

from typing import Any

import pandas as pd

from biosae import pl
from biosae.pl import results, style
from biosae.pl.retrieval import MEASURES, REPRESENTATIONS
from biosae.reports.run import Run
from biosae.reports.tables import Figures, interval, table, without_constants

SHOWN = 12
"""Latents, and pairs, in the tables of two cohorts."""

_DIFF = {
    "latent": "latent", "frequency_a": "fires in A", "frequency_b": "fires in B", "difference": "A − B",
    "ci": "95 % CI", "p": "p", "q": "q", "p_maxt": "p (max-T)", "n_a": "n of A", "n_b": "n of B", "status": "status",
}  # fmt: skip
_PAIRS = {
    "latent_a": "latent", "latent_b": "with latent", "n_a": "fires in", "n_b": "other fires in", "n_both": "both",
    "npmi": "NPMI", "r_within": "φ within strata", "p": "p", "q": "q", "n_groups": "groups", "status": "status",
}  # fmt: skip
_RETRIEVAL = {
    "encoder": "encoder", "layer": "layer", "label": "label", "excluded": "excluded", "use_rep": "ranked by",
    "measure": "measure", "estimate": "estimate", "ci": "95 % CI", "chance": "chance", "n_queries": "queries",
    "n_groups": "groups", "n_left_out": "left out", "status": "status",
}  # fmt: skip


def cohorts(run: Run, figures: Figures) -> dict[str, Any] | None:
    """Latents that fire more often in one cohort, pairs of latents, and what was not tested."""
    frame = run.tables.get("diff")
    if frame is None:
        return None
    facts = run.cohorts
    frame = frame.copy()
    frame.attrs["biosae"] = facts
    unit = facts["noun"]
    first = frame.iloc[0]
    n = f"{style.count(first['n_a'], unit)} of {facts['a']}, {style.count(first['n_b'], unit)} of {facts['b']}"
    tested = int(frame["p"].notna().sum())
    pictures = [
        figures.add(
            "diff", pl.diff, frame, whole=True, size=(6.9, 3.4),
            alt=f"Share of samples in which each latent fires in {facts['a']} against {facts['b']}, and the "
            "differences with the strongest evidence.",
            caption=f"How often latents fire in both cohorts; n = {n}. Intervals are not widened for the choice.",
        )
    ] if tested else []  # fmt: skip
    leading, same = without_constants(frame[frame["p"].notna()].head(SHOWN))
    caption = f"A: {facts['a']}. B: {facts['b']}. The {len(leading)} latents with the strongest evidence"
    tables = [table(leading, _DIFF, caption=f"{caption} of {tested:,} tested.{same}")] if tested else []
    _pairs(run, figures, pictures, tables)
    return {
        "sentences": [*_cohort_sentences(frame, facts, unit)],
        "pictures": [p for p in pictures if p],
        "tables": tables,
    }


def _cohort_sentences(frame: pd.DataFrame, facts: dict[str, Any], unit: str) -> list[str]:
    first = frame.iloc[0]
    sides = [
        f"{side.upper()} is {facts[side]}: {style.count(first[f'n_{side}'], unit)}"
        + ("" if unit == "sample" else f" ({style.count(first[f'n_samples_{side}'], 'sample')})")
        for side in "ab"
    ]
    said = f"{'. '.join(sides)}." + (f" The same {unit}s are in both." if facts.get("paired") else "")
    left = {"samples_without_cohort": "samples are of neither", "samples_left_out": "samples were left out",
            "patients_left_out": f"{unit}s were left out"}  # fmt: skip
    counts = [f"{int(facts[key]):,} {words}" for key, words in left.items() if facts.get(key)]
    said += f" {'; '.join(counts)}." if counts else ""
    refused = _withheld(frame)
    tested = f"{frame['p'].notna().sum():,} of {style.count(len(frame), 'latent')} were tested"
    tested += f"; not tested: {refused}." if refused else "."
    return [said, f"{tested} What differs may be the device, the preparation or the people."]


def _pairs(run: Run, figures: Figures, pictures: list[Any], tables: list[Any]) -> None:
    frame = run.tables.get("pairs")
    if frame is None:
        return
    facts = frame.attrs.get("biosae", {})
    within = f" within {facts['strata']}" if facts.get("strata") else ""
    n = style.count(int(frame["n"].iloc[0]), "sample")
    tested = int(frame["p"].notna().sum())
    pictures.append(
        figures.add(
            "pairs", pl.pairs, frame, size=(3.9, 3.6),
            alt=f"Mutual information of pairs of latents over all samples against their correlation{within}.",
            caption=f"Which latents go together{within}; n = {n} of both cohorts.",
        )
    )  # fmt: skip
    refused = _withheld(frame)
    leading, same = without_constants(frame[frame["p"].notna()].head(SHOWN))
    said = f"{tested:,} of {style.count(len(frame), 'pair')} tested{f' (not: {refused})' if refused else ''}"
    if tested:
        tables.append(table(leading, _PAIRS, caption=f"Pairs{within} with the strongest evidence; {said}.{same}"))
    else:
        tables.append(table(frame.head(0), {}, caption=f"Pairs{within}: {said}."))


def _withheld(frame: pd.DataFrame) -> str:
    """``coverage 12, dead 40``: rows without a p, by status."""
    return ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in results.status_counts(frame).items())


def retrieval(run: Run, figures: Figures) -> dict[str, Any] | None:
    """Precision of rankings by label and by what was excluded, beside chance, and what was refused."""
    frame = run.tables.get("retrieval_all", run.tables.get("retrieval"))
    if frame is None:
        return None
    views = frame.groupby(["encoder", "layer"]).ngroups if {"encoder", "layer"} <= set(frame) else 1
    if views == 1:
        frame = frame.drop(columns=[c for c in ("encoder", "layer") if c in frame])
    refused, measured = (frame[(frame["status"] == "refused") == side] for side in (True, False))
    found = {"sentences": [_ranked(frame)], "figure": None, "table": None, "all": None}
    found["refused"] = _refused(run, refused) if len(refused) else None
    if measured.empty:
        return found
    reps = sum(" - " not in rep for rep in pd.unique(frame["use_rep"].astype(str)))
    lines = views * reps + (1.3 * views if views > 1 else 0)
    found["figure"] = figures.add(
        "retrieval", pl.retrieval, frame, whole=True,
        size=(1.9 + 1.85 * frame["excluded"].nunique(), 0.4 + (0.85 + 0.17 * lines) * frame["label"].nunique()),
        alt="Mean average precision of rankings by codes and embeddings, a panel a label and exclusion, with chance.",
        caption="Do the nearest samples share the label? Dashed: a random order. Bars: 95 % interval over "
        f"{_over(frame)}; hollow: fewer than 20 groups. n stands above each panel.",
    )  # fmt: skip
    printed = measured.assign(
        use_rep=measured["use_rep"].map(_representation), measure=measured["measure"].map(_measure)
    )
    shown, same = without_constants(_by_setting(printed[printed["measure"] == MEASURES["ap"]]))
    caption = f"Mean average precision with 95 % intervals; differences are paired by query.{same}"
    found["table"] = table(shown, caption=caption, digits=3)
    shown, same = without_constants(printed[printed["estimate"].notna()])
    found["all"] = table(shown, _RETRIEVAL, caption=f"Every measure.{same}", digits=3)
    return found


def _by_setting(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a view, label and exclusion: chance, codes and what they gain, then each other representation."""
    keys = [c for c in ("encoder", "layer", "label", "excluded") if c in frame]
    rows = []
    for key, part in frame.groupby(keys, sort=False):
        codes = part["use_rep"].str.startswith(REPRESENTATIONS["X"])
        kept = pd.concat([part[codes], part[~codes & ~part["use_rep"].str.contains(" − ")]])
        spans = {r.use_rep: _estimate(r.estimate, r.ci_low, r.ci_high) for r in kept.itertuples()}
        first = part.iloc[0]
        counts = {name: first[name] for name in ("n_queries", "n_groups", "n_left_out", "status")}
        rows.append(dict(zip(keys, key)) | {"chance": first["chance"]} | spans | counts)
    return pd.DataFrame(rows)


def _estimate(value: float, low: float, high: float) -> str:
    if pd.isna(value):
        return "–"
    span = f" ({interval(low, high, digits=3)})" if pd.notna(low) else ""
    return style.number(value, digits=3) + span


def _ranked(frame: pd.DataFrame) -> str:
    """Who asked, how, and what nobody could answer."""
    metric = frame["metric"].iloc[0] if "metric" in frame else "cosine"
    text = f"Every query ranks the others by {metric}; relevant is what has its label. "
    left = frame.loc[frame["status"] == "no_queries", ["label", "excluded"]].drop_duplicates()
    if len(left):
        pairs = "; ".join(f"{row.label} with {row.excluded} excluded" for row in left.itertuples())
        text += f"Not measured, since nothing relevant is left: {pairs}. "
    return text + "Compare with chance, not with 0: it changes with what is excluded."


def _over(frame: pd.DataFrame) -> str:
    groups = str(frame["groups"].iloc[0]) if "groups" in frame else "groups"
    return groups.replace("_", " ")


def _refused(run: Run, rows: pd.DataFrame) -> Any:
    lead = [c for c in ("encoder", "layer", "label", "excluded", "reason") if c in rows]
    rows = rows[lead].drop_duplicates().assign(reason=lambda r: r["reason"].map(run.redact))
    return table(rows, {c: c for c in lead}, caption="What could not be asked of these samples.")


def _representation(rep: str) -> str:
    return " − ".join(REPRESENTATIONS.get(part, part) for part in str(rep).split(" - "))


def _measure(name: str) -> str:
    kind, _, place = str(name).partition("@")
    return MEASURES.get(kind, kind) + (f"@{place}" if place else "")
