"""Rejection rates under the null, of the paths and cohorts of benchmarks/calibration.py, thinned."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from biosae.stats import associate, fit, icc
from biosae.stats.inference import between_groups, block
from biosae.stats.methods import variance_ratio

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import calibration
from null_paths import PATHS, cohort

MAIN = (
    "patient: auto, age", "patient: auto, fifth", "patient: negbin, cells", "patient: adjusted, number",
    "sample: auto, number", "sample: auto, rare", "sample: auto, fifth", "sample: adjusted, number",
    "sample: strata, number", "fit ols: sample, number", "fit logistic: sample, common",
)  # fmt: skip
LEFT_OUT = (
    "fit glmm_binomial",
    "fit ordinal: sample",
    "fit cox: sample",
    "by site",
    "leave one",
    "planted",
    "max-T sp",
)
"""Too slow for a thinned run, or with too few tests in one; benchmarks/calibration.py has them."""


def too_high(cells):
    """Above the level by more than three standard errors and half a per cent; 0.001 by more than its like."""
    bound = {"0.05": 0.055, "0.001": 0.003}
    return {
        (c["path"], c["measure"]): c
        for c in cells
        if c["measure"] in bound and c["cohorts"] > 5 and c["rate"] > bound[c["measure"]] + 3 * c["se"]
    }


def test_cohorts_are_what_they_say():
    rng = np.random.default_rng(0)
    sizes, active, agreement, correlation = [], [], [], []
    for _ in range(6):
        adata = cohort(60, 0.3, rng)
        sizes += list(adata.obs["patient"].value_counts())
        active.append(np.asarray((adata.X != 0).mean(axis=0)).ravel())
        agreement.append(icc(adata.obs["number"].to_numpy(), adata.obs["patient"].to_numpy())["icc"])
        x = np.log1p(adata.X.toarray()[:, ::2])
        correlation.append(np.corrcoef(x.T)[0, [1, 2, 10, 15]])
    assert 2 <= min(sizes) <= 4 and 40 <= max(sizes) <= 60
    assert np.mean(active, axis=0)[::2].mean() == pytest.approx(0.4, abs=0.03)
    assert np.mean(active, axis=0)[1::2].mean() == pytest.approx(0.05, abs=0.01)
    assert np.mean(agreement) == pytest.approx(0.3, abs=0.06)
    within, between = np.mean(correlation, axis=0)[:2], np.mean(correlation, axis=0)[2:]
    assert (within > 0.3).all() and (np.abs(between) < 0.15).all()


def test_rate_counts_cohorts():
    """With one test a cohort the error is binomial; with copies of one test in a cohort it does not change."""
    hits = np.r_[np.ones(30), np.zeros(70)]
    one = calibration.rate(np.column_stack([hits, np.ones(100)]))
    copies = calibration.rate(np.column_stack([40 * hits, np.full(100, 40.0)]))
    assert one["rate"] == copies["rate"] == 0.3
    assert one["se"] == copies["se"] == pytest.approx(np.sqrt(0.3 * 0.7 / 99), abs=1e-6)


def test_tiles_as_independent_are_found_out():
    values = []
    for seed in range(10):
        adata = cohort(20, 0.3, np.random.default_rng(seed))
        p = associate(adata, "age", unit="sample", assume_independent=True, controls=False)["p"].dropna()
        values.append([(p <= 0.05).sum(), len(p)])
    cell = {"path": "naive", "measure": "0.05", **calibration.rate(np.array(values))}
    assert cell["rate"] > 0.12 and calibration.too_high(cell) and too_high([cell])


def test_what_lies_between_groups():
    """A covariate constant in groups takes one degree of freedom of groups, one that is centred in them none."""
    g = np.repeat(np.arange(6), 4)
    constant, centred = np.arange(6.0)[g], np.tile([-1.0, 1.0, 2.0, -2.0], 6)
    y, V = np.arange(24.0), sp.csc_matrix(np.eye(24)[:, :2])

    def share(C, strata=None):
        rows = [np.arange(24)] if strata is None else [np.flatnonzero(strata == s) for s in np.unique(strata)]
        return between_groups([block(r, V[r], y[r], C if C is None else C[r]) for r in rows], g, 6)

    assert share(None) == pytest.approx(0) and share(centred[:, None]) == pytest.approx(0)
    assert share(constant[:, None]) == pytest.approx(1)
    assert share(np.column_stack([constant, centred])) == pytest.approx(1)
    assert share(None, g % 3) == pytest.approx(2) and share(None, np.arange(24) % 2) == pytest.approx(0)


def test_variance_that_goes_with_size():
    rng = np.random.default_rng(3)
    sizes = rng.integers(2, 60, 300).astype(float)
    x, y = rng.normal(size=(2, 300)) / np.sqrt(sizes)
    C, u = rng.normal(size=(300, 1)), 1 / sizes
    b = block(np.arange(300), sp.csc_matrix(np.column_stack([x, rng.normal(size=300)])), y, C)
    design = np.column_stack([np.ones(300), C])
    left = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    slopes = [np.polyfit(u, v**2, 1)[0] / (v**2).mean() for v in left]
    found = variance_ratio([b], sizes)
    assert found[0] == pytest.approx(1 + slopes[0] * slopes[1] * u.var(), rel=1e-9) and found[0] > 1.5 > found[1] >= 1
    assert (variance_ratio([b], np.full(300, 7.0)) == 1).all()


def test_pooled_numbers_that_vary_more_in_small_units():
    """Before, Pearson rejected 8 % of true nulls here."""
    cells = calibration.simulate(["patient: pearson, number"], 60, 0.0, cohorts=0.2, seed=8)
    assert not too_high(cells) and not any(calibration.too_high(c) for c in cells if c["measure"] == "0.05")


def test_a_latent_that_one_patient_carries_is_refused():
    """Without that patient it is constant: ``fit`` of grades stopped with an error."""
    adata = cohort(8, 0.0, np.random.default_rng(1))
    X = adata.X.toarray()
    X[:, 0] = np.where(adata.obs["patient"] == "p003", np.arange(len(X)) + 1.0, 0.0)
    adata.X = sp.csr_matrix(X)
    how = {"unit": "sample", "min_active": 1, "min_active_groups": 1}
    found = fit(adata, "grade_within", latents=["l000"], model="ordinal", **how).iloc[0]
    assert np.isnan(found["p"])


def test_main_paths_hold_their_level():
    cells = calibration.simulate(MAIN, 20, 0.3, cohorts=0.09, seed=5)
    assert {c["path"] for c in cells if c["measure"] == "0.05"} == set(MAIN)
    assert not too_high(cells), too_high(cells)


@pytest.mark.slow
@pytest.mark.parametrize(("G", "level"), [(8, 0.8), (20, 0.3), (60, 0.0)])
def test_every_path_holds_its_level(G, level):
    names = [name for name in PATHS if not name.startswith(LEFT_OUT)]
    cells = calibration.simulate(names, G, level, cohorts=0.08, seed=6)
    assert not too_high(cells), too_high(cells)
    joint = [c for c in cells if c["measure"].startswith("any")]
    assert joint
    above = {(c["path"], c["measure"]): c for c in joint if c["rate"] > 0.05 + 3 * np.sqrt(0.05 * 0.95 / c["cohorts"])}
    assert not {k: v for k, v in above.items() if v["cohorts"] >= 30}, above


@pytest.mark.slow
@pytest.mark.parametrize("G", [20, 60])
def test_false_discoveries_beside_true_ones(G):
    cells = calibration.simulate([n for n in PATHS if n.startswith("planted")], G, 0.3, cohorts=0.3, seed=7)
    rates = [c for c in cells if c["measure"].startswith("fdr")]
    assert len(rates) == 16 and all(c["rate"] <= 0.05 + 3 * max(c["se"], 0.01) for c in rates), rates
    assert any(c["measure"] == "power bh" and c["rate"] > 0.2 for c in cells)
