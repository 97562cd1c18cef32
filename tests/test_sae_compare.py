"""Methods side by side: the same rows for all, failures listed, labels held against latents, the figure."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import scipy.stats
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from biosae.embeddings import Embeddings
from biosae.errors import InputError
from biosae.sae import SAE, compare, planted
from biosae.sae.agreement import stability
from biosae.sae.labels import Labels, Target, rank_codes, shuffled
from biosae.sae.rows import Held, Rows


def random_codes(n, m, *, signed=False, seed=0):
    rng = np.random.default_rng(seed)
    z = np.round(rng.standard_normal((n, m)), 1) * (rng.random((n, m)) < 0.4)
    return scipy.sparse.csr_matrix(z if signed else np.abs(z))


# ------------------------------------------------------------------------------------------------------- labels


@given(st.integers(2, 40), st.integers(1, 6), st.booleans(), st.integers(0, 20))
@hypothesis_settings(max_examples=30)
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


# ------------------------------------------------------------------------------------------------------ compare


@pytest.fixture(scope="module")
def rows():
    truth = planted("sparse", n_rows=900, d=12, n_atoms=16, k=2, random_state=0)
    return truth, np.repeat([f"p{i}" for i in range(30)], 30)


QUICK = {"n_steps": 25, "batch_size": 128, "device": "cpu"}


def quick(name, **settings):
    return SAE(name, **QUICK, **settings)


@pytest.fixture(scope="module")
def table(rows):
    truth, groups = rows
    first = np.asarray(truth.codes[:, [0]].todense()).ravel()
    methods = [quick("topk"), {"architecture": "relu", "l1": 0.1, **QUICK}, "itda", "pca", quick("topk", k_start=99)]
    return compare(
        truth.rows, methods=methods, seeds=(3, 5), k=(2, 4), n_latents=16, groups=groups, validation=0.2, n_null=5,
        labels={"active": first > 0, "strength": first},
    )  # fmt: skip


def test_one_row_for_each_method_setting_and_seed(table):
    assert (table["error"] == "").all() and len(table) == 2 * (2 + 1 + 2 + 2 + 2)
    assert table.groupby(["method", "setting"], sort=False).size().to_dict() == {
        ("topk", "batch_size 128, n_steps 25"): 4,
        ("relu", "batch_size 128, n_steps 25, l1 0.1"): 2,
        ("itda", ""): 4,
        ("pca", ""): 4,
        ("topk", "batch_size 128, n_steps 25, k_start 99"): 4,
    }
    assert set(table["seed"]) == {3, 5} and set(table["n_latents"]) == {16, 12}  # pca: as many as features
    assert table.loc[table["method"] == "relu", "k"].isna().all()
    assert (table.loc[table["method"] == "topk", "l0"] <= table.loc[table["method"] == "topk", "k"]).all()
    assert table[["n_rows", "n_rows_val", "n_groups_val"]].drop_duplicates().to_numpy().tolist() == [[720, 180, 6]]
    numbers = table.drop(columns=["k", "shared_null"]).select_dtypes("number")
    assert np.isfinite(numbers).all(axis=None) and (table["seconds"] > 0).all()


def test_its_numbers_are_those_of_a_fit_alone(rows, table):
    truth, groups = rows
    held = Held.draw(Rows(truth.rows), groups=groups, share=0.2, rng=np.random.default_rng(0)).mask(0, 900)
    sae = quick("topk", k=2, n_latents=16, random_state=3, validation=0.0)
    sae.fit(truth.rows[~held], groups=groups[~held])
    line = table[(table["method"] == "topk") & (table["seed"] == 3) & (table["k"] == 2)].iloc[0]
    there = sae.evaluate(truth.rows[held])
    assert line["fvu"] == pytest.approx(sae.metrics_["fvu"]) and line["fvu_val"] == pytest.approx(there["fvu"])
    assert line["l0_val"] == pytest.approx(there["l0"]) and line["gamma"] == pytest.approx(there["gamma"])
    first = np.asarray(truth.codes[:, [0]].todense()).ravel()
    dense = sae.codes(truth.rows[held]).toarray()
    rho = [abs(scipy.stats.spearmanr(column, first[held]).statistic) for column in dense.T if column.any()]
    assert line["alignment: strength"] == pytest.approx(max(rho))
    assert line["alignment"] == pytest.approx((line["alignment: strength"] + line["alignment: active"]) / 2)
    assert line["alignment_null"] < line["alignment"]


def test_stability_is_that_of_the_seeds(rows, table):
    pca = table[table["method"] == "pca"]
    assert (pca["shared"] == 1).all() and pca["mmcs"].to_numpy() == pytest.approx(1, abs=1e-6)
    topk = table[table["method"] == "topk"]
    assert (topk["shared"] < 1).any() and topk.groupby(["setting", "k"])["shared"].nunique().max() == 1
    assert np.isfinite(table["shared_null"]).all()


def test_what_fails_is_listed_and_the_rest_is_there(rows):
    truth, groups = rows
    methods = [quick("topk"), quick("gated", options={"l1": -1.0}), "nmf", quick("topk", resample_every=1)]
    table = compare(truth.rows, methods=methods, seeds=(0,), k=2, n_latents=16, groups=groups)
    failed = table[table["error"] != ""]
    assert list(failed["method"]) == ["gated", "nmf", "topk"] and failed["fvu_val"].isna().all()
    assert failed["error"].str.contains("l1|negative|resample_every").all()
    assert np.isfinite(table.loc[table["error"] == "", "fvu_val"]).all() and table["shared"].isna().all()


def test_names_labels_and_groups_of_stored_embeddings(rows):
    truth, groups = rows
    obs = pd.DataFrame({"patient": groups[::3], "score": np.arange(300.0)}, index=[f"s{i}" for i in range(300)])
    emb = Embeddings.from_array(truth.rows, obs=obs, tokens_per_sample=3, identity={"encoder": "x"})
    (line,) = compare(emb, methods=quick("batchtopk"), seeds=[0], k=2, n_latents=8, labels="score").to_dict("records")
    assert line["n_rows_val"] == 180 and line["n_groups_val"] == 6 and 0 < line["alignment"] <= 1
    for wrong, message in (
        ({"methods": ["topq"]}, "did you mean 'topk'"),
        ({"labels": "scores"}, "did you mean 'score'"),
        ({"labels": np.zeros(7)}, "7 entries for 900 rows"),
        ({"seeds": (1, 1)}, "different"),
        ({"methods": []}, "at least one"),
        ({"validation": 0.0}, "between 0 and 1"),
    ):
        with pytest.raises(InputError, match=message):
            compare(emb, **{"methods": ["topk"], "seeds": [0], **wrong})


def test_the_figure_shows_every_method_and_names_what_failed(table):
    from biosae import pl

    failed = table.iloc[[0]].assign(method="vl_sae", setting="", error="InputError: two tables", fvu_val=np.nan)
    fig = pl.sae_comparison(pd.concat([table, failed], ignore_index=True))
    fig.draw_without_rendering()
    first, dead, stable, label = fig.axes
    names = [tick.get_text() for tick in dead.get_yticklabels()]
    assert len(names) == 5 and "itda" in names and not any("vl_sae" in name for name in names)
    assert "vl_sae" in fig.get_supxlabel() and "720 rows" in fig.get_supxlabel() and "2 seeds" in fig.get_supxlabel()
    assert names[::-1] == ["topk (batch_size 128, n_steps 25)", "relu", "itda", "pca", names[0]]
    assert names[0] == "topk (batch_size 128, n_steps 25, k_start 99)"  # settings where a method has several
    looks = {
        (line.get_marker(), line.get_color()) for line in first.lines if line.get_marker() not in ("None", None, "")
    }
    assert len(looks) == 5
    assert label.get_xlim()[0] == 0 and stable.get_xlabel().startswith("atoms found again")
    with pytest.raises(InputError, match="no fit succeeded"):
        pl.sae_comparison(failed)
    with pytest.raises(InputError, match="no column 'fvu_val'"):
        pl.sae_comparison(table.drop(columns="fvu_val"))
    assert len(pl.sae_comparison(table.drop(columns=["shared", "alignment"])).axes) == 2
