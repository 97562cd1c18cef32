"""Examples of a latent: planted near misses, caps, quantiles, both ends, tokens, blinding."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from synthetic_run import make_latents

import biosae as bs
from biosae.errors import InputError
from biosae.interpret import examples
from biosae.interpret.examples import KINDS

EVERY = ("top", "spread", "active", "inactive", "near")


@pytest.fixture(scope="module")
def adata():
    return make_latents()


_once: list = []


def once() -> anndata.AnnData:
    if not _once:
        _once.append(make_latents())
    return _once[0]


def codes_of(adata, latent="L0003") -> pd.Series:
    return pd.Series(adata[:, latent].X.toarray().ravel(), index=adata.obs_names)


def signed_copy(adata) -> anndata.AnnData:
    out = adata.copy()
    dense = out.X.toarray()
    dense[::2, 3] *= -1
    out.X = csr_matrix(dense)
    return out


@given(n=st.integers(1, 30), cap=st.integers(1, 4), site_cap=st.none() | st.integers(1, 20), seed=st.integers(0, 5))
def test_caps_order_and_controls(n, cap, site_cap, seed):
    adata = once()
    chosen = examples(adata, "L0003", n=n, cap_per_patient=cap, cap_per_site=site_cap, random_state=seed)
    values = codes_of(adata)
    assert chosen.groupby(["kind", "patient"]).size().max() <= cap
    assert site_cap is None or chosen.groupby(["kind", "site"]).size().max() <= site_cap
    assert chosen["row"].is_unique
    np.testing.assert_array_equal(chosen["activation"], values[chosen["row"]].astype(float))
    by = dict(list(chosen.groupby("kind", sort=False)))
    assert list(by) == [kind for kind in EVERY if kind in by]
    assert by["top"]["activation"].is_monotonic_decreasing
    assert by["top"]["activation"].iloc[0] == values.max()
    for kind, rows in by.items():
        assert len(rows) <= n
        assert (rows["activation"].eq(0) if kind in ("near", "inactive") else rows["activation"].gt(0)).all()
        assert rows["quantile"].isna().all() == (kind in ("near", "inactive"))
        assert rows["near_to"].notna().all() == (kind == "near")
    assert set(by["near"]["near_to"]) <= set(by["top"]["sample_id"])


def test_the_seed_decides_the_random_kinds_only(adata):
    same, again, other = (examples(adata, "L0003", random_state=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(same, again)
    for kind in ("top", "near"):
        assert same[same["kind"] == kind]["row"].tolist() == other[other["kind"] == kind]["row"].tolist()
    for kind in ("spread", "active", "inactive"):
        assert same[same["kind"] == kind]["row"].tolist() != other[other["kind"] == kind]["row"].tolist()


def table_of(codes, embedding=None, **obs) -> anndata.AnnData:
    codes = np.asarray(codes, np.float32)
    index = pd.Index([f"s{i}" for i in range(len(codes))], name="sample_id")
    out = anndata.AnnData(csr_matrix(codes[:, None]), obs=pd.DataFrame(obs, index=index))
    out.var_names = ["L0000"]
    if embedding is not None:
        out.obsm["embedding"] = np.asarray(embedding, np.float32)
    return out


def test_spread_has_one_of_every_class_of_what_the_top_leaves():
    adata = table_of(np.arange(1, 25))  # 24 active; the top takes 21 to 24, five of each class are left
    for seed in range(5):
        chosen = examples(adata, "L0000", n=4, kinds=("top", "spread"), random_state=seed)
        assert chosen["activation"][:4].tolist() == [24, 23, 22, 21]
        assert ((chosen["activation"][4:] - 1) // 5).tolist() == [0, 1, 2, 3]


def test_spread_passes_to_another_item_of_the_class_where_a_patient_is_full():
    adata = table_of(range(1, 9), patient=["a", "a", "a", "b", "a", "c", "a", "d"])
    chosen = examples(adata, "L0000", n=4, kinds=("spread",), cap_per_patient=1)
    assert chosen["patient"].is_unique and len(chosen) == 4


def test_quantile_is_the_share_of_active_items_below_with_half_of_the_ties():
    chosen = examples(table_of([0, 1, 2, 2, 4, 0]), "L0000", kinds=("top",))
    assert dict(zip(chosen["activation"], chosen["quantile"])) == {4: 0.875, 2: 0.5, 1: 0.125}


def test_near_misses_are_the_planted_twins_of_each_top_item():
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(60, 24)) + 5  # a common offset, which the cosine of raw vectors would see
    embedding[40:44] = embedding[[0, 1, 2, 3]] + rng.normal(0, 0.05, (4, 24))
    codes = np.r_[np.arange(10, 0, -1), np.zeros(50)]
    chosen = examples(table_of(codes, embedding), "L0000", n=4, kinds=("near",))
    assert chosen["row"].tolist() == ["s40", "s41", "s42", "s43"]
    assert chosen["near_to"].tolist() == ["s0", "s1", "s2", "s3"]
    centred = embedding - embedding.mean(axis=0)
    cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(centred[[40, 41, 42, 43]], centred[:4])]
    np.testing.assert_allclose(chosen["similarity"], cosine, rtol=1e-4)


def test_signed_codes_show_both_ends_and_no_negative_code_is_silent(adata):
    signed = signed_copy(adata)
    values = codes_of(signed).to_numpy()
    by = dict(list(examples(signed, "L0003", n=4, cap_per_patient=None).groupby("kind")["activation"]))
    assert set(by) == set(KINDS)
    np.testing.assert_array_equal(by["top"], np.sort(values)[::-1][:4])
    np.testing.assert_array_equal(by["bottom"], np.sort(values)[:4])
    assert (by["inactive"] == 0).all() and (by["near"] == 0).all()
    assert (by["active"] != 0).all()


def test_of_kept_tokens_a_sample_is_silent_only_if_all_its_tokens_are():
    T = 4
    codes = np.zeros((6, T))
    codes[0, 2], codes[0, 1], codes[1, 3], codes[2, 0] = 5, 4, 3, -2
    embedding = np.random.default_rng(0).normal(size=(6 * T, 8))
    embedding[5 * T + 1] = embedding[2] * 1.01
    adata = table_of(codes.ravel(), embedding)
    adata.obs["sample_id"] = np.repeat([f"t{i}" for i in range(6)], T)
    chosen = examples(adata, "L0000", n=2)
    of = {kind: rows[["sample_id", "row"]].to_numpy().tolist() for kind, rows in chosen.groupby("kind")}
    assert of["top"] == [["t0", "s2"], ["t1", "s7"]]
    assert of["bottom"] == [["t2", "s8"]]
    assert of["near"][0] == ["t5", "s21"]
    assert {name for name, _ in of["near"] + of["inactive"]} == {"t3", "t4", "t5"}


def test_slides_are_items_too(adata):
    slides = bs.stats.aggregate(adata, by="slide")
    chosen = examples(slides, "L0007", n=3, kinds=("top",), cap_per_patient=1)
    assert chosen["sample_id"].tolist() == chosen["row"].tolist()
    assert chosen["activation"].iloc[0] == codes_of(slides, "L0007").max()


def test_without_patients_there_is_no_cap_and_unknown_patients_have_none(adata):
    anonymous = adata.copy()
    anonymous.obs = anonymous.obs.drop(columns="patient")
    top = examples(anonymous, "L0003", kinds=("top",))
    np.testing.assert_array_equal(top["activation"], np.sort(codes_of(adata))[::-1][:12].astype(float))
    assert top["patient"].isna().all()
    some = table_of(range(1, 7), patient=["a", None, "a", None, "a", None])
    assert examples(some, "L0000", kinds=("top",), cap_per_patient=1)["row"].tolist() == ["s5", "s4", "s3", "s1"]


def test_a_dead_latent_has_only_silent_items(adata):
    assert set(examples(adata, "L0012", n=5)["kind"]) == {"inactive"}


def test_an_item_that_is_never_silent_has_no_controls():
    chosen = examples(table_of([1, -2, 3], np.eye(3)), "L0000")
    assert set(chosen["kind"]) == {"top", "bottom"}


def test_a_blinded_table_tells_nothing_and_the_same_call_is_its_key(adata):
    blind = examples(adata, "L0003", n=6, blinded=True, random_state=3)
    key = examples(adata, "L0003", n=6, random_state=3)
    assert list(blind) == ["number", "sample_id", "row"]
    assert blind["number"].tolist() == list(range(1, len(key) + 1))
    joined = blind.merge(key, on="row")
    assert sorted(joined["row"]) == sorted(key["row"])
    runs = (joined["kind"] != joined["kind"].shift()).sum()
    assert runs > 12  # five kinds in order would be five runs


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kinds": ("topp",)}, "did you mean 'top'"),
        ({"kinds": ()}, "Valid"),
        ({"n": 0}, "n=0"),
        ({"cap_per_patient": 0}, "cap_per_patient=0"),
    ],
)
def test_what_cannot_be_chosen_is_refused(adata, options, match):
    with pytest.raises(InputError, match=match):
        examples(adata, "L0003", **options)


def test_absent_latents_sites_and_embeddings_are_named(adata):
    with pytest.raises(InputError, match="L0012"):
        examples(adata, "L12")
    bare = table_of([0, 1])
    with pytest.raises(InputError, match="keep_embedding=True"):
        examples(bare, "L0000")
    with pytest.raises(InputError, match="site"):
        examples(bare, "L0000", kinds=("top",), cap_per_site=1)


def test_near_misses_of_embeddings_with_gaps_are_refused(adata):
    some = adata.copy()
    some.obsm["embedding"][3, 0] = np.nan
    with pytest.raises(InputError, match="1 rows of obsm"):
        examples(some, "L0003")
    assert len(examples(some, "L0003", kinds=("top", "inactive")))
