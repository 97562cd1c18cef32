"""The section on confounding: biology or the scanner, and what is left within strata."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from biosae import pl
from biosae.data.roles import CONFOUNDERS
from biosae.pl import style
from biosae.reports.run import Run
from biosae.reports.sections import file_name, unit_first
from biosae.reports.tables import Figures, table, without_constants
from biosae.reports.verdicts import best_rows, strata_verdicts

_FLAGS = {
    "latent": "latent", "factor": "technical factor", "biology": "biology", "eta2_biology": "η² biology",
    "eta2_technical": "η² technical", "unique_biology": "unique biology", "unique_technical": "unique technical",
    "q_biology": "q biology", "q_technical": "q technical", "p": "p", "flag": "flag", "n_units": "units",
    "n_groups": "groups",
}  # fmt: skip


def confounding(run: Run, figures: Figures, latents: list[str]) -> dict[str, Any]:
    """Variance shares, latent levels by scanner, readout of the technical factor, pooled against within strata."""
    out: dict[str, Any] = {"pictures": [], "missing": [], "flags": None, "readout": [], "strata": None, "survival": []}
    table_ = run.tables.get("confounders")
    if table_ is None:
        out["missing"].append("no table of confounders (the stage 'confounders' was not run)")
    else:
        for factor, rows in table_.groupby("factor" if "factor" in table_ else np.zeros(len(table_)), sort=False):
            out["pictures"].append(
                figures.add(
                    f"confounders_{file_name(str(factor))}",
                    pl.confounders,
                    rows,
                    size=(3.9, 3.4),
                    alt=f"Variance share of biology against that of {factor}, one mark a latent.",
                    caption=f"{factor}: variance shares, n = {style.count(rows['eta2_technical'].count(), 'latent')}. "
                    "Above the diagonal the technical factor explains more than biology.",
                )
            )
        if len(set(table_["factor"])) > 1:
            out["pictures"].append(
                figures.add(
                    "factor_map", pl.factor_map, table_, size=(4.2, 5.2),
                    alt="Heat map of variance shares: latents by biology and technical factors.",
                    caption="Latents with the largest variance shares, from biology (top) to technical (bottom); "
                    f"n = {style.count(table_['n_units'].max(), 'sample')}.",
                )
            )  # fmt: skip
        shown = table_[table_["latent"].isin(latents) | (table_["flag"] == "technical")]
        total = len(table_)
        shown, same = without_constants(shown.sort_values("eta2_technical", ascending=False).head(20))
        out["flags"] = table(
            shown,
            _FLAGS,
            caption=f"Latents of this report and those flagged technical ({len(shown)} of {total:,} rows).{same}",
        )
    by = next((r for r in ("scanner", *CONFOUNDERS) if run.role(r) is not None and run.role(r).nunique() <= 12), None)
    if by is None:
        out["missing"].append(
            f"no {', '.join(CONFOUNDERS[:-1])} or {CONFOUNDERS[-1]} column, so their leakage cannot be excluded"
        )
    else:
        label = run.role("label")
        label = "label" if label is not None and label.nunique() <= 6 else None
        for latent in latents[:4]:
            levels = run.role(by).nunique()
            out["pictures"].append(
                figures.add(
                    f"{by}_{latent}",
                    pl.scanner,
                    run.adata,
                    latent,
                    by=by,
                    label=label,
                    size=(max(3.4, 1.2 + 1.0 * levels) + (0.9 if label else 0), 2.7),
                    alt=f"Level of {latent} by {by}.",
                    caption=f"{latent} by {by}; one dot a {'patient' if run.role('patient') is not None else 'row'}"
                    f"{' and label' if label else ''}, bar: median; n = {style.count(run.adata.n_obs, 'row')}.",
                )
            )
    _readout(run, figures, out)
    _strata(run, figures, out)
    out["pictures"] = [p for p in out["pictures"] if p]
    return out


def _readout(run: Run, figures: Figures, out: dict[str, Any]) -> None:
    frame = run.tables.get("readout_all", run.tables.get("readout"))
    if frame is None:
        out["missing"].append("no readout of the technical factor from the embeddings")
        return
    shown, same = without_constants(frame)
    out["readout"].append(
        table(unit_first(shown), caption=f"How well a factor can be read out, groups kept apart.{same}")
    )
    for factor in pd.unique(frame["factor"].astype(str)) if "factor" in frame else ():
        views = frame.groupby(["encoder", "layer"]).ngroups if {"encoder", "layer"} <= set(frame) else 1
        picture = figures.add(
            f"readout_{file_name(factor)}", pl.readout, frame.assign(factor=frame["factor"].astype(str)), factor=factor,
            size=(2.2 + 0.95 * views, 2.8),
            alt=f"Balanced accuracy of reading {factor} from embeddings and latents, by layer, with chance.",
            caption=f"Readout of {factor} by layer; dashed: chance; bars: confidence interval.",
        )  # fmt: skip
        out["pictures"].append(picture)


def _strata(run: Run, figures: Figures, out: dict[str, Any]) -> None:
    frame = run.tables.get("within_strata")
    if frame is None:
        out["missing"].append("no estimates within strata (no 'strata' was given to the association)")
        return
    frame = run.masked(frame)
    out["survival"] = strata_verdicts(run)
    if out["survival"]:
        rows = pd.DataFrame(out["survival"])[["target", "latent", "pooled", "within", "n", "verdict"]]
        names = {"target": "target", "latent": "latent", "pooled": "pooled", "within": "within strata", "n": "units",
                 "verdict": "verdict"}  # fmt: skip
        out["strata"] = table(rows, names, caption="The same effect pooled over everything and within strata.")
    if not {"stratum", "target", "latent"} <= set(frame):
        out["missing"].append("the table within_strata.csv lacks the column stratum, target or latent")
        return
    whole = frame["stratum"].astype(str).isin(["pooled", "within"])
    few = frame if frame.loc[~whole, "stratum"].nunique() <= 8 else frame[whole]
    best = best_rows(run).query("source == 'latent'")[["target", "latent"]]
    few = few.merge(best, on=["target", "latent"]) if len(best) else few
    few = few.assign(effect=few.get("effect", "effect"))
    for effect, rows in few.groupby("effect", sort=False):
        picture = figures.add(
            f"within_strata_{file_name(str(effect))}", pl.forest, rows,
            size=(4.6, 0.7 + 0.19 * (len(rows) + 1.3 * rows.groupby(["target", "latent"]).ngroups)),
            alt="Effects pooled, within strata, and in each stratum, with confidence intervals.",
            caption="Best latent of each target: pooled (black), within strata (diamond), in each stratum (squares).",
        )  # fmt: skip
        out["pictures"].append(picture)
