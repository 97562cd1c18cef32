"""Look at a cohort before any model sees it: who is in it, what is broken, what leaks, what cannot be told apart."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.contents import COLUMNS, read_all
from biosae.data.overlap import label_by_confounder
from biosae.data.samples import Samples
from biosae.errors import InputError, nearest
from biosae.settings import settings

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
}
MIN_PATIENTS = 5  # of 4, an exact permutation test has 4! orders: its smallest two-sided p is 2 / 24
MAX_SIZES = 10  # more sizes of images than this are no confounder with levels
STRONG_V, STRONG_ETA = 0.5, 0.14  # "large" in Cohen (1988): w = 0.5, eta squared = 0.14


@dataclass
class Audit:
    """Result of :meth:`biosae.Samples.audit`.

    Attributes
    ----------
    checks
        One row a check: ``check, status, n, message``; ``status`` is ``ok``, ``problem`` or ``not checked``.
    counts
        How many samples, patients, slides, sites, scanners, labels, splits; and how many samples miss each.
    composition
        Samples, patients and slides in each level of site, scanner, label and split.
    images
        One row a sample: ``width, height, blank, file_sha256, pixels_sha256`` (missing where it could not be read).
    unreadable
        ``sample_id, reason, detail``.
    duplicates
        Samples whose decoded pixels are those of another sample: ``group, sample_id, same_file`` and their patient,
        slide, site, scanner, split and labels.
    leakage
        ``unit, name, splits, n_samples``: patients, slides and groups of duplicates in more than one part of the split.
    overlap
        One row a label and confounder; see :func:`biosae.data.overlap.label_by_confounder`.
    cells
        Their cross-tables, one row a cell.
    """

    checks: pd.DataFrame
    counts: pd.DataFrame
    composition: pd.DataFrame
    images: pd.DataFrame
    unreadable: pd.DataFrame
    duplicates: pd.DataFrame
    leakage: pd.DataFrame
    overlap: pd.DataFrame
    cells: pd.DataFrame
    title: str = field(default="", repr=False)

    @property
    def problems(self) -> list[str]:
        """``"check: message"`` of every problem; the names of checks are the keys of ``CHECKS``."""
        bad = self.checks[self.checks["status"] == "problem"]
        return [f"{check}: {message}" for check, message in zip(bad["check"], bad["message"])]

    @property
    def ok(self) -> bool:
        """True if no check found a problem. What was not checked does not count: see ``checks``."""
        return not self.problems

    def to_frame(self) -> pd.DataFrame:
        """The checks as a table, problems first."""
        return self.checks.copy()

    def _tables(self) -> list[tuple[str, pd.DataFrame]]:
        tables = [("Counts", self.counts), ("Composition", self.composition)]
        for (label, confounder), cells in self.cells.groupby(["label", "confounder"], sort=False):
            pivot = cells.pivot_table(
                index="label_level", columns="confounder_level", values="n_samples", sort=False, observed=True
            )
            if pivot.shape[0] <= 20 and pivot.shape[1] <= 12:
                tables.append((f"Samples of {label} by {confounder}", pivot.astype(int).rename_axis(None, axis=1)))
        measures = ["label", "confounder", "n_samples", "n_patients", "cramers_v", "eta_squared", "inseparable"]
        if len(self.overlap):
            tables.append(("Labels by confounder", self.overlap[measures].round(3)))
        return [(name, table) for name, table in tables if len(table)]

    def __str__(self) -> str:
        mark = {"problem": "!", "ok": "+", "not checked": "-"}
        lines = [self.title]
        lines += [f" {mark[s]} {c}: {m}" for c, s, m in zip(*(self.checks[k] for k in ("check", "status", "message")))]
        for name, table in self._tables():
            plain = isinstance(table.index, pd.RangeIndex)
            lines += ["", name, table.to_string(index=not plain, max_rows=40, max_colwidth=40, na_rep="-")]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        items = "".join(
            f"<li><b>{html.escape(c)}</b> ({s}): {html.escape(m)}</li>"
            for c, s, m in zip(*(self.checks[k] for k in ("check", "status", "message")))
        )
        tables = "".join(f"<h4>{html.escape(n)}</h4>{t.to_html(max_rows=40, na_rep='-')}" for n, t in self._tables())
        return f"<h3>{html.escape(self.title)}</h3><ul>{items}</ul>{tables}"


def audit(
    samples: Samples,
    *,
    label: str | Sequence[str] | None = None,
    confounders: Sequence[str] | None = None,
    read: bool = True,
    n_jobs: int | None = None,
) -> Audit:
    """Audit a cohort. Nothing is changed; no item stops it.

    Parameters
    ----------
    samples
        The samples.
    label
        Column or columns of what is to be explained. Default: the role ``label``, if there is one.
    confounders
        Columns of what should not explain it. Default: ``site`` and ``scanner`` where they are known, and the size of
        the images where it differs.
    read
        Open and decode every item: finds unreadable ones, duplicates and sizes.
    n_jobs
        Worker processes; default ``settings.n_jobs``. Sets of fewer than 128 items are read in this process.

    Returns
    -------
    :class:`Audit`

    Raises
    ------
    InputError
        For columns that are not there.
    """
    obs = samples.obs
    labels = [label] if isinstance(label, str) else list(label or ["label"] * ("label" in obs))
    named = list(confounders) if confounders is not None else [c for c in ("site", "scanner") if c in obs]
    for column in [*labels, *named]:
        if column not in obs:
            raise InputError(f"no column {column!r}; {nearest(column, obs.columns)}")
    images = read_all(samples, n_jobs=n_jobs or settings.n_jobs) if read else pd.DataFrame(columns=COLUMNS)
    unreadable = images.loc[images["reason"].notna(), ["reason", "detail"]].reset_index()
    duplicates = _duplicates(obs, images, labels)
    leakage = _leakage(obs, duplicates)
    sizes = _sizes(images)
    if confounders is None and 1 < sizes.nunique() <= MAX_SIZES:
        obs = obs.assign(image_size=sizes.reindex(obs.index))
        named.append("image_size")
    aliases = _aliases(obs, named)
    varying = [c for c in named if c not in aliases and obs[c].nunique() >= 2]
    pairs = [
        label_by_confounder(obs, label=one, confounder=other) for one in labels for other in varying if one != other
    ]
    overlap = pd.DataFrame([summary for summary, _ in pairs])
    cells = (
        pd.concat([c for _, c in pairs], ignore_index=True) if pairs else pd.DataFrame(columns=["label", "confounder"])
    )
    checks = [
        *_check_people(samples),
        *_check_images(images, unreadable, duplicates, labels, read),
        _check_leakage(obs, leakage, read),
        *_check_overlap(overlap, labels),
        *_check_aliases(aliases, varying),
    ]
    table = pd.DataFrame(checks, columns=["check", "status", "n", "message"])
    rank = {name: i for i, name in enumerate(["problem", "ok", "not checked", *CHECKS])}
    return Audit(
        checks=table.sort_values(["status", "check"], key=lambda c: c.map(rank), kind="stable", ignore_index=True),
        counts=_counts(obs),
        composition=_composition(obs, labels),
        images=images.drop(columns=["reason", "detail"]),
        unreadable=unreadable,
        duplicates=duplicates,
        leakage=leakage,
        overlap=overlap,
        cells=cells,
        title=f"Audit of {samples!r}",
    )


# -- tables ------------------------------------------------------------------------------------------------------------


def _counts(obs: pd.DataFrame) -> pd.DataFrame:
    roles = ["patient", "slide", "site", "scanner", "label", "split"]
    rows = [{"what": "sample", "n": len(obs), "n_samples_missing": 0}]
    rows += [
        {
            "what": r,
            "n": obs[r].nunique() if r in obs else None,
            "n_samples_missing": obs[r].isna().sum() if r in obs else None,
        }
        for r in roles
    ]
    return pd.DataFrame(rows).astype({"n": "Int64", "n_samples_missing": "Int64"})


def _composition(obs: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    rows = []
    for role in dict.fromkeys(["site", "scanner", "split", "label", *labels]):
        if role not in obs or (pd.api.types.is_numeric_dtype(obs[role]) and not pd.api.types.is_bool_dtype(obs[role])):
            continue
        for level, part in obs.groupby(obs[role].astype(object), dropna=False, sort=True):
            rows.append({
                "role": role, "level": level, "n_samples": len(part),
                "n_patients": part["patient"].nunique() if "patient" in obs else None,
                "n_slides": part["slide"].nunique() if "slide" in obs else None,
            })  # fmt: skip
    columns = ["role", "level", "n_samples", "n_patients", "n_slides"]
    return pd.DataFrame(rows, columns=columns).astype({"n_patients": "Int64", "n_slides": "Int64"})


def _duplicates(obs: pd.DataFrame, images: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """Samples with equal pixels; blank ones apart, since empty glass is the same everywhere."""
    described = list(dict.fromkeys(c for c in ["patient", "slide", "site", "scanner", "split", *labels] if c in obs))
    seen = images[images["pixels_sha256"].notna() & (images["blank"] == False)]  # noqa: E712  (holds None)
    twice = seen[seen["pixels_sha256"].duplicated(keep=False)]
    group = pd.factorize(twice["pixels_sha256"])[0]
    same_file = twice["file_sha256"].notna() & twice["file_sha256"].duplicated(keep=False)
    table = obs.loc[twice.index, described]
    table.insert(0, "same_file", same_file.to_numpy(bool))
    table.insert(0, "group", group)
    return (
        table.reset_index()
        .rename(columns={"index": "sample_id"})
        .sort_values(["group", "sample_id"], ignore_index=True)
    )


def _leakage(obs: pd.DataFrame, duplicates: pd.DataFrame) -> pd.DataFrame:
    rows = []
    units = [("patient", obs), ("slide", obs), ("group", duplicates)] if "split" in obs else []
    for unit, table in units:
        if unit not in table:
            continue
        known = table[table["split"].notna()]
        splits = known.groupby(unit)["split"].agg(lambda s: ", ".join(sorted(set(s))))
        sizes = known.groupby(unit).size()
        name = "duplicates" if unit == "group" else unit
        rows += [(name, str(n), s, int(sizes[n])) for n, s in splits.items() if "," in s]
    return pd.DataFrame(rows, columns=["unit", "name", "splits", "n_samples"])


def _sizes(images: pd.DataFrame) -> pd.Series:
    """``"width x height"`` of each item that could be read."""
    read = images[images["width"].notna()]
    return read["width"].astype(int).astype(str) + " x " + read["height"].astype(int).astype(str)


def _aliases(obs: pd.DataFrame, confounders: list[str]) -> dict[str, str]:
    """Confounder -> earlier confounder whose levels are the same sets of samples."""
    found: dict[str, str] = {}
    codes = {c: pd.factorize(obs[c])[0] for c in confounders if obs[c].nunique() >= 2}
    for later in codes:
        for earlier in codes:
            if earlier == later:
                break
            if earlier not in found and (codes[earlier] == codes[later]).all():
                found[later] = earlier
                break
    return found


# -- checks ------------------------------------------------------------------------------------------------------------


def _row(check: str, found: Any, message: str, *, n: int | None = None) -> tuple[str, str, int, str]:
    """A row of ``checks``; the message speaks only of a problem."""
    n = int(found) if n is None else n
    return (check, "problem", n, message) if found else (check, "ok", 0, CHECKS[check])


def _skipped(check: str, why: str) -> tuple[str, str, int, str]:
    return check, "not checked", 0, why


def _check_people(samples: Samples) -> list[tuple]:
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
    for role in ("patient", "slide"):
        if role in obs:
            names = pd.Series(obs[role].dropna().unique(), dtype=object)
            plain = names.str.lower().str.replace(r"[\s_\-]+", "", regex=True)
            alike = names[plain.duplicated(keep=False)].tolist()
            text = f"{len(alike)} names of {role}s differ only in case, blanks or dashes: {_some(alike)}"
            if alike:
                rows.append(_row("names", len(alike), text))
    if {"patient", "slide"} <= set(obs):
        owners = obs.groupby("slide")["patient"].nunique()
        shared = owners.index[owners > 1].tolist()
        if shared:
            rows.append(_row("names", len(shared), f"{len(shared)} slides belong to several patients: {_some(shared)}"))
    if not any(r[0] == "names" for r in rows) and {"patient", "slide"} & set(obs):
        rows.append(_row("names", 0, ""))
    return rows


def _check_images(
    images: pd.DataFrame, unreadable: pd.DataFrame, duplicates: pd.DataFrame, labels: list[str], read: bool
) -> list[tuple]:
    if not read:
        return [_skipped(c, "needs read=True") for c in ("unreadable", "sizes", "blank", "duplicates")]
    reasons = ", ".join(f"{n} {r}" for r, n in unreadable["reason"].value_counts().items())
    rows = [_row("unreadable", len(unreadable), f"{len(unreadable)} of {len(images)}: {reasons}")]
    sizes = _sizes(images).value_counts()
    shown = ", ".join(f"{n} of {s}" for s, n in sizes.head(5).items()) + (" ..." if len(sizes) > 5 else "")
    rows.append(_row("sizes", len(sizes) > 1, f"{len(sizes)} sizes: {shown}", n=len(sizes)))
    blank = int(images["blank"].eq(True).sum())
    rows.append(_row("blank", blank, f"{blank} images of one colour throughout; they are left out of the duplicates"))
    n_groups = duplicates["group"].nunique()
    text = f"{n_groups} image(s) occur more than once ({len(duplicates)} samples)"
    for column in ("patient", *labels):
        if column in duplicates:
            differing = int(duplicates.groupby("group")[column].nunique().gt(1).sum())
            text += f", {differing} with different {column}" if differing else ""
    rows.append(_row("duplicates", n_groups, text))
    return rows


def _check_leakage(obs: pd.DataFrame, leakage: pd.DataFrame, read: bool) -> tuple:
    if "split" not in obs:
        return _skipped("leakage", "there is no split")
    counts = leakage["unit"].value_counts()
    names = {"patient": "patients", "slide": "slides", "duplicates": "groups of identical images"}
    parts = [f"{counts[u]} {name}" for u, name in names.items() if u in counts]
    if not parts and not ({"patient", "slide"} & set(obs)):
        seen = "identical images do not cross the split, but " if read else ""
        return _skipped("leakage", f"{seen}neither patient nor slide is known")
    return _row("leakage", len(leakage), " and ".join(parts) + " lie in more than one part of the split")


def _check_aliases(aliases: dict[str, str], varying: list[str]) -> list[tuple]:
    if aliases:
        return [
            _row("aliases", True, f"{a} and {b} divide the samples alike; {b} is shown") for a, b in aliases.items()
        ]
    return [_row("aliases", 0, "")] if len(varying) > 1 else []


def _check_overlap(overlap: pd.DataFrame, labels: list[str]) -> list[tuple]:
    if overlap.empty:
        why = "no label; pass label= what is to be explained"
        if labels:
            why = (
                "no site or scanner with two levels is known, so their influence cannot be excluded; pass confounders="
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
        if pair.n_empty_cells + pair.n_near_empty_cells and not pair.inseparable:
            n_cells = pair.n_label_levels * pair.n_confounder_levels
            text = f"{name}: of {n_cells} cells {pair.n_empty_cells} are empty and {pair.n_near_empty_cells} nearly so"
            rows.append(_row("cells", pair.n_empty_cells + pair.n_near_empty_cells, text))
    rows += [_row(c, 0, "") for c in ("confounding", "inseparable", "cells") if not any(r[0] == c for r in rows)]
    return rows


def _some(names: list[str]) -> str:
    return ", ".join(repr(n) for n in names[:6]) + (" ..." if len(names) > 6 else "")
