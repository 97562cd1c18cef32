"""Dark matter: worked cases, planted linear and nonlinear errors, the released regressions; laws over width; MaxSim."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import biosae as bs
from biosae.errors import InputError
from biosae.sae import SAE
from biosae.sae.analysis import error_report, linear_fit, maxsim, row_scaling, width_law

few = hypothesis_settings(max_examples=25)


def rows(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


# ------------------------------------------------------------------------------------------------- worked cases


@few
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.05, 0.95))
def test_a_scaled_reconstruction_is_linear_error_alone(seed, d, share):
    x = rows(200, d, seed)
    report = error_report(x, np.float32(share) * x, random_state=0)
    assert report.r2_vec == pytest.approx(1, abs=1e-6) and report.fvu_nonlinear == pytest.approx(0, abs=1e-6)
    assert np.abs(report.nonlinear(x, np.float32(share) * x)).max() < 1e-5
    np.testing.assert_allclose(report.vector.weights, (1 - share) * np.eye(d), atol=1e-5)
    assert report.linear_share == pytest.approx(1, abs=1e-6)
    assert report.fvu == pytest.approx((1 - share) ** 2, rel=0.35)  # (1 - s)^2 ||x||^2 about the mean of few rows


def test_the_case_of_the_paper_page():
    x = rows(400, 5, 0)
    report = error_report(x, np.float32(0.7) * x, random_state=0)
    assert report.r2_vec == pytest.approx(1) and report.fvu_nonlinear < 1e-10
    assert report.r2_norm["nonlinear"] != report.r2_norm["error"]


def test_an_independent_error_is_not_predicted():
    x, e = rows(4000, 10, 1), rows(4000, 10, 2)
    report = error_report(x, x - e, random_state=0)
    assert abs(report.r2_vec) < 0.02 and report.r2_vec < 0.005  # held out: about -d / n
    assert report.fvu_nonlinear == pytest.approx(report.fvu, rel=0.02)
    assert report.linear_share < 0.01
    assert set(report.r2_norm) == {"error", "linear", "nonlinear", "x", "x_hat"}
    assert abs(report.r2_norm["error"]) < 0.05 and abs(report.baselines["norm"]) < 0.05


def test_a_planted_linear_part_is_found_beside_noise():
    x, rng = rows(6000, 8, 3), np.random.default_rng(4)
    B, noise = rng.normal(size=(8, 8)) * 0.2, 0.3 * rng.normal(size=(6000, 8))
    e = x @ B + noise
    report = error_report(x, x - e, random_state=0)
    expected = np.square(x @ B).sum() / np.square(e).sum()
    np.testing.assert_allclose(report.vector.weights, B, atol=0.03)
    assert report.linear_share == pytest.approx(expected, abs=0.02) == report.r2_vec_pooled
    assert report.fvu_nonlinear == pytest.approx(np.square(noise).sum() / np.square(x - x.mean(0)).sum(), rel=0.05)
    found = report.substitutes(x, x - e)
    np.testing.assert_allclose(found["with_linear"] + found["with_nonlinear"] - found["x_hat"], x, atol=1e-4)
    assert found["x_hat"].dtype == np.float32


def test_equals_the_released_regressions():
    with np.load(Path(__file__).parent / "reference" / "methods" / "solvers.npz") as stored:
        given = {name[3:]: stored[name] for name in stored if name.startswith("dm/")}
    x, x_hat, held = given["x"].astype(np.float64), given["x_hat"].astype(np.float64), given["held"] > 0
    e = x - x_hat
    vector = linear_fit(x, e, held=held, intercept=False)
    norm = linear_fit(x, np.square(e).sum(1), held=held, intercept=False)
    assert vector.r2 == pytest.approx(float(given["r2_vec"]), abs=1e-5)
    assert norm.r2 == pytest.approx(float(given["r2_norm"]), abs=1e-5)
    np.testing.assert_allclose(vector.weights, given["solution_vec"], atol=1e-5)
    np.testing.assert_allclose(norm.weights.ravel(), given["solution_norm"], atol=1e-4)
    spread = np.square(x - x.mean(0)).sum()  # it takes FVU over all rows
    assert np.square(e).sum() / spread == pytest.approx(float(given["fvu"]), abs=1e-5)
    assert np.square(e - vector.predict(x)).sum() / spread == pytest.approx(float(given["fvu_nonlinear"]), abs=1e-5)


# --------------------------------------------------------------------------------------------- split by patients


def test_whole_groups_are_fitted_or_evaluated():
    """Errors that are a constant of the patient are predictable inside patients and not across."""
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(40), 30)
    marks, offsets = rng.normal(size=(40, 60)), rng.normal(size=(40, 4))
    x = (np.hstack([marks[patient], rng.normal(size=(1200, 4))]) + 0.01 * rng.normal(size=(1200, 64))).astype(
        np.float32
    )
    e = np.zeros_like(x)
    e[:, 60:] = offsets[patient]
    by_row = error_report(x, x - e, random_state=0, intercept=True)
    by_patient = error_report(x, x - e, groups=patient, random_state=0, intercept=True)
    assert (by_row.by, by_patient.by) == ("row", "groups")
    assert by_row.r2_vec_pooled > 0.9 > 0.2 > by_patient.r2_vec_pooled
    assert by_patient.n_fit % 30 == 0 and by_patient.n_fit + by_patient.n_evaluated == 1200


def test_tokens_of_a_sample_stay_together_and_the_patient_column_is_used():
    import pandas as pd

    x = rows(600, 4, 0)
    obs = pd.DataFrame({"patient": np.repeat(list("abcdef"), 25)}, index=[f"s{i}" for i in range(150)])
    emb = bs.Embeddings.from_array(x, obs=obs, tokens_per_sample=4)
    report = error_report(emb, x * np.float32(0.5), random_state=0)
    assert report.by == "patient" and report.n_fit % 100 == 0
    plain = bs.Embeddings.from_array(x, obs=obs[[]], tokens_per_sample=4)
    assert error_report(plain, x * np.float32(0.5), random_state=0).by == "sample"


def test_intercepts():
    x = rows(2000, 3, 0) + 5
    e = np.full_like(x, 2.0)
    without = error_report(x, x - e, random_state=0)
    with_one = error_report(x, x - e, random_state=0, intercept=True)
    assert with_one.linear_share == pytest.approx(1, abs=1e-9) and np.allclose(with_one.vector.intercept, 2, atol=1e-5)
    assert 0.5 < without.linear_share < 0.999 and np.isnan(without.r2_vec)  # a constant target has no R2
    none = error_report(x, x - e * rows(2000, 1, 1), random_state=0, norm_intercept=False)
    some = error_report(x, x - e * rows(2000, 1, 1), random_state=0, norm_intercept=True)
    assert none.r2_norm["error"] != some.r2_norm["error"]
    linear = error_report(x, x - x * rows(2000, 1, 2), random_state=0, norm_power=1)
    assert linear.r2_norm["error"] != error_report(x, x - x * rows(2000, 1, 2), random_state=0).r2_norm["error"]


def test_baselines_of_the_norm_and_a_coder():
    found = bs.sae.planted("sparse", n_rows=800, d=12, n_atoms=24, k=3, noise=0.05, random_state=0)
    sae = SAE(n_latents=24, k=3, n_steps=60, random_state=0, device="cpu").fit(found.rows)
    label = np.random.default_rng(0).normal(size=(800, 2))
    report = error_report(found.rows, sae, others={"label": label}, random_state=1)
    assert set(report.baselines) == {"norm", "l0", "label"}
    assert abs(report.baselines["label"]) < 0.05 < report.r2_norm["x"]
    given = error_report(found.rows, sae.inverse_transform(sae.codes(found.rows)), random_state=1)
    assert given.fvu == report.fvu and "l0" not in given.baselines
    whole = error_report(found.rows, sae, random_state=1, share=0.9)
    assert whole.fvu == pytest.approx(sae.evaluate(found.rows)["fvu"], rel=0.1)
    assert report.fvu_nonlinear <= report.fvu * 1.02


@pytest.mark.parametrize(
    ("x", "x_hat", "options", "match"),
    [
        (rows(30, 40, 0), rows(30, 40, 1), {}, "more rows"),
        (rows(100, 4, 0), rows(99, 4, 1), {}, "same rows"),
        (rows(10, 2, 0), rows(10, 2, 1), {}, "20 rows"),
        (rows(100, 2, 0), rows(100, 2, 1), {"groups": ["a"] * 100}, "two groups"),
        (rows(100, 2, 0), rows(100, 2, 1), {"norm_power": 3}, "norm_power"),
    ],
)
def test_refusals(x, x_hat, options, match):
    with pytest.raises(InputError, match=match):
        error_report(x, x_hat, random_state=0, **options)


# ------------------------------------------------------------------------------------------------- laws over width


@few
@given(st.floats(0, 0.4), st.floats(0.05, 5), st.floats(0.1, 1.5))
def test_width_law_is_recovered(c, a, m):
    widths = 2.0 ** np.arange(5, 14)
    law = width_law(widths, c + a * widths**-m)
    np.testing.assert_allclose(law.predict(widths), c + a * widths**-m, rtol=1e-4, atol=1e-6)
    assert law.c == pytest.approx(c, abs=5e-3) and law.r2 > 0.999


def test_width_law_of_a_flat_curve_and_refusals():
    law = width_law([64, 128, 256, 512, 1024], [0.2] * 5)
    np.testing.assert_allclose(law.predict([100, 10_000]), 0.2, rtol=1e-3)
    with pytest.raises(InputError, match="four"):
        width_law([64, 64, 128, 256], [0.3, 0.3, 0.2, 0.1])
    with pytest.raises(InputError):
        width_law([64, 128, 256, -1], [0.3, 0.3, 0.2, 0.1])


def test_scaling_of_rows():
    widths, rng = np.array([32, 64, 128, 256]), np.random.default_rng(0)
    slope, level = rng.uniform(-0.2, 1, 50), rng.uniform(-1, 1, 50)
    errors = np.exp(level[:, None] - slope[:, None] * np.log(widths))
    found = row_scaling(widths, errors)
    np.testing.assert_allclose(found.slope, slope, atol=1e-9)
    np.testing.assert_allclose(found.level, level, atol=1e-9)
    np.testing.assert_allclose(found.r2, 1, atol=1e-9)
    expected = np.corrcoef(np.sqrt(errors[:, 0]), np.sqrt(errors[:, 3]))[0, 1] ** 2
    assert found.persistence[0, 3] == pytest.approx(expected) and found.persistence.shape == (4, 4)
    errors[3, 2] = 0
    again = row_scaling(widths, errors)
    assert again.zero_rows == 1 and np.isnan(again.slope[3]) and np.isfinite(np.delete(again.slope, 3)).all()
    with pytest.raises(InputError, match="rise"):
        row_scaling([64, 32, 128, 256], errors)


# --------------------------------------------------------------------------------------------------------- MaxSim


def test_maxsim_worked_example():
    Q, D = np.array([[1.0, 0], [0, 1]]), np.array([[0.8, 0.6], [0, 1]])
    assert maxsim(Q, D) == pytest.approx(1.8)
    assert maxsim(D, Q) == pytest.approx(1.8) and maxsim(Q, np.zeros((0, 2))) == 0
    assert maxsim(2 * Q, D) == pytest.approx(1.8) and maxsim(2 * Q, D, normalise=False) == pytest.approx(3.6)


@few
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9))
def test_maxsim_properties(seed, q, n):
    rng = np.random.default_rng(seed)
    Q, D = rng.normal(size=(q, 5)), rng.normal(size=(n, 5))
    assert maxsim(Q, Q) == pytest.approx(q)
    assert maxsim(Q, np.vstack([D, rng.normal(size=(2, 5))])) >= maxsim(Q, D) - 1e-12
    u, v = (t / np.linalg.norm(t, axis=1, keepdims=True) for t in (Q, D))
    assert maxsim(Q, D) == pytest.approx(sum(max(a @ b for b in v) for a in u))
    Z, Y = np.maximum(Q, 0), np.maximum(D, 0)
    assert maxsim(scipy.sparse.csr_matrix(Z), scipy.sparse.csr_matrix(Y)) == pytest.approx(maxsim(Z, Y))


def test_maxsim_of_bags(monkeypatch):
    rng = np.random.default_rng(0)
    Q, D = rng.normal(size=(20, 4)), rng.normal(size=(30, 4))
    a, b = rng.integers(0, 3, 20), rng.permutation(np.repeat(["x", "y"], 15))
    scores = maxsim(Q, D, query_bags=a, document_bags=b)
    for i in range(3):
        for j, name in enumerate("xy"):
            assert scores[i, j] == pytest.approx(maxsim(Q[a == i], D[b == name]))
    monkeypatch.setattr("biosae.sae.analysis.late.BLOCK", 40)  # a few rows at a time
    np.testing.assert_allclose(maxsim(Q, D, query_bags=a, document_bags=b), scores)
    with pytest.raises(InputError, match="columns"):
        maxsim(Q, D[:, :3])
    with pytest.raises(InputError, match="labels"):
        maxsim(Q, D, query_bags=a[:4])
