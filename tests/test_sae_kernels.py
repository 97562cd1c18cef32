"""Kernels of the sparse step against dense tables in float64, plain sorting and torch's own Adam."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn import functional as F

from biosae.errors import InputError
from biosae.sae import sparse_ops
from biosae.sae.activations import batchtopk
from biosae.sae.kernels import torch_any
from biosae.sae.kernels.codes import Codes, Gradient
from biosae.sae.sparse_ops import kernels, select_batchtopk

numba = pytest.importorskip("numba", reason="numba is not installed")
from biosae.sae.kernels import numba_cpu, numba_select  # noqa: E402

OPS = {"numba": numba_cpu, "torch": torch_any}
LANES = numba_select.LANES


@pytest.fixture(params=list(OPS))
def ops(request):
    return OPS[request.param]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(n=60, d=24, m=100, seed=0):
    """Rows, encoder, bias and unit atoms."""
    g = generator(seed)
    x, weight, bias = torch.randn(n, d, generator=g), torch.randn(m, d, generator=g), torch.randn(m, generator=g)
    return x, weight / d**0.5, 0.3 * bias, F.normalize(torch.randn(m, d, generator=g))


def as_product(a):
    """Rows, weight and bias whose scores are exactly the table ``a``: each row is a unit vector."""
    return torch.eye(len(a)), torch.from_numpy(np.ascontiguousarray(a.T)), torch.zeros(a.shape[1])


def by_sorting(a, k):
    """The k largest positive entries of each row by a stable sort."""
    kept = np.zeros_like(a)
    for row, out in zip(a, kept):
        order = np.argsort(-row, kind="stable")[:k]
        out[order] = np.maximum(row[order], 0)
    return kept


def close(found, expected, rel=1e-6):
    """Distance of float32 results from float64 ones, relative to the size of the whole."""
    found, expected = found.double(), expected.double()
    assert found.shape == expected.shape
    size = float(expected.norm())
    assert float((found - expected).norm()) <= rel * size + (1e-30 if size else 0)


def check_form(codes, n, m):
    """What :class:`Codes` promises of every set of codes."""
    assert codes.indptr.dtype == torch.int64 and codes.indices.dtype == torch.int32
    assert codes.values.dtype == torch.float32
    assert len(codes.indptr) == n + 1 and codes.indptr[0] == 0 and codes.indptr[-1] == len(codes.indices)
    assert len(codes.indices) == len(codes.values) and (codes.indptr.diff() >= 0).all()
    assert ((codes.indices >= 0) & (codes.indices < m)).all()
    key = codes.rows() * m + codes.indices
    assert (key.diff() >= 0).all()
    positive = codes.values > 0
    assert (key[positive].diff() > 0).all()  # a latent that is on stands once


# ------------------------------------------------------------------------------------------------------ selection

WIDTHS = [1, 2, 7]
for _lanes in (LANES, 2 * LANES, 4 * LANES):
    WIDTHS += [_lanes - 1, _lanes, _lanes + 1, 2 * _lanes - 1, 2 * _lanes, 2 * _lanes + 1, 3 * _lanes - 5]
COUNTS = [1, 2, 5, 63, 64, 65, 128, 129, 400]


@pytest.mark.parametrize("name", OPS)
@given(st.sampled_from(WIDTHS), st.sampled_from(COUNTS), st.integers(-3, 1), st.integers(0, 3), st.integers(0, 10**6))
@hypothesis_settings(max_examples=120, deadline=None)
def test_topk_equals_a_stable_sort_on_tables_full_of_ties(name, m, k, low, spread, seed):
    a = np.random.default_rng(seed).integers(low, low + spread + 1, size=(3, m)).astype(np.float32)
    codes = OPS[name].select_topk(*as_product(a), k)
    check_form(codes, 3, m)
    assert (codes.indptr.diff() == min(k, m)).all()
    np.testing.assert_array_equal(codes.dense(m).numpy(), by_sorting(a, k))


@pytest.mark.parametrize("k", [1, 4, 64, 70])
@pytest.mark.parametrize("m", [2 * LANES, 2 * LANES + 3, 5 * LANES, 9 * LANES - 1])
def test_topk_finds_entries_that_share_one_lane(ops, m, k):
    """The k largest stand exactly one lane width apart: every lane but one has a small maximum."""
    rng = np.random.default_rng(m + k)
    a = rng.uniform(0.1, 1, size=(4, m)).astype(np.float32)
    for row, lane in zip(a, (0, 1, LANES - 1, 77)):
        row[lane::LANES] += rng.uniform(5, 6, size=len(row[lane::LANES])).astype(np.float32)
    a[3] *= -1
    np.testing.assert_array_equal(ops.select_topk(*as_product(a), k).dense(m).numpy(), by_sorting(a, k))


@pytest.mark.parametrize(("n", "m", "k"), [(1, 700, 32), (1, 5, 9), (513, 64, 64), (1100, 40, 3), (30, 600, 1)])
def test_backends_select_the_same_bits(n, m, k):
    x, weight, bias, _ = problem(n=n, m=m, seed=n + m)
    one, other = (module.select_topk(x, weight, bias, k) for module in OPS.values())
    assert torch.equal(one.dense(m), other.dense(m)) and torch.equal(one.indptr, other.indptr)
    on = one.values > 0
    assert torch.equal(one.indices[on], other.indices[other.values > 0])
    for threshold in (0.0, 0.5, torch.rand(m, generator=generator(1))):
        one, other = (module.select_above(x, weight, bias, threshold) for module in OPS.values())
        for field in ("indptr", "indices", "values"):
            assert torch.equal(getattr(one, field), getattr(other, field))


def test_rows_with_too_few_positives_are_filled_with_zeros(ops):
    a = np.array([[-1, -2, 0, -3], [0, 3, 0, 2], [1, 1, 1, 1], [0, 0, 0, 0]], np.float32)
    codes = ops.select_topk(*as_product(a), 3)
    assert codes.dense(4).tolist() == [[0, 0, 0, 0], [0, 3, 0, 2], [1, 1, 1, 0], [0, 0, 0, 0]]
    check_form(codes, 4, 4)


def test_scores_equal_to_the_threshold_are_left_out(ops):
    a = np.array([[-1, 0, 1, 2], [2, 2, 2, 2], [-5, -5, -5, -5]], np.float32)
    codes = ops.select_above(*as_product(a), 1.0)
    assert codes.indptr.tolist() == [0, 1, 5, 5] and codes.indices.tolist() == [3, 0, 1, 2, 3]
    codes = ops.select_above(*as_product(a), torch.tensor([-2.0, -1.0, 2.0, 0.0]))
    assert codes.indptr.tolist() == [0, 3, 6, 6] and codes.values.tolist() == [-1, 0, 2, 2, 2, 2]


@pytest.mark.parametrize("n", [1, 512, 1100])
def test_above_equals_the_dense_table(ops, n):
    x, weight, bias, _ = problem(n=n, m=50)
    a = x @ weight.T + bias
    limit = torch.linspace(-1, 1, 50)
    codes = ops.select_above(x, weight, bias, limit)
    check_form(codes, n, 50)
    sure = (a - limit).abs() > 1e-5  # rounding may decide the rest
    mask = torch.zeros_like(a, dtype=torch.bool)
    mask[codes.rows(), codes.indices.long()] = True
    assert torch.equal(mask[sure], (a > limit)[sure]) and (~sure).sum() < 20
    torch.testing.assert_close(codes.values, a[mask], atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------- forward, backward

SHAPES = [
    (60, 24, 100, 8, (100,)),
    (60, 24, 100, 8, (6, 12, 25, 50, 100)),
    (40, 7, 33, 40, (1, 33)),
    (1, 24, 100, 5, (50, 100)),
    (1, 1, 1, 1, (1,)),
    (700, 5, 16, 3, (1, 2, 3, 16)),
    (30, 19, 300, 2, (300,)),  # most latents dead
]


@pytest.mark.parametrize(("n", "d", "m", "k", "ends"), SHAPES)
def test_values_and_gradients_equal_float64_autograd(ops, n, d, m, k, ends):
    """L = sum over prefixes of <r_g, z_{<m_g} D_{<m_g}> + <s, a> on the open entries, for given r and s."""
    x, weight, bias, decoder = problem(n, d, m, seed=n + m)
    codes = ops.select_topk(x, weight, bias, k)
    g = generator(5)
    pull = torch.randn(len(ends), n, d, generator=g)
    wide = [t.double().requires_grad_() for t in (weight, bias, decoder)]
    a = x.double() @ wide[0].T + wide[1]
    z = torch.where(codes.dense(m) > 0, a, 0.0)
    z.retain_grad()
    prefixes = torch.stack([z[:, :end] @ wide[2][:end] for end in ends])
    (prefixes * pull.double()).sum().backward()

    close(ops.decode(codes, decoder, ends), prefixes.detach())
    grads = pull.flip(0).cumsum(0).flip(0)
    slopes = ops.code_gradient(codes, grads, decoder, ends) * (codes.values > 0)
    close(slopes, z.grad[codes.rows(), codes.indices.long()] * (codes.values > 0), rel=2e-6)
    room = Gradient(*(torch.full_like(t, float("nan")) for t in vars(Gradient.empty(decoder)).values()))
    for out in (None, room):
        found = ops.latent_gradient(codes, slopes, x, grads, ends, decoder, out=out)
        unit = decoder.double()
        by_atom = wide[2].grad - (wide[2].grad * unit).sum(1, keepdim=True) * unit
        # atoms of unit norm in float32: along the atom nothing is left but rounding
        close(found.dec, by_atom, rel=1e-6 if d > 1 else 1.0)
        close(found.enc, wide[0].grad)
        close(found.bias, wide[1].grad)
        square = found.dec.double().square().sum(1) + found.enc.double().square().sum(1) + found.bias.double() ** 2
        close(found.square, square)
        assert found.square.dtype == torch.float64
        idle = torch.ones(m, dtype=torch.bool)
        idle[codes.indices[codes.values > 0].long()] = False
        assert not found.enc[idle].any() and not found.dec[idle].any() and not found.bias[idle].any()


def test_closed_entries_with_a_slope_reach_the_encoder_and_idle_ones_nothing(ops):
    codes = Codes(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 2], dtype=torch.int32), torch.tensor([0.0, 2.0, 0.0]))
    x, decoder = torch.tensor([[1.0, 2.0], [5.0, 7.0]]), torch.eye(3, 2)
    decoder[2] = torch.tensor([0.6, 0.8])
    grads = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    found = ops.latent_gradient(codes, torch.tensor([3.0, 0.0, 0.0]), x, grads, (3,), decoder)
    assert found.enc.tolist() == [[3, 6], [0, 0], [0, 0]] and found.bias.tolist() == [3, 0, 0]
    torch.testing.assert_close(found.dec, torch.tensor([[0.0, 0.0], [0.0, 0.0], [2 - 1.2 * 0.6, -1.2 * 0.8]]))


def test_codes_without_a_single_entry(ops):
    x, weight, bias, decoder = problem(n=4, m=10)
    codes = ops.select_above(x, weight, bias, 1e9)
    check_form(codes, 4, 10)
    assert len(codes.values) == 0
    assert not ops.decode(codes, decoder, (4, 10)).any()
    slopes = ops.code_gradient(codes, torch.ones(2, 4, 24), decoder, (4, 10))
    found = ops.latent_gradient(codes, slopes, x, torch.ones(2, 4, 24), (4, 10), decoder)
    assert slopes.shape == (0,) and not found.dec.any() and not found.enc.any() and not found.square.any()


def test_extra_gradients_are_added_before_the_projection(ops):
    x, weight, bias, decoder = problem(m=40)
    codes = ops.select_topk(x, weight, bias, 3)
    grads, g = torch.randn(1, 60, 24, generator=generator(2)), generator(3)
    slopes = ops.code_gradient(codes, grads, decoder, (40,)) * (codes.values > 0)
    dead = torch.tensor([3, 8, 39])
    more = Gradient(
        torch.randn(3, 24, generator=g), torch.randn(3, 24, generator=g), torch.randn(3, generator=g), torch.zeros(3)
    )
    plain = ops.latent_gradient(codes, slopes, x, grads, (40,), decoder)
    found = ops.latent_gradient(codes, slopes, x, grads, (40,), decoder, extra=(dead, more))
    part = more.dec - (more.dec * decoder[dead]).sum(1, keepdim=True) * decoder[dead]
    for field, add in (("dec", part), ("enc", more.enc), ("bias", more.bias)):
        close(getattr(found, field), getattr(plain, field).index_add(0, dead, add), rel=2e-6)


def test_results_do_not_depend_on_the_number_of_threads(ops):
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("numba was started with one thread")
    x, weight, bias, decoder = problem(n=1100, d=33, m=700)
    grads = torch.randn(2, 1100, 33, generator=generator(1))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert numba_cpu.threads() == count
            codes = ops.select_topk(x, weight, bias, 16)
            near = ops.select_above(x, weight, bias, 0.2, low=weight.bfloat16())
            low = ops.select_topk(x, weight, bias, 16, low=weight.bfloat16())
            slopes = ops.code_gradient(codes, grads, decoder, (90, 700))
            gradient = ops.latent_gradient(codes, slopes, x, grads, (90, 700), decoder)
            moved = [t.clone() for t in (weight, gradient.enc, torch.zeros_like(weight), torch.zeros_like(weight))]
            ops.adam_(*moved, step=1, rate=1e-3, betas=(0.9, 0.999), eps=1e-9, factor=torch.tensor(0.5), unit=True)
            parts = [*vars(codes).values(), *vars(near).values(), *vars(low).values(), *vars(gradient).values()]
            found.append([*parts, slopes, ops.decode(codes, decoder, (90, 700)), *moved])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# ---------------------------------------------------------------------------------------------------------- oneDNN


@pytest.fixture
def fresh_probe():
    torch_any._onednn.cache_clear()
    yield
    torch_any._onednn.cache_clear()


def _raises(*_):
    raise RuntimeError("not here")


@pytest.mark.parametrize("fault", [_raises, lambda x, w, b, *_: x @ w.T, None])
def test_a_private_operator_that_fails_its_probe_is_not_used(fault, fresh_probe, monkeypatch, ops):
    if fault is None:
        monkeypatch.delattr(torch.ops, "mkldnn", raising=False)
        monkeypatch.setattr(torch.ops, "mkldnn", object(), raising=False)
    else:
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", fault, raising=False)
    x, weight, bias, _ = problem()
    assert torch.equal(torch_any.linear(x, weight, bias), F.linear(x, weight, bias))
    expected = F.linear(x, weight, bias)
    np.testing.assert_array_equal(
        ops.select_topk(x, weight, bias, 5).dense(100).numpy(), by_sorting(expected.numpy(), 5)
    )


def test_the_product_equals_float64_for_every_form_of_input(fresh_probe):
    x, weight, bias, _ = problem(n=5)
    assert torch_any.linear(x[:0], weight, bias).shape == (0, 100)
    for rows in (x, x[:1], x[::2], x.T.contiguous().T):
        close(torch_any.linear(rows, weight, bias), rows.double() @ weight.double().T + bias)
        close(torch_any.linear(rows, weight), rows.double() @ weight.double().T)
    close(torch_any.linear(x.double(), weight.double(), bias.double()), x.double() @ weight.double().T + bias)


# ------------------------------------------------------------------------------------------------------------ Adam


@pytest.mark.parametrize(("shape", "unit"), [((20, 7), False), ((20, 7), True), ((20,), False), ((1, 1), False)])
def test_adam_equals_the_one_of_torch(ops, shape, unit):
    """30 steps of changing rate; rows 5-9 get gradients in the first 10 steps only, rows 10-14 never."""
    g = generator(4)
    start = torch.randn(shape, generator=g)
    theirs = start.double().requires_grad_()
    adam = torch.optim.Adam([theirs], betas=(0.9, 0.999), eps=6.25e-10)
    weight, first, second = start.clone(), torch.zeros(shape), torch.zeros(shape)
    for step in range(1, 31):
        grad = torch.randn(shape, generator=g)
        grad[10:15] = 0
        if step > 10:
            grad[5:10] = 0
        before = weight.clone()
        factor, rate = torch.rand((), generator=g), 1e-2 / step
        theirs.grad = (factor * grad).double()
        adam.param_groups[0]["lr"] = rate
        adam.step()
        if unit:
            with torch.no_grad():
                theirs.div_(theirs.norm(dim=1, keepdim=True))
        rule = {"betas": (0.9, 0.999), "eps": 6.25e-10, "factor": factor, "unit": unit}
        ops.adam_(weight, grad, first, second, step=step, rate=rate, **rule)
        assert len(weight) == 1 or not torch.equal(weight[5:10], before[5:10])  # idle rows go on moving
    torch.testing.assert_close(weight.double(), theirs.detach(), rtol=1e-5, atol=1e-6)
    state = adam.state[theirs]
    close(first, state["exp_avg"], rel=1e-5)
    close(second, state["exp_avg_sq"], rel=1e-5)
    if not unit:
        assert torch.equal(weight[10:15], start[10:15])
    else:
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)))


# ------------------------------------------------------------------------------------------------- bfloat16 prefilter


def correlated(n, d, seed=0):
    """Rows like those of an encoder: falling spectrum, an offset, and two coordinates far above the others."""
    g = generator(seed)
    x = torch.randn(n, d, generator=g) / torch.arange(1, d + 1) ** 0.5
    x = x @ torch.linalg.qr(torch.randn(d, d, generator=g)).Q + 0.2
    x[:, [3, d - 1]] *= 20
    return x / x.norm(dim=1).mean()


def dictionaries(d, m):
    """Rows and atoms: unrelated, correlated rows with atoms among them, and rows that lie on one coordinate."""
    g = generator(9)
    x, weight, bias, _ = problem(n=300, d=d, m=m)
    yield "random", x, weight, bias
    x = correlated(300 + m, d)
    yield "correlated", x[:300], F.normalize(x[300:]), 0.05 * torch.randn(m, generator=g)
    one = torch.zeros(300, d)
    one[:, 0] = torch.rand(300, generator=g)
    spike = 0.02 * F.normalize(torch.randn(m, d, generator=g))
    spike[:, 0] = torch.rand(m, generator=g)
    yield "one coordinate", one, spike, torch.zeros(m)
    yield "bias alone", 1e-3 * x[:300], F.normalize(x[300:]), torch.rand(m, generator=g)


@pytest.mark.parametrize("d", [64, 384])
def test_prefilter_misses_few_of_the_true_topk_and_scores_the_rest_exactly(ops, d):
    m, k = 1024, 16
    for name, x, weight, bias in dictionaries(d, m):
        low = weight.bfloat16()
        found, exact = ops.select_topk(x, weight, bias, k, low=low), ops.select_topk(x, weight, bias, k)
        check_form(found, 300, m)
        kept, wanted = found.dense(m) > 0, exact.dense(m) > 0
        recall = float((kept & wanted).sum() / wanted.sum())
        assert recall > (0.995 if name in ("random", "correlated") else 0.5), (name, recall)
        scores = x.double() @ weight.double().T + bias
        both = kept & wanted
        torch.testing.assert_close(found.dense(m).double()[both], scores[both], rtol=1e-5, atol=1e-6)
        # what was taken instead of a missed latent is hardly smaller: bfloat16 has 8 bits
        lost = exact.dense(m).sum(1) - found.dense(m).sum(1)
        assert float(lost.max()) <= 2.0**-6 * float(exact.dense(m).sum(1).max())


@pytest.mark.parametrize("d", [64, 384])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_prefilter_above_a_threshold_misses_nothing(ops, d, threshold):
    """300 x 1024 scores of each kind: six standard errors leave about 1e-9 of those near the threshold."""
    for name, x, weight, bias in dictionaries(d, 1024):
        found = ops.select_above(x, weight, bias, threshold, low=weight.bfloat16())
        exact = ops.select_above(x, weight, bias, threshold)
        kept, wanted = torch.zeros(2, 300, 1024, dtype=torch.bool)
        kept[found.rows(), found.indices.long()] = True
        wanted[exact.rows(), exact.indices.long()] = True
        sure = ((x.double() @ weight.double().T + bias) - threshold).abs() > 1e-6
        assert int((sure & (kept != wanted)).sum()) == 0, name


# ------------------------------------------------------------------------------------------------------ batchtopk


@pytest.mark.parametrize("name", OPS)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 12), st.integers(0, 4), st.integers(0, 10**6))
@hypothesis_settings(max_examples=60, deadline=None)
def test_batchtopk_does_not_depend_on_the_guess(name, n, m, k, values, seed):
    """Few distinct values: ties at the threshold; negative ones: too few positives."""
    rng = np.random.default_rng(seed)
    a = rng.integers(-2, values, size=(n, m)).astype(np.float32) if values else rng.normal(size=(n, m))
    x, weight, bias = as_product(a.astype(np.float32))
    count = min(k, m) * n
    expected = batchtopk(weight.T, k)
    last = float(expected[expected > 0].min()) if (expected > 0).sum() == count else 0.0
    for guess in (float("inf"), 0.0, -1.0, 1e-9, last, 0.9 * last, 1.1 * last, 1.0, 100.0):
        codes, cut = select_batchtopk(OPS[name], x, weight, bias, count, guess)
        check_form(codes, n, m)
        assert torch.equal(codes.dense(m), expected)
        assert cut == last


def test_batchtopk_worked_example(ops):
    codes, cut = select_batchtopk(ops, *as_product(np.array([[5, 4, 3], [2, 1, 0.5]], np.float32)), 4, float("inf"))
    assert codes.dense(3).tolist() == [[5, 4, 3], [2, 0, 0]] and cut == 2


# ------------------------------------------------------------------------------------------------- choice of backend


def test_backends_are_found_or_refused_by_name(monkeypatch):
    cpu = torch.device("cpu")
    assert kernels("auto", cpu) is numba_cpu and kernels("torch", cpu) is torch_any
    with pytest.raises(InputError, match="choose backend='auto'"):
        kernels("numba", torch.device("meta"))
    assert kernels("auto", torch.device("meta")) is torch_any
    monkeypatch.setattr(sparse_ops.importlib.util, "find_spec", lambda _: None)
    assert kernels("auto", cpu) is torch_any
    with pytest.raises(ImportError, match="pip install numba"):
        kernels("numba", cpu)
