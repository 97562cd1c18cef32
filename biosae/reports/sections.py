"""The sections of the report: each reads a :class:`~biosae.reports.run.Run` and returns what the template prints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from biosae import pl
from biosae.data.roles import CONFOUNDERS, UNITS
from biosae.pl import results, style
from biosae.pl.density import firing_share
from biosae.reports.run import Run, flat
from biosae.reports.tables import Figures, Table, cell, table, without_constants
from biosae.reports.verdicts import best_rows

SHOWN = 10
"""Latents of a target in its figure of associations."""


def cohort(run: Run) -> dict[str, Any]:
    """Counts of samples, patients, slides, sites and scanners; per label; targets; what could not be read."""
    obs = run.obs
    facts = [("samples", f"{len(obs):,}")]
    for role in (*UNITS, *CONFOUNDERS):
        values = run.role(role)
        if values is not None:
            facts.append((role + "s", f"{values.nunique():,}"))
        elif role in ("patient", "site", "scanner"):
            facts.append((role + "s", "not given"))
    tables: list[Table] = []
    label = run.role("label")
    groups = label.astype(str).where(label.notna()) if label is not None and label.nunique() <= 20 else None
    if groups is not None:
        tables.append(_counts_by(obs, groups, "label", run.facts.get("roles", {}).get("label")))
    for role in (*CONFOUNDERS, "split"):
        values = run.role(role)
        if values is None or values.nunique() > 30:
            continue
        tables.append(_counts_by(obs, values.astype(str), role, None))
        if groups is not None and role != "split":
            tables.append(_crossed(obs, groups, values.astype(str), role))
    targets = [t for t in run.associations["target"].astype(str).unique() if t in obs]
    numeric = [t for t in targets if pd.api.types.is_numeric_dtype(obs[t])]
    if numeric:
        rows = obs[numeric].astype(float)
        summary = pd.DataFrame(
            {
                "target": numeric, "n": rows.notna().sum().to_numpy(), "missing": rows.isna().sum().to_numpy(),
                "zero": [f"{z:.0%}" for z in (rows == 0).mean()], "median": rows.median().to_numpy(),
                "q1": rows.quantile(0.25).to_numpy(), "q3": rows.quantile(0.75).to_numpy(),
                "max": rows.max().to_numpy(),
            }
        )  # fmt: skip
        names = {"target": "target", "n": "n", "missing": "missing", "zero": "zeros", "median": "median",
                 "q1": "lower quartile", "q3": "upper quartile", "max": "largest"}  # fmt: skip
        tables.append(table(summary, names, caption="Targets, over samples."))
    return {"facts": facts, "tables": tables, "failures": _failures(run), "n_listed": run.n_listed, "n": len(obs)}


def _counts_by(obs: pd.DataFrame, groups: pd.Series, role: str, column: str | None) -> Table:
    parts = {"samples": groups.value_counts().sort_index()}
    for other in ("patient", "slide"):
        if other in obs and other != role:
            parts[other + "s"] = obs[other].groupby(groups).nunique()
    frame = pd.DataFrame(parts).rename_axis(role).reset_index()
    missing = int(groups.isna().sum())
    note = f" {missing:,} samples have none." if missing else ""
    name = f" (column {column})" if column and column != role else ""
    return table(frame, caption=f"By {role}{name}.{note}")


def _crossed(obs: pd.DataFrame, groups: pd.Series, values: pd.Series, role: str) -> Table:
    """Patients (or samples) per label and technical level: an empty cell means that the two cannot be told apart."""
    if "patient" in obs:
        counts = pd.crosstab(*_distinct(obs["patient"].astype(str), groups, values))
        noun = "Patients"
    else:
        counts = pd.crosstab(groups, values)
        noun = "Samples"
    frame = counts.rename_axis("label", axis=0).rename_axis(None, axis=1).reset_index()
    caption = f"{noun} by label and {role}."
    if (counts == 0).any(axis=None):
        caption += f" An empty cell: there label and {role} cannot be told apart."
    return table(frame, caption=caption)


def _distinct(patients: pd.Series, groups: pd.Series, values: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Group and value of each patient once per combination."""
    once = pd.DataFrame({"p": patients, "g": groups, "v": values}).drop_duplicates()
    return once["g"], once["v"]


def _failures(run: Run) -> dict[str, Any] | None:
    if run.failures is None:
        return None
    reason = "reason" if "reason" in run.failures else run.failures.columns[-1]
    keys = [c for c in ("stage", reason) if c in run.failures]
    frame = run.failures.assign(**{reason: run.failures[reason].map(run.redact)})
    counts = frame.groupby(keys).size().rename("samples").reset_index()
    return {"n": run.failures.iloc[:, 0].nunique(), "table": table(counts)}


def quality(run: Run, figures: Figures) -> dict[str, Any]:
    """FVU, L0, dead latents, whatever baseline the run recorded, and the density figure."""
    sae = run.facts.get("sae", {})
    metrics = flat(
        run.facts.get("metrics") or sae.get("metrics") or {k: v for k, v in sae.items() if isinstance(v, float)}
    )
    settings = flat({k: v for k, v in sae.items() if k != "metrics"})
    share = firing_share(run.adata)
    dead = int((share == 0).sum())
    rows = [(_metric_word(k), _metric(v)) for k, v in metrics.items() if _number(v) and _metric_word(k)]
    rows.append(("active latents a row (L0), this cohort", f"{share.sum():.1f}"))
    rows.append(("latents that never fire in this cohort", f"{dead:,} of {len(share):,}"))
    baseline = [
        (k, v) for k, v in metrics.items() if _number(v) and any(w in k for w in ("baseline", "pca", "mean_fvu"))
    ]
    rows += [(k.replace("_", " ").replace(".", ", "), _metric(v)) for k, v in baseline]
    picture = figures.add(
        "density", pl.density, run.adata, size=(4.6, 2.6),
        alt=f"Histogram of latent density; {dead} of {len(share)} latents never fire.",
        caption=f"Density of {len(share):,} latents over n = {style.count(run.adata.n_obs, 'row')}. "
        f"A latent that never fires here has a density below {3 / max(run.adata.n_obs, 1):.2g} (95 % bound, 3/n).",
    )  # fmt: skip
    return {"rows": rows, "baseline": bool(baseline), "settings": settings, "figure": picture}


_METRICS = {
    "fvu": "variance unexplained (FVU)",
    "l0": "active latents a row (L0)",
    "dead": "dead latents",
    "n_dead": "dead latents",
    "dead_share": "share of dead latents",
    "cosine": "cosine of reconstruction and embedding",
    "n_rows": "rows",
}
_PARTS = {"train": "training rows", "val": "validation rows", "test": "test rows"}


def _metric_word(key: str) -> str:
    """Words for a metric such as ``fvu_val`` or ``val.fvu``; empty for what the page does not show."""
    for part, words in _PARTS.items():
        base = key.removeprefix(f"{part}.").removeprefix(f"{part}_").removesuffix(f"_{part}")
        if base != key:
            return f"{_METRICS[base]}, {words}" if base in _METRICS else ""
    return f"{_METRICS[key]}, at the end of training" if key in _METRICS else ""


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _metric(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if float(value).is_integer() else f"{value:.3f}"


def associations(run: Run, figures: Figures) -> dict[str, Any]:
    """Best of each source per target, the figure of it, and a volcano and an effect plot for each target."""
    result = run.associations
    best = best_rows(run)
    columns = {
        "target": "target", "source": "source", "latent": "feature", "effect": "effect", "estimate": "estimate",
        "ci": "95 % CI", "p": "p", "q": "q", "p_maxt": "p (max-T)", "n_units": "units", "n_samples": "samples",
    }  # fmt: skip
    out: dict[str, Any] = {
        "best": None,
        "sentences": [results.sentence(latents)] if len(latents := result[result["source"] == "latent"]) else [],
        "power": _power(run),
        "overview": [],
        "targets": [],
    }
    if best.empty:
        return out
    quantiles = figures.add(
        "qq", pl.qq, result, size=(3.5, 3.2),
        alt="Observed against expected p-values of all tests, a line a source.",
        caption="All tests: observed against expected p; λ near 1 or below: p-values are not too small throughout. "
        f"n = {results.units_phrase(result[results.was_tested(result)])}.",
    ) if results.was_tested(result).any() else None  # fmt: skip
    contrast = best["contrast"] if "contrast" in best else pd.Series(index=best.index, dtype=object)
    named = best["effect"].map(results.effect_name) + contrast.map(lambda c: f", {c}" if isinstance(c, str) else "")
    shorter, same = without_constants(best.assign(effect=named))
    out["best"] = table(shorter, columns, caption=f"Best feature of each source and target.{same}")
    for effect, rows in best.groupby("effect", sort=False):
        part = result[result["target"].isin(rows["target"])]
        lines = len(rows) + 1.3 * rows["target"].nunique()
        picture = figures.add(
            f"best_per_target_{file_name(str(effect))}", pl.associations, part, size=(5.0, 0.7 + 0.2 * lines),
            alt=f"{results.effect_name(effect)} of the best latent, raw dimension and component of each target.",
            caption=f"Best of each source per target; n = {results.units_phrase(rows)}. Filled: q ≤ 0.05.",
        )  # fmt: skip
        out["overview"] += [picture] if picture else []
    out["overview"] += [quantiles] if quantiles else []
    unadjusted = run.tables.get("unadjusted")
    for target in result["target"].astype(str).unique():
        rows = results.choose(result, target=target)
        latents = rows[rows["source"] == "latent"]
        tested = latents[results.was_tested(latents)]
        if results.ranked(latents).empty:
            out["targets"].append({"target": target, "pictures": [], "note": results.sentence(latents)})
            continue
        n = results.units_phrase(results.ranked(latents).head(SHOWN))
        passing = int((tested["q"] <= 0.05).sum())
        pictures = [
            tested.size and figures.add(
                f"volcano_{file_name(target)}", pl.volcano, result, target=target, unadjusted=unadjusted,
                size=(3.9, 3.2),
                alt=f"Volcano plot of {len(tested)} latents against {target}; {passing} have q at most 0.05.",
                caption=f"{target}: {results.sentence(latents)}. {passing:,} with q ≤ 0.05."
                + (" Arrows lead from the unadjusted effect to the adjusted one." if unadjusted is not None else ""),
            ),
            figures.add(
                f"associations_{file_name(target)}", pl.associations, result, target=target, n=SHOWN, size=(4.3, 3.2),
                alt=f"The strongest latents for {target} with confidence intervals, and the best control features.",
                caption=f"{target}: strongest latents and the best raw dimension and component; n = {n}.",
            ),
        ]  # fmt: skip
        pictures.append(_permutations(run, figures, target))
        out["targets"].append({"target": target, "pictures": [p for p in pictures if p], "note": ""})
    return out


def _permutations(run: Run, figures: Figures, target: str) -> Any:
    """The largest statistic of all latents against its permutations."""
    frame = run.tables.get("permutations")
    rows = None if frame is None else frame[(frame["target"].astype(str) == target) & (frame["source"] == "latent")]
    if rows is None or rows.empty:
        return None
    first = rows.iloc[0]
    n = style.count(int(first["n_groups"]), "independent group")
    tested = results.choose(run.associations, source="latent", target=target).set_index("latent")
    p = float(tested["p_maxt"].get(first["latent"], np.nan)) if "p_maxt" in tested else np.nan
    return figures.add(
        f"permutations_{file_name(target)}", pl.null, rows["draw"].to_numpy(), observed=abs(float(first["observed"])),
        p=None if np.isnan(p) else p, label="largest statistic of all latents", n=n, size=(3.4, 2.7),
        alt="Histogram of the largest statistic over permutations with the observed one.",
        caption=f"{target}: the largest statistic of all latents over {len(rows):,} permutations ({first['scheme']}), "
        f"and that of {first['latent']} (line); n = {n}.",
    )  # fmt: skip


_POWER = {
    "target": "target", "classes": "classes", "n_units": "units", "n_groups": "independent groups", "m": "tests",
    "icc_median": "ICC", "design_effect": "design effect", "n_effective": "effective n", "effect": "effect",
    "detectable": "smallest detectable",
}  # fmt: skip


def _power(run: Run) -> dict[str, Any] | None:
    """What this cohort can confirm at best, and the table behind it."""
    frame = run.tables.get("power")
    if frame is None or frame.empty:
        return None
    shown, same = without_constants(frame[[c for c in _POWER if c in frame]])
    caption = f"Smallest effect that these patients can confirm with power 0.8 after correction for all tests.{same}"
    said = [
        f"{', '.join(targets)}: {sentence}" for sentence, targets in frame.groupby("sentence", sort=False)["target"]
    ]
    return {"sentences": said, "table": table(shown, _POWER, caption=caption)}


def file_name(name: str) -> str:
    """A name that every file system takes."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


_REPLICATION = {
    "target": "target", "target_second": "second target", "source": "source", "latent": "feature",
    "estimate_discovery": "discovery", "estimate_replication": "replication", "ci": "95 % CI",
    "p_replication": "p (one-sided)", "p_holm": "p (Holm)", "replicated": "replicated",
    "n_units_discovery": "n disc.", "n_units_replication": "n repl.",
    "groups_shared": "patients in both", "status_replication": "status",
}  # fmt: skip


def replication(run: Run, figures: Figures) -> dict[str, Any] | None:
    """Estimates on the part that did not choose, and on the second cohort, as the tables give them."""
    found: dict[str, Any] = {"tables": [], "pictures": []}
    for name, caption in (
        ("replication", "Chosen on the discovery part, tested once on the replication part."),
        ("transfer", "Chosen on the first cohort, tested on the second with the encoder and the SAE frozen."),
    ):
        if name not in run.tables:
            continue
        frame = run.masked(run.tables[name])
        known = _REPLICATION if "estimate_replication" in frame else None
        shown, same = without_constants(frame)
        found["tables"].append(table(shown if known else unit_first(shown), known, caption=caption + same))
        for effect, rows in frame.groupby("effect", sort=False) if known and "effect" in frame else ():
            if rows[["estimate_discovery", "estimate_replication"]].dropna().empty:
                continue
            found["pictures"].append(
                figures.add(
                    f"{name}_{file_name(str(effect))}", pl.replication, rows, source=None, size=(3.9, 3.3),
                    alt="Effect in the discovery part against the effect in the replication part.",
                    caption=f"{caption} Filled: replicated. Bars: 95 % interval of the replication. "
                    "Blue: latent, orange: raw dimension, green: component.",
                )
            )  # fmt: skip
    found["pictures"] = [p for p in found["pictures"] if p]
    return found if found["tables"] else None


def unit_first(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns that say what a row is, before those that say what was found."""
    lead = [c for c in ("encoder", "layer", "target", "source", "latent", "stratum") if c in frame]
    return frame[lead + [c for c in frame if c not in lead]]


def comparison(run: Run, figures: Figures) -> dict[str, Any] | None:
    """Effect per target, encoder and layer: the latent's heat map and the table with its controls.

    Where the table holds several rows for one cell the first counts: the one that discovery put first, so that
    nothing is chosen by its replication.
    """
    frame = run.tables.get("comparison")
    where = ""
    if frame is not None and "estimate_replication" in frame:
        parts = {f"{c}_replication": c for c in ("estimate", "n_units", "n_samples")}
        frame = frame.drop(columns=[c for c in parts.values() if c in frame]).rename(columns=parts)
        where = " Chosen on the discovery part; the values are those of the replication part."
    needed = {"encoder", "layer", "target", "source", "estimate"}
    if frame is None or not needed <= set(frame):
        return None
    best = frame.drop_duplicates(["encoder", "layer", "target", "source"])
    keys = ["target", "encoder", "layer"]
    wide = best[keys].drop_duplicates()
    for source, rows in best.groupby("source"):
        wide = wide.merge(rows[[*keys, "estimate"]].rename(columns={"estimate": source}), on=keys, how="left")
    place = {target: i for i, target in enumerate(wide["target"].unique())}
    wide = wide.sort_values("target", key=lambda t: t.map(place), kind="stable")
    names = {
        "target": "target",
        "encoder": "encoder",
        "layer": "layer",
        "latent": "best latent",
        "raw": "best raw",
        "pca": "best component",
    }
    counted = best.assign(unit=best["unit"] if "unit" in best else run.choices.get("unit", "unit"))
    n = results.units_phrase(results.check(_testlike(counted)))
    views = best.groupby(["encoder", "layer"]).ngroups
    picture = figures.add(
        "comparison", pl.comparison, best, size=(2.6 + 0.8 * views, 1.2 + 0.3 * best["target"].nunique()),
        alt="Heat map of the best latent's effect by target, encoder and layer.",
        caption=f"Best latent per target, encoder and layer; n = {n}.{where}",
    )  # fmt: skip
    return {"figure": picture, "table": table(wide, names, caption=f"Best feature of each source; n = {n}.{where}")}


def _testlike(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(**{c: np.nan for c in results.REQUIRED if c not in frame})


def refused(run: Run) -> dict[str, Any]:
    """What was not tested: counts by source, target and status."""
    result = run.associations
    withheld = result[~results.was_tested(result)]
    counts = (
        pd.crosstab([withheld["source"], withheld["target"]], withheld["status"]).reset_index()
        if len(withheld)
        else None
    )
    return {"n": len(withheld), "counts": table(counts.rename_axis(None, axis=1)) if counts is not None else None}


def stages(run: Run) -> Table | None:
    """Wall time and peak memory of the latest run of each stage."""
    if run.log is None or "stage" not in run.log:
        return None
    last = run.log.drop_duplicates("stage", keep="last")
    names = {
        "stage": "stage",
        "seconds": "wall time (s)",
        "cpu_seconds": "CPU time (s)",
        "peak_rss_mb": "peak memory (MB)",
    }
    last = last.assign(**{c: last[c].astype(float).round(1) for c in ("seconds", "cpu_seconds") if c in last})
    return table(last, names)


def provenance(run: Run) -> dict[str, Any]:
    """Versions, hashes, seeds and licence, with paths and identifiers taken out."""
    identity = run.facts.get("identity", {})
    versions = run.provenance.get("versions") or run.facts.get("provenance", {}).get("versions") or {}
    other = flat({k: v for k, v in run.provenance.items() if k not in ("versions", "config")})
    inner = flat({k: v for k, v in run.facts.get("provenance", {}).items() if k not in ("versions", "config")})
    restricted = str(identity.get("derivatives_restricted", "")).lower() in ("true", "1")
    config = flat(run.study.get("config") or run.study.get("parameters") or {})
    return {
        "identity": [(k.replace("_", " "), run.redact(cell(k, v))) for k, v in flat(identity).items()],
        "versions": [(k, str(v)) for k, v in versions.items() if v],
        "other": [(k.replace("_", " "), run.redact(v)) for k, v in {**inner, **other}.items() if v is not None],
        "config": [(k, run.redact(v)) for k, v in config.items() if v not in (None, "", {})],
        "licence": identity.get("licence"),
        "restricted": restricted,
    }
