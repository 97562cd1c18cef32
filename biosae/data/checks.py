"""The checks of an audit: each looks at a table and says what is wrong with it, in words that suit the kind of item."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from biosae.data.items import NOUNS
from biosae.data.roles import UNITS
from biosae.data.samples import Samples

CHECKS = {
    "patient": "patients are known and enough",
    "leakage": "no patient, slide or image lies on two sides of the split",
    "inseparable": "labels can be told apart from confounders",
    "confounding": "labels are not tied to confounders",
    "cells": "no combination of label and confounder is empty or nearly so",
    "aliases": "confounders can be told apart from each other",
    "unreadable": "every item can be read",
    "duplicates": "no image occurs twice",
    "names": "names of patients and slides are consistent",
    "sizes": "all images have one size",
    "blank": "no image is of one colour throughout",
    "flat": "no signal has a flat channel",
    "gaps": "no signal has missing values",
    "finite": "no vector holds NaN or infinity",
}
WORDS: dict[str, dict[str, str]] = {
    "image": {"one": "image", "size": "image_size", "blank": "of one colour throughout"},
    "signal": {
        "one": "signal", "size": "signal_size", "blank": "flat or missing throughout",
        "leakage": "no patient, recording or signal lies on two sides of the split",
        "duplicates": "no signal occurs twice",
        "sizes": "all signals have one number of channels and one length",
        "blank_ok": "no signal is flat or missing throughout",
    },
    "features": {
        "one": "vector", "size": "vector_size", "blank": "of one value throughout",
        "leakage": "no patient, slide or vector lies on two sides of the split",
        "duplicates": "no vector occurs twice",
        "sizes": "all vectors have one length",
        "blank_ok": "no vector is of one value throughout",
    },
}  # fmt: skip
MIN_PATIENTS = 5  # of 4, an exact permutation test has 4! orders: its smallest two-sided p is 2 / 24
MAX_SIZES = 10  # more sizes of images than this are no confounder with levels
STRONG_V, STRONG_ETA = 0.5, 0.14  # "large" in Cohen (1988): w = 0.5, eta squared = 0.14


def sizes_in_words(items: pd.DataFrame, item: str) -> pd.Series:
    """Size in words of each item that could be read: ``"width x height"``, ``"channels x times"`` or the length."""
    sides = {"image": ["width", "height"], "signal": ["n_channels", "n_times"], "features": ["length"]}[item]
    read = items.loc[items[sides[0]].notna(), sides].astype(int).astype(str)
    return read[sides[0]] if len(sides) == 1 else read[sides[0]] + " x " + read[sides[1]]


def _row(check: str, found: Any, message: str, *, n: int | None = None) -> tuple[str, str, int, str]:
    """A row of ``checks``; the message speaks only of a problem."""
    n = int(found) if n is None else n
    return (check, "problem", n, message) if found else (check, "ok", 0, CHECKS[check])


def _skipped(check: str, why: str) -> tuple[str, str, int, str]:
    return check, "not checked", 0, why


def check_people(samples: Samples) -> list[tuple]:
    """Rows on patients and on names of patients, slides, recordings and sequences."""
    obs = samples.obs
    rows = []
    if "patient" not in obs:
        text = "unknown, so samples may depend on each other and no result can claim to hold for new patients"
        rows.append(_row("patient", True, text))
    else:
        n = obs["patient"].nunique()
        text = (
            f"{n}: no exact test of fewer than {MIN_PATIENTS} patients reaches p < 0.05 (two equal groups need 4 each)"
        )
        rows.append(_row("patient", n < MIN_PATIENTS, text, n=n))
    for role in UNITS:
        if role in obs:
            names = pd.Series(obs[role].dropna().unique(), dtype=object)
            plain = names.str.lower().str.replace(r"[\s_\-]+", "", regex=True)
            alike = names[plain.duplicated(keep=False)].tolist()
            text = f"{len(alike)} names of {role}s differ only in case, blanks or dashes: {_some(alike)}"
            if alike:
                rows.append(_row("names", len(alike), text))
    for role in ("slide", "recording"):
        if {"patient", role} <= set(obs):
            owners = obs.groupby(role)["patient"].nunique()
            shared = owners.index[owners > 1].tolist()
            if shared:
                text = f"{len(shared)} {role}s belong to several patients: {_some(shared)}"
                rows.append(_row("names", len(shared), text))
    if not any(r[0] == "names" for r in rows) and set(UNITS) & set(obs):
        rows.append(_row("names", 0, ""))
    return rows


def check_items(
    items: pd.DataFrame, unreadable: pd.DataFrame, duplicates: pd.DataFrame, labels: list[str], read: bool, item: str
) -> list[tuple]:
    """Rows on what was read of the items themselves."""
    more = {"signal": ("flat", "gaps"), "features": ("finite",)}.get(item, ())
    if not read:
        return [_skipped(c, "needs read=True") for c in ("unreadable", "sizes", "blank", "duplicates", *more)]
    words, nouns = WORDS[item], NOUNS[item]
    reasons = ", ".join(f"{n} {r}" for r, n in unreadable["reason"].value_counts().items())
    rows = [_row("unreadable", len(unreadable), f"{len(unreadable)} of {len(items)}: {reasons}")]
    sizes = sizes_in_words(items, item).value_counts()
    shown = ", ".join(f"{n} of {s}" for s, n in sizes.head(5).items()) + (" ..." if len(sizes) > 5 else "")
    rows.append(_row("sizes", len(sizes) > 1, f"{len(sizes)} sizes: {shown}", n=len(sizes)))
    blank = int(items["blank"].eq(True).sum())
    rows.append(_row("blank", blank, f"{blank} {nouns} {words['blank']}; they are left out of the duplicates"))
    n_groups = duplicates["group"].nunique()
    text = f"{n_groups} {words['one']}(s) occur more than once ({len(duplicates)} samples)"
    for column in ("patient", *labels):
        if column in duplicates:
            differing = int(duplicates.groupby("group")[column].nunique().gt(1).sum())
            text += f", {differing} with different {column}" if differing else ""
    rows.append(_row("duplicates", n_groups, text))
    if item == "signal":
        flat, gaps = int(items["n_flat"].gt(0).sum()), items["missing_share"].astype(float)
        rows.append(_row("flat", flat, f"{flat} signals have flat channels, {int(items['n_flat'].sum())} in all"))
        text = f"{int((gaps > 0).sum())} signals have missing values, at most {gaps.max():.0%} of one"
        rows.append(_row("gaps", int((gaps > 0).sum()), text))
    if item == "features":
        bad = int(items["n_not_finite"].gt(0).sum())
        rows.append(_row("finite", bad, f"{bad} vectors hold NaN or infinity"))
    ok = {
        c: words[w] for c, w in (("duplicates", "duplicates"), ("sizes", "sizes"), ("blank", "blank_ok")) if w in words
    }
    return [(c, s, n, ok.get(c, m) if s == "ok" else m) for c, s, n, m in rows]


def check_leakage(obs: pd.DataFrame, leakage: pd.DataFrame, read: bool, item: str) -> tuple:
    """The row on units that lie in more than one part of the split."""
    if "split" not in obs:
        return _skipped("leakage", "there is no split")
    counts = leakage["unit"].value_counts()
    names = {u: f"{u}s" for u in (*UNITS, "file")} | {"duplicates": f"groups of identical {NOUNS[item]}"}
    parts = [f"{counts[u]} {name}" for u, name in names.items() if u in counts]
    if not parts and not (set(UNITS) & set(obs)):
        seen = f"identical {NOUNS[item]} do not cross the split, but " if read else ""
        return _skipped("leakage", f"{seen}neither patient nor slide is known")
    check, status, n, message = _row(
        "leakage", len(leakage), " and ".join(parts) + " lie in more than one part of the split"
    )
    return check, status, n, message if parts else WORDS[item].get("leakage", message)


def check_aliases(aliases: dict[str, str], varying: list[str]) -> list[tuple]:
    """Rows on confounders that divide the samples alike."""
    if aliases:
        return [
            _row("aliases", True, f"{a} and {b} divide the samples alike; {b} is shown") for a, b in aliases.items()
        ]
    return [_row("aliases", 0, "")] if len(varying) > 1 else []


def check_overlap(overlap: pd.DataFrame, labels: list[str]) -> list[tuple]:
    """Rows on how far labels can be told apart from confounders."""
    if overlap.empty:
        why = "no label; pass label= what is to be explained"
        if labels:
            why = (
                "no site, location, scanner or collector with two levels is known, so their influence cannot be "
                "excluded; pass confounders="
            )
        return [_skipped(c, why) for c in ("inseparable", "confounding", "cells")]
    rows = []
    for pair in overlap.itertuples():
        name = f"{pair.label} by {pair.confounder}"
        freedom = max(pair.n_samples - pair.n_confounder_levels, 1)
        adjusted = (
            1 - (1 - pair.eta_squared) * (pair.n_samples - 1) / freedom
        )  # many small levels inflate the plain one
        if pair.cramers_v_corrected >= STRONG_V or adjusted >= STRONG_ETA:
            eta = "" if np.isnan(pair.eta_squared) else f", {pair.eta_squared:.0%} of its variance lies between levels"
            rows.append(_row("confounding", True, f"{name}: Cramér's V = {pair.cramers_v:.2f}{eta}"))
        if pair.inseparable:
            text = (
                f"{name}: each of the {pair.n_confounder_levels} levels holds one label; no analysis can separate them"
            )
            rows.append(_row("inseparable", True, text))
        elif pair.n_parts > 1:
            text = (
                f"{name}: labels fall into {pair.n_parts} sets that share no level ({_short(pair.parts)}); no analysis "
                "can compare labels of different sets"
            )
            rows.append(_row("inseparable", True, text))
        if pair.n_empty_cells + pair.n_near_empty_cells and not pair.inseparable:
            n_cells = pair.n_label_levels * pair.n_confounder_levels
            text = f"{name}: of {n_cells} cells {pair.n_empty_cells} are empty and {pair.n_near_empty_cells} nearly so"
            rows.append(_row("cells", pair.n_empty_cells + pair.n_near_empty_cells, text))
    rows += [_row(c, 0, "") for c in ("confounding", "inseparable", "cells") if not any(r[0] == c for r in rows)]
    return rows


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


def _some(names: list[str]) -> str:
    return ", ".join(repr(n) for n in names[:6]) + (" ..." if len(names) > 6 else "")
