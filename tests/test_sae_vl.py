"""VL-SAE and the alignment of two tables: worked numbers, the released code on the same weights, planted pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import biosae as bs
from biosae.errors import FormatError, InputError, NotFittedError
from biosae.sae.alignment import Alignment, info_nce
from biosae.sae.methods.base import NoOptions, Now
from biosae.sae.methods.vl import VLSAE, closeness, strictly_largest
from biosae.sae.modalities import zero_shot_scores

REFERENCE = Path(__file__).parent / "reference" / "methods" / "vl_sae.npz"


@pytest.fixture(scope="module")
def released() -> dict[str, torch.Tensor]:
    with np.load(REFERENCE) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def two_views(n: int = 1500, *, seed: int = 0, d: tuple[int, int] = (24, 24)) -> tuple[np.ndarray, np.ndarray]:
    """Two tables of the same 12 sparse sources, each through a linear map of its own."""
    rng = np.random.default_rng(seed)
    sources = rng.gamma(2, 1, (n, 12)) * (rng.random((n, 12)) < 0.25)
    maps = np.random.default_rng(99)
    return tuple(
        np.float32(sources @ maps.normal(size=(12, width)) + 0.05 * rng.normal(size=(n, width)) + 3) for width in d
    )


# ------------------------------------------------------------------------------------------------------ the codes


@pytest.mark.parametrize(("cosine", "h"), [(1.0, 2.0), (0.5, 1.0), (0.0, 0.5858), (-1.0, 0.0)])
def test_worked_closenesses(cosine, h):
    x = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    w = 0.2 * torch.tensor([[cosine, (1 - cosine**2) ** 0.5]], dtype=torch.float64)
    assert closeness(x, w).item() == pytest.approx(h, abs=5e-5)
    assert closeness(x.float(), w.float()).item() == pytest.approx(h, abs=1e-3)


@given(st.integers(0, 10**6))
def test_closeness_keeps_distances_and_forgets_lengths(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    w = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    h, g = closeness(x, w), closeness(y, w)
    distance = (F.normalize(x) - F.normalize(y)).norm(dim=1, keepdim=True)
    assert ((h - g).abs() <= distance + 1e-9).all()
    assert ((h >= -1e-12) & (h <= 2)).all()
    lengths = torch.rand(7, 1, generator=generator, dtype=torch.float64) + 0.1
    torch.testing.assert_close(closeness(x * lengths, w * 3.7), h)


def test_ties_at_the_last_place_are_all_dropped_and_k_may_exceed_the_latents():
    h = torch.tensor([[1.0, 0.5, 0.5, 0.2], [1.0, 0.9, 0.5, 0.2], [1.0, 1.0, 1.0, 1.0]])
    assert strictly_largest(h, 2).tolist() == [
        [1.0, 0.0, 0.0, 0.0],
        [pytest.approx(1.0), pytest.approx(0.9), 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
    assert torch.equal(strictly_largest(h, 4), h)
    assert torch.equal(strictly_largest(h, 9), h)


def test_a_zero_row_is_one_from_all_directions_and_has_no_code():
    h = closeness(torch.zeros(1, 4), torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(h, torch.ones(1, 9))
    made = VLSAE(4, 9, k=3, options=NoOptions(), n_partner=4)
    with torch.no_grad():
        made.W_enc.copy_(torch.eye(9, 4) + torch.eye(9, 4).flip(1))
    assert not made.encode(torch.zeros(1, 4)).any()


def test_gradient_is_finite_where_a_row_lies_on_a_direction():
    x = torch.tensor([[1.0, 0.0]], requires_grad=True)
    w = torch.tensor([[2.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    closeness(x, w).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(w.grad).all()


def test_released_code_gives_the_same_codes_reconstructions_and_gradients(released):
    r = released
    made = VLSAE(8, 32, k=5, options=NoOptions(), n_partner=8)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(r[name])
    for t, (rows, z, x_hat) in enumerate((("x", "z_x", "x_hat"), ("y", "z_y", "y_hat"))):
        codes = made.encode(r[rows], table=t)
        torch.testing.assert_close(codes, r[z], atol=1e-5, rtol=0)
        torch.testing.assert_close(made.decode(codes, table=t), r[x_hat], atol=1e-5, rtol=0)
    loss = made.loss(torch.cat([r["x"], r["y"], torch.ones(40, 2)], dim=1), Now(k=5)).total / 8  # theirs: by the width
    loss.backward()
    assert loss.item() == pytest.approx(r["loss"].item(), abs=1e-5)
    for name in ("W_enc", "W_dec", "b_second"):
        torch.testing.assert_close(made.get_parameter(name).grad, r[f"grad_{name}"], atol=1e-5, rtol=0)


def test_unpaired_rows_count_where_they_are():
    made = VLSAE(5, 12, k=3, options=NoOptions(), n_partner=5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x, y = torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)
    has = torch.tensor([[1.0, 1.0], [1, 0], [0, 1], [1, 0]])
    found = made.loss(torch.cat([x * has[:, :1], y * has[:, 1:], has], dim=1), Now(k=3))
    expected = sum(
        (made.decode(made.encode(rows), table=t) - rows).square().sum(1).mean()
        for t, rows in enumerate((x[[0, 1, 3]], y[[0, 2]]))
    )
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(found.z) == 5


# -------------------------------------------------------------------------------------------------- the estimator


def test_fitted_codes_are_closenesses_that_both_tables_share():
    X, Y = two_views()
    joined = Alignment(random_state=0, min_steps=300).fit(X, Y)
    x, y = joined.transform(X), joined.transform(Y, table=1)
    sae = bs.sae.SAE("vl_sae", n_latents=64, k=8, n_steps=300, random_state=0, validation=0.0).fit(x, partner=y)
    first, second = sae.codes(x), sae.codes(y, table=1)
    assert first.data.min() > 0
    assert first.data.max() <= 2
    assert (np.diff(first.indptr) == 8).all()
    own = np.diff((first > 0).multiply(second > 0).indptr).mean()
    other = np.diff((first > 0).multiply(second[np.r_[1 : len(y), 0]] > 0).indptr).mean()
    assert own > 2 * other
    assert sae.evaluate(x)["fvu"] < 0.35
    back = sae.inverse_transform(second, table=1)
    fvu = ((back - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert fvu < 0.35
    assert fvu == pytest.approx(sae.evaluate(y, table=1)["fvu"], rel=1e-4)
    with pytest.raises(InputError, match="no such table"):
        sae.evaluate(y, table=2)


def test_zero_shot_is_the_cosine_and_codes_can_settle_what_it_leaves_open():
    rows = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    classes = np.array([[3.0, 0.0], [1.0, 1.0]])
    z, w = np.array([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 1]]), np.array([[0, 1.0, 0], [2.0, 0, 0]])
    plain = zero_shot_scores(rows, classes, z, w, alpha=0)
    np.testing.assert_allclose(plain, [[1, 2**-0.5], [0, 2**-0.5], [0, 0]])
    both = zero_shot_scores(rows, classes, z, w, alpha=0.5)
    np.testing.assert_allclose(both, [[1, 2**-0.5 + 0.5], [0.5, 2**-0.5], [0, 0]])
    with pytest.raises(InputError, match="Alignment"):
        zero_shot_scores(rows, classes[:, :1], z, w)
    with pytest.raises(InputError, match="one dictionary"):
        zero_shot_scores(rows, classes, z, w[:, :2])


def test_two_tables_of_one_width_are_needed():
    with pytest.raises(InputError, match="Alignment"):
        VLSAE(5, 12, k=3, options=NoOptions(), n_partner=4)
    with pytest.raises(InputError, match="partner=Y"):
        VLSAE(5, 12, k=3, options=NoOptions())


# -------------------------------------------------------------------------------------------------- the alignment


def test_info_nce_of_the_released_code_and_its_bounds(released):
    found = info_nce(released["h"], released["g"], temperature=0.07, cosine=False)
    assert found.item() == pytest.approx(released["contrast"].item(), abs=1e-5)
    alike = torch.ones(10, 3)
    assert info_nce(alike, alike, temperature=0.07).item() == pytest.approx(np.log(10), abs=1e-5)
    assert info_nce(torch.eye(10), 5 * torch.eye(10), temperature=0.07).item() < 1e-4


def test_alignment_has_the_loss_of_the_released_autoencoder(released):
    made = Alignment(cosine=False, min_steps=1, max_epochs=1, n_components=5, random_state=0)
    made.fit(released["wide"].numpy(), released["narrow"].numpy())
    made._tensors |= {n: v for n, v in released.items() if n.startswith(("W_in", "b_in", "W_out", "b_out"))}
    made._tensors |= {n: torch.zeros(()) for n in ("mean_0", "mean_1")} | {
        n: torch.ones(()) for n in ("scale_0", "scale_1")
    }
    np.testing.assert_allclose(made.transform(released["wide"].numpy()), released["h"], atol=1e-5)
    loss = made._loss(released["wide"], released["narrow"])
    assert loss.item() == pytest.approx(released["total"].item(), abs=1e-5)


def test_alignment_finds_held_out_pairs_and_rebuilds_either_table_from_either():
    X, Y = two_views(600, d=(24, 16))
    joined = Alignment(random_state=0, min_steps=300).fit(X, Y)
    new_x, new_y = two_views(200, seed=5, d=(24, 16))
    assert joined.matched(new_x, new_y) > 0.8
    assert joined.matched(new_x, np.roll(new_y, 1, axis=0)) < 0.05
    h = joined.transform(new_x)
    assert h.shape == (200, 16)
    for rows, h_, table in ((new_x, h, 0), (new_y, joined.transform(new_y, table=1), 1)):
        back = joined.inverse_transform(h_, table=table)
        assert ((back - rows) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum() < 0.4


def test_alignment_is_reproducible_and_survives_saving(tmp_path):
    X, Y = two_views(120, d=(10, 8))
    one, two, other = (Alignment(random_state=seed, min_steps=40).fit(X, Y) for seed in (3, 3, 4))
    assert np.array_equal(one.transform(X), two.transform(X))
    assert not np.array_equal(one.transform(X), other.transform(X))
    one.save(tmp_path / "alignment.safetensors")
    again = Alignment.load(tmp_path / "alignment.safetensors")
    assert np.array_equal(again.transform(Y, table=1), one.transform(Y, table=1))
    assert again.get_params() == one.get_params()
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(FormatError, match="not a readable alignment"):
        Alignment.load(tmp_path / "other.safetensors")


def test_alignment_refuses_what_cannot_be_meant():
    X, Y = two_views(20, d=(10, 8))
    with pytest.raises(InputError, match="one row for each"):
        Alignment().fit(X, Y[:10])
    with pytest.raises(InputError, match="two pairs"):
        Alignment().fit(X[:1], Y[:1])
    with pytest.raises(NotFittedError):
        Alignment().transform(X)
    with pytest.raises(InputError, match="temperature"):
        Alignment(temperature=0).fit(X, Y)
    with pytest.raises(InputError, match="10 columns"):
        Alignment(min_steps=1, max_epochs=1).fit(X, Y).transform(Y)
