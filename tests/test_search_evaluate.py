"""Measures of rankings against hand-worked cases, enumeration and scikit-learn; intervals that count patients."""

from __future__ import annotations

import itertools

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from biosae.errors import InputError, StatisticsError
from biosae.search import evaluate, evaluate_queries, ranking_measures
from biosae.search.evaluate import clustered_mean


def test_hand_worked_rankings():
    # relevant at places 1 and 4 of 4: AP (1/1 + 2/4) / 2, DCG@3 1 of 1 + 1/log2(3), P@3 1/3
    found = ranking_measures([1, 0, 0, 1], [4, 3, 2, 1], k=3)
    assert found["ap"] == pytest.approx(0.75)
    assert found["ndcg@3"] == pytest.approx(1 / (1 + 1 / np.log2(3)))
    assert found["precision@3"] == pytest.approx(1 / 3)
    # the same with ties (methods, A11): 2/3, not the 0.5 of steps nor the 0.75 of file order
    assert ranking_measures([1, 0, 0, 1], [1, 1, 0, 0])["ap"] == pytest.approx(2 / 3)
    assert np.isnan(list(ranking_measures([0, 0], [1, 2]).values())).all()
    assert ranking_measures([1], [0.5], k=10) == {"ap": 1.0, "ndcg@10": 1.0, "precision@10": 1.0}


@given(
    items=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=6),
    k=st.integers(1, 8),
)
def test_ties_are_averaged_over_all_their_orders(items, k):
    relevant, scores = (np.array(v) for v in zip(*items))
    if not relevant.any():
        return
    orders = []
    for order in itertools.permutations(range(len(items))):
        order = list(order)
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            y = relevant[order]
            gain = 1 / np.log2(np.arange(2, min(k, len(y)) + 2))
            hits = np.cumsum(y) / np.arange(1, len(y) + 1)
            best = np.sort(y)[::-1][: len(gain)] @ gain
            orders.append((hits[y == 1].mean(), y[: len(gain)] @ gain / best, y[:k].mean()))
    found = ranking_measures(relevant, scores, k=k)
    np.testing.assert_allclose(list(found.values()), np.mean(orders, axis=0), atol=1e-12)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 80), k=st.integers(1, 100), ties=st.booleans())
def test_agrees_with_scikit_learn(seed, n, k, ties):
    from sklearn.metrics import average_precision_score, ndcg_score

    rng = np.random.default_rng(seed)
    relevant = np.r_[1, rng.integers(0, 2, n - 1)]
    scores = rng.integers(0, 4, n).astype(float) if ties else rng.permutation(n).astype(float)
    found = ranking_measures(relevant, scores, k=k)
    assert found[f"ndcg@{k}"] == pytest.approx(ndcg_score([relevant], [scores], k=k))
    if not ties:
        assert found["ap"] == pytest.approx(average_precision_score(relevant, scores))


def cohort(seed: int = 0, n_patients: int = 12, each: int = 6) -> anndata.AnnData:
    """Codes that follow the class weakly and the patient strongly; embeddings that follow neither."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n_patients), each)
    label = rng.integers(0, 2, len(patient))
    X = rng.random((len(patient), n_patients + 2)) * 0.3
    X[np.arange(len(patient)), patient] += 2
    X[np.arange(len(patient)), n_patients + label] += 1
    obs = pd.DataFrame({"patient": patient.astype(str), "label": np.array(["a", "b"])[label]})
    obs.index = [f"t{i}" for i in range(len(obs))]
    return anndata.AnnData(
        sp.csr_matrix(X.astype(np.float32)), obs=obs, obsm={"embedding": rng.normal(size=(len(obs), 5))}
    )


def test_rankings_of_queries_are_those_of_scikit_learn_with_and_without_the_own_patient():
    from sklearn.metrics import average_precision_score
    from sklearn.metrics.pairwise import cosine_similarity

    adata = cohort()
    label, patient = adata.obs["label"].to_numpy(), adata.obs["patient"].to_numpy()
    for exclude in ((), ("patient",)):
        found = evaluate_queries(adata, "label", exclude=exclude, k=5).set_index(["use_rep", "query"])
        for rep, X in (("X", adata.X.toarray()), ("embedding", adata.obsm["embedding"])):
            similar = cosine_similarity(X.astype(np.float64))
            for q, name in enumerate(adata.obs_names):
                allowed = np.arange(len(label)) != q
                if exclude:
                    allowed &= patient != patient[q]
                line = found.loc[rep, name]
                same = label[allowed] == label[q]
                assert line["ap"] == pytest.approx(average_precision_score(same, similar[q, allowed]))
                assert line["precision@5"] == pytest.approx(same[np.argsort(-similar[q, allowed])[:5]].mean())
                assert line["n_gallery"] == allowed.sum() and line["n_relevant"] == same.sum()


def test_chance_is_the_mean_over_random_orders():
    adata = cohort()
    line = evaluate_queries(adata, "label", k=5).iloc[0]
    same = (adata.obs["label"] == adata.obs["label"].iloc[0]).to_numpy()[1:].astype(int)
    rng = np.random.default_rng(0)
    draws = pd.DataFrame([ranking_measures(same, rng.random(len(same)), k=5) for _ in range(4000)])
    for name, values in draws.items():
        assert line[f"chance_{name}"] == pytest.approx(values.mean(), abs=4 * values.std() / np.sqrt(len(values)))


def test_summary_counts_patients_and_pairs_the_difference():
    adata = cohort()
    table = evaluate(adata, "label", exclude="patient", k=(1, 5)).set_index(["use_rep", "measure"])
    lines = evaluate_queries(adata, "label", exclude="patient", k=(1, 5))
    means = lines.groupby("use_rep")[["ap", "ndcg@5"]].mean()
    assert table.loc[("X", "ap"), "estimate"] == pytest.approx(means.loc["X", "ap"])
    difference = table.loc[("X - embedding", "ndcg@5")]
    assert difference["estimate"] == pytest.approx(means.loc["X", "ndcg@5"] - means.loc["embedding", "ndcg@5"])
    assert difference["ci_low"] > 0  # planted
    assert (table["n_groups"] == 12).all() and (table["status"] == "few_groups").all()
    assert table.attrs["biosae"]["exclude"] == ["patient"]


def test_interval_of_equal_groups_is_the_t_interval_of_their_means():
    from scipy import stats

    rng = np.random.default_rng(0)
    values = np.repeat(0.1 * rng.normal(size=8), 5) + 0.01 * rng.normal(size=40)
    means = values.reshape(8, 5).mean(1)
    found = clustered_mean(values, np.repeat(np.arange(8), 5), difference=True)
    low, high = stats.t.interval(0.95, 7, means.mean(), stats.sem(means))
    assert (found["ci_low"], found["ci_high"]) == (pytest.approx(low), pytest.approx(high))
    alone = clustered_mean(values, np.arange(40), difference=True)
    assert alone["ci_high"] - alone["ci_low"] < 0.6 * (high - low)  # tiles taken as independent promise too much


def test_intervals_cover_with_patients_of_unequal_size():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        size = rng.integers(1, 12, 15)
        patient = np.repeat(np.arange(15), size)
        values = 0.1 * (rng.normal(size=15)[patient] + rng.normal(size=len(patient)))
        found = clustered_mean(values, patient, difference=True)
        hits += found["ci_low"] < 0 < found["ci_high"]
    assert 0.91 < hits / 300 < 0.985


def test_what_cannot_be_answered_is_said():
    adata = cohort(n_patients=2)
    table = evaluate(adata, "label", use_rep="X")
    assert (table["status"] == "too_few_groups").all() and table["ci_low"].isna().all()
    alone = cohort()
    alone.obs["label"] = alone.obs["patient"]  # no other patient has this label
    table = evaluate(alone, "label", exclude="patient")
    assert (table["status"] == "no_queries").all() and (table["n_left_out"] == alone.n_obs).all()
    alone.obs["label"] = alone.obs["label"].where(alone.obs["patient"] != "3")
    lines = evaluate_queries(alone, "label", use_rep="X", gallery=alone.obs_names[:20])
    assert len(lines) == alone.n_obs - 6 and lines["n_gallery"].max() == 18
    with pytest.raises(StatisticsError, match="assume_independent=True"):
        evaluate(adata, "label", groups="case")
    with pytest.raises(InputError, match="not a column"):
        evaluate(adata, "diagnosis")
    with pytest.raises(InputError, match="count from 1"):
        ranking_measures([1], [1], k=0)


@pytest.mark.parametrize(("groups", "mean"), [(3, 0.97), (5, 0.9), (10, 0.97), (20, 0.95), (20, 0.5)])
def test_intervals_of_precision_near_one_cover(groups: int, mean: float) -> None:
    """Precision at 1 of patients that differ: t limits cover 0.27, 0.82, 0.65, 0.8 and 0.95."""
    rng = np.random.default_rng(0)
    covered, widths = [], []
    for _ in range(300):
        codes = np.repeat(np.arange(groups), rng.integers(2, 10, groups))
        found = clustered_mean((rng.random(len(codes)) < rng.beta(3 * mean, 3 - 3 * mean, groups)[codes]) * 1.0, codes)
        covered.append(found["ci_low"] <= mean <= found["ci_high"] + 1e-12)
        widths.append(found["ci_high"] - found["ci_low"])
    assert np.mean(covered) > 0.89 and min(widths) > 0


def test_what_did_not_vary_is_not_certain() -> None:
    codes = np.repeat(np.arange(10), 4)
    ones = clustered_mean(np.ones(40), codes)
    assert ones["ci_high"] == pytest.approx(1) and ones["ci_low"] == pytest.approx(0.025**0.1)  # Clopper and Pearson
    same = clustered_mean(np.zeros(40), codes, difference=True)
    assert same["estimate"] == 0 and same["ci_low"] == -same["ci_high"] == pytest.approx(0.025**0.1 - 1)


def test_masks_are_joined_by_id_and_codes_on_disk_are_read(tmp_path) -> None:
    adata = cohort()
    mask = pd.Series(adata.obs["patient"].isin(["0", "1"]), adata.obs_names)
    expected = evaluate(adata, "label", queries=mask.to_numpy())
    pd.testing.assert_frame_equal(evaluate(adata, "label", queries=mask.sample(frac=1, random_state=0)), expected)
    with pytest.raises(InputError, match="ids of all rows"):
        evaluate(adata, "label", queries=mask.iloc[:5])
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    pd.testing.assert_frame_equal(evaluate(backed, "label", queries=mask), expected)
