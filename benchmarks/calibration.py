"""How often every default of ``biosae.stats`` rejects a true null: nested cohorts without any effect.

    OMP_NUM_THREADS=1 python benchmarks/calibration.py --docs docs/statistics.md
    python benchmarks/calibration.py --only "fit ols" --patients 8 --cohorts 10

Tiles of patients (2 to 60 each, geometric or log-normal), latents zero-inflated and log-normal with 60 and 95 % zeros,
correlated 0.5 in blocks of ten, one intraclass correlation for latents and for targets that vary within patients.
Nothing is associated with anything but in the cells ``planted``. Latents of a cohort depend on each other, so standard
errors count cohorts. A cell above 5 % + 2 standard errors is simulated again, with a new seed and three times the
cohorts, and only the second result is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from null_paths import ICC, LEVEL, PATHS, PATIENTS, Measures
from pages import insert

ROOT = Path(__file__).resolve().parents[1]


# -------------------------------------------------------------------------------------------------------- measuring


def simulate(names: Iterable[str], G: int, icc: float, *, cohorts: float, seed: int) -> list[dict[str, Any]]:
    """Cells of one design: every path on the same cohorts; ``cohorts`` multiplies the number of each path."""
    found: dict[str, list[Measures]] = {name: [] for name in names}
    spent, refused, counts = dict.fromkeys(found, 0.0), dict.fromkeys(found, ""), dict.fromkeys(found, 0)
    wanted = {name: max(1, round(PATHS[name].cohorts * cohorts)) for name in found if G in PATHS[name].patients}
    for i in range(max(wanted.values(), default=0)):
        made: dict[str, anndata.AnnData] = {}
        for name, number in wanted.items():
            if i >= number:
                continue
            path = PATHS[name]
            kind = f"{path.make.__name__} {path.made}"
            if kind not in made:
                made[kind] = path.make(G, icc, np.random.default_rng((seed, G, round(100 * icc), i)), **path.made)
            start = time.process_time()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found[name].append(path.run(made[kind], **path.options))
            except Exception as error:  # a refusal or a crash is a result of the path too
                refused[name] = f"{type(error).__name__}: {error}"[:200]
                counts[name] += 1
            spent[name] += time.process_time() - start
    cells = []
    for name, number in wanted.items():
        measures = sorted({measure for one in found[name] for measure in one})
        for measure in measures:
            values = np.array([one[measure] for one in found[name] if measure in one])
            cells.append({"path": name, "measure": measure, "patients": G, "icc": icc, **rate(values)})
        if not measures:
            cells.append({"path": name, "measure": "none", "patients": G, "icc": icc, "cohorts": number})
        if counts[name] or not measures:
            cells[-1] |= {"refused": refused[name] or "no p", "n_refused": counts[name] or number}
    return [{**cell, "cpu_s": round(spent[cell["path"]], 2)} for cell in cells]


def rate(values: np.ndarray) -> dict[str, float]:
    """Hits over tests (cohorts, 2) with the standard error of that ratio, cohorts being independent."""
    hits, tests = values.T
    k, share = len(values), hits.sum() / tests.sum()
    se = np.sqrt(((hits - share * tests) ** 2).sum() * k / max(k - 1, 1)) / tests.sum()
    return {"rate": round(float(share), 6), "se": round(float(se), 6), "cohorts": k, "tests": int(tests.sum())}


def too_high(cell: dict[str, Any]) -> bool:
    """Above its level by more than two standard errors."""
    level = 1e-3 if cell["measure"] == "0.001" else LEVEL
    return "rate" in cell and not cell["measure"].startswith("power") and cell["rate"] > level + 2 * cell["se"]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    chosen = [n for n in PATHS if not options.only or any(word in n for word in options.only)]
    cells: list[dict[str, Any]] = json.loads(options.out.read_text())["cells"] if options.more else []
    for icc in options.icc:
        for G in options.patients:
            new = simulate(chosen, G, icc, cohorts=options.cohorts, seed=options.seed)
            again = {c["path"] for c in new if too_high(c)}
            second = simulate(again, G, icc, cohorts=3 * options.cohorts, seed=options.seed + 1)
            flagged = {(c["path"], c["measure"]) for c in new if too_high(c)}
            for c in second:
                c["again"] = True
            new = [c for c in new if (c["path"], c["measure"]) not in flagged] + [
                c for c in second if (c["path"], c["measure"]) in flagged
            ]
            done = {(c["path"], c["patients"], c["icc"]) for c in new}
            cells = [c for c in cells if (c["path"], c["patients"], c["icc"]) not in done] + new
            write(options.out, {"cells": cells})
            print(G, icc, len(new), "cells;", sorted({c["path"] for c in new if too_high(c)}), flush=True)
    return {"cells": cells}


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    lines = ",\n".join(json.dumps(cell) for cell in results["cells"])
    temporary.write_text(f'{{"cells": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(temporary, path)


GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "patients: `auto`": ("0.05", ("patient: auto",)),
    "patients: `pearson kendall welch fisher ols`": (
        "0.05", tuple(f"patient: {m}," for m in ("pearson", "kendall", "welch", "fisher", "ols"))
    ),
    "patients: `aggregate=` max, fraction active": ("0.05", ("patient: max", "patient: fraction")),
    "patients: `poisson negbin`": ("0.05", ("patient: poisson", "patient: negbin", "patient: adjusted negbin")),
    "patients: `ordinal`": ("0.05", ("patient: ordinal", "patient: adjusted ordinal")),
    "patients: `cox`": ("0.05", ("patient: cox", "patient: adjusted cox", "patient: strata cox")),
    "patients: covariates": ("0.05", ("patient: adjusted,",)),
    "patients: strata, fixed and random": ("0.05", ("patient: strata,",)),
    "samples: `auto`, also `nested=\"cluster\"`": ("0.05", ("sample: auto", "cluster: auto")),
    "samples: `pearson kendall welch fisher ols`": (
        "0.05", tuple(f"sample: {m}," for m in ("pearson", "kendall", "welch", "fisher", "ols"))
    ),
    "samples: `lmm`": ("0.05", ("sample: lmm",)),
    "samples: `poisson negbin`": ("0.05", ("sample: poisson", "sample: negbin", "sample: adjusted negbin")),
    "samples: `ordinal`": ("0.05", ("sample: ordinal", "sample: adjusted ordinal")),
    "samples: `cox`": ("0.05", ("sample: cox",)),
    "samples: covariates": ("0.05", ("sample: adjusted,",)),
    "samples: strata, fixed and random": ("0.05", ("sample: strata",)),
    "samples: smooth maps": ("0.05", ("smooth maps",)),
    "any `p_maxt`: `permute` auto": ("any max-T", ("max-T auto",)),
    "any `p_maxt`: between": ("any max-T", ("max-T between",)),
    "any `p_maxt`: within": ("any max-T", ("max-T within",)),
    "any `p_maxt`: spatial": ("any max-T", ("max-T spatial",)),
    **{f"any q: `{q}`": (f"any {q}", ("families",)) for q in ("bh", "storey", "hierarchical", "by")},
    **{f"false among discoveries: `{q}`": (f"fdr {q}", ("planted",)) for q in ("bh", "storey", "hierarchical", "by")},
    "`confounders`": ("0.05", ("confounders",)),
    **{f"`fit` {model}": ("0.05", (f"fit {model}",)) for model in (
        "ols", "logistic", "poisson", "negbin", "ordinal", "cox", "lmm", "glmm_binomial"
    )},
    "`replicate`, `p_replication`": ("0.05", ("replicate",)),
    "`leave_one_site_out`, combined": ("0.05", ("leave one site out",)),
    "`by_site`, fixed": ("0.05", ("by site, fixed",)),
    "`by_site`, random": ("0.05", ("by site, random",)),
}  # fmt: skip
"""Rows of the table: measure, and beginnings of the names of paths."""


def table(results: dict[str, Any]) -> str:
    """The section of the page: mean of all cells of a row, and the highest one with its standard error, in %."""
    cells = [c for c in results["cells"] if "rate" in c]
    patients = sorted({c["patients"] for c in cells})
    lines = [
        f"| share of true nulls rejected, % | {' | '.join(f'{G} patients' for G in patients)} | p <= 0.001 |",
        "| --- |" + " --- |" * (len(patients) + 1),
    ]
    for title, (kind, prefixes) in GROUPS.items():
        own = [c for c in cells if c["path"].startswith(prefixes)]
        row = []
        for G in patients:
            here = [c for c in own if c["patients"] == G and c["measure"] == kind]
            if not here:
                row.append("")
                continue
            worst = max(here, key=lambda c: c["rate"])
            row.append(f"{mean(here):.1f} ({100 * worst['rate']:.1f} ± {100 * worst['se']:.1f})")
        far = [c for c in own if c["measure"] == "0.001"] if kind == "0.05" else []
        if any(row):
            lines.append(f"| {title} | {' | '.join(row)} | {f'{mean(far):.2f}' if far else ''} |")
    return "\n".join(lines)


def mean(cells: list[dict[str, Any]]) -> float:
    """Mean rate of cells in %, weighted by their tests."""
    tests = np.array([c["tests"] for c in cells])
    return float(100 * (np.array([c["rate"] for c in cells]) @ tests) / tests.sum())


def conspicuous(results: dict[str, Any]) -> str:
    """Cells above their level by more than two standard errors, paths below 2 %, and what was refused."""
    lines, paths = [], {}
    for c in results["cells"]:
        if too_high(c):
            lines.append(
                f"above: {c['path']}, {c['patients']} patients, ICC {c['icc']}, {c['measure']}: "
                f"{100 * c['rate']:.2f} +- {100 * c['se']:.2f} %, {c['cohorts']} cohorts, {c['tests']:.0f} tests"
            )
        if "refused" in c:
            lines.append(f"refused: {c['path']}, {c['patients']}, {c['icc']}: {c['n_refused']}, {c['refused']}")
        if c["measure"] == "0.05":
            paths.setdefault((c["path"], c["patients"]), []).append(c)
    low = [f"{name} ({G}): {mean(own):.1f}" for (name, G), own in paths.items() if mean(own) < 2]
    return "\n".join([*lines, "below 2 %: " + "; ".join(low)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/calibration.json", help="raw results")
    parser.add_argument("--docs", type=Path, help="page whose section between the markers is replaced")
    parser.add_argument("--only", nargs="*", help="words that the name of a path contains")
    parser.add_argument("--patients", nargs="*", type=int, default=list(PATIENTS))
    parser.add_argument("--icc", nargs="*", type=float, default=list(ICC))
    parser.add_argument("--cohorts", type=float, default=1.0, help="multiple of the usual number of cohorts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", action="store_true", help="keep the cells of --out that are not simulated again")
    parser.add_argument("--table", action="store_true", help="simulate nothing; print what --out holds")
    options = parser.parse_args()
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.table else measure(options)
    print(table(results), conspicuous(results), sep="\n\n")
    if options.docs:
        insert(options.docs, "calibration", table(results))


if __name__ == "__main__":
    main()
