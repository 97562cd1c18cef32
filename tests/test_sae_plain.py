"""Option forms of the built-in architectures against worked numbers, other implementations and the sparse step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from biosae.errors import InputError
from biosae.sae import SAE, activations, objectives
from biosae.sae.methods.abstopk import AbsTopK
from biosae.sae.methods.base import Now
from biosae.sae.methods.gated import Gated
from biosae.sae.methods.plain import (
    BatchTopK,
    BatchTopKOptions,
    JumpRelu,
    JumpReluOptions,
    Matryoshka,
    MatryoshkaOptions,
    Relu,
    ReluOptions,
    TopK,
    TopKOptions,
    random_ends,
)
from biosae.sae.methods.threshold import Threshold
from biosae.sae.model import SparseAutoencoder
from biosae.sae.step import Wanted, dense
from biosae.sae.synthetic import planted

T = torch.tensor
OTHERS = np.load(Path(__file__).parent / "reference" / "methods" / "plain_and_gated.npz")
D, M, K = 6, 16, 3


def other(name: str) -> torch.Tensor:
    return torch.from_numpy(OTHERS[name])


def made(kind, options, *, n_features=D, n_latents=M, k=K, **weights):
    """A method with the weights given; those of the reference where none are."""
    method = kind(n_features, n_latents, k=k, options=options)
    with torch.no_grad():
        for name, value in method.state_dict().items():
            if name in weights:
                value.copy_(torch.as_tensor(weights[name], dtype=torch.float32))
            elif not weights and name in OTHERS and OTHERS[name].shape == value.shape:
                value.copy_(other(name))
    return method


def with_atoms(method, name):
    with torch.no_grad():
        method.W_dec.copy_(other(name))
    return method


def identity(kind, options, *, k=1, d=2, **more):
    return made(kind, options, n_features=d, n_latents=d, k=k, W_enc=torch.eye(d), W_dec=torch.eye(d), **more)


def same(found, expected, *, factor=1.0):
    torch.testing.assert_close(found.detach(), factor * expected, atol=1e-5, rtol=1e-5)


def same_gradients(method, kind, names, *, factor=1.0):
    for name in names:
        same(getattr(method, name).grad, other(f"{kind}.by_{name}"), factor=factor)


# ------------------------------------------------------------------------------------------------------ worked numbers


def test_relu_worked_number_in_both_norm_conventions():
    """x = (3, -1), lambda 0.1: z = (3, 0), loss 1.3; atoms twice as long with codes half as large cost the same."""
    x = T([[3.0, -1.0]])
    loss = identity(Relu, ReluOptions(l1=0.1)).loss(x, Now(k=1))
    assert loss.z.tolist() == [[3, 0]] and float(loss.total) == pytest.approx(1.3)
    longer = made(
        Relu, ReluOptions(l1=0.1, norm="atoms"), n_features=2, n_latents=2, W_enc=0.5 * torch.eye(2),
        W_dec=2 * torch.eye(2),
    )  # fmt: skip
    assert float(longer.loss(x, Now(k=1)).total) == pytest.approx(1.3)
    assert float(longer.loss(x, Now(k=1, ramp=0.5)).total) == pytest.approx(1.15)


def test_multi_topk_worked_number():
    """z_1 = (3, 0, 0, 0), z_4 = x: errors 14 and 0 at k and 4 k; with two latents a row 5 and 0: L = L(k) + L(4k)/8."""
    x = T([[3.0, 3.0, 2.0, 1.0, 1.0]])
    eye = {"n_features": 5, "n_latents": 5, "W_enc": torch.eye(5), "W_dec": torch.eye(5)}
    loss = made(TopK, TopKOptions(multi=4), k=1, **eye).loss(x, Now(k=1))
    assert float(loss.total) == pytest.approx(15 + 1 / 8) and loss.z.tolist() == [[3, 0, 0, 0, 0]]
    assert float(made(TopK, TopKOptions(multi=2), k=1, **eye).loss(x, Now(k=1)).total) == pytest.approx(15 + 6 / 8)
    assert float(made(TopK, TopKOptions(multi=4), k=3, **eye).loss(x, Now(k=3)).total) == pytest.approx(2)  # 12 > m


def test_matryoshka_worked_number():
    """b = 0, atoms e1 e2 e3, z = (3, 2, 0), x = (3, 2, 1), sizes (1, 3): prefix losses 5 and 1, mean 3."""
    x, eye = T([[3.0, 2.0, 1.0]]), {"W_enc": torch.eye(3), "W_dec": torch.eye(3)}
    kind = {"n_features": 3, "n_latents": 3, "k": 2}
    loss = made(Matryoshka, MatryoshkaOptions(prefixes=(1 / 3, 1)), **kind, **eye).loss(x, Now(k=2))
    assert float(loss.total) == pytest.approx(3) and loss.z.tolist() == [[3, 2, 0]]
    # b_dec alone leaves 14: (14 + 5 + 1) / 3
    with_bias = made(Matryoshka, MatryoshkaOptions(prefixes=(1 / 3, 1), bias_term=True), **kind, **eye)
    assert float(with_bias.loss(x, Now(k=2)).total) == pytest.approx(20 / 3)


def test_one_prefix_is_batchtopk():
    matryoshka = made(Matryoshka, MatryoshkaOptions(prefixes=(1,)))
    batchtopk = made(BatchTopK, BatchTopKOptions())
    a, b = (m.loss(other("x"), Now(k=K)) for m in (matryoshka, batchtopk))
    assert torch.equal(a.z, b.z) and float(a.total) == pytest.approx(float(b.total))


def test_each_level_has_a_selection_of_its_own():
    """x = (3, 2, 1): level of 1 latent keeps 3, level of 3 with k = 2 keeps 3 and 2; one selection with k = 1 would
    leave nothing else. SAIL trains like this and counts the mean over levels."""
    rows = T([[3.0, 2.0, 1.0], [0.5, 5.0, 4.0]])
    kind = {"n_features": 3, "n_latents": 3, "k": 2, "W_enc": torch.eye(3), "W_dec": torch.eye(3)}
    levels = made(Matryoshka, MatryoshkaOptions(prefixes=(1 / 3, 1), level_k=(1, 2)), **kind)
    loss = levels.loss(rows, Now(k=2))
    # the four largest of both rows are 5, 4, 3, 2; the first level has two places and two positive entries
    assert loss.z.tolist() == [[3, 2, 0], [0, 5, 4]]
    first, second = (5 + 41) / 2, (1 + 0.25) / 2
    assert float(loss.total) == pytest.approx((first + second) / 2)


def test_shrink_subtracts_the_threshold():
    rows = T([[3.0, 0.4], [0.9, 2.0]])
    for shrink, expected in ((False, [[3, 0], [0, 2]]), (True, [[2, 0], [0, 1]])):
        method = identity(BatchTopK, BatchTopKOptions(shrink=shrink), threshold=1.0)
        assert method.encode(rows).tolist() == expected


def test_an_exponential_threshold_gets_the_chain_rule():
    """theta = exp(l): dz/dl = theta dz/dtheta (the BatchTopK repository leaves theta out)."""
    log = T([0.2996], dtype=torch.float64).log().requires_grad_(True)
    activations.jumprelu(T([[0.3]], dtype=torch.float64), log.exp(), 0.001)[0].sum().backward()
    assert log.grad.item() == pytest.approx(-299.6 * 0.2996)


def test_tanh_penalty_is_l1_for_small_and_l0_for_large_codes():
    decoder = torch.eye(2) * T([[2.0], [1.0]])
    small, large = T([[1e-4, 2e-4], [0, 0]]), T([[50.0, 0.0], [30.0, 9.0]])
    assert float(objectives.tanh_norm(small, decoder)) == pytest.approx(4 * float(objectives.l1_atoms(small, decoder)))
    assert float(objectives.tanh_norm(large, decoder)) == pytest.approx(1.5)


def test_random_prefixes_are_rising_reach_the_end_and_favour_short_ones():
    g = torch.Generator().manual_seed(0)
    ends = [random_ends(512, 10, g) for _ in range(300)]
    assert all(e[-1] == 512 and list(e) == sorted(set(e)) and len(e) == 10 and e[0] >= 1 for e in ends)
    drawn = np.concatenate([e[:-1] for e in ends])
    assert np.median(drawn) < 64 and drawn.max() > 256
    assert random_ends(1, 10, g) == (1,) and random_ends(3, 10, g) == (1, 2, 3)
    again = torch.Generator().manual_seed(0)
    assert random_ends(512, 10, again) == ends[0]


# ----------------------------------------------------------------------------------------------- other implementations


@pytest.mark.parametrize(("kind", "pre_bias"), [("april_pre_bias", True), ("april", False)])
def test_april_update_equals_dictionary_learning(kind, pre_bias):
    method = with_atoms(made(Relu, ReluOptions(norm="atoms", pre_bias=pre_bias, l1=0.1)), "W_free")
    loss = method.loss(other("x"), Now(k=K))
    same(loss.z, other(f"{kind}.codes"))
    same(loss.residual + other("x"), other(f"{kind}.x_hat"))
    same(method.encode(other("x")), other(f"{kind}.codes"))
    total = loss.total
    if kind == "april":  # AutoEncoderNew gives codes times the norm, and its trainer multiplies again: z ||d||^2
        z, norm = torch.relu(method.preactivations(other("x"))), method.W_dec.norm(dim=1)
        total = total + 0.1 * (z @ (norm.square() - norm)).mean()
    same(total, other(f"{kind}.loss"))
    total.backward()
    same_gradients(method, kind, ("W_enc", "b_enc", "W_dec", "b_dec"))


def test_jumprelu_equals_dictionary_learning():
    """Theirs takes the window of L0 about z: the same where no a lies just below a threshold, as in these rows."""
    method = made(JumpRelu, JumpReluOptions(pre_bias=False, weight=0.7, bandwidth=0.1))
    loss = method.loss(other("jumprelu.x"), Now(k=K))
    same(loss.total, other("jumprelu.loss"))
    same(method.encode(other("jumprelu.x")), other("jumprelu.codes"))
    loss.total.backward()
    same_gradients(method, "jumprelu", ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"))
    assert float(method.threshold.grad.abs().max()) > 0.1


@pytest.mark.parametrize(("penalty", "kind"), [("l0", "lens_step"), ("tanh", "lens_tanh")])
def test_l0_and_tanh_penalties_equal_saelens(penalty, kind):
    options = JumpReluOptions(penalty=penalty, weight=0.05, bandwidth=0.3, norm="atoms")
    method = with_atoms(made(JumpRelu, options), "W_free")
    loss = method.loss(other("x"), Now(k=K))
    same(loss.z, other(f"{kind}.codes"))
    same(loss.total, other(f"{kind}.loss"))
    loss.total.backward()
    same_gradients(method, kind, ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"))


def test_topk_with_auxk_equals_dictionary_learning():
    method = made(TopK, TopKOptions())
    now = Now(k=K, dead=other("topk.dead").long(), aux_k=2, aux_alpha=0.25)
    loss = method.loss(other("x"), now)
    same(loss.z, other("topk.codes"))
    same(loss.total, other("topk.loss"))
    loss.total.backward()
    same_gradients(method, "topk", ("W_enc", "b_enc", "W_dec", "b_dec"))


def test_matryoshka_equals_dictionary_learning_up_to_its_factor():
    """Theirs weights groups by 1 / G and averages over them besides: 1 / G of ours."""
    method = made(Matryoshka, MatryoshkaOptions(prefixes=(4 / 16, 8 / 16, 1)))
    loss = method.loss(other("x"), Now(k=K))
    same(loss.z, other("matryoshka.codes"))
    same(loss.total, other("matryoshka.loss"), factor=3)
    loss.total.backward()
    same_gradients(method, "matryoshka", ("W_enc", "b_enc", "W_dec", "b_dec"), factor=3)


@pytest.mark.parametrize(
    ("kind", "cls", "options"),
    [
        ("topk", TopK, TopKOptions(encoder_bias=False)),
        ("batchtopk", BatchTopK, BatchTopKOptions(encoder_bias=False)),
        ("relu", Relu, ReluOptions(l1=0.02 * D)),
    ],
)
def test_the_batchtopk_repository_gives_the_same_up_to_the_width(kind, cls, options):
    """Theirs averages squared errors over the width; its topk and batchtopk have no encoder bias."""
    method = made(cls, options)
    if not options.encoder_bias:
        method.b_enc.zero_()
    kind = f"bussmann_{kind}"
    loss = method.loss(other("x"), Now(k=K))
    same(loss.z, other(f"{kind}.codes"))
    same(loss.residual + other("x"), other(f"{kind}.x_hat"))
    same(loss.total, other(f"{kind}.loss"), factor=D)
    loss.total.backward()
    same_gradients(method, kind, ("W_enc", "W_dec", "b_dec"), factor=D)


# ------------------------------------------------------------------------------------------------ ours with each other


@pytest.mark.parametrize("name", ["relu", "topk", "batchtopk", "matryoshka", "jumprelu"])
def test_default_options_give_the_loss_of_the_sparse_step(name):
    kinds = {"relu": Relu, "topk": TopK, "batchtopk": BatchTopK, "matryoshka": Matryoshka, "jumprelu": JumpRelu}
    kind = kinds[name]
    method = made(kind, kind.Options())
    model = SparseAutoencoder(D, M, architecture=name, k=K, ends=getattr(method, "ends", None), bandwidth=0.1)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.copy_(method.state_dict().get(key, value))
    weight = {"relu": 0.2, "jumprelu": 4.0}.get(name, 0.0)
    wanted = Wanted(k=K, weight=0.5 * weight, dead=T([2, 9]), aux_k=2, aux_alpha=0.1)
    expected = dense(model, other("x"), wanted)
    loss = method.loss(other("x"), Now(k=K, ramp=0.5, dead=T([2, 9]), aux_k=2, aux_alpha=0.1))
    same(loss.total, expected.loss)
    loss.total.backward()
    same(method.W_enc.grad, expected.latents.enc)
    same(method.b_dec.grad, expected.b_dec)
    if name == "jumprelu":
        same(method.threshold.grad, expected.threshold)


def test_tied_weights_are_one_matrix_and_biases_can_be_left_out():
    options = TopKOptions(tied=True, encoder_bias=False, norm="atoms")
    method = made(TopK, options)
    method.b_enc.zero_()
    assert sorted(n for n, _ in method.named_parameters()) == ["W_dec", "b_dec"]
    untied = made(TopK, TopKOptions(), W_enc=method.W_dec, W_dec=method.W_dec, b_dec=method.b_dec)
    x = other("x")
    method.loss(x, Now(k=K)).total.backward()
    untied.loss(x, Now(k=K)).total.backward()
    torch.testing.assert_close(method.W_dec.grad, untied.W_dec.grad + untied.W_enc.grad)
    assert not method.unit_atoms
    no_pre = made(TopK, TopKOptions(pre_bias=False))
    same(no_pre.preactivations(x), x @ other("W_enc").T + other("b_enc"))


@pytest.mark.parametrize("scale", ["probes", "least_squares"])
def test_tied_free_atoms_start_with_reconstructions_of_the_right_length(scale):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(300, D, generator=g)
    method = TopK(D, M, k=K, options=TopKOptions(tied=True, norm="atoms"))
    method.initialise(rows, atoms="data", scale=scale, generator=g)
    with torch.no_grad():
        rebuilt = method.rebuilt(rows, g) - method.b_dec
    assert float(rebuilt.norm(dim=1).mean() / (rows - method.b_dec).norm(dim=1).mean()) == pytest.approx(1, abs=0.4)
    april = Relu(D, M, k=K, options=ReluOptions(norm="atoms"))
    april.initialise(rows, atoms="random", scale=scale, generator=g)
    torch.testing.assert_close(april.W_dec.norm(dim=1), torch.full((M,), 0.1))
    assert torch.equal(april.W_enc, april.W_dec)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Relu, {"norm": "atom"}, "did you mean 'atoms'"),
        (Relu, {"l1": -1}, "l1=-1 must be a number >= 0"),
        (JumpRelu, {"penalty": "l1"}, "not known"),
        (JumpRelu, {"bandwidth": 0}, "bandwidth=0 must be a number > 0"),
        (TopK, {"multi": 1}, "multi=1 must be a whole number >= 2"),
        (Matryoshka, {"prefixes": (0.5,)}, "rising shares"),
        (Matryoshka, {"prefixes": "rnd"}, "rising shares"),
        (Matryoshka, {"prefixes": (0.5, 1), "level_k": (3,)}, "for each of the fixed prefixes"),
        (Matryoshka, {"prefixes": "random", "level_k": (3,)}, "for each of the fixed prefixes"),
    ],
)
def test_options_say_what_is_wrong(kind, options, message):
    with pytest.raises(InputError, match=message):
        kind.Options(**options).check()


def test_levels_must_fit_the_dictionary():
    options = MatryoshkaOptions(prefixes=(0.01, 0.02, 1), level_k=(1, 1, K))
    with pytest.raises(InputError, match="too small"):
        Matryoshka(D, M, k=K, options=options)
    with pytest.raises(InputError, match="must end with k=3"):
        Matryoshka(D, M, k=K, options=MatryoshkaOptions(prefixes=(0.5, 1), level_k=(1, 2)))


FORMS = [
    (Relu, {"norm": "atoms"}),
    (Relu, {"tied": True, "norm": "atoms"}),
    (JumpRelu, {"penalty": "l0"}),
    (JumpRelu, {"penalty": "tanh", "norm": "atoms"}),
    (TopK, {"multi": 4}),
    (TopK, {"tied": True, "encoder_bias": False, "pre_bias": False}),
    (BatchTopK, {"shrink": True}),
    (Matryoshka, {"prefixes": "random", "bias_term": True}),
    (Matryoshka, {"prefixes": (0.5, 1.0), "level_k": (1, 3)}),
    (Gated, {}),
    (AbsTopK, {}),
    (Threshold, {}),
]


@pytest.mark.parametrize(("kind", "options"), FORMS, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("m", [2, 9])
def test_no_form_meets_a_number_that_is_not_finite(kind, options, m):
    """Zero rows, equal rows, one row, more latents wanted than there are, fewer latents than features, all dead."""
    d, k = 4, 3
    try:
        method = kind(d, m, k=k, options=kind.Options(**options))
    except InputError:
        assert options.get("level_k") and m == 2
        return
    g = torch.Generator().manual_seed(0)
    for rows in (torch.zeros(5, d), torch.ones(5, d), torch.randn(1, d, generator=g), torch.randn(6, d, generator=g)):
        method.initialise(rows, atoms="data", scale="least_squares", generator=g)
        method.zero_grad()
        now = Now(k=k, dead=torch.arange(m), aux_k=5, aux_alpha=0.1, generator=g)
        loss = method.loss(rows, now)
        loss.total.backward()
        method.complete_(rows, g)
        z = method.encode(rows).detach()
        for value in (loss.total, loss.residual, z, method.decode(z), *(p.grad for p in method.parameters())):
            assert torch.isfinite(value).all()
        for i, row in enumerate(rows):
            torch.testing.assert_close(method.encode(row[None])[0].detach(), z[i])


@pytest.mark.parametrize(("kind", "options"), FORMS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_float64_agrees(kind, options):
    method = kind(D, M, k=K, options=kind.Options(**options))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(20, D, generator=g)
    method.initialise(x, atoms="data", scale="probes", generator=g)
    losses = []
    for dtype in (torch.float32, torch.float64):
        now = Now(k=K, generator=torch.Generator().manual_seed(2))
        losses.append(float(method.to(dtype).loss(x.to(dtype), now).total.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ------------------------------------------------------------------------------------------------------ the estimator

FEW = {"n_latents": 24, "k": 3, "n_steps": 40, "validation": 0.0, "random_state": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return planted("sparse", n_rows=400, d=12, n_atoms=24, k=3, noise=0.02, random_state=0).rows


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("relu", {"norm": "atoms"}),
        ("topk", {"multi": 2, "tied": True, "norm": "atoms", "encoder_bias": False}),
        ("matryoshka", {"prefixes": "random", "pre_bias": False}),
        ("matryoshka", {"prefixes": [0.25, 1.0], "level_k": [1, 3]}),
        ("jumprelu", {"penalty": "tanh"}),
    ],
)
def test_option_forms_fit_save_and_code_row_by_row(name, options, rows, tmp_path):
    sae = SAE(name, options=options, **FEW).fit(rows)
    codes = sae.codes(rows)
    assert (codes[7] != sae.codes(rows[7:8])).nnz == 0 and codes.min() >= 0
    sae.save(tmp_path)
    again = SAE.load(tmp_path)
    assert (again.codes(rows) != codes).nnz == 0
    assert again.get_params()["architecture"] == name
    norms = np.linalg.norm(sae.decoder_, axis=1)
    assert (np.abs(norms - 1).max() < 1e-5) == (options.get("norm", "unit") == "unit")


def test_random_prefixes_go_on_bit_for_bit_after_an_interrupt(rows, tmp_path):
    """The generator that draws them is part of the state."""
    settings = {"options": {"prefixes": "random"}, **FEW, "checkpoint": str(tmp_path), "checkpoint_every": 10}

    def stop(step, numbers):
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SAE("matryoshka", callbacks=(stop,), **settings).fit(rows)
    resumed = SAE("matryoshka", **settings).fit(rows)
    whole = SAE("matryoshka", options={"prefixes": "random"}, **FEW).fit(rows)
    np.testing.assert_array_equal(resumed.decoder_, whole.decoder_)
    assert len(resumed.history_) == len(whole.history_)


def test_shrink_can_be_switched_on_a_fitted_model(rows):
    sae = SAE("batchtopk", options={"shrink": False}, **FEW).fit(rows)
    plain = sae.codes(rows).toarray()
    shrunken = sae.set_params(options={"shrink": True}).codes(rows).toarray()
    assert ((plain > 0) == (shrunken > 0)).all()
    taken = (plain - shrunken)[plain > 0]
    np.testing.assert_allclose(taken, taken[0], rtol=1e-4, atol=1e-6)
    assert taken[0] > 0 and plain[plain > 0].min() >= taken[0]


def test_a_prefix_of_the_codes_is_the_smaller_dictionary(rows):
    """Truncation at inference: codes with the later columns set to 0."""
    sae = SAE("matryoshka", options={"prefixes": (0.5, 1)}, **FEW).fit(rows)
    codes = sae.codes(rows).toarray()
    codes[:, 12:] = 0
    expected = codes[:, :12] @ sae.decoder_[:12] + sae.bias_
    np.testing.assert_allclose(sae.inverse_transform(codes), expected, atol=1e-5)


def test_settings_of_the_sparse_step_are_not_silently_dropped(rows):
    with pytest.raises(InputError, match=r"l1=0\.3 belongs to a built-in"):
        SAE("relu", l1=0.3, options={"norm": "atoms"}).fit(rows)
    with pytest.raises(InputError, match=r"l0_weight=0\.3 belongs to a built-in"):
        SAE("threshold", l0_weight=0.3).fit(rows)
    with pytest.raises(InputError, match="did you mean 'tied'"):
        SAE("topk", options={"tyed": True}).fit(rows)


# ------------------------------------------------------------------------------------------------------ planted rows

LONGER = {
    "n_latents": 24, "k": 2, "n_steps": 300, "batch_size": 256, "learning_rate": 4e-3, "validation": 0.0,
    "random_state": 0, "device": "cpu",
}  # fmt: skip


def test_multi_topk_stays_usable_at_four_times_k():
    """TopK reconstructs worse with more latents than it was trained with, MultiTopK better."""
    x = planted("sparse", n_rows=2000, d=16, n_atoms=24, k=2, random_state=0).rows
    errors = {}
    for multi in (None, 4):
        sae = SAE("topk", options={"multi": multi, "encoder_bias": True}, **LONGER).fit(x)
        at = [sae.evaluate(x)["fvu"]]
        sae._model.k = 8
        errors[multi] = [*at, sae.evaluate(x)["fvu"]]
    assert errors[None][1] > errors[None][0] and errors[4][1] < errors[4][0]
    assert errors[4][1] < 0.75 * errors[None][1]


@pytest.mark.parametrize("prefixes", [(0.25, 1.0), "random"])
def test_the_first_latents_of_matryoshka_reconstruct_alone(prefixes):
    """By a quarter of the dictionary, half the error of BatchTopK; by all of it, a larger one."""
    x = planted("hierarchical", n_rows=2000, d=16, n_atoms=24, k=2, random_state=0).rows
    found = []
    for name, options in (("batchtopk", {"shrink": False}), ("matryoshka", {"prefixes": prefixes})):
        sae = SAE(name, options=options, **LONGER).fit(x)
        codes = sae.codes(x).toarray()
        part = np.where(np.arange(24) < 6, codes, 0)
        found.append([np.square(x - sae.inverse_transform(z)).sum() for z in (part, codes)])
    (part_b, all_b), (part_m, all_m) = found
    assert part_m < 0.7 * part_b and all_m > all_b


def test_levels_of_matryoshka_keep_their_proportions_under_another_k():
    """A fit that goes on with twice the k has twice the k in each level."""
    settings = {"n_steps": 3, "random_state": 0, "device": "cpu", "warm_start": True}
    x = planted("sparse", n_rows=400, d=8, n_atoms=16, k=2, random_state=0).rows
    sae = SAE("matryoshka", 16, 4, options={"level_k": (2, 4), "prefixes": (0.5, 1)}, **settings).fit(x)
    model = sae.set_params(k=8).fit(x)._model
    z = model.loss(torch.from_numpy(x[:100]), Now(k=8)).z
    assert int((z != 0).sum()) == min(800, int((model.preactivations(torch.from_numpy(x[:100])) > 0).sum()))
