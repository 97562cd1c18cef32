"""Splits: no group is cut, every row is assigned, shares and strata are kept, and leaks are refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import biosae as bs
from biosae.data import Samples
from biosae.errors import InputError, StatisticsError


class Never:
    def __call__(self, row):
        raise AssertionError("a split reads no image")

    def spec(self):
        return {"kind": "never"}


def cohort(groups, **columns):
    obs = pd.DataFrame({"case": groups, **columns}, index=[f"s{i}" for i in range(len(groups))])
    return Samples(obs, Never(), roles={"patient": "case"})


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=6, max_size=30),
    test=st.sampled_from([0.1, 0.2, 0.4]),
    val=st.sampled_from([0.0, 0.15, 0.3]),
    seed=st.integers(0, 5),
)
def test_properties(sizes, test, val, seed):
    groups = np.repeat([f"p{i}" for i in range(len(sizes))], sizes)
    label = np.where(np.repeat(np.arange(len(sizes)), sizes) % 2, "case", "control")
    samples = cohort(groups, dx=label)
    out = bs.data.split(samples, stratify="dx", test=test, val=val, random_state=seed)
    parts = out.obs["split"]
    assert parts.notna().all()
    assert set(parts) == ({"train", "val", "test"} if val else {"train", "test"})
    assert not out.obs.groupby("patient")["split"].nunique().gt(1).any()  # no group is cut
    assert set(zip(label, parts)) == {(a, b) for a in ("case", "control") for b in set(parts)}  # each class everywhere
    n_test = out.obs.loc[parts == "test", "patient"].nunique()
    assert abs(n_test - test * len(sizes)) <= 1.5  # within one group, plus the one that each class must give
    again = bs.data.split(samples, stratify="dx", test=test, val=val, random_state=seed)
    assert again.obs.equals(out.obs)
    order = np.random.default_rng(seed).permutation(len(groups))
    shuffled = bs.data.split(samples.select(order), stratify="dx", test=test, val=val, random_state=seed)
    assert shuffled.obs["split"].reindex(out.ids).equals(parts)  # rows may come in any order


def test_exact_shares_and_seed():
    samples = cohort([f"p{i}" for i in range(100)], dx=["a"] * 60 + ["b"] * 40)
    out = bs.data.split(samples, stratify="dx", test=0.2, val=0.1)
    assert pd.crosstab(out.obs["dx"], out.obs["split"]).to_numpy().tolist() == [[12, 42, 6], [8, 28, 4]]
    assert out.roles["split"] == "split"
    other = bs.data.split(samples, stratify="dx", test=0.2, val=0.1, random_state=1)
    assert not other.obs["split"].equals(out.obs["split"])


def test_rounding_does_not_add_up_over_classes():
    """Ten classes of 7 groups: 1.4 test groups each. Rounding each down would give 10 instead of 14."""
    samples = cohort([f"p{i}" for i in range(70)], dx=[f"k{i % 10}" for i in range(70)])
    out = bs.data.split(samples, stratify="dx", test=0.2)
    assert (out.obs["split"] == "test").sum() == 14


def test_every_seed_can_choose_every_group():
    samples = cohort([f"p{i}" for i in range(5)])
    chosen = [bs.data.split(samples, random_state=s).obs["split"].eq("test").idxmax() for s in range(60)]
    assert set(chosen) == set(samples.ids)


def test_mixed_groups_follow_their_majority_and_numbers_their_quartiles():
    groups = np.repeat([f"p{i:02d}" for i in range(8)], 3)
    mixed = np.tile(["a", "a", "b"], 8)
    mixed[12:] = np.tile(["b", "a", "b"], 4)  # four patients mostly a, four mostly b
    out = bs.data.split(cohort(groups, dx=mixed), stratify="dx", test=0.25)
    test = out.obs.loc[out.obs["split"] == "test", "patient"].unique()
    assert sorted(int(p[1:]) // 4 for p in test) == [0, 1]
    age = np.repeat(np.arange(40.0), 2)
    aged = bs.data.split(cohort([f"p{a:02.0f}" for a in age], age=age), stratify="age", test=0.2)
    test_age = aged.obs.loc[aged.obs["split"] == "test", "age"].unique()
    assert np.bincount((test_age // 10).astype(int)).tolist() == [2, 2, 2, 2]


def test_refusals():
    unknown = Samples(pd.DataFrame({"g": list("aabbcc")}), Never(), roles={"patient": None})
    with pytest.raises(StatisticsError, match=r"patient .* unknown, so a split could leak"):
        bs.data.split(unknown)
    with pytest.raises(StatisticsError, match="assume_independent=True"):
        bs.data.split(unknown, by=None)
    assert set(bs.data.split(unknown, by=None, assume_independent=True).obs["split"]) == {"train", "test"}
    by_group = bs.data.split(unknown, by="g")
    assert not by_group.obs.groupby("g")["split"].nunique().gt(1).any()
    with pytest.raises(InputError, match="no column 'gg' to split by; did you mean 'g'"):
        bs.data.split(unknown, by="gg")
    rare = cohort([f"p{i}" for i in range(9)], dx=["a"] * 7 + ["b"] * 2)
    with pytest.raises(StatisticsError, match=r"dx = 'b' has 2 group\(s\) of 'patient', fewer than the 3 parts"):
        bs.data.split(rare, stratify="dx", val=0.2)
    for test, val in [(0, 0), (0.5, 0.5), (1.2, 0), (0.2, -0.1)]:
        with pytest.raises(InputError, match="need test > 0"):
            bs.data.split(rare, test=test, val=val)
    gaps = cohort(list("aabbcc"), dx=["x", None, "x", "y", "y", "x"])
    with pytest.raises(InputError, match="1 samples have no 'dx'"):
        bs.data.split(gaps, stratify="dx")
