"""Questions by item, weights, property and text; late interaction of slides. Small tables worked by hand."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from biosae.encoders.text import TextTower
from biosae.errors import IdentityError, InputError
from biosae.search import (
    by_item,
    by_property,
    by_relevance,
    by_text,
    by_weights,
    late_interaction,
    rank_bags,
    softmax_weights,
)


def table(*, signed: bool = False) -> anndata.AnnData:
    #              L0 L1 L2 L3
    X = np.array([[4, 0, 0, 0], [2, 1, 0, 0], [4, 0, 1, 0], [0, 1, 1, 0], [0, 0, 2, 0]], np.float32)
    if signed:
        X[3, 0] = -3
    obs = pd.DataFrame({"camera": ["c1", "c1", "c2", "c2", "c3"]}, index=pd.Index(list("abcde"), name="sample_id"))
    var = pd.DataFrame({"name": ["vole", "snow and ice", "edge", "edge"]}, index=["L0", "L1", "L2", "L3"])
    embedding = np.array([[1, 0], [1, 1], [0, 1], [-1, 0], [0, 0]], np.float32)
    decoder = np.array([[1, 0], [0, 1], [-1, 0], [0, 0]], np.float32)
    return anndata.AnnData(sp.csr_matrix(X), obs=obs, var=var, obsm={"embedding": embedding}, varm={"decoder": decoder})


def test_by_item_says_what_is_shared():
    found = by_item(table(), "b", n=2)
    assert found["sample_id"].tolist() == ["a", "c"]
    assert found["score"].tolist() == pytest.approx([2 / np.sqrt(5), 8 / np.sqrt(85)])
    assert found["shared"].tolist() == ["L0", "L0"]
    assert by_item(table(), "b", n=1, metric="jaccard")["score"].tolist() == [0.5]
    assert by_item(table(), "a", n=1, use_rep="embedding")["sample_id"].tolist() == ["b"]
    assert by_item(table(), ["b"], n=5, exclude="camera")["sample_id"].tolist() == ["c", "d", "e"]
    new = table()[["d"]].copy()
    new.obs_names = ["z"]
    found = by_item(table(), new, n=1)
    assert found[["query", "sample_id", "shared"]].to_numpy().tolist() == [["z", "d", "L1 L2"]]


def test_by_weights_is_the_weighted_sum_of_scaled_codes():
    found = by_weights(table(), {"L0": 1, "L2": -1})
    assert dict(zip(found["sample_id"], found["score"])) == {"a": 1.0, "b": 0.5, "c": 0.5, "d": -0.5, "e": -1.0}
    assert found["sample_id"].tolist() == list("abcde")  # b and c are equal and stay in order
    plain = by_weights(table(), {"vole": 1}, scale=False, exclude={"camera": "c1"}, n=1)
    assert plain[["sample_id", "score", "L0"]].to_numpy().tolist() == [["c", 4.0, 4.0]]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("high L0, no L2", "ab"),
        ("high L0 and no L1", "ac"),
        ("high vole without L2", None),
        ("L0", "acb"),
        ("high 'snow and ice' and active L2", "d"),
        ('high L2; no "snow and ice"', "ec"),
        ("no L0, no L1", "e"),
        ("high L0, high L2", "caebd"),  # 1.5, 1, 1, 0.5, 0.5
        ("active L0, active L1, active L2", ""),
        ('no "vole", L2', "ed"),
        ("HIGH vole;;", "acb"),
    ],
)
def test_phrases(query, expected):
    if expected is None:
        with pytest.raises(InputError, match="cannot read"):
            by_property(table(), query)
    else:
        assert "".join(by_property(table(), query)["sample_id"]) == expected


def test_property_scores_cameras_and_signed_codes():
    found = by_property(table(), "high L0, high L2", exclude={"camera": ["c1", "c3"]})
    assert found[["sample_id", "score", "L0", "L2"]].to_numpy().tolist() == [["c", 1.5, 4, 1], ["d", 0.5, 0, 1]]
    assert by_property(table(signed=True), "negative L0")[["sample_id", "score"]].to_numpy().tolist() == [["d", 1.0]]
    assert "d" not in set(by_property(table(signed=True), "high L0")["sample_id"])
    with pytest.raises(InputError, match="never negative"):
        by_property(table(), "negative L0")
    with pytest.raises(InputError, match="L2, L3"):
        by_property(table(), "high edge")
    with pytest.raises(InputError, match="did you mean 'L0'"):
        by_property(table(), "high L00")
    with pytest.raises(InputError, match="empty"):
        by_property(table(), " , ")
    with pytest.raises(InputError, match="did you mean 'camera'"):
        by_property(table(), "high L0", exclude={"cameras": "c1"})


def test_softmax_property_retrieval_by_hand():
    weights = softmax_weights(["L0", "L1", "L2", "L3"], [0.2, np.nan, 0.3, 0.1], n_latents=2, temperature=0.1)
    assert weights.to_dict() == pytest.approx({"L2": np.e / (1 + np.e), "L0": 1 / (1 + np.e)})
    found = by_relevance(table(), {"L0": 0.2, "L2": 0.3}, temperature=0.1).set_index("sample_id")["score"]
    w = np.e / (1 + np.e)  # codes of L2 over 2, of L0 over 4
    expected = {"a": 1 - w, "b": (1 - w) / 2, "c": 1 - w + w / 2, "d": w / 2, "e": w}
    assert found.to_dict() == pytest.approx(expected)
    top = by_relevance(table(signed=True), [1, 0, 0, 0], n_latents=1)
    assert top["score"].tolist() == [1.0, 1.0, 0.5, 0.0, 0.0] and top.attrs["weights"] == {"L0": 1.0}
    with pytest.raises(InputError, match="no such latent"):
        by_relevance(table(), {"L9": 1.0})
    with pytest.raises(InputError, match="no latent has a relevance"):
        by_relevance(table(), [np.nan] * 4)
    with pytest.raises(InputError, match="one number for each of 4"):
        by_relevance(table(), [1.0])


class Words(torch.nn.Module):
    """Stands for a text tower: a vector for each known sentence."""

    def encode_text(self, numbers: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[2.0, 0.0], [0.0, 1.0]])[numbers]


def tower(weights: str = "abc") -> TextTower:
    known = {"a vole": 0}
    return TextTower(
        Words(), lambda texts: torch.tensor([known.get(t, 1) for t in texts]), name="small", weights_sha256=weights
    )


def test_by_text_through_embedding_and_through_latents():
    adata = table()
    adata.uns["biosae"] = {"identity": {"weights_sha256": "abc", "layer": "final", "pool": "head", "encoder": "small"}}
    found = by_text(adata, "vole", tower(), templates=("a {}",))
    assert found["sample_id"].tolist() == ["a", "b", "c", "e", "d"]
    assert found["score"].tolist() == pytest.approx([1, np.sqrt(0.5), 0, 0, -1])
    through = by_text(adata, "vole", tower(), templates=("a {}",), through="latents", n_latents=1)
    assert through.attrs["weights"] == {"L0": 1.0} and through["sample_id"].tolist()[:3] == ["a", "c", "b"]
    with pytest.raises(IdentityError, match="same file"):
        by_text(adata, "vole", tower("other"))
    with pytest.raises(InputError, match="did you mean 'latents'"):
        by_text(adata, "vole", tower(), through="latent")
    del adata.obsm["embedding"]
    with pytest.raises(InputError, match="keep_embedding=True"):
        by_text(adata, "vole", tower())


def slides() -> anndata.AnnData:
    """Three slides: s1 holds (1,0), (0,1); s2 (.8,.6), (0,1); s3 (1,0) three times."""
    X = np.array([[1, 0], [0.8, 0.6], [0, 1], [0, 2], [1, 0], [1, 0], [1, 0]], np.float32)
    obs = pd.DataFrame({"slide": ["s1", "s2", "s1", "s2", "s3", "s3", "s3"], "patient": list("pqpqppp")})
    obs.index = obs.index.astype(str)
    return anndata.AnnData(sp.csr_matrix(X), obs=obs)


def test_late_interaction_is_the_worked_case_over_the_rows_of_the_query():
    scores = late_interaction(slides())
    assert scores.loc["s1", "s2"] == pytest.approx(1.8 / 2)  # methods (SAE), 22
    assert np.diag(scores) == pytest.approx([1, 1, 1])
    assert scores.loc["s1", "s3"] == pytest.approx(0.5) and scores.loc["s3", "s1"] == pytest.approx(1)
    both = late_interaction(slides(), symmetric=True)
    assert both.loc["s1", "s3"] == both.loc["s3", "s1"] == pytest.approx(0.75)
    asked = late_interaction(slides(), queries=slides()[[4, 5]])
    assert asked.shape == (1, 3) and asked.loc["s3"].tolist() == pytest.approx([1, 0.8, 1])


def test_equal_bags_take_away_the_advantage_of_size():
    rng = np.random.default_rng(0)
    slide = np.repeat(["big", "query", "small"], [400, 40, 20])
    adata = anndata.AnnData(
        rng.normal(size=(460, 16)), obs=pd.DataFrame({"slide": slide}, index=np.arange(460).astype(str))
    )
    whole = late_interaction(adata).loc["query"]
    equal = np.mean(
        [late_interaction(adata, n_per_bag=20, random_state=s).loc["query", ["big", "small"]] for s in range(10)],
        axis=0,
    )
    assert whole["big"] - whole["small"] > 0.15 and abs(equal[0] - equal[1]) < 0.05
    again = late_interaction(adata, n_per_bag=20, random_state=3)
    pd.testing.assert_frame_equal(again, late_interaction(adata, n_per_bag=20, random_state=3))


def test_bags_are_ranked_without_themselves_and_their_patient():
    scores = late_interaction(slides())
    found = rank_bags(scores, slides().obs)
    assert found[found["query"] == "s1"]["bag"].tolist() == ["s2", "s3"]
    other = rank_bags(scores, slides().obs, exclude="patient")
    assert other[["query", "bag"]].to_numpy().tolist() == [["s1", "s2"], ["s2", "s1"], ["s2", "s3"], ["s3", "s2"]]
    mixed = slides().obs.assign(site=list("abcdefg"))
    with pytest.raises(InputError, match="several values of 'site'"):
        rank_bags(scores, mixed, exclude="site")
    with pytest.raises(InputError, match="not a column"):
        late_interaction(slides(), by="slides")


def test_latents_without_a_name_have_none_and_names_may_hold_anything():
    adata = table()
    for blank in ("", " ", np.nan, None):
        adata.var["name"] = ["vole", "no vole", blank, "Howell's body"]
        for query in ('high ""', "high nan", "high none", '" "'):
            with pytest.raises(InputError, match="cannot read"):
                by_property(adata, query)
        assert list(by_property(adata, "high Howell's body").columns[3:]) == ["L3"]
        assert list(by_property(adata, 'high "no vole"').columns[3:]) == ["L1"]
        assert "".join(by_property(adata, 'no "vole", high L2')["sample_id"]) == "ed"
        with pytest.raises(InputError, match="may also mean 'no' of 'vole'"):
            by_property(adata, "no vole")
    for query in ('high "vole', '"', "high vole, 'snow", "<script>alert(1)</script>", "%s{0}", "'; drop table obs"):
        with pytest.raises(InputError):
            by_property(adata, query)


def test_what_excludes_nothing_is_refused():
    adata = table()
    adata.obs["camera"] = [1, 1, 2, 2, 3]
    for value in (1, "1", 1.0, ["1"]):
        assert set(by_weights(adata, {"L0": 1}, exclude={"camera": value})["sample_id"]) == set("cde")
    with pytest.raises(InputError, match="would exclude nothing"):
        by_weights(adata, {"L0": 1}, exclude={"camera": 7})
    adata.obs["camera"] = [1, 1, None, 2, 3]
    with pytest.raises(InputError, match="1 rows have no 'camera'"):
        by_property(adata, "high L0", exclude={"camera": 1})


def test_weights_and_relevance_are_one_finite_number_a_latent():
    for weights in ({}, {"L0": np.nan}, {"L0": np.inf}, {"L0": 1, "vole": 1}, {0: 1.0}):
        with pytest.raises(InputError):
            by_weights(table(), weights)
    with pytest.raises(InputError, match="more than once"):
        by_relevance(table(), pd.Series([1.0, 2.0], index=["L0", "L0"]))


def test_what_is_shared_with_a_plain_row_of_codes_is_that_of_the_row():
    found = by_item(table(), table().X[3], n=1)
    assert found[["query", "sample_id", "shared"]].to_numpy().tolist() == [[0, "d", "L1 L2"]]


def test_bags_of_another_table_must_be_in_obs_and_keep_their_patient_out():
    asked = slides()[[4, 5]].copy()
    asked.obs["slide"] = "t1"
    scores = late_interaction(slides(), queries=asked)
    with pytest.raises(InputError, match=r"1 bags are not in obs.*concat"):
        rank_bags(scores, slides().obs, exclude="patient")
    both = pd.concat([slides().obs, asked.obs])
    assert rank_bags(scores, both, exclude="patient")["bag"].tolist() == ["s2"]
    assert rank_bags(scores, both.assign(patient=[1, 2, 1, 2, 1, 1, 1, 1.0, 1.0]), exclude="patient")[
        "bag"
    ].tolist() == ["s2"]
    for options, words in (
        ({"n": 0}, "at least one"),
        ({"by": "slides", "exclude": "patient"}, "did you mean 'slide'"),
    ):
        with pytest.raises(InputError, match=words):
            rank_bags(scores, both, **options)
    adata, other = slides(), slides()
    adata.varm["decoder"], other.varm["decoder"] = np.eye(2), np.eye(2)[::-1]
    with pytest.raises(IdentityError):
        late_interaction(adata, queries=other)
