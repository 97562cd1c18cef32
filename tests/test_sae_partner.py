"""Second tables: which rows belong together, whose rows they are, how they are scaled."""

from __future__ import annotations

import weakref

import numpy as np
import pandas as pd
import pytest

import biosae as bs
from biosae.errors import IdentityError, InputError
from biosae.sae.normalise import Normaliser
from biosae.sae.partner import Joined, Scalings

N, D = 120, 6


@pytest.fixture
def tables():
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(2, N, D)).astype(np.float32) + np.float32(3)
    obs = pd.DataFrame({"patient": [f"p{i // 12}" for i in range(N)]}, index=[f"s{i}" for i in range(N)])
    return X, Y, obs


def test_data_frames_are_joined_by_their_index_never_by_position(tables):
    X, Y, obs = tables
    X, Y = (pd.DataFrame(t, index=obs.index) for t in (X, Y))
    other = Y.sample(frac=1, random_state=1)
    embeddings = bs.Embeddings.from_array(X.to_numpy(), obs=obs)
    for first in (X, embeddings):
        assert np.array_equal(Joined(first, Y, "target")[:][:, D:], Y)
        with pytest.raises(InputError, match="another order"):
            Joined(first, other, "target")
        assert Joined(first, other.to_numpy(), "target").shape == (N, 2 * D)
        assert Joined(first, other.reset_index(drop=True), "target").shape == (N, 2 * D)


def test_rows_of_tokens_are_matched_token_by_token(tables):
    X, Y, obs = tables
    tokens = bs.Embeddings.from_array(X, obs=obs[:30], tokens_per_sample=4)
    each = pd.DataFrame(Y, index=np.repeat(obs.index[:30], 4))
    assert Joined(tokens, each, "target").tokens_per_sample == 4
    with pytest.raises(InputError, match="another order"):
        Joined(tokens, each[::-1], "target")
    with pytest.raises(InputError, match="other samples"):
        Joined(tokens, bs.Embeddings.from_array(Y, obs=obs), "target")


def test_whole_patients_are_held_out_whichever_table_knows_them(tables):
    X, Y, obs = tables
    known = bs.Embeddings.from_array(Y, obs=obs)
    unknown = bs.Embeddings.from_array(X, obs=obs[[]])
    settings = {"n_latents": 16, "k": 2, "n_steps": 2, "random_state": 0, "validation": 0.2}
    for first in (X, unknown):
        sae = bs.sae.SAE("group_sparse", **settings).fit(first, partner=known)
        assert sae.validation_["by"] == "patient"
        assert sae.trained_on([f"p{i}" for i in range(10)]).sum() == 8


def test_each_table_is_scaled_from_the_rows_that_it_has_and_no_block_is_kept(tables):
    X, Y, _ = tables
    X, Y = X.copy(), 5 * Y
    X[:50], Y[90:] = np.nan, np.nan
    joined, given = Joined(X, Y, "modality"), []

    def blocks():
        for start in range(0, N, 10):
            block = joined[start : start + 10]
            given.append(weakref.ref(block))
            yield block
            assert sum(ref() is not None for ref in given) <= 2

    found = Scalings.fit("centre_scale", blocks, kind="modality", widths=joined.widths)
    for part, rows in zip(found.parts, (X[50:], Y[:90]), strict=True):
        alone = Normaliser.fit("centre_scale", [rows])
        assert np.allclose(part.mean, rows.mean(0), atol=1e-5)
        assert part.scale == pytest.approx(np.square(rows - rows.mean(0)).sum(1).mean() ** -0.5, rel=1e-5)
        assert part.scale == pytest.approx(alone.scale, rel=1e-9)


def embeddings(rows, encoder, obs):
    identity = {"encoder": encoder, "layer": "final"}
    return bs.Embeddings.from_array(rows, obs=obs, identity=identity)


def test_rows_of_the_second_table_must_be_of_its_kind(tables, tmp_path):
    X, Y, obs = tables
    first, second = embeddings(X, "histology", obs), embeddings(Y, "text", obs)
    sae = bs.sae.SAE("group_sparse", n_latents=16, k=2, n_steps=2, random_state=0).fit(first, partner=second)
    sae.save(tmp_path)
    for model in (sae, bs.sae.load(tmp_path)):
        assert (model.codes(second, table=1) != model.codes(Y, table=1)).nnz == 0
        with pytest.raises(IdentityError, match="second table"):
            model.codes(first, table=1)
        with pytest.raises(IdentityError):
            model.codes(second)


@pytest.mark.parametrize("name", ["group_sparse", "transcoder"])
def test_rows_scaled_one_by_one_are_undone_with_the_rows_that_are_rebuilt(tables, name):
    X, Y, _ = tables
    Y = 7 * Y - 2
    sae = bs.sae.SAE(name, n_latents=24, k=6, n_steps=20, random_state=0, normalise="layernorm", validation=0.0)
    sae.fit(X, partner=Y)
    Z, table = (sae.codes(X), 0) if name == "transcoder" else (sae.codes(Y, table=1), 1)
    wanted = sae.evaluate(X, partner=Y) if name == "transcoder" else sae.evaluate(Y, table=1)
    found = sae.inverse_transform(Z, like=Y, table=table)
    assert np.square(Y - found).sum() / np.square(Y - Y.mean(0)).sum() == pytest.approx(wanted["fvu"], rel=1e-3)
    with pytest.raises(InputError, match="like has 50 rows"):
        sae.inverse_transform(Z, like=Y[:50], table=table)
    with pytest.raises(InputError, match="like has 120 rows"):
        sae.inverse_transform(Z[:50], like=Y, table=table)
    with pytest.raises(InputError, match="pass like="):
        sae.inverse_transform(Z, table=table)


def test_pairs_are_counted_as_matched_only_where_they_are_pairs(tables):
    X, Y, obs = tables
    first, second = (bs.Embeddings.from_array(t, obs=obs) for t in (X, Y))
    alignment = bs.sae.Alignment(random_state=0, max_epochs=1, min_steps=2).fit(first, second)
    assert 0 <= alignment.matched(first, second) <= 1
    with pytest.raises(InputError, match="another order"):
        alignment.matched(first, second.select(np.arange(N)[::-1]))
    with pytest.raises(InputError, match="50 rows"):
        alignment.matched(X, Y[:50])


def test_atoms_of_arrays_of_different_length_are_not_compared(tables):
    X, Y, _ = tables
    one, same, other = (bs.sae.ITDA(k=2, random_state=0).fit(rows) for rows in (X, Y, X[:100]))
    assert 0 < bs.sae.jaccard(one, same) <= 1
    with pytest.raises(InputError, match="different sets of samples"):
        bs.sae.jaccard(one, other)
