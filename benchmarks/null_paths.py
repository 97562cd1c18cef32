"""Nested cohorts without any effect, and the default paths of ``biosae.stats`` that test them; see calibration.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import ndimage, stats

import biosae.stats as bs
from biosae.stats.multiplicity import correct

PATIENTS, ICC = (8, 20, 60), (0.0, 0.3, 0.8)
LEVEL = 0.05
Measures = dict[str, tuple[float, float]]
"""Measure -> hits and tests of one cohort."""


# ---------------------------------------------------------------------------------------------------------- cohorts


def cohort(G: int, icc: float, rng: np.random.Generator, *, m: int = 40, effect: float = 0.0) -> anndata.AnnData:
    """Tiles of G patients with m latents; ``effect`` shifts every tenth by the label ``half`` or by ``number``."""
    size = rng.geometric(1 / 14, G) if rng.random() < 0.5 else np.exp(rng.normal(np.log(10), 0.9, G))
    size = np.clip(np.round(size), 2, 60).astype(int)
    g = np.repeat(np.arange(G), size)
    n = len(g)

    def nested(*columns: int) -> np.ndarray:
        between = rng.normal(size=(G, *columns))[g]
        return np.sqrt(icc) * between + np.sqrt(1 - icc) * rng.normal(size=(n, *columns))

    def dealt(*shares: float) -> np.ndarray:
        """Class of every tile, constant in patients, at least two patients a class."""
        counts = np.maximum(2, np.round(np.array(shares[1:]) * G)).astype(int)
        return rng.permutation(np.repeat(np.arange(len(shares)), [G - counts.sum(), *counts]))[g]

    stain, level = nested(), nested()
    half = dealt(0.5, 0.5)
    z = np.sqrt(0.5) * np.repeat(nested(m // 10), 10, axis=1) + np.sqrt(0.5) * nested(m)
    if effect:
        z[:, ::10] += effect * np.column_stack([half - 0.5, level])[:, np.arange(m // 10) % 2]
    zeros = np.where(np.arange(m) % 2, 0.95, 0.6)
    cut = stats.norm.ppf(zeros)
    area = np.exp(rng.normal(0, 0.7, n))
    died_at, left_at = rng.exponential(size=(2, G))
    obs = pd.DataFrame(
        {
            "patient": [f"p{i:03d}" for i in g],
            "number": level + 0.5 * stain, "count": rng.poisson(np.exp(level)).astype(float),
            "cells": rng.poisson(area * np.exp(level)).astype(float), "area": area,
            "half": np.where(half, "case", "control"), "fifth": np.where(dealt(0.8, 0.2), "case", "control"),
            "common": level > 0.3, "rare": level > 1.64,
            "classes": np.array(["a", "b", "c"])[dealt(0.4, 0.3, 0.3)],
            "classes_within": np.array(["a", "b", "c"])[np.searchsorted([-0.5, 0.7], level)],
            "grade": dealt(0.25, 0.25, 0.25, 0.25).astype(float),
            "grade_within": np.searchsorted([-0.8, 0.2, 1.2], level).astype(float),
            "time": np.minimum(died_at, left_at)[g], "died": (died_at < left_at)[g].astype(float),
            "age": np.exp(rng.normal(size=G))[g], "site": np.array(["north", "south"])[dealt(0.5, 0.5)],
            "hospital": np.array(["x", "y", "z"])[dealt(0.4, 0.3, 0.3)], "stain": stain,
        },
        index=[f"t{i}" for i in range(n)],
    )  # fmt: skip
    X = sp.csr_matrix(np.where(z > cut, np.exp(z) - np.exp(cut), 0.0))
    return anndata.AnnData(X, obs=obs, var=pd.DataFrame({"zeros": zeros}, index=[f"l{j:03d}" for j in range(m)]))


def maps(G: int, icc: float, rng: np.random.Generator, *, m: int = 20, side: int = 12) -> anndata.AnnData:
    """Slides of ``side`` x ``side`` tiles, one a patient, with smooth maps of latents and of a target."""
    fields = rng.normal(size=(G, m + 1, side, side))
    fields = ndimage.gaussian_filter(fields, (0, 0, 2.0, 2.0), mode="wrap")
    fields = fields / fields.std(axis=(2, 3), keepdims=True)
    fields = np.sqrt(1 - icc) * fields + np.sqrt(icc) * rng.normal(size=(G, m + 1, 1, 1))
    z = fields.transpose(0, 2, 3, 1).reshape(-1, m + 1)
    zeros = np.where(np.arange(m) % 2, 0.95, 0.6)
    cut = stats.norm.ppf(zeros)
    xy = np.tile(np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2), (G, 1)) * 256.0
    patient = np.repeat([f"p{i:03d}" for i in range(G)], side * side)
    obs = pd.DataFrame({"patient": patient, "number": z[:, m]}, index=[f"t{i}" for i in range(len(z))])
    X = sp.csr_matrix(np.where(z[:, :m] > cut, np.exp(z[:, :m]) - np.exp(cut), 0.0))
    var = pd.DataFrame({"zeros": zeros}, index=[f"l{j:03d}" for j in range(m)])
    return anndata.AnnData(X, obs=obs, var=var, obsm={"spatial": xy})


# ------------------------------------------------------------------------------------------------------------ paths


def of_p(table: pd.DataFrame, zeros: pd.Series | None = None, column: str = "p") -> Measures:
    """Rejections at 0.05 (all, and of latents with 60 and 95 % zeros) and at 0.001."""
    p = table[column].astype(float)
    tested = p.notna()
    out = {"0.05": ((p <= LEVEL).sum(), tested.sum()), "0.001": ((p <= 1e-3).sum(), tested.sum())}
    if zeros is not None:
        share = table["latent"].map(zeros)
        for value in (0.6, 0.95):
            out[f"0.05, {value:.0%} zeros"] = ((p <= LEVEL)[share == value].sum(), tested[share == value].sum())
    return {name: (float(hits), float(tests)) for name, (hits, tests) in out.items() if tests}


def screen(adata: anndata.AnnData, target: Any, **how: Any) -> Measures:
    table = bs.associate(adata, target, controls=False, n_fits=0, **how)
    out = of_p(table, adata.var["zeros"])
    if not out:
        return {}
    families = [] if isinstance(target, str) else ["by", "hierarchical"]
    for name in ["bh", "storey", *families]:
        q = correct(table["p"], correction=name, families=table["target"])
        out[f"any {name}"] = (float((q <= LEVEL).any()), 1.0)
    if how.get("n_permutations"):
        out["any max-T"] = (float((table["p_maxt"] <= LEVEL).any()), 1.0)
    return out


def planted(adata: anndata.AnnData, target: list[str], **how: Any) -> Measures:
    """Share of false among the discoveries; every tenth latent goes with one of the two targets."""
    table = bs.associate(adata, target, controls=False, **how)
    place = table["latent"].str[1:].astype(int)
    true = (place % 10 == 0) & (place // 10 % 2 == table["target"].map({"half": 0, "number": 1}))
    out = {}
    for name in ("bh", "by", "storey", "hierarchical"):
        found = correct(table["p"], correction=name, families=table["target"]) <= LEVEL
        out[f"fdr {name}"] = (float((found & ~true).sum()) / max(int(found.sum()), 1), 1.0)
        out[f"power {name}"] = (float((found & true).sum()), float(true.sum()))
    return out


def shortlist(adata: anndata.AnnData, target: str, *, model: str, **how: Any) -> Measures:
    """Six latents fixed in advance: of three blocks one with 60 % and one with 95 % zeros."""
    return of_p(bs.fit(adata, target, latents=LATENTS, model=model, **how), adata.var["zeros"])


LATENTS = ["l000", "l001", "l010", "l011", "l020", "l021"]


def confounders(adata: anndata.AnnData, side: str, **how: Any) -> Measures:
    table = bs.confounders(adata, n_permutations=199, n_bootstrap=0, **how)
    return of_p(table, adata.var["zeros"], f"p_{side}")


def replicate(adata: anndata.AnnData, target: list[str], **how: Any) -> Measures:
    found = bs.replicate(adata, target, split=None, controls=False, n_permutations=0, **how)
    out = of_p(found, None, "p_replication")
    holm = found["p_holm"].astype(float)
    return out | ({"any Holm": (float((holm <= LEVEL).any()), 1.0)} if holm.notna().any() else {})


def left_out(adata: anndata.AnnData, target: str, **how: Any) -> Measures:
    found = bs.leave_one_site_out(adata, target, site="hospital", controls=False, **how)
    return of_p(found[found["site"] == "combined"])


def by_site(adata: anndata.AnnData, target: str, row: str, **how: Any) -> Measures:
    found = bs.by_site(adata, target, site="hospital", latents=list(adata.var_names[:20]), **how)
    return of_p(found[found["site"] == row], adata.var["zeros"])


class NullPath(NamedTuple):
    """A default path: what runs it, its arguments, where cohorts come from, and how many are drawn of each design."""

    run: Callable[..., Measures]
    options: dict[str, Any]
    cohorts: int
    make: Callable[..., anndata.AnnData] = cohort
    made: dict[str, Any] = {}
    patients: tuple[int, ...] = PATIENTS


def screens() -> Iterable[tuple[str, NullPath]]:
    adjusted = {"covariates": ["stain", "site"]}
    patient = {
        "auto": ("number age half fifth classes", {}), "pearson": ("number age half", {"method": "pearson"}),
        "kendall": ("age", {"method": "kendall"}), "welch": ("half fifth", {"method": "welch"}),
        "fisher": ("half fifth", {"method": "fisher"}), "ols": ("age", {"method": "ols"}),
        "ordinal": ("grade", {"method": "ordinal"}), "poisson": ("cells", {"method": "poisson", "exposure": "area"}),
        "negbin": ("count cells", {"method": "negbin", "exposure": "area"}),
        "cox": ("time", {"method": "cox", "event": "died"}), "adjusted": ("number age fifth", adjusted),
        "adjusted negbin": ("cells", {"method": "negbin", "exposure": "area", **adjusted}),
        "adjusted ordinal": ("grade", {"method": "ordinal", **adjusted}),
        "adjusted cox": ("time", {"method": "cox", "event": "died", **adjusted}),
        "strata": ("age half", {"strata": "site"}),
        "strata, random": ("age half", {"strata": "site", "pooling": "random"}),
        "strata cox": ("time", {"method": "cox", "event": "died", "strata": "site"}),
        "max": ("number half", {"aggregate": "max"}),
        "fraction active": ("number half", {"aggregate": "fraction_active"}),
    }  # fmt: skip
    sample = {
        "auto": ("number count common rare classes_within age half fifth classes", {}),
        "pearson": ("count rare age", {"method": "pearson"}), "kendall": ("count", {"method": "kendall"}),
        "welch": ("common fifth", {"method": "welch"}), "fisher": ("common rare fifth", {"method": "fisher"}),
        "ols": ("number age", {"method": "ols"}), "lmm": ("number", {"method": "lmm"}),
        "ordinal": ("grade grade_within", {"method": "ordinal"}),
        "poisson": ("cells", {"method": "poisson", "exposure": "area"}),
        "negbin": ("cells", {"method": "negbin", "exposure": "area"}),
        "cox": ("time", {"method": "cox", "event": "died"}), "adjusted": ("number common fifth", adjusted),
        "adjusted negbin": ("cells", {"method": "negbin", "exposure": "area", **adjusted}),
        "adjusted ordinal": ("grade_within", {"method": "ordinal", **adjusted}),
        "strata": ("number common half", {"strata": "site"}),
        "strata, random": ("number half", {"strata": "site", "pooling": "random"}),
    }  # fmt: skip
    for unit, rows in (("patient", patient), ("sample", sample)):
        for name, (targets, how) in rows.items():
            for target in targets.split():
                few = 60 if name in ("kendall", "lmm") else 160
                yield f"{unit}: {name}, {target}", NullPath(screen, {"target": target, "unit": unit, **how}, few)
    clustered = {"target": "number", "unit": "patient", "nested": "cluster"}
    yield "cluster: auto, number", NullPath(screen, clustered, 160)


def others() -> Iterable[tuple[str, NullPath]]:
    draws = {"n_permutations": 199}
    for name, unit, target, more in (
        ("auto", "sample", "number", {}), ("auto", "sample", "classes_within", {}), ("auto", "sample", "half", {}),
        ("auto", "patient", "age", {}), ("auto", "sample", "number", {"covariates": ["stain", "site"]}),
        ("between", "sample", "age", {}), ("between", "patient", "half", {}), ("within", "sample", "number", {}),
        ("within", "sample", "rare", {}), ("within", "sample", "cells", {"method": "negbin", "exposure": "area"}),
    ):  # fmt: skip
        title = f"max-T {name}: {unit}{', adjusted' * ('covariates' in more)}, {target}"
        yield title, NullPath(screen, {"target": target, "unit": unit, "permute": name, **draws, **more}, 400)
    spatial = {"target": "number", "unit": "sample", "permute": "spatial", **draws}
    yield "max-T spatial: sample, number", NullPath(screen, spatial, 120, maps, {}, (8, 20))
    smooth = {"target": "number", "unit": "sample"}
    yield "smooth maps: sample, number", NullPath(screen, smooth, 120, maps, {}, (8, 20))
    for unit, targets in (("patient", "number age half fifth"), ("sample", "number count common age fifth")):
        yield f"families: {unit}", NullPath(screen, {"target": targets.split(), "unit": unit}, 400)
        for effect in (0.8, 1.6):
            how, made = {"target": ["half", "number"], "unit": unit}, {"m": 200, "effect": effect}
            yield f"planted {effect}: {unit}", NullPath(planted, how, 100, cohort, made, (20, 60))
    for side in ("biology", "technical"):
        for technical in ("site", "stain"):
            yield (
                f"confounders: {side}, {technical}",
                NullPath(confounders, {"side": side, "biology": "half", "technical": technical}, 100),
            )
    for model, unit, target, more in (
        ("ols", "sample", "number", {}), ("ols", "sample", "half", {}), ("ols", "patient", "age", {}),
        ("logistic", "sample", "common", {}), ("logistic", "sample", "half", {}), ("logistic", "patient", "half", {}),
        ("poisson", "sample", "cells", {"exposure": "area"}), ("poisson", "patient", "cells", {"exposure": "area"}),
        ("negbin", "sample", "cells", {"exposure": "area"}), ("negbin", "patient", "cells", {"exposure": "area"}),
        ("ordinal", "sample", "grade_within", {}), ("ordinal", "patient", "grade", {}),
        ("cox", "sample", "time", {"event": "died"}), ("cox", "patient", "time", {"event": "died"}),
        ("lmm", "sample", "number", {}), ("glmm_binomial", "sample", "common", {}),
    ):  # fmt: skip
        slow = model in ("ordinal", "cox", "glmm_binomial") and unit == "sample"
        how = {"target": target, "model": model, "unit": unit, **more}
        yield f"fit {model}: {unit}, {target}", NullPath(shortlist, how, 20 if slow else 120)
    for unit, targets in (("patient", ["half", "age"]), ("sample", ["half", "number"])):
        yield f"replicate: {unit}", NullPath(replicate, {"target": targets, "unit": unit}, 160)
    for unit, target in (("patient", "age"), ("patient", "half"), ("sample", "number")):
        how = {"target": target, "unit": unit}
        yield f"leave one site out: {unit}, {target}", NullPath(left_out, how, 60, cohort, {}, (20, 60))
        for row in ("fixed", "random"):
            yield f"by site, {row}: {unit}, {target}", NullPath(by_site, {**how, "row": row}, 40, cohort, {}, (20, 60))


PATHS: dict[str, NullPath] = dict([*screens(), *others()])
