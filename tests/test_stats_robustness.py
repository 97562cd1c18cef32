"""Robustness index: worked numbers, planted biology and site, what is refused; tables backed by a file; worked numbers
of the specification that other files do not hold.
"""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats

from biosae.errors import InputError
from biosae.stats import associate, confounders, effects, readout, robustness_index
from biosae.stats.correlation import as_columns, rank_columns, t_from_r, t_pvalue
from biosae.stats.nested import ols_cluster
from biosae.stats.robustness import neighbours, pairs

FREE = {"unit": "sample", "assume_independent": True, "controls": False}


@pytest.mark.parametrize("container", [np.asarray, sp.csr_matrix])
def test_worked_index(container):
    x, y = np.tile([0, 0.1, 1, 1.1], 2), np.repeat([0.0, 3.0], 4)

    def index(x, y, k):
        so, os = pairs(neighbours(container(np.column_stack([x, y])), np.arange(8), k), y > 0, x >= x[2])
        return so.sum() / (so.sum() + os.sum()) if so.sum() + os.sum() else np.nan

    assert [index(x, y, k) for k in (1, 3, 5)] == pytest.approx([np.nan, 1, 0.5], nan_ok=True)
    assert [index(3 * x, 0.1 * y, k) for k in (3, 5)] == pytest.approx([0, 1 / 3])


def cohort(biology, site, n=240, seed=0):
    rng = np.random.default_rng(seed)
    slide = np.arange(n) // 10
    bio, tech = slide % 2, slide // 2 % 2
    X = 0.3 * rng.random((n, 6)) + rng.random((24, 6))[slide] * 0.2
    X[:, 0] += biology * bio
    X[:, 1] += biology * (1 - bio)
    X[:, 2] += site * tech
    X[:, 3] += site * (1 - tech)
    obs = pd.DataFrame({"slide": slide.astype(str), "label": np.where(bio, "t", "n"), "site": np.where(tech, "x", "y")})
    obs.index = obs.index.astype(str)
    adata = anndata.AnnData(sp.csr_matrix(X), obs=obs)
    adata.obsm["embedding"] = X[:, ::-1].astype(np.float32)
    return adata


@pytest.mark.parametrize("use", ["latents", "embedding"])
def test_biology_and_site_are_told_apart(use):
    of = {"biology": "label", "technical": "site", "use": use}
    strong, weak = robustness_index(cohort(2, 0), **of), robustness_index(cohort(0, 2), **of, k=9)
    assert strong["robustness_index"] > 0.98 and strong["balanced_accuracy"] == 1 and strong["status"] == "ok"
    assert weak["robustness_index"] < 0.02 and weak["k"] == 9 and weak["n_samples"] == 240
    even = robustness_index(cohort(0.1, 0.1), **of, k=31)
    assert 0.25 < even["robustness_index"] < 0.75 and 0 < even["sd"] < 0.2
    assert even["n_so"] + even["n_os"] <= 240 * 31


def test_index_never_looks_at_the_same_slide():
    near = neighbours(sp.csr_matrix(cohort(0, 0).X), np.arange(240) // 10, 9)
    assert (near // 10 != np.arange(240)[:, None] // 10).all() and (near >= 0).all()
    few = neighbours(np.random.default_rng(0).random((6, 2)), np.array([0, 0, 0, 0, 1, 1]), 5)
    assert ((few >= 0).sum(axis=1) == [2, 2, 2, 2, 4, 4]).all()


def test_index_refuses_confounded_designs():
    adata = cohort(1, 1)
    adata.obs["lab"] = adata.obs["label"].map({"t": "x", "n": "y"})
    found = robustness_index(adata, biology="label", technical="lab")
    assert found["status"] == "unidentifiable" and np.isnan(found["robustness_index"])
    assert robustness_index(cohort(9, 9), biology="label", technical="site", k=1)["status"] == "undefined"
    with pytest.raises(InputError, match="exclude=None"):
        robustness_index(adata, biology="label", technical="site", exclude="recording")
    with pytest.raises(InputError, match="latents"):
        robustness_index(adata, biology="label", technical="site", use="raw")


def test_tables_backed_by_a_file(tmp_path):
    adata = cohort(1, 1)
    adata.obs["y"] = np.random.default_rng(0).normal(size=240)
    adata.write_h5ad(tmp_path / "latents.h5ad")
    backed = anndata.read_h5ad(tmp_path / "latents.h5ad", backed="r")
    for ask in (
        lambda a: associate(a, ["y", "label"], unit="slide", groups="slide"),
        lambda a: confounders(a, biology="label", technical="site", groups="slide", n_permutations=19),
        lambda a: readout(a, "site", groups="slide"),
    ):
        pd.testing.assert_frame_equal(ask(backed), ask(adata))
    with pytest.raises(InputError, match="0 samples"):
        associate(adata[:0], "y", **FREE)


# --------------------------------------------------------------------------- worked numbers not held by other files


def test_worked_p_of_correlations():
    assert t_pvalue(t_from_r(np.array([0.8727860, 0.8558443]), 6), 6) == pytest.approx([0.0046683, 0.0067028], abs=2e-7)


def test_worked_rank_sum_statistic():
    x, y = np.array([0, 0, 0, 0, 1.5, 2, 0, 3.0]), np.array([1, 0, 2, 1, 3, 5, 0, 4.0])
    obs = pd.DataFrame({"high": np.where(y >= 2, "yes", "no")}, index=list("abcdefgh"))
    found = associate(
        anndata.AnnData(sp.csr_matrix(x[:, None]), obs=obs), "high", min_active=1, min_active_groups=1, **FREE
    ).iloc[0]
    assert found["statistic"] == pytest.approx(1.9843135, abs=1e-7)
    assert 2 * stats.norm.sf(found["statistic"]) == pytest.approx(0.0472209, abs=1e-7)


def test_worked_analysis_of_variance():
    V, group = as_columns(np.array([[1, 2, 3, 2, 4, 6, 5, 7, 9.0]]).T), np.repeat([0, 1, 2], 3)
    eta = effects.eta_squared(V, group)[0]
    F = eta / (1 - eta) * 6 / 2
    assert (F, stats.f.sf(F, 2, 6)) == pytest.approx((6.3333, 0.033209), abs=5e-5)
    assert effects.auroc(rank_columns(V), group == 2)[0] == pytest.approx(17 / 18)


def test_worked_standard_errors_of_a_slope():
    x, y = np.array([1, 2, 3, 4, 6, 7, 8, 9.0]), np.array([2, 1, 4, 3, 7, 9, 8, 10.0])
    cr1 = ols_cluster(x[:, None], y, np.repeat([1, 2, 3, 4], 2))["se"][0]
    assert cr1 / np.sqrt(4 / 3 * 7 / 6) == pytest.approx(0.0635255, abs=1e-7)  # CR0
    obs = pd.DataFrame({"y": y}, index=list("abcdefgh"))
    found = associate(anndata.AnnData(sp.csr_matrix(x[:, None]), obs=obs), "y", method="ols", min_active=1, **FREE)
    half = (found["ci_high"][0] - found["ci_low"][0]) / 2
    assert half / stats.t.ppf(0.975, 6) == pytest.approx(0.1412576, abs=1e-7)


def test_worked_share_of_false_alarms():
    """20 patients of 100 tiles, intraclass correlation 0.3: tiles taken as independent reject 72 %, patients 4.5 %."""
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(20), 100)
    x = np.sqrt(0.3) * rng.normal(size=(20, 400))[g] + np.sqrt(0.7) * rng.normal(size=(2000, 400))
    obs = pd.DataFrame(
        {"patient": g.astype(str), "label": np.where(g % 2, "a", "b")}, index=np.arange(2000).astype(str)
    )
    adata = anndata.AnnData(sp.csr_matrix(x), obs=obs)
    tiles = associate(adata, "label", method="welch", **FREE)["p"]
    patients = associate(adata, "label", method="welch", unit="patient", controls=False)["p"]
    assert (tiles <= 0.05).mean() == pytest.approx(0.72, abs=0.07)
    assert (patients <= 0.05).mean() == pytest.approx(0.045, abs=0.03)
