"""Cluster bootstrap: every resample of three patients, scipy for independent rows, what a resample may hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from biosae.errors import InputError, StatisticsError
from biosae.stats import cluster_bootstrap


def test_every_resample_of_three_means() -> None:
    values = np.array([1.0, 2.0, 6.0])
    found = cluster_bootstrap(np.arange(3), lambda rows: values[rows].mean())
    assert found.estimate == 3.0 and len(found.draws) == 27 and found.how.startswith("all 27")
    assert found.se == pytest.approx(1.247219, abs=1e-6)
    assert found.se == pytest.approx(values.std() / np.sqrt(3), rel=1e-12)


def test_patients_come_with_all_their_rows() -> None:
    codes = np.repeat([5, 1, 9, 2, 7, 3], [1, 2, 3, 4, 5, 6])
    seen = []

    def look(rows: np.ndarray) -> float:
        counts = np.bincount(rows, minlength=len(codes))
        seen.append(all(len(set(counts[codes == c])) == 1 for c in np.unique(codes)))
        return float(len(rows))

    found = cluster_bootstrap(codes, look)
    assert all(seen) and found.estimate == 21.0 and len(np.unique(found.draws)) > 10


def test_slides_are_resampled_only_if_asked() -> None:
    codes = np.repeat(np.arange(8), 6)
    slides = np.repeat(np.arange(24), 2)
    values = np.random.default_rng(0).normal(size=24)[slides]
    plain = cluster_bootstrap(codes, lambda rows: values[rows].mean())
    both = cluster_bootstrap(codes, lambda rows: values[rows].mean(), subcodes=slides)
    means = values.reshape(8, -1).mean(axis=1)
    within = values.reshape(8, 3, 2).mean(axis=2).var(axis=1).mean() / 3 / 8
    assert plain.se == pytest.approx(means.std() / np.sqrt(8), rel=0.05)
    assert both.se == pytest.approx(np.sqrt(means.var() / 8 + within), rel=0.05)
    assert "subgroups" in both.how and "subgroups" not in plain.how


def test_no_resample_is_of_one_class() -> None:
    codes = np.arange(12)
    classes = np.r_[np.ones(2), np.zeros(10)]
    found = cluster_bootstrap(codes, lambda rows: classes[rows].sum(), classes=classes)
    assert set(found.draws) == {2.0} and "2 strata" in found.how
    free = cluster_bootstrap(codes, lambda rows: classes[rows].sum())
    assert free.draws.min() == 0


@pytest.mark.parametrize("interval", ["percentile", "bca"])
def test_one_row_a_group_is_the_bootstrap_of_rows(interval: str) -> None:
    values = np.random.default_rng(1).exponential(size=40)
    found = cluster_bootstrap(np.arange(40), lambda r: values[r].mean(), interval=interval, n_draws=8000)
    other = stats.bootstrap(
        (values,), np.mean, n_resamples=8000, method="BCa" if interval == "bca" else "percentile",
        rng=np.random.default_rng(2),
    )  # fmt: skip
    width = other.confidence_interval.high - other.confidence_interval.low
    assert found.low == pytest.approx(other.confidence_interval.low, abs=0.05 * width)
    assert found.high == pytest.approx(other.confidence_interval.high, abs=0.05 * width)
    assert found.se == pytest.approx(other.standard_error, rel=0.04)


def test_seed_and_scale() -> None:
    values = np.random.default_rng(3).normal(size=60)
    codes = np.repeat(np.arange(20), 3)
    one, same, twice, other = (
        cluster_bootstrap(codes, lambda r, f=f: f * values[r].mean(), random_state=seed)
        for f, seed in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert np.array_equal(one.draws, same.draws) and not np.array_equal(one.draws, other.draws)
    assert twice.low == pytest.approx(2 * one.low) and twice.p() == one.p()


def test_p_is_twice_the_smaller_tail() -> None:
    values = np.random.default_rng(4).normal(0.5, 1, 30)
    found = cluster_bootstrap(np.arange(30), lambda r: values[r].mean())
    below = int((found.draws <= 0).sum())
    assert found.p() == pytest.approx(2 * (below + 1) / 2001)
    assert found.p(null=found.estimate) > 0.8


def test_statistic_that_often_fails_has_no_interval() -> None:
    values = np.random.default_rng(5).normal(size=10)
    found = cluster_bootstrap(np.arange(10), lambda r: np.nan if len(set(r)) < 7 else values[r].mean())
    assert found.n_failed > 100 and np.isnan(found.low) and np.isnan(found.p())


def test_what_cannot_be_resampled_is_refused() -> None:
    with pytest.raises(StatisticsError, match="needs 3"):
        cluster_bootstrap(np.array([0, 0, 1, 1]), lambda r: 1.0)
    with pytest.raises(InputError, match="2000"):
        cluster_bootstrap(np.arange(9), lambda r: 1.0, n_draws=500)
    with pytest.raises(InputError, match="percentile"):
        cluster_bootstrap(np.arange(9), lambda r: 1.0, interval="normal")
    with pytest.raises(StatisticsError, match="no value"):
        cluster_bootstrap(np.arange(9), lambda r: np.nan)
