"""Look at a cohort before any model sees it: who is in it, what is broken, what leaks, what cannot be told apart."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from biosae.data.checks import (
    CHECKS,
    MAX_SIZES,
    WORDS,
    check_aliases,
    check_items,
    check_leakage,
    check_overlap,
    check_people,
    sizes_in_words,
)
from biosae.data.contents import columns, hash_column, read_all
from biosae.data.overlap import label_by_confounder
from biosae.data.roles import CONFOUNDERS, UNITS
from biosae.data.samples import Samples
from biosae.errors import InputError, nearest
from biosae.settings import settings


@dataclass
class Audit:
    """Result of :meth:`biosae.Samples.audit`.

    Attributes
    ----------
    checks
        One row a check: ``check, status, n, message``; ``status`` is ``ok``, ``problem`` or ``not checked``.
    counts
        How many samples, patients, slides, sites, scanners, labels, splits (and recordings, sequences, locations,
        collectors where there are); and how many samples miss each.
    composition
        Samples, patients and slides in each level of site, location, scanner, collector, label and split.
    items
        One row a sample (values are missing where it could not be read). Images: ``width, height, blank, file_sha256,
        pixels_sha256``. Signals: ``n_channels, n_times, seconds, missing_share, n_flat`` (flat channels), ``blank,
        file_sha256, values_sha256``. Vectors: ``length, n_not_finite, blank, file_sha256, values_sha256``.
    unreadable
        ``sample_id, reason, detail``.
    duplicates
        Samples whose decoded values are those of another sample: ``group, sample_id, same_file`` and their patient,
        slide, recording, sequence, site, location, scanner, collector, split and labels.
    leakage
        ``unit, name, splits, n_samples``: patients, slides, recordings, sequences, files that give several samples, and
        groups of duplicates in more than one part of the split.
    overlap
        One row a label and confounder; see :func:`biosae.data.overlap.label_by_confounder`.
    cells
        Their cross-tables, one row a cell.
    """

    checks: pd.DataFrame
    counts: pd.DataFrame
    composition: pd.DataFrame
    items: pd.DataFrame
    unreadable: pd.DataFrame
    duplicates: pd.DataFrame
    leakage: pd.DataFrame
    overlap: pd.DataFrame
    cells: pd.DataFrame
    title: str = field(default="", repr=False)

    @property
    def images(self) -> pd.DataFrame:
        """``items``, by the name that suits images."""
        return self.items

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
        measures = [
            "label",
            "confounder",
            "n_samples",
            "n_patients",
            "cramers_v",
            "eta_squared",
            "inseparable",
            "n_parts",
        ]
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
        Columns of what should not explain it. Default: ``site``, ``location``, ``scanner`` and ``collector`` where they
        are known, and the size of the items where it differs.
    read
        Open and decode every item: finds unreadable ones, duplicates and sizes.
    n_jobs
        Worker processes, -1 for one a core; default ``settings.n_jobs``. Sets of fewer than 128 items are read in
        this process.

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
    named = list(confounders) if confounders is not None else [c for c in CONFOUNDERS if c in obs]
    for column in [*labels, *named]:
        if column not in obs:
            raise InputError(f"no column {column!r}; {nearest(column, obs.columns)}")
    item = samples.item
    items = read_all(samples, n_jobs=n_jobs or settings.n_jobs) if read else pd.DataFrame(columns=columns(item))
    unreadable = items.loc[items["reason"].notna(), ["reason", "detail"]].reset_index()
    duplicates = _duplicates(obs, items, labels, hash_column(item))
    leakage = _leakage(obs, duplicates)
    sizes = sizes_in_words(items, item)
    if confounders is None and 1 < sizes.nunique() <= MAX_SIZES:
        name = WORDS[item]["size"]
        obs = obs.assign(**{name: sizes.reindex(obs.index)})
        named.append(name)
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
        *check_people(samples),
        *check_items(items, unreadable, duplicates, labels, read, item),
        check_leakage(obs, leakage, read, item),
        *check_overlap(overlap, labels),
        *check_aliases(aliases, varying),
    ]
    table = pd.DataFrame(checks, columns=["check", "status", "n", "message"])
    rank = {name: i for i, name in enumerate(["problem", "ok", "not checked", *CHECKS])}
    return Audit(
        checks=table.sort_values(["status", "check"], key=lambda c: c.map(rank), kind="stable", ignore_index=True),
        counts=_counts(obs),
        composition=_composition(obs, labels),
        items=items.drop(columns=["reason", "detail"]),
        unreadable=unreadable,
        duplicates=duplicates,
        leakage=leakage,
        overlap=overlap,
        cells=cells,
        title=f"Audit of {samples!r}",
    )


# -- tables ------------------------------------------------------------------------------------------------------------


def _counts(obs: pd.DataFrame) -> pd.DataFrame:
    more = [r for r in ("recording", "sequence", "location", "collector") if r in obs]
    roles = ["patient", "slide", "site", "scanner", *more, "label", "split"]
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
    for role in dict.fromkeys([*CONFOUNDERS, "split", "label", *labels]):
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


def _duplicates(obs: pd.DataFrame, items: pd.DataFrame, labels: list[str], values: str) -> pd.DataFrame:
    """Samples with equal values; blank ones apart, since empty glass is the same everywhere."""
    described = list(dict.fromkeys(c for c in [*UNITS, *CONFOUNDERS, "split", *labels] if c in obs))
    seen = items[items[values].notna() & (items["blank"] == False)]  # noqa: E712  (holds None)
    twice = seen[seen[values].duplicated(keep=False)]
    group = pd.factorize(twice[values])[0]
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
    units = [(u, obs, u) for u in UNITS]
    if "path" in obs and not {"slide", "recording"} & set(obs):  # crops of one photograph, windows of one file
        units.append(("path", obs[obs["path"].duplicated(keep=False)], "file"))
    for unit, table, name in [*units, ("group", duplicates, "duplicates")] if "split" in obs else []:
        if unit not in table:
            continue
        known = table[table["split"].notna()]
        splits, sizes = known.groupby(unit)["split"].unique(), known.groupby(unit).size()
        rows += [(name, str(n), ", ".join(sorted(s)), int(sizes[n])) for n, s in splits.items() if len(s) > 1]
    return pd.DataFrame(rows, columns=["unit", "name", "splits", "n_samples"])


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
