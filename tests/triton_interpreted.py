"""Triton kernels of the sparse step against dense float64 autograd, by Triton's interpreter; see test_sae_triton.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from biosae.errors import InputError
from biosae.sae.kernels import torch_any
from biosae.sae.kernels import triton_cuda as tc
from biosae.sae.kernels.codes import Codes, Gradient
from biosae.sae.model import SparseAutoencoder
from biosae.sae.step import Wanted, dense, sparse


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Largest difference, relative to the largest number."""
    assert got.shape == want.shape
    scale = float(want.detach().abs().max()) if want.numel() else 1.0
    assert float((got.double() - want.double()).abs().max() if want.numel() else 0) <= tolerance * max(scale, 1e-30)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small whole numbers: products are exact in every type, and ties are many."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def random_codes(n: int, m: int, k: int, *, always: int | None = None, never: int = 0) -> Codes:
    """k entries a row; latent ``always`` in every row, the last ``never`` latents in none, some entries zero."""
    rng = np.random.default_rng(n + m)
    index = np.stack([rng.choice(m - never, k, replace=False) for _ in range(n)])
    if always is not None:
        index[:, 0] = np.where((index == always).any(1), index[:, 0], always)
    values = rng.random((n, k), dtype=np.float32) + 0.1
    values[rng.random((n, k)) < 0.2] = 0
    index = torch.from_numpy(np.sort(index, 1).astype(np.int32).ravel())
    return Codes(torch.arange(n + 1) * k, index, torch.from_numpy(values.ravel()))


def oracle_topk(a: torch.Tensor, k: int) -> torch.Tensor:
    """Dense codes: a stable descending sort puts the lower of two equal latents first."""
    order = np.argsort(-a.numpy(), axis=1, kind="stable")[:, :k]
    z = np.zeros_like(a.numpy())
    np.put_along_axis(z, order, np.take_along_axis(a.numpy(), order, 1).clip(0), 1)
    return torch.from_numpy(z)


# -------------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    ("n", "d", "m", "k"), [(6, 5, 17, 4), (1, 8, 9, 1), (3, 100, 40, 39), (4, 3, 6, 6), (2, 3, 5, 9), (2, 4, 2500, 30)]
)
def test_topk_is_exact_and_ties_go_to_the_lower_latent(n, d, m, k):
    x, weight, bias = whole(n, d), whole(m, d, seed=1), whole(m, seed=2)
    codes = tc.select_topk(x, weight, bias, k)
    assert codes.indptr.tolist() == [i * min(k, m) for i in range(n + 1)]
    assert codes.indices.dtype == torch.int32 and codes.values.dtype == torch.float32
    assert torch.equal(codes.dense(m), oracle_topk(F.linear(x, weight, bias), min(k, m)))
    assert bool((codes.indices.view(n, -1).diff(dim=1) > 0).all())


def test_topk_of_rows_with_too_few_positive_scores():
    bias = torch.tensor([-1.0, 2, -3, 0, 1, -5])
    codes = tc.select_topk(torch.zeros(2, 3), torch.zeros(6, 3), bias, 4)
    assert codes.dense(6).tolist() == [[0, 2, 0, 0, 1, 0]] * 2 and len(codes.values) == 8


def test_nan_scores_reach_the_values():
    x = torch.ones(2, 3)
    x[1, 0] = float("nan")
    codes = tc.select_topk(x, normal(8, 3), torch.zeros(8), 4)
    assert bool(codes.values.view(2, 4).isnan().all(1).tolist() == [False, True])
    assert int(codes.indices.min()) >= 0 and int(codes.indices.max()) < 8


@pytest.mark.parametrize("k", [6, 19])
def test_prefilter_agrees_where_bfloat16_is_exact(k):
    x, weight, bias = whole(5, 7), whole(40, 7, seed=1), whole(40, seed=2)
    codes = tc.select_topk(x, weight, bias, k, low=weight.bfloat16())
    assert torch.equal(codes.dense(40), oracle_topk(F.linear(x, weight, bias), k))


def test_prefilter_gives_float32_scores():
    x, weight, bias = normal(6, 50), normal(30, 50, seed=1), normal(30, seed=2)
    codes = tc.select_topk(x, weight, bias, 22, low=weight.bfloat16())  # 22 + 8 = all: nothing can be missed
    close(codes.dense(30), oracle_topk((x.double() @ weight.double().T + bias.double()).float(), 22))


@pytest.mark.parametrize("threshold", [1.0, torch.arange(17.0) / 4])
@pytest.mark.parametrize("prefilter", [False, True])
def test_above(threshold, prefilter):
    x, weight, bias = whole(6, 5), whole(17, 5, seed=1), whole(17, seed=2)
    a = F.linear(x, weight, bias)
    codes = tc.select_above(x, weight, bias, threshold, low=weight.bfloat16() if prefilter else None)
    assert torch.equal(codes.dense(17), torch.where(a > threshold, a, 0))
    assert torch.equal(codes.indptr.diff(), (a > threshold).sum(1)) and len(codes.indices) == int((a > threshold).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_summed_in_float32(dtype):
    x, weight, bias = normal(4, 60).to(dtype), normal(9, 60, seed=1).to(dtype), normal(9, seed=2)
    want = x.double() @ weight.double().T + bias.double()
    a = tc.linear(x, weight, bias)
    assert a.dtype == torch.float32
    close(a, want)
    close(tc.linear(x, weight), want - bias)
    close(tc.select_topk(x, weight, bias, 3).dense(9), oracle_topk(want, 3))


def test_chunks_do_not_show(monkeypatch):
    x, weight, bias = whole(7, 4), whole(12, 4, seed=1), whole(12, seed=2)
    calls = (lambda: tc.select_topk(x, weight, bias, 3)), (lambda: tc.select_above(x, weight, bias, 1.0))
    whole_batch = [call() for call in calls]
    monkeypatch.setattr(torch_any, "CHUNK", 2)
    for a, b in zip(whole_batch, (call() for call in calls)):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("indptr", "indices", "values"))


# ------------------------------------------------------------------------------------------- forward and backward

CASES = {
    "one prefix": (9, 5, 12, 4, (12,)),
    "three prefixes": (9, 5, 12, 4, (3, 7, 12)),
    "one row": (1, 16, 20, 6, (20,)),
    "width 1": (4, 1, 6, 2, (2, 6)),
    "width 100": (5, 100, 24, 10, (8, 16, 24)),
    "width 768": (3, 768, 10, 4, (10,)),
    "all latents in all rows": (4, 6, 5, 5, (1, 2, 5)),
}


def twin(codes: Codes, x: torch.Tensor, decoder: torch.Tensor, weight: torch.Tensor, ends: tuple[int, ...]):
    """Dense float64 autograd of sum_g |x - x_hat_g|^2 with ReLU codes on the support of ``codes``.

    Gives reconstructions, the kernels' ``grads``, slopes at the entries, and gradients (dec before projection).
    """
    m = len(decoder)
    z = codes.dense(m).double().requires_grad_()
    atoms, rows = decoder.double().requires_grad_(), weight.double().requires_grad_()
    outs = torch.stack([z[:, :e] @ atoms[:e] for e in ends])
    by_prefix = (2 * (outs - x.double())).detach()
    (outs - x.double()).square().sum().backward()
    grads = by_prefix.flip(0).cumsum(0).flip(0)
    bias = torch.zeros(m, dtype=torch.float64, requires_grad=True)
    a = x.double() @ rows.T + bias
    (a * z.grad * (z.detach() > 0)).sum().backward()
    slopes = z.grad[codes.rows(), codes.indices.long()]
    dec = atoms.grad - (atoms.grad * decoder).sum(1, keepdim=True) * decoder
    return outs.detach(), grads, slopes, dec, rows.grad, bias.grad


def check_step(codes: Codes, n: int, d: int, m: int, ends: tuple[int, ...]) -> None:
    x, weight, decoder = normal(n, d), normal(m, d, seed=1), F.normalize(normal(m, d, seed=2), dim=1)
    outs, grads, slopes, dec, enc, bias = twin(codes, x, decoder, weight, ends)
    close(tc.decode(codes, decoder, ends), outs)
    grads = grads.float()
    got = tc.code_gradient(codes, grads, decoder, ends)
    close(got, slopes)
    got = got * (codes.values > 0)
    made = Gradient.empty(decoder)
    for table in (made.dec, made.enc, made.bias, made.square):
        table.fill_(float("nan"))  # every row must be written
    again = tc.latent_gradient(codes, got, x, grads, ends, decoder)
    found = tc.latent_gradient(codes, got, x, grads, ends, decoder, out=made)
    assert found is made
    # the projection subtracts numbers of the size of the gradient before it
    before = tc.latent_gradient(codes, got, x, grads, ends, torch.zeros_like(decoder)).dec.abs().max()
    assert float((made.dec - dec).abs().max()) <= 1e-6 * max(float(before), 1e-30)
    close(made.enc, enc)
    close(made.bias, bias)
    close(made.square, made.dec.double().square().sum(1) + enc.square().sum(1) + bias.square())
    for name in ("dec", "enc", "bias", "square"):
        assert torch.equal(getattr(made, name), getattr(again, name))
    fired = torch.bincount(codes.indices[codes.values > 0], minlength=m) > 0
    assert not bool(torch.cat([made.dec, made.enc, made.bias[:, None]], 1)[~fired].any())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_equal_dense_autograd(case):
    n, d, m, k, ends = case
    check_step(random_codes(n, m, k), n, d, m, ends)


@pytest.mark.parametrize(("piece", "n", "ends"), [(128, 132, (9,)), (4, 21, (9,)), (4, 21, (1, 4, 9))])
def test_latents_of_every_row_and_of_none(piece, n, ends, monkeypatch):
    """Latent 2 is in all rows: it is split in pieces; the last three latents have no entries."""
    monkeypatch.setattr(tc, "PIECE", piece)
    codes = random_codes(n, 9, 3, always=2, never=3)
    assert int((codes.indices == 2).sum()) > piece
    check_step(codes, n, 3, 9, ends)


def test_no_entries_at_all():
    codes = Codes(torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), torch.zeros(0))
    check_step(codes, 3, 4, 5, (2, 5))


def test_rows_of_unequal_length():
    codes = Codes(
        torch.tensor([0, 0, 3, 14, 15]),
        torch.tensor([1, 2, 5, *range(11), 3], dtype=torch.int32),
        torch.linspace(0.1, 2, 15),
    )
    check_step(codes, 4, 6, 11, (4, 11))


def test_entries_of_value_zero():
    """Places that top-k could not fill may repeat a latent; a slope without a value still counts, and so backwards."""
    indptr = torch.tensor([0, 3, 6])
    indices = torch.tensor([1, 1, 1, 0, 2, 2], dtype=torch.int32)
    values, slopes = torch.tensor([0.5, 0, 0, 0, 2.0, 0]), torch.tensor([0.0, 0, 0, 3.0, 1.0, 0])
    x, side = normal(2, 4), normal(1, 2, 4, seed=1)
    decoder = torch.zeros(4, 4)
    codes = Codes(indptr, indices, values)
    g = tc.latent_gradient(codes, slopes, x, side, (4,), decoder)
    zero = torch.zeros(4)
    close(g.dec, torch.stack([zero, 0.5 * side[0, 0], 2 * side[0, 1], zero]))
    close(g.enc, torch.stack([3 * x[1], zero, x[1], zero]))
    assert g.bias.tolist() == [3, 0, 1, 0]


def test_extra_gradients_are_added_before_the_projection():
    codes, ends = random_codes(5, 8, 3, never=3), (3, 8)
    x, grads, decoder = normal(5, 6), normal(2, 5, 6, seed=1), F.normalize(normal(8, 6, seed=2), dim=1)
    slopes = normal(15, seed=3)
    more = Gradient(normal(3, 6, seed=4), normal(3, 6, seed=5), normal(3, seed=6), torch.zeros(3, dtype=torch.float64))
    extra = (torch.tensor([6, 1, 7]), more)
    got = tc.latent_gradient(codes, slopes, x, grads, ends, decoder, extra=extra)
    want = _dense_extra(codes, slopes, x, grads, ends, decoder, extra)
    for name, table in want.items():
        close(getattr(got, name), table)


def _dense_extra(codes, slopes, x, grads, ends, decoder, extra) -> dict[str, torch.Tensor]:
    z, s = codes.dense(8).double(), Codes(codes.indptr, codes.indices, slopes).dense(8).double()
    dec = torch.cat([z[:, a:b].T @ grads[g].double() for g, (a, b) in enumerate(zip((0, *ends), ends))])
    enc, bias = s.T @ x.double(), s.sum(0)
    latents, more = extra
    dec[latents] += more.dec
    enc[latents] += more.enc
    bias[latents] += more.bias
    dec -= (dec * decoder).sum(1, keepdim=True) * decoder
    return {"dec": dec, "enc": enc, "bias": bias}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tables_are_summed_in_float32(dtype):
    codes, ends = random_codes(5, 8, 3), (3, 8)
    x, grads, decoder = normal(5, 12).to(dtype), normal(2, 5, 12, seed=1).to(dtype), normal(8, 12, seed=2).to(dtype)
    close(tc.decode(codes, decoder, ends), tc.decode(codes, decoder.float(), ends))
    slopes = tc.code_gradient(codes, grads, decoder, ends)
    close(slopes, tc.code_gradient(codes, grads.float(), decoder.float(), ends))
    atoms = F.normalize(decoder.float(), dim=1)
    got = tc.latent_gradient(codes, slopes, x, grads, ends, atoms)
    want = tc.latent_gradient(codes, slopes, x.float(), grads.float(), ends, atoms)
    close(got.dec, want.dec)
    close(got.enc, want.enc)


# ----------------------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize("shape", [(6, 5), (3, 100), (1030,), (7,)])
def test_adam_equals_torch_with_idle_rows(shape):
    """20 steps; half of the gradients' rows are zero from step 5 on, and their weights must still move."""
    weight = normal(*shape)
    twin = weight.double().requires_grad_()
    torch_adam = torch.optim.Adam([twin], lr=0.01, betas=(0.9, 0.99), eps=1e-9)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    factor = torch.tensor(0.37)
    for step in range(1, 21):
        grad = normal(*shape, seed=step)
        if step > 5:
            grad[: len(grad) // 2] = 0
        before = weight.clone()
        tc.adam_(
            weight, grad, first, second, step=step, rate=0.01, betas=(0.9, 0.99), eps=1e-9, factor=factor, unit=False
        )
        twin.grad = grad.double() * float(factor)
        torch_adam.step()
        assert bool((weight != before).all())
    close(weight, twin.detach())
    state = torch_adam.state[twin]
    close(first, state["exp_avg"], 2e-6)
    close(second, state["exp_avg_sq"], 2e-6)


def test_unit_rows_and_their_guard():
    weight, zero = normal(4, 6), torch.zeros(4, 6)
    weight[2] = 0
    moved = weight.clone()
    rule = {
        "step": 3,
        "rate": 0.05,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "factor": torch.tensor(1.0, dtype=torch.float64),
    }
    grad = normal(4, 6, seed=1)
    grad[2] = 0
    grad[3] = 0
    weight[3] *= 1e-6
    moved[3] *= 1e-6
    tc.adam_(weight, grad, zero.clone(), zero.clone(), unit=True, **rule)
    tc.adam_(moved, grad, zero.clone(), zero.clone(), **rule)
    close(weight.norm(dim=1), torch.tensor([1.0, 1, 0, 1]))
    close(weight, F.normalize(moved.double(), dim=1))
    with pytest.raises(InputError, match="contiguous"):
        tc.adam_(zero.T, zero.T, zero.T, zero.T, **rule)


# ------------------------------------------------------------------------------------------------------- whole step


def test_training_step_equals_the_torch_backend():
    """Three steps of top-k with prefixes, every kernel after the other, against plain torch."""
    n, d, m, k, ends = 6, 10, 16, 4, (6, 16)
    start = {"enc": normal(m, d, seed=1), "dec": F.normalize(normal(m, d, seed=2), dim=1), "bias": normal(m) / 10}
    results = []
    for kernels in (tc, torch_any):
        p = {name: table.clone() for name, table in start.items()}
        moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in p.items()}
        for step in range(1, 4):
            x = normal(n, d, seed=10 + step)
            codes = kernels.select_topk(x, p["enc"], p["bias"], k)
            outs = kernels.decode(codes, p["dec"], ends)
            grads = (2 / n * (outs - x)).flip(0).cumsum(0).flip(0)
            slopes = kernels.code_gradient(codes, grads, p["dec"], ends) * (codes.values > 0)
            g = kernels.latent_gradient(codes, slopes, x, grads, ends, p["dec"])
            factor = (1 / (g.square.sum().sqrt() + 1e-6)).clamp(max=1).float()
            for name, table in p.items():
                kernels.adam_(
                    table, getattr(g, name), *moments[name], step=step, rate=0.01, betas=(0.9, 0.999), eps=1e-8,
                    factor=factor, unit=name == "dec",
                )  # fmt: skip
        results.append(p)
    for name in start:
        close(results[0][name], results[1][name], 1e-5)
    assert not torch.equal(results[0]["enc"], start["enc"])


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "relu", "jumprelu"])
def test_gradient_of_every_architecture_equals_dense_autograd(architecture):
    """With the auxiliary loss of five dead latents."""
    n, d, m = 10, 7, 24
    ends = (5, 12, m) if architecture == "matryoshka" else (m,)
    model = SparseAutoencoder(d, m, architecture=architecture, k=4, ends=ends, threshold=0.6, bandwidth=0.2)
    with torch.no_grad():
        for seed, table in enumerate((model.W_enc, model.b_enc, model.b_dec, model.W_dec)):
            table.copy_(normal(*table.shape, seed=seed))
        model.W_dec.copy_(F.normalize(model.W_dec, dim=1))
    x = normal(n, d, seed=9)
    wanted = Wanted(k=4, weight=0.3, dead=torch.tensor([2, 5, 7, 20, 21]), aux_k=3, aux_alpha=0.1, guess=0.1)
    got, want = sparse(model, x, wanted, tc), dense(model, x, wanted)
    assert torch.equal(got.fired, want.fired) and int(got.active) == int(want.active)
    for name in ("dec", "enc", "bias", "square"):
        close(getattr(got.latents, name), getattr(want.latents, name), 3e-6)
    close(got.b_dec, want.b_dec, 3e-6)
    close(got.loss, want.loss, 3e-6)
    if architecture == "jumprelu":
        assert bool(got.threshold.any())
        close(got.threshold, want.threshold, 3e-6)


# ------------------------------------------------------------------------------------------------------------- probe


def test_probe_accepts_right_and_names_wrong_kernels(monkeypatch):
    good, reason = tc.available()
    assert good and "Triton" in reason
    right = tc.decode
    monkeypatch.setattr(tc, "decode", lambda *a: right(*a) * 1.1)
    assert tc.available.__wrapped__()[0] is False and "decode differs" in tc.available.__wrapped__()[1]

    def broken(*_):
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr(tc, "decode", broken)
    good, reason = tc.available.__wrapped__()
    assert not good and "no compiler was found" in reason
