"""Rejection rates under the null in simulated nested cohorts: no default path may reject more than it says.

Patients have 4 to 20 samples and an intraclass correlation of 0.3 in latents and targets; latents are zero-inflated
and skewed.
"""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats

from biosae.errors import BiosaeError
from biosae.stats import associate, confounders

PATHS = {
    "number that varies": ("count", {"unit": "sample"}),
    "rare label that varies": ("rare", {"unit": "sample"}),
    "three classes that vary": ("tile3", {"unit": "sample"}),
    "label of patients": ("label", {"unit": "sample"}),
    "number of patients": ("age", {"unit": "sample"}),
    "classes of patients": ("cls3", {"unit": "sample"}),
    "number, adjusted": ("count", {"unit": "sample", "covariates": ["stain"]}),
    "label of patients, adjusted": ("label", {"unit": "sample", "covariates": ["site"]}),
    "number, within site": ("count", {"unit": "sample", "strata": "site"}),
    "label of patients, within site": ("label", {"unit": "sample", "strata": "site"}),
    "patients: number": ("count", {"unit": "patient"}),
    "patients: label": ("label", {"unit": "patient"}),
    "patients: classes": ("cls3", {"unit": "patient"}),
    "patients: adjusted": ("count", {"unit": "patient", "covariates": ["site"]}),
    "patients: within site": ("age", {"unit": "patient", "strata": "site"}),
    "patients: Welch": ("label", {"unit": "patient", "method": "welch"}),
    "firing": ("rare", {"unit": "sample", "method": "fisher"}),
    "slope": ("count", {"unit": "sample", "method": "ols"}),
}


def cohort(G, rng, *, m, inflation, icc=0.3):
    size = rng.integers(4, 21, G)
    g = np.repeat(np.arange(G), size)
    n = len(g)

    def nested(columns=()):
        return np.sqrt(icc) * rng.normal(size=(G, *columns))[g] + np.sqrt(1 - icc) * rng.normal(size=(n, *columns))

    x, level, cut = nested((m,)), nested(), stats.norm.ppf(inflation)
    three = rng.permutation(np.arange(G) % 3)
    obs = pd.DataFrame(
        {
            "patient": g.astype(str),
            "site": np.where(rng.permutation(np.arange(G) % 2)[g], "north", "south"),
            "count": rng.poisson(np.exp(level)).astype(float),
            "rare": level > 1.3,
            "tile3": np.select([level < -0.5, level < 0.7], ["a", "b"], "c"),
            "label": np.where(rng.permutation(np.arange(G) < max(2, G // 4))[g], "case", "control"),
            "age": np.exp(rng.normal(size=G))[g],
            "cls3": np.array(["a", "b", "c"])[three[g]],
            "stain": nested(),
        },
        index=[f"t{i}" for i in range(n)],
    )
    return anndata.AnnData(sp.csr_matrix(np.where(x > cut, np.exp(x) - np.exp(cut), 0)), obs=obs)


def rates(G, *, inflation, repeats, m, paths, n_permutations=0, seed=0):
    """Per path: share of p <= 0.05, its standard error over cohorts, and the share of cohorts with a p_maxt <= 0.05."""
    rng = np.random.default_rng(seed)
    found = {name: [] for name in paths}
    for _ in range(repeats):
        adata = cohort(G, rng, m=m, inflation=inflation)
        for name, (target, how) in paths.items():
            try:
                result = associate(adata, target, controls=False, n_permutations=n_permutations, **how)
            except BiosaeError:
                continue
            p = result["p"].dropna()
            if len(p):
                joint = (result["p_maxt"] <= 0.05).any() if n_permutations else np.nan
                found[name].append(((p <= 0.05).mean(), joint))
    out = {}
    for name, values in found.items():
        share = np.array(values, float)
        out[name] = (share[:, 0].mean(), share[:, 0].std() / np.sqrt(len(share)), share[:, 1].mean(), len(share))
    return out


def assert_holds(found, level=0.05):
    too_high = {n: v for n, v in found.items() if v[0] > level + 0.005 + 3 * v[1]}
    assert not too_high, too_high


def test_naive_samples_do_not_hold_their_level():
    naive = {"naive": ("age", {"unit": "sample", "assume_independent": True})}
    assert rates(20, inflation=0.6, repeats=6, m=40, paths=naive)["naive"][0] > 0.12


@pytest.mark.parametrize("G", [8, 24])
def test_default_paths_hold_their_level(G):
    assert_holds(rates(G, inflation=0.6, repeats=12 if G == 8 else 10, m=30, paths=PATHS))


def test_rare_latents_and_labels_hold_their_level():
    chosen = {n: PATHS[n] for n in ("rare label that varies", "label of patients", "number that varies", "firing")}
    assert_holds(rates(40, inflation=0.95, repeats=12, m=40, paths=chosen))


@pytest.mark.slow
@pytest.mark.parametrize("inflation", [0.6, 0.95])
@pytest.mark.parametrize("G", [8, 20, 60])
def test_every_path_holds_its_level(G, inflation):
    assert_holds(rates(G, inflation=inflation, repeats=120, m=40, paths=PATHS))


@pytest.mark.slow
@pytest.mark.parametrize("G", [8, 20, 60])
def test_max_t_holds_the_family_wise_level(G):
    names = (
        "number that varies",
        "label of patients",
        "three classes that vary",
        "number, adjusted",
        "patients: number",
    )
    found = rates(G, inflation=0.6, repeats=200, m=25, paths={n: PATHS[n] for n in names}, n_permutations=199, seed=3)
    assert all(v[2] <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / v[3]) for v in found.values()), found


@pytest.mark.slow
def test_confounder_p_hold_their_level():
    rng = np.random.default_rng(0)
    share = []
    for _ in range(40):
        adata = cohort(24, rng, m=30, inflation=0.6)
        found = confounders(adata, biology=["label"], technical=["site"], n_permutations=199)
        share.append([(found[c].dropna() <= 0.05).mean() for c in ("p_biology", "p_technical")])
    share = np.array(share)
    assert (share.mean(0) <= 0.055 + 3 * share.std(0) / np.sqrt(40)).all(), share.mean(0)
