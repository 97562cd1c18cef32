"""The draws behind the family-wise p."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import biosae as bs
from biosae.errors import InputError


@pytest.fixture
def cohort() -> anndata.AnnData:
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(30), 5)
    Z = rng.gamma(1.0, size=(150, 12)) * (rng.random((150, 12)) < 0.5)
    obs = pd.DataFrame(
        {"patient": [f"P{p}" for p in patient], "y": rng.normal(size=150), "grade": rng.normal(size=30)[patient],
         "kind": np.array(["a", "b", "c"])[patient % 3]},
        index=[f"s{i}" for i in range(150)],
    )  # fmt: skip
    adata = anndata.AnnData(X=sp.csr_matrix(Z), obs=obs)
    adata.var_names = [f"L{j:04d}" for j in range(12)]
    return adata


@pytest.mark.parametrize("unit", ["patient", "sample"])
def test_draws_give_the_family_wise_p_of_the_best_latent(cohort: anndata.AnnData, unit: str) -> None:
    targets = ["y", "grade", "kind"]
    null = bs.stats.permutation_null(cohort, targets, unit=unit, n_permutations=199)
    result = bs.stats.associate(cohort, targets, unit=unit, n_permutations=199, controls=False)
    for target in targets:
        own = null[null["target"] == target]
        assert own["draw"].min() >= 0 and len(own) == 199
        row = result[(result["target"] == target) & (result["latent"] == own["latent"].iloc[0])].iloc[0]
        exceed = (own["draw"] >= abs(own["observed"].iloc[0]) * (1 - 1e-9)).sum()
        assert row["p_maxt"] == pytest.approx(max((exceed + 1) / 200, row["p"]), abs=1e-12)
        assert own["n_units"].iloc[0] == row["n_units"] and "draws" in own["scheme"].iloc[0]


def test_nothing_permuted_is_said(cohort: anndata.AnnData) -> None:
    with pytest.raises(InputError, match="nothing was permuted"):
        bs.stats.permutation_null(cohort, "y", unit="patient", n_permutations=0)


def test_looking_changes_nothing(cohort: anndata.AnnData) -> None:
    bs.stats.permutation_null(cohort, "y", unit="patient", n_permutations=49)
    how = {"unit": "patient", "n_permutations": 49, "controls": False}
    pd.testing.assert_frame_equal(bs.stats.associate(cohort, "y", **how), bs.stats.associate(cohort, "y", **how))
