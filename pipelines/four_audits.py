"""Four public data sets audited: what tiles taken as independent would have claimed, and what is left of it.

Run the four studies first, then this script on their run folders:

    for name in pathology_cell_counts blood_smear_counts chest_xray_findings leaf_disease; do
        biosae --data-dir DATA --weights-dir WEIGHTS run pipelines/$name.toml --out runs/$name
    done
    python pipelines/four_audits.py runs docs/audits

It writes the figures (PDF and PNG) and ``tables.md`` with every number of the page docs/audits.md.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

import biosae as bs


@dataclass
class Study:
    """One data set and the questions put to it."""

    run: str
    targets: list[str]
    technical: list[str]
    biology: list[str]
    groups: str
    label: str = ""
    """Column of classes that is counted against the first technical factor."""
    unit: str = "sample"
    method: str = "auto"
    covariates: list[str] = field(default_factory=list)
    strata: str | None = None
    complete: list[str] = field(default_factory=list)
    """Columns that must be known for the adjusted tests."""


STUDIES = {
    "her2st": Study(
        "pathology_cell_counts", ["prop_epithelial", "prop_plasma_cells", "prop_t_cells", "prop_myeloid"], ["slide"],
        ["prop_epithelial", "prop_plasma_cells", "prop_t_cells"], "patient", strata="slide",
    ),
    "blood": Study(
        "blood_smear_counts", ["count_rbc", "count_platelet"], ["site"], ["count_rbc", "count_platelet"],
        "near_dup_group", strata="site",
    ),
    "radiographs": Study(
        "chest_xray_findings", ["label_covid"], ["site", "ap_view", "male", "age"], ["label_covid"], "patient",
        "label_covid", unit="patient", method="spearman", covariates=["site", "ap_view", "male", "spline(age, df=3)"],
        complete=["male", "age"],
    ),
    "leaves": Study(
        "leaf_disease", ["label_scab", "label_black_rot", "label_healthy"], ["collector"], ["label_healthy"],
        "patient", "disease", strata="collector",
    ),
}  # fmt: skip


def main(runs: Path, out: Path) -> None:
    """Audit every study whose run folder is there."""
    out.mkdir(parents=True, exist_ok=True)
    text = []
    for name, study in STUDIES.items():
        path = runs / study.run / "latents.h5ad"
        if not path.is_file():
            text.append(f"## {name}\n\nNo run folder {study.run}.")
            continue
        adata = anndata.read_h5ad(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text.append(f"## {name}\n\n" + audit(name, study, adata, out))
        print(f"{name}: done", flush=True)
    (out / "tables.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def audit(name: str, study: Study, adata: Any, out: Path) -> str:
    """Figures of one study, and its tables as Markdown."""
    parts = [f"n = {adata.n_obs} samples, {adata.n_vars} latents."]
    factor = study.technical[0]
    if study.label:
        table = bs.stats.overlap(adata.obs, study.label, by=factor, unit=study.groups)
        parts += [f"{study.groups}s by {study.label} and {factor}: {table.attrs}", table.to_markdown()]
    how = {"controls": False, "groups": study.groups, "method": study.method}
    naive = bs.stats.associate(
        adata, study.targets, unit="sample", controls=False, method=study.method, assume_independent=True
    )
    known = adata.obs[study.complete].notna().all(axis=1).to_numpy() if study.complete else slice(None)
    honest = bs.stats.associate(adata, study.targets, unit=study.unit, **how)
    settings: dict[str, Any] = {"covariates": study.covariates} if study.covariates else {"strata": study.strata}
    adjusted = bs.stats.associate(adata[known].copy(), study.targets, unit=study.unit, **how, **settings)
    rows = []
    for target in study.targets:
        row = {"target": target}
        for words, result in (("naive", naive), ("patients", honest), ("adjusted", adjusted)):
            here = result[result["target"] == target]
            row[words] = f"{int((here['q'] <= 0.05).sum())} of {int(here['p'].notna().sum())}"
            row[f"n {words}"] = f"{here['n_units'].max()} / {here['n_groups'].max()}"
            if not here["p"].notna().any():
                row[words] = "no p: " + ", ".join(f"{k} {v}" for k, v in here["status"].value_counts().items())
        rows.append(row)
    parts.append("Latents with q <= 0.05 of those tested; n = units / independent groups.")
    parts.append(pd.DataFrame(rows).to_markdown(index=False))
    best = [bs.stats.ranked(naive[naive["target"] == t])["latent"].iloc[0] for t in study.targets]
    fate = []
    for target, latent in zip(study.targets, best):
        row = {"target": target, "best naive": latent}
        for words, result in (("naive", naive), ("patients", honest), ("adjusted", adjusted)):
            r = result[(result["target"] == target) & (result["latent"] == latent)].iloc[0]
            row[words] = f"{r['estimate']:.2f} ({r['ci_low']:.2f}, {r['ci_high']:.2f}), p {r['p']:.2g}, {r['status']}"
        fate.append(row)
    parts += ["What becomes of the best naive latent of each target:", pd.DataFrame(fate).to_markdown(index=False)]

    shares = bs.stats.confounders(
        adata[known].copy(), biology=study.biology, technical=study.technical, groups=study.groups, n_permutations=499
    )
    flags = pd.crosstab(shares["factor"], shares["flag"])
    flags["technical share at least twice"] = (shares["log2_ratio"] <= -1).groupby(shares["factor"]).sum()
    flags["biology share at least twice"] = (shares["log2_ratio"] >= 1).groupby(shares["factor"]).sum()
    parts += ["Flags of latents by technical factor:", flags.to_markdown()]
    technical = sorted(set(shares.loc[shares["flag"] == "technical", "latent"]))
    labels = [f for f in study.technical if adata.obs[f].nunique() <= 12]
    read = bs.stats.readout(adata, labels, groups=study.groups, without=technical)
    columns = ["factor", "features", "balanced_accuracy", "ci_low", "ci_high", "chance", "n_groups", "status"]
    parts += [f"Readout; {len(technical)} latents flagged technical left out:", read[columns].round(3).to_markdown()]

    draw(out / f"{name}_qq", bs.pl.qq, honest if honest["p"].notna().any() else naive)
    draw(out / f"{name}_qq_naive", bs.pl.qq, naive)
    if adjusted["p"].notna().any():
        target = study.targets[0]
        draw(out / f"{name}_volcano", bs.pl.volcano, adjusted, target=target, unadjusted=honest)
    if (shares["flag"] != "not_separable").any():
        draw(out / f"{name}_factors", bs.pl.factor_map, shares, n=24)
    if study.strata:
        chosen = [(t, b) for t, b in zip(study.targets, best)]
        strata = pd.concat(
            [
                bs.stats.within_strata(adata, t, strata=study.strata, unit=study.unit, latents=[b], groups=study.groups)
                for t, b in chosen
            ]
        )
        draw(out / f"{name}_forest", bs.pl.forest, strata)
        columns = ["target", "latent", "stratum", "estimate", "ci_low", "ci_high", "n_units", "n_groups", "status"]
        parts += ["Best naive latents, pooled and within strata:", strata[columns].round(3).to_markdown(index=False)]
    if "split" in adata.obs and {"train", "test"} <= set(adata.obs["split"]):
        again = bs.stats.replicate(
            adata, study.targets, unit=study.unit, groups=study.groups, strata=study.strata, method=study.method,
            n_permutations=199,
        )  # fmt: skip
        columns = [
            "target", "source", "latent", "estimate_discovery", "estimate_replication", "ci_low", "ci_high",
            "p_replication", "p_holm", "replicated", "n_groups_discovery", "n_groups_replication", "groups_shared",
            "status_replication",
        ]  # fmt: skip
        parts += ["Chosen on the train part, tested once on the test part:", again[columns].round(3).to_markdown()]
        if again[["estimate_discovery", "estimate_replication"]].notna().all(axis=1).any():
            draw(out / f"{name}_replication", bs.pl.replication, again, source=None)
    if "site" in adata.obs and adata.obs["site"].nunique() > 2:
        sites = bs.stats.leave_one_site_out(
            adata, study.targets[0], unit=study.unit, site="site", groups=study.groups, method=study.method,
            controls=False,
        )  # fmt: skip
        columns = ["site", "latent", "estimate_discovery", "estimate", "ci_low", "ci_high", "p", "n_groups", "status"]
        parts += [f"{study.targets[0]}, chosen on all other sites:", sites[columns].round(3).to_markdown(index=False)]
    power = bs.stats.power(adata, study.targets, unit=study.unit, groups=study.groups)
    parts += ["Power:", power.to_markdown(index=False)]
    return "\n\n".join(parts)


def draw(path: Path, function: Any, *args: Any, **kwargs: Any) -> None:
    """Draw and save one figure."""
    bs.pl.save(function(*args, **kwargs), path)


if __name__ == "__main__":
    np.seterr(all="ignore")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
