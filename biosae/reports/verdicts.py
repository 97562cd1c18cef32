"""One-line answers, each computed from the tables and carrying its n."""

from __future__ import annotations

import numpy as np
import pandas as pd

from biosae.pl import results, style
from biosae.reports.run import Run
from biosae.reports.tables import interval
from biosae.stats.ranking import strength

ALPHA = 0.05
_FLAGS = {  # the gravest first
    "technical": "technical",
    "not_separable": "where biology and the technical factor cannot be told apart",
    "mixed": "mixed",
    "undetermined": "undetermined",
    "neither": "with neither shown beyond chance",
    "biology": "biology",
}


def best_rows(run: Run) -> pd.DataFrame:
    """Best row per target and source: the run's own ``summary.csv`` where it has what is needed, else ranked here."""
    summary = run.tables.get("summary")
    if summary is not None and {*results.REQUIRED, "source", "effect"} <= set(summary):
        return results.check(summary[summary["estimate"].notna()])
    return results.best(run.associations)


def question_verdicts(run: Run) -> list[dict[str, str]]:
    """For each target: the best latent, its effect and n, and what the SAE adds over the encoder's own dimensions."""
    best = best_rows(run)
    found = []
    for target in run.associations["target"].astype(str).unique():
        rows = best[best["target"].astype(str) == target].set_index("source")
        if "latent" not in rows.index:
            asked = results.choose(run.associations, target=target)
            counts = results.status_counts(asked[asked["source"] == "latent"])
            reasons = ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in counts.items())
            found.append({"target": target, "text": f"no latent could be tested ({reasons}).", "tone": "none"})
            continue
        row = _first(rows, "latent")
        name = results.effect_name(row["effect"])
        text = f"{row['latent']}, {name} {style.number(row['estimate'])}"
        if pd.notna(row.get("ci_low")):
            text += f" (95 % CI {interval(row['ci_low'], row['ci_high'])})"
        if pd.notna(row["q"]):
            text += f", q = {style.p_value(row['q'])}"
        else:
            text += f", no p-value ({str(row['status']).replace('_', ' ')})"
        if pd.notna(row.get("p_maxt", np.nan)):
            text += f", max-T p = {style.p_value(row['p_maxt'])}"
        text += f", n = {results.units_phrase(pd.DataFrame([row]))}{_from_groups(row, run)}. "
        if isinstance(row.get("contrast"), str) and row["contrast"]:
            text = text.replace(", q =", f" for {row['contrast']}, q =", 1)
        passes = row["q"] <= ALPHA
        if not passes and pd.notna(row["q"]):
            text = f"no latent reaches q ≤ {ALPHA:g}; the best is {text}"
        found.append({"target": target, "text": text + sae_adds(rows), "tone": "yes" if passes else "none"})
    return found


def _from_groups(row: pd.Series, run: Run) -> str:
    """The independent groups behind units that are not independent of each other."""
    groups = row.get("n_groups", np.nan)
    if pd.isna(groups) or not 0 < groups < row.get("n_units", np.nan):
        return ""
    return " from " + style.count(int(groups), "patient" if run.role("patient") is not None else "group")


def sae_adds(rows: pd.DataFrame) -> str:
    """What the best latent adds over the best raw dimension and component (``rows`` of one target, by source)."""
    controls = [s for s in ("raw", "pca") if s in rows.index]
    if not controls:
        return "No control was computed, so what the SAE adds is not known."
    latent = _first(rows, "latent")
    own = _strength(latent)
    best = {s: _strength(_first(rows, s)) for s in controls}
    said = ", ".join(
        f"{'best raw dimension' if s == 'raw' else 'best component'} {style.number(_first(rows, s)['estimate'])}"
        for s in controls
    )
    top = max(best.values())
    null = results.null_value(latent["effect"])
    low, high = latent.get("ci_low", np.nan), latent.get("ci_high", np.nan)
    nearest_edge = low if latent["estimate"] >= null else high
    covers_null = low <= null <= high
    lower = 0.0 if covers_null else _strength(pd.Series({**latent, "estimate": nearest_edge}))
    if own <= top or style.number(own - top) == style.number(0.0):
        judged = "the latent is no stronger than what the encoder gives without an SAE"
    elif pd.isna(low) or pd.isna(high):
        judged = f"the latent is stronger by {style.number(own - top)}, with no interval to judge by"
    elif lower > top:
        judged = f"the latent is stronger by {style.number(own - top)}, and its interval excludes the control"
    else:
        judged = f"the latent is stronger by {style.number(own - top)}, but its interval covers the control"
    return f"{said[0].upper()}{said[1:]}: {judged}."


def _strength(row: pd.Series) -> float:
    return abs(float(strength(pd.DataFrame([row])).iloc[0]))


def _first(rows: pd.DataFrame, source: str) -> pd.Series:
    row = rows.loc[source]
    return row if isinstance(row, pd.Series) else row.iloc[0]


def replication_verdict(run: Run) -> str | None:
    """How many of the latents carried forward held on data that did not choose them."""
    table = run.tables.get("replication")
    if table is None or "replicated" not in table:
        return None
    rows = table[table["source"] == "latent"] if "source" in table else table
    known = rows["replicated"].dropna()
    if known.empty:
        return None
    held = int(known.astype(str).str.lower().isin(["true", "1", "1.0", "yes"]).sum())
    return f"{held} of {len(known)} latents chosen on one part of the cohort hold on the part that did not choose them."


def confounding_verdict(run: Run, latents: list[str]) -> str | None:
    """How many of the latents that matter follow biology, and how many the technical factor."""
    table = run.tables.get("confounders")
    if table is None or "flag" not in table:
        return None
    rows = table[table["latent"].isin(latents)]
    if rows.empty:
        return None
    worst = rows.groupby("latent")["flag"].agg(lambda f: next((o for o in _FLAGS if o in set(f)), "undetermined"))
    counts = worst.value_counts()
    said = ", ".join(f"{counts[f]} {_FLAGS[f]}" for f in reversed(_FLAGS) if f in counts)
    return f"Of the {style.count(len(worst), 'latent')} with the best association of a target: {said}."


def strata_verdicts(run: Run) -> list[dict[str, str]]:
    """For each target and latent: does the pooled association survive within strata of the confounder?

    An estimate is clear when its interval excludes no association (or, where there is no interval, its p is at most
    0.05). A clear pooled association survives when the estimate within strata is clear too and has its sign.
    """
    table = run.tables.get("within_strata")
    if table is None or not {"stratum", "target", "latent", "estimate"} <= set(table):
        return []
    found = []
    for (target, latent), rows in table.groupby(["target", "latent"], sort=False):
        by = rows.drop_duplicates("stratum").set_index("stratum")
        if not {"pooled", "within"} <= set(by.index):
            continue
        pooled, within = by.loc["pooled"], by.loc["within"]
        null = results.null_value(within.get("effect", "effect"))
        same = np.sign(within["estimate"] - null) == np.sign(pooled["estimate"] - null)
        verdict = _STRATA[_clear(pooled, null), _clear(within, null) and (bool(same) or "reversed")]
        if not (_known(pooled) and _known(within)):
            verdict = "cannot be judged"
        n = within.get("n_units", within.get("n", np.nan))
        found.append(
            {
                "target": str(target), "latent": str(latent), "verdict": verdict,
                "pooled": pooled["estimate"], "within": within["estimate"], "n": n,
            }
        )  # fmt: skip
    return found


_STRATA = {  # (pooled is clear, within is clear and of the same sign) -> verdict
    (True, True): "survives within strata",
    (True, False): "does not survive within strata",
    (True, "reversed"): "reverses within strata",
    (False, True): "is seen only within strata",
    (False, "reversed"): "is seen only within strata",
    (False, False): "is seen neither pooled nor within strata",
}


def _clear(row: pd.Series, null: float) -> bool:
    if pd.notna(row.get("ci_low", np.nan)):
        return bool(row["ci_low"] > null or row["ci_high"] < null)
    return bool(row.get("p", np.nan) <= ALPHA)


def _known(row: pd.Series) -> bool:
    """An estimate with an interval or a p, of a question that the data can answer."""
    if row.get("status", "ok") == "unidentifiable":
        return False
    return pd.notna(row["estimate"]) and (pd.notna(row.get("ci_low", np.nan)) or pd.notna(row.get("p", np.nan)))


def strata_sentences(run: Run) -> list[str]:
    """For each target: what becomes of its best latent, and of all that a pooled analysis would name, within strata."""
    found = pd.DataFrame(strata_verdicts(run))
    best = best_rows(run).query("source == 'latent'").set_index("target")["latent"]
    said = []
    for target, rows in found.groupby("target", sort=False) if len(found) else ():
        if (rows["verdict"] == "cannot be judged").all():
            continue
        counts = rows["verdict"].value_counts()
        pooled = int(counts.reindex([v for (seen, _), v in _STRATA.items() if seen]).sum())
        kept = int(counts.get(_STRATA[True, True], 0))
        named = style.count(pooled, "latent")
        text = f"{target}: of {named} associated with it over all strata, {kept} survive within them"
        for row in rows[rows["latent"] == best.get(target)].itertuples():
            text += (
                f"; {row.latent}, the best, {row.verdict} "
                f"({style.number(row.pooled)} pooled, {style.number(row.within)} within)"
            )
        said.append(text + ".")
    return said


def cohort_verdict(run: Run) -> str | None:
    """How many latents fire more often in one cohort than in the other."""
    table = run.tables.get("diff")
    if table is None:
        return None
    facts = run.cohorts
    first, tested = table.iloc[0], table[table["p"].notna()]
    n = f"{style.count(first['n_a'], facts['noun'])} against {first['n_b']:,}"
    text = f"{facts['a']} against {facts['b']} ({n}): of {style.count(len(tested), 'tested latent')} "
    passing = tested[tested["q"] <= ALPHA]
    text += f"{len(passing):,} differ in how often they fire (q ≤ {ALPHA:g})"
    if passing.empty:
        return text + ", which does not show that the others are the same."
    best = passing.iloc[0]
    shares = f"{style.number(best['frequency_a'])} against {style.number(best['frequency_b'])}"
    return f"{text}; first {best['latent']}, {shares}, q = {style.p_value(best['q'])}."


def retrieval_verdicts(run: Run) -> list[str]:
    """For each label: how precisely codes find it, by what was excluded, beside chance and the embedding."""
    table = run.tables.get("retrieval")
    if table is None or "measure" not in table:
        return []
    rows = table[(table["measure"] == "ap") & table["estimate"].notna()]
    found = []
    for label, part in rows[rows["use_rep"] == "X"].groupby("label", sort=False):
        said = [
            f"{style.number(row.estimate)} ({row.excluded} excluded, chance {style.number(row.chance)})"
            for row in part.itertuples()
        ]
        text = f"Search for {label} by codes: mAP {', '.join(said)}, {style.count(part['n_queries'].max(), 'query')}"
        gains = rows[(rows["label"] == label) & rows["use_rep"].astype(str).str.startswith("X - ")]
        if len(gains):
            other = str(gains["use_rep"].iloc[0]).removeprefix("X - ").replace("_", " ")
            ends = [style.number(end, digits=3) for end in (gains["estimate"].min(), gains["estimate"].max())]
            text += f"; codes less {other}: {' to '.join(dict.fromkeys(ends))}"
        found.append(f"{text}.".replace("querys", "queries"))
    return found
