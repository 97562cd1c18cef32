"""Methods side by side: the same rows for all, failures listed, labels held against latents, the figure."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from biosae.errors import InputError
from biosae.sae.agreement import stability
from biosae.sae.labels import Labels, Target, rank_codes, shuffled


def random_codes(n, m, *, signed=False, seed=0):
    rng = np.random.default_rng(seed)
    z = np.round(rng.standard_normal((n, m)), 1) * (rng.random((n, m)) < 0.4)
    return scipy.sparse.csr_matrix(z if signed else np.abs(z))


# ------------------------------------------------------------------------------------------------------- labels


@given(st.integers(2, 40), st.integers(1, 6), st.booleans(), st.integers(0, 20))
def test_ranks_of_sparse_columns_are_those_of_dense_ones(n, m, signed, seed):
    z = random_codes(n, m, signed=signed, seed=seed)
    ranks, spread = rank_codes(z)
    dense = scipy.stats.rankdata(z.toarray(), axis=0)
    np.testing.assert_allclose(ranks.toarray() - ranks.toarray().mean(0), dense - dense.mean(0), atol=1e-9)
    np.testing.assert_allclose(spread, np.sqrt(np.square(dense - dense.mean(0)).sum(0)), atol=1e-7)


@pytest.mark.parametrize("signed", [False, True])
def test_scores_are_those_of_scipy(signed):
    z = random_codes(200, 7, signed=signed)
    rng = np.random.default_rng(1)
    number, two, three = rng.standard_normal(200), rng.choice(["a", "b"], 200), rng.choice(["a", "b", "c"], 200)
    number[:9], two = np.nan, two.astype(object)
    two[11:30] = None
    found = Labels({"number": number, "two": two, "three": three}).scores(z)
    dense = z.toarray()
    rho = [abs(scipy.stats.spearmanr(dense[9:, j], number[9:]).statistic) for j in range(7)]
    assert found["number"][0] == pytest.approx(max(rho))

    def away(values, name):
        one = values == name
        area = [scipy.stats.mannwhitneyu(column[one], column[~one]).statistic for column in dense[known].T]
        return max(abs(2 * np.array(area) / (one.sum() * (~one).sum()) - 1))

    known = np.array([v is not None for v in two])
    assert found["two"][0] == pytest.approx(away(two[known], "a"))
    known = np.ones(200, bool)
    assert found["three"][0] == pytest.approx(np.mean([away(three, name) for name in "abc"]))


def test_what_a_label_is():
    assert Target([1, 2, 5, 2]).n_classes == 0
    assert Target([0, 1, 1, np.nan]).n_classes == 2 and Target([True, False]).n_classes == 2
    assert Target(["x", "y", None, "z"]).n_classes == 3 and Target(["x", "y", None, "z"]).known.sum() == 3
    assert Target(pd.array([1, None, 3, 4], dtype="Int64")).known.tolist() == [True, False, True, True]
    with pytest.raises(InputError, match="does not vary"):
        Labels({"site": ["a", "a"]})


def test_a_planted_latent_is_found_and_its_null_is_lower():
    rng = np.random.default_rng(0)
    y = rng.choice(["tumour", "stroma"], 400)
    z = random_codes(400, 30).toarray()
    z[:, 4] = (y == "tumour") * rng.random(400)
    score, null = Labels({"y": y}).scores(scipy.sparse.csr_matrix(z))["y"]
    assert score > 0.99 and 0.05 < null < 0.25
    assert Labels({"y": y}).scores(random_codes(400, 30))["y"][0] < 0.25


def test_shuffles_keep_what_belongs_together():
    groups = np.repeat(np.arange(6), [3, 1, 4, 2, 5, 3])
    rng = np.random.default_rng(0)
    patients = shuffled(np.array([0, 1, 0, 1, 1, 0])[groups], groups, rng)
    assert all(len(set(patients[groups == g])) == 1 for g in range(6))
    assert sorted(patients[np.flatnonzero(np.diff(groups, prepend=-1))]) == [0, 0, 0, 1, 1, 1]
    values = np.arange(len(groups))
    for _ in range(5):
        moved = shuffled(values, groups, rng)
        assert all(set(moved[groups == g]) == set(values[groups == g]) for g in range(6))
    assert (moved != values).any()
    # all spread over groups: a label of patients with few of them is no better than its null
    y, z = np.array(["a", "b"])[groups % 2], random_codes(18, 300)
    score, null = Labels({"y": y}, groups=groups).scores(z)["y"]
    assert null > 0.5 and score > 0.5


def test_atoms_of_opposite_sign_are_the_same_where_codes_are_signed():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((20, 64))
    B = A * rng.choice([-1, 1], (20, 1))
    apart, same = (stability([A, B], signed=signed, random_state=0).pairs[0] for signed in (False, True))
    assert same.mmcs == pytest.approx(1) and same.shared == 1
    assert apart.shared < 0.9 and same.null_mean["mmcs"] > apart.null_mean["mmcs"]
