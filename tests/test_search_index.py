"""Exact search against brute force, bit for bit, and against scikit-learn; rules of exclusion; faiss."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from biosae.errors import IdentityError, InputError
from biosae.search import Index, by_item, by_weights, kernels, neighbours

METRICS = ("cosine", "dot", "euclidean", "jaccard")


def sums(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Scalar products, each added up column by column in float64."""
    products = A.astype(np.float64)[:, None, :] * B.astype(np.float64)[None, :, :]
    return np.cumsum(products, axis=2)[:, :, -1]


def brute(Q: np.ndarray, X: np.ndarray, metric: str) -> np.ndarray:
    """All scores (queries, rows), straight from the definitions."""
    if metric == "jaccard":
        Q, X = (Q != 0).astype(float), (X != 0).astype(float)
    dot = sums(Q, X)
    own, other = (np.cumsum(np.square(rows, dtype=np.float64), axis=1)[:, -1] for rows in (Q, X))
    own, other = own[:, None], other[None]
    if metric == "dot":
        return dot
    if metric == "euclidean":
        return -np.sqrt(np.maximum(own + other - 2 * dot, 0))
    scale = np.sqrt(own) * np.sqrt(other) if metric == "cosine" else own + other - dot
    return np.divide(dot, scale, out=np.zeros_like(dot), where=scale > 0)


def ranking(scores: np.ndarray, barred: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first n allowed rows of each query, ties by lower row; -1 and NaN where there are fewer."""
    rows = np.full((len(scores), n), -1)
    best = np.full((len(scores), n), np.nan)
    for q, (line, no) in enumerate(zip(scores, barred)):
        order = [r for r in np.argsort(-line, kind="stable") if not no[r]][:n]
        rows[q, : len(order)], best[q, : len(order)] = order, line[order]
    return rows, best


def codes(rng: np.random.Generator, n: int, m: int, density: float, *, coarse: bool, signed: bool) -> np.ndarray:
    """Sparse rows; coarse values, so that many scores are tied; one row is zero and two are equal."""
    value = rng.integers(1, 3, (n, m)) if coarse else rng.exponential(size=(n, m))
    if signed:
        value = value * rng.choice([-1, 1], (n, m))
    X = (value * (rng.random((n, m)) < density)).astype(np.float32)
    X[n // 2] = 0
    X[n - 1] = X[0]
    return X


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), n=st.integers(3, 60), m=st.integers(1, 30), density=st.floats(0.02, 1.0),
    coarse=st.booleans(), signed=st.booleans(), metric=st.sampled_from(METRICS), sparse=st.booleans(),
    wide=st.booleans(), wanted=st.integers(1, 70), rules=st.integers(0, 2), tile=st.sampled_from([4, 8192]),
)  # fmt: skip
def test_ranking_and_scores_are_those_of_brute_force_to_the_bit(
    seed, n, m, density, coarse, signed, metric, sparse, wide, wanted, rules, tile
):
    rng = np.random.default_rng(seed)
    X = codes(rng, n, m, density, coarse=coarse, signed=signed)
    if wide:
        X = X.astype(np.float64) * np.pi
    obs = pd.DataFrame(
        {"patient": rng.integers(0, 3, n), "site": rng.choice(["a", "b"], n)}, index=[f"t{i}" for i in range(n)]
    )
    exclude = ["patient", "site"][:rules]
    barred = np.eye(n, dtype=bool)
    for name in exclude:
        barred |= obs[name].to_numpy()[:, None] == obs[name].to_numpy()[None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("biosae.search.index.CORPUS_BLOCK", tile)
        patch.setattr("biosae.search.index.QUERY_BLOCK", 7)
        found = Index(sp.csr_matrix(X) if sparse else X, metric=metric, obs=obs).search(n=wanted, exclude=exclude)
    rows, best = ranking(brute(X, X, metric), barred, min(wanted, n))
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.scores, best)


def test_posting_lists_of_several_tiles_are_searched_as_one_corpus():
    rng = np.random.default_rng(0)
    n, m = 2 * kernels.TILE + 17, 50
    X = sp.random(n, m, density=0.08, random_state=1, format="csr", dtype=np.float32)
    queries = rng.choice(n, 20, replace=False)
    product = (X[queries].astype(np.float64) @ X.T.astype(np.float64)).toarray()  # scipy adds up in the same order
    found = Index(X, metric="dot").search(list(queries), n=40)
    barred = np.arange(n)[None] == queries[:, None]
    rows, best = ranking(product, barred, 40)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.scores, best)


def test_agrees_with_scikit_learn():
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(3)
    X, Q = rng.normal(size=(300, 40)), rng.normal(size=(25, 40))
    for metric, sign in (("cosine", 1), ("euclidean", 0)):
        distance, rows = NearestNeighbors(n_neighbors=12, metric=metric, algorithm="brute").fit(X).kneighbors(Q)
        found = Index(X, metric=metric).search(Q, n=12)
        np.testing.assert_array_equal(found.rows, rows)
        np.testing.assert_allclose(found.scores, sign - distance, atol=1e-12)


def test_sparse_and_dense_rows_of_the_same_numbers_give_the_same_bits():
    X = codes(np.random.default_rng(5), 200, 64, 0.1, coarse=False, signed=True)
    for metric in METRICS:
        a, b = Index(sp.csr_matrix(X), metric=metric).search(n=9), Index(X, metric=metric).search(n=9)
        np.testing.assert_array_equal(a.rows, b.rows)
        np.testing.assert_array_equal(a.scores, b.scores)


def test_screening_does_not_lose_rows_that_differ_in_the_last_bits():
    rng = np.random.default_rng(0)
    X = np.repeat(rng.normal(size=(1, 512)), 400, axis=0).astype(np.float32)
    X[np.arange(400), rng.integers(0, 512, 400)] *= np.float32(1 + 2**-22)  # all the same to a float32 product
    rows, best = ranking(brute(X[:30], X, "cosine"), np.eye(30, 400, dtype=bool), 10)
    found = Index(X).search(list(range(30)), n=10)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.scores, best)


def table() -> anndata.AnnData:
    obs = pd.DataFrame(
        {"patient": ["p", "p", "q", "q"], "site": ["s", "t", "s", None]}, index=pd.Index(list("abcd"), name="sample_id")
    )
    X = sp.csr_matrix(np.array([[2, 0], [2, 0], [2, 1], [0, 1]], np.float32))
    return anndata.AnnData(X, obs=obs, obsm={"embedding": np.eye(4, 3, dtype=np.float32)})


def test_items_by_id_rules_and_table():
    adata = table()
    found = neighbours(adata, "a", n=3, exclude="patient").to_frame()
    assert found["sample_id"].tolist() == ["c", "d"] and found["rank"].tolist() == [1, 2]
    assert found["score"].tolist() == [2 / np.sqrt(5), 0.0] and set(found["query"]) == {"a"}
    assert neighbours(adata, ["a", "c"], n=1).ids[neighbours(adata, ["a", "c"], n=1).rows[:, 0]].tolist() == ["b", "a"]
    assert neighbours(adata, n=1, use_rep="embedding").rows.ravel().tolist() == [1, 0, 0, 0]


def test_new_items_meet_the_same_rules():
    new = table()[["a"]].copy()
    new.obs_names = ["z"]
    assert neighbours(table(), new, n=4).to_frame()["sample_id"].tolist() == ["a", "b", "c", "d"]
    assert neighbours(table(), new, n=4, exclude="patient").to_frame()["sample_id"].tolist() == ["c", "d"]
    same = table()[["a"]].copy()  # the id is known here, so it is the same item
    assert neighbours(table(), same, n=4).to_frame()["sample_id"].tolist() == ["b", "c", "d"]
    assert neighbours(table().X, table().X[:1], n=1).rows.tolist() == [[0]]  # a matrix has no ids


def test_codes_on_disk_are_searched_too(tmp_path):
    table().write_h5ad(tmp_path / "latents.h5ad")
    backed = anndata.read_h5ad(tmp_path / "latents.h5ad", backed="r")
    assert neighbours(backed, "a", n=3).rows.tolist() == neighbours(table(), "a", n=3).rows.tolist()
    assert by_item(backed, "a", n=1)["shared"].tolist() == ["0"]
    assert by_weights(backed, {"1": 1.0}, n=1)["sample_id"].tolist() == ["c"]


def test_refusals_say_what_to_do():
    with pytest.raises(InputError, match=r"'site': 1 rows .* drop these rows"):
        neighbours(table(), exclude="site")
    with pytest.raises(InputError, match="did you mean 'patient'"):
        neighbours(table(), exclude="patients")
    with pytest.raises(InputError, match="'e' is not among the 4 rows"):
        neighbours(table(), "e")
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        neighbours(table(), metric="cosin")
    with pytest.raises(InputError, match="did you mean 'embedding'"):
        neighbours(table(), use_rep="embeddings")
    with pytest.raises(InputError, match="not finite"):
        neighbours(np.array([[np.nan, 1.0]]))
    with pytest.raises(InputError, match="3 columns, the index 2"):
        neighbours(table(), np.ones((1, 3)))
    with pytest.raises(InputError, match="at least one"):
        neighbours(table(), n=0)
    with pytest.raises(InputError, match="faiss=None for sparse codes"):
        neighbours(table(), faiss="Flat")


def test_faiss_gives_candidates_and_exact_scores():
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(1)
    X = rng.normal(size=(500, 24)).astype(np.float32)
    obs = pd.DataFrame({"patient": np.repeat(np.arange(5), 100)}, index=np.arange(500).astype(str))
    for metric in ("cosine", "euclidean"):
        exact = Index(X, obs=obs, metric=metric).search(n=15, exclude="patient")
        flat = Index(X, obs=obs, metric=metric, faiss="Flat").search(n=15, exclude="patient")
        np.testing.assert_array_equal(flat.rows, exact.rows)
        np.testing.assert_array_equal(flat.scores, exact.scores)
    graph = Index(X, obs=obs, faiss="HNSW16").search(n=15, exclude="patient")
    exact = Index(X, obs=obs).search(n=15, exclude="patient")
    recall = np.mean([len(set(a) & set(b)) / 15 for a, b in zip(graph.rows, exact.rows)])
    assert recall > 0.8
    own = obs["patient"].to_numpy()
    assert (own[graph.rows] != own[:, None]).all()
    ready = faiss.IndexFlatIP(24)
    ready.add(X)
    np.testing.assert_array_equal(
        Index(X, metric="dot", faiss=ready).search(n=3).rows, Index(X, metric="dot").search(n=3).rows
    )
    with pytest.raises(InputError, match="build it anew"):
        Index(X[:10], faiss=ready)
    with pytest.raises(InputError, match="faiss cannot build"):
        Index(X, faiss="Nonsense")


def test_values_that_mean_the_same_patient_are_the_same():
    """A column of whole numbers that had a gap once holds 1.0, and as text '1.0' or '1': one patient all the same."""
    X = np.eye(6, 4, dtype=np.float32) + 0.1
    obs = pd.DataFrame({"patient": [1, 1, 2, 2, 3, 3]}, index=list("abcdef"))
    for values in ([1.0, 2.0], ["1", "2"], ["1.0", "2.0"], pd.Categorical([1, 2]), pd.array([1, 2], dtype="Int64")):
        asked = pd.DataFrame({"patient": values}, index=["x", "y"])
        found = Index(X, obs=obs).search(X[:2], obs=asked, exclude="patient", n=6).rows
        assert [set(row[row >= 0]) for row in found] == [{2, 3, 4, 5}, {0, 1, 4, 5}]


def test_rows_that_are_only_counted_have_no_ids():
    X = np.eye(3, dtype=np.float32)
    found = Index(X, obs=pd.DataFrame({"patient": list("abc")})).search(X, obs=pd.DataFrame({"patient": list("xyz")}))
    assert found.rows[:, 0].tolist() == [0, 1, 2]
    frame = pd.DataFrame(X, index=list("abc"))
    assert Index(frame).search("a").to_frame()["sample_id"].tolist() == ["b", "c"]
    assert neighbours(frame, frame.loc[["c"]]).to_frame()["sample_id"].tolist() == ["a", "b"]


def test_missing_groups_are_neither_equal_nor_others():
    for value in (None, np.nan, pd.NA, "", " "):
        adata = table()
        adata.obs["patient"] = pd.Series(["p", "p", value, "q"], index=adata.obs_names, dtype=object)
        with pytest.raises(InputError, match="1 rows of the index have no value"):
            neighbours(adata, "a", exclude="patient")


def test_a_vector_or_a_mask_is_not_taken_for_ids():
    X = np.eye(3)
    for queries in (np.array([1.0, 0.0, 0.0]), np.array([True, False, False]), [0.0, 1.0]):
        with pytest.raises(InputError, match=r"vector\[None\]"):
            Index(X).search(queries)
    assert Index(X).search(np.array([1]), n=1).rows.tolist() == [[0]]


def test_products_that_overflow_single_precision_are_scored_exactly():
    """Partial sums of float32 reach -inf and stay there; the product itself is the largest."""
    X = np.full((4, 5), 0.0, np.float32)
    X[:3, 0] = [1e17, 2e17, 3e17]
    X[3] = [-1.5e19, -1.5e19, 2e19, 2e19, 2e19]
    Q = np.array([[1e19, 1.5e19, 1.5e19, 1.5e19, 1.5e19]] * 2, np.float32)
    found = Index(X, metric="dot").search(Q, n=1)
    rows, best = ranking(brute(Q, X, "dot"), np.zeros((2, 4), bool), 1)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.scores, best)


def test_codes_of_another_dictionary_are_refused():
    adata = table()
    adata.varm["decoder"] = np.eye(2, dtype=np.float32)
    other = table()
    other.varm["decoder"] = np.array([[0, 1], [1, 0]], np.float32)
    other.uns["biosae"], adata.uns["biosae"] = {"fingerprint": "a"}, {"fingerprint": "b"}
    assert neighbours(adata, adata[:1].copy(), n=1).rows.tolist() == [[1]]
    for rep, words in (("X", "different dictionaries"), ("embedding", "different encoders")):
        with pytest.raises(IdentityError, match=words):
            neighbours(adata, other, use_rep=rep)


def test_a_faiss_index_of_other_rows_or_another_measure_is_refused():
    faiss = pytest.importorskip("faiss")
    X = np.random.default_rng(0).normal(2, 1, size=(100, 8)).astype(np.float32)
    raw, distance = faiss.IndexFlatIP(8), faiss.IndexFlatL2(8)
    raw.add(X)
    distance.add(X)
    unit = faiss.IndexFlatIP(8)
    unit.add(X / np.linalg.norm(X, axis=1, keepdims=True))
    np.testing.assert_array_equal(Index(X, faiss=unit).search(n=5).rows, Index(X).search(n=5).rows)
    with pytest.raises(InputError, match="not of unit length"):
        Index(X, faiss=raw)
    with pytest.raises(InputError, match="METRIC_INNER_PRODUCT"):
        Index(X, metric="dot", faiss=distance)
    with pytest.raises(InputError, match="another order"):
        Index(-X, metric="dot", faiss=raw)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sparse", [True, False])
def test_blocks_and_threads_do_not_change_a_bit(metric, sparse, monkeypatch):
    import numba

    X = codes(np.random.default_rng(0), 300, 40, 0.15, coarse=True, signed=True)
    X = sp.csr_matrix(X) if sparse else X
    whole = Index(X, metric=metric).search(n=12)
    monkeypatch.setattr("biosae.search.index.CORPUS_BLOCK", 17)
    monkeypatch.setattr("biosae.search.index.QUERY_BLOCK", 5)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        parts = [Index(X, metric=metric).search([i], n=12) for i in range(300)]
    finally:
        numba.set_num_threads(before)
    np.testing.assert_array_equal(np.vstack([p.rows for p in parts]), whole.rows)
    np.testing.assert_array_equal(np.vstack([p.scores for p in parts]), whole.scores)
