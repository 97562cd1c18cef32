"""SAE-V: worked numbers, the released code on the same tokens, streaming, properties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from biosae.errors import InputError
from biosae.sae.saev import best_samples, cross_modal_weights, sample_scores, score_quarters

REFERENCE = Path(__file__).parent / "reference" / "methods" / "saev.npz"


def tokens(seed: int, n: int = 60, m: int = 7, d: int = 4):
    rng = np.random.default_rng(seed)
    z = np.float32(rng.gamma(2, 1, (n, m)) * (rng.random((n, m)) < 0.5))
    return z, np.float32(rng.normal(size=(n, d))), rng.integers(0, 2, n)


@pytest.mark.parametrize(("image", "omega"), [((1, 0), 1), ((0, 1), 0), ((-1, 0), -1)])
def test_weight_is_the_cosine_of_both_modalities(image, omega):
    z = np.ones((10, 1), np.float32)
    hidden = np.repeat(np.float32([[1, 0], image]), 5, axis=0)
    found = cross_modal_weights([(z, hidden, np.repeat([0, 1], 5))])
    assert found.weight == pytest.approx([omega])
    assert found.kind.tolist() == ["both"]


def test_a_sample_scores_the_weights_of_the_latents_that_both_of_its_modalities_share():
    # two latents of weights 1 and 0; the second sample shares the first latent only, the third none
    z = np.float32([[1, 1, 0], [2, 3, 1], [1, 0, 5], [1, 1, 0], [1, 0, 0], [0, 1, 0]])
    found = sample_scores(
        [(z, np.array([0, 1, 0, 1, 0, 1]), np.array(["a", "a", "b", "b", "c", "c"]))], np.array([1.0, 0.0, np.nan])
    )
    assert found["sample"].tolist() == ["a", "b", "c"]
    assert found["score"].tolist() == [1.0, 1.0, 0.0]
    assert found["n_shared"].tolist() == [2, 1, 0]
    assert found["n_weighted"].tolist() == [2, 1, 0]
    assert found["l0"].tolist() == [2.5, 2.0, 1.0]
    assert found["l1"].tolist() == [4.0, 4.0, 1.0]
    above = sample_scores([(z, np.array([0, 1] * 3), np.repeat([0, 1, 2], 2))], np.array([1.0, 0.5, 0.0]), delta=1)
    assert above["score"].tolist() == [0.0, 0.0, 0.0]


def test_released_code_gives_the_same_weights_and_kinds():
    with np.load(REFERENCE) as stored:
        given_ = dict(stored)
    # text in three batches, pictures in two, in turns
    parts = []
    for name, which, n in (("text", 0, 3), ("image", 1, 2)):
        for rows in np.array_split(np.arange(len(given_[f"z_{name}"])), n):
            parts.append((given_[f"z_{name}"][rows], given_[f"hidden_{name}"][rows], np.full(len(rows), which)))
    found = cross_modal_weights(parts[::2] + parts[1::2])
    assert np.flatnonzero(found.kind == "both").tolist() == given_["latent"].tolist()
    np.testing.assert_allclose(found.weight[given_["latent"]], given_["omega"], atol=1e-6)
    assert np.flatnonzero(found.kind == "first").tolist() == given_["first"].tolist()
    assert np.flatnonzero(found.kind == "second").tolist() == given_["second"].tolist()
    assert found.kind[5] == "silent"
    assert np.isnan(found.weight[found.kind != "both"]).all()


def test_released_code_finds_the_same_shared_latents():
    with np.load(REFERENCE) as stored:
        given_ = dict(stored)
    n, t, m = given_["acts_shape"]
    entries = (given_["acts_value"], (given_["acts_row"], given_["acts_column"]))
    z = scipy.sparse.csr_matrix(entries, shape=(n * t, m))
    place = np.arange(n * t) % t
    first = int(given_["first_image"])
    picture = ((place >= first) & (place < first + 1176)).astype(int)
    for j in range(m):  # the weight of one latent alone tells whether it is shared
        weight = np.full(m, np.nan)
        weight[j] = 1.0
        score = sample_scores([(z, picture, np.arange(n * t) // t)], weight, delta=1)["score"]
        assert (score > 0).tolist() == given_["shared"][:, j].tolist()


@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([None, 12, 30]))
def test_batches_do_not_matter_and_nor_does_the_length_of_hidden_states(seed, n_batches, joint):
    z, hidden, modality = tokens(seed)
    whole = cross_modal_weights([(z, hidden, modality)], joint=joint)
    factor = np.random.default_rng(seed).uniform(0.1, 9, (len(z), 1)).astype(np.float32)
    parts = [
        (scipy.sparse.csr_matrix(z[rows]), (hidden * factor)[rows], modality[rows])
        for rows in np.array_split(np.arange(len(z)), n_batches)
    ]
    split = cross_modal_weights(parts, joint=joint)
    assert split.kind.tolist() == whole.kind.tolist()
    np.testing.assert_allclose(split.weight, whole.weight, atol=1e-6)
    known = whole.weight[np.isfinite(whole.weight)]
    assert (np.abs(known) <= 1 + 1e-9).all()


def test_weight_is_the_mean_over_all_pairs_of_the_largest_tokens():
    z, hidden, modality = tokens(3, n=80)
    found = cross_modal_weights([(z, hidden, modality)], joint=None, top_k=4)
    unit = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    for j in range(z.shape[1]):
        best = [sorted(np.flatnonzero(modality == w), key=lambda i: -z[i, j])[:4] for w in (0, 1)]
        cosines = [unit[a] @ unit[b] for a in best[0] for b in best[1]]
        assert found.weight[j] == pytest.approx(np.mean(cosines), abs=1e-6)


@given(st.integers(0, 10**6))
def test_scores_add_up_over_disjoint_sets_of_latents_and_over_streams(seed):
    z, _, modality = tokens(seed, n=40)
    rng = np.random.default_rng(seed)
    sample, weight = np.repeat(np.arange(8), 5), rng.normal(size=7)
    mine = rng.random(7) < 0.5
    score = [
        sample_scores([(z, modality, sample)], np.where(which, weight, np.nan))["score"]
        for which in (mine, ~mine, mine | True)
    ]
    np.testing.assert_allclose(score[0] + score[1], score[2], atol=1e-12)
    halves = [(z[rows], modality[rows], sample[rows]) for rows in (slice(0, 15), slice(15, 40))]
    streamed = sample_scores(halves, weight)
    np.testing.assert_allclose(streamed["score"], score[2], atol=1e-12)
    assert streamed["sample"].tolist() == list(range(8))


def test_with_many_patches_and_few_words_only_each_modality_by_itself_gives_weights():
    rng = np.random.default_rng(0)
    z = np.float32(np.r_[rng.uniform(0, 1, 6), rng.uniform(2, 3, 1000)])[:, None]
    hidden = np.ones((1006, 2), np.float32)
    modality = np.repeat([0, 1], [6, 1000])
    assert cross_modal_weights([(z, hidden, modality)]).kind.tolist() == ["second"]
    alone = cross_modal_weights([(z, hidden, modality)], joint=None)
    assert alone.kind.tolist() == ["both"]
    assert alone.weight == pytest.approx([1.0])


def test_fewer_tokens_than_top_k_give_no_weight_and_only_the_largest_latents_of_a_token_count():
    z = np.ones((9, 2), np.float32)
    z[:, 1] = 0.5
    modality = np.repeat([0, 1], [4, 5])
    hidden = np.ones((9, 3), np.float32)
    assert cross_modal_weights([(z, hidden, modality)]).kind.tolist() == ["rare", "rare"]
    one = cross_modal_weights([(z, hidden, modality)], per_token=1, top_k=4)
    assert one.kind.tolist() == ["both", "silent"]


def test_zero_hidden_states_have_cosine_zero():
    z = np.ones((10, 1), np.float32)
    hidden = np.ones((10, 2), np.float32)
    hidden[0] = 0
    found = cross_modal_weights([(z, hidden, np.repeat([0, 1], 5))])
    assert found.weight == pytest.approx([0.8])


def test_filter_keeps_the_best_and_quarters_have_the_borders_of_the_released_notebook():
    scores = np.array([0.5, 2.0, -1.0, 2.0, 0.0, 3.0, 1.0])
    assert np.flatnonzero(best_samples(scores, share=0.5)).tolist() == [1, 3, 5]
    assert best_samples(scores, share=1.0).all()
    # int(7 / 4), int(7 / 2), int(21 / 4) = 1, 3, 5
    assert score_quarters(scores).tolist() == [2, 1, 3, 1, 3, 0, 2]
    for share in (0, 1.1):
        with pytest.raises(InputError, match="share"):
            best_samples(scores, share=share)


def test_what_cannot_be_meant_is_refused():
    z, hidden, modality = tokens(0)
    with pytest.raises(InputError, match="two batches"):
        sample_scores([(z, modality, np.zeros(60)), (z, modality, np.zeros(60))], np.ones(7))
    with pytest.raises(InputError, match="not negative"):
        cross_modal_weights([(-z, hidden, modality)])
    with pytest.raises(InputError, match="0 or 1"):
        cross_modal_weights([(z, hidden, modality + 1)])
    with pytest.raises(InputError, match="one dictionary"):
        sample_scores([(z, modality, modality)], np.ones(6))
    with pytest.raises(InputError, match="no tokens"):
        cross_modal_weights([])
