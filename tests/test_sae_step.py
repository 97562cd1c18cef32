"""The sparse training step against autograd on dense float64 tables, and against worked numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from biosae.sae import sparse_ops, step
from biosae.sae.kernels import torch_any
from biosae.sae.kernels.codes import Gradient
from biosae.sae.model import SparseAutoencoder
from biosae.sae.step import Wanted

numba_cpu = pytest.importorskip("biosae.sae.kernels.numba_cpu", reason="numba is not installed")

OPS = {"numba": numba_cpu, "torch": torch_any}
ARCHITECTURES = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu")
NONE = torch.zeros(0, dtype=torch.int64)
T = torch.tensor


@pytest.fixture(params=list(OPS))
def ops(request):
    return OPS[request.param]


def wanted(k, *, weight=0.0, dead=NONE, aux_k=0, guess=float("inf")):
    return Wanted(
        k=k, weight=weight, dead=dead, some_dead=len(dead) > 0, aux_k=aux_k, aux_alpha=0.125, guess=guess
    )  # fmt: skip


def random_model(architecture, n=70, d=16, m=90, k=6, seed=0, offset=0.0):
    """A model in the middle of training, and rows; ``offset`` moves the encoder biases."""
    g = torch.Generator().manual_seed(seed)
    ends = (5, 20, m) if architecture == "matryoshka" else None
    model = SparseAutoencoder(d, m, architecture=architecture, k=k, ends=ends, threshold=0.4, bandwidth=0.3)
    with torch.no_grad():
        model.W_enc.copy_(0.4 * torch.randn(m, d, generator=g))
        model.W_dec.copy_(F.normalize(torch.randn(m, d, generator=g)))
        model.b_enc.copy_(0.2 * torch.randn(m, generator=g) + offset)
        model.b_dec.copy_(0.3 * torch.randn(d, generator=g))
        if architecture == "jumprelu":
            model.threshold.copy_(0.1 + torch.rand(m, generator=g))
    return model.train(), torch.randn(n, d, generator=g)


def exact(model, x, want):
    """The same step in float64 by autograd."""
    return step.dense(copy.deepcopy(model).double(), x.double(), want)


def close(found, expected, rel=2e-6):
    found, expected = found.double(), expected.double()
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= rel * float(expected.norm()) + 1e-12


def compare(found, expected):
    for field in ("dec", "enc", "bias", "square"):
        close(getattr(found.latents, field), getattr(expected.latents, field), rel=4e-6 if field == "square" else 2e-6)
    close(found.b_dec, expected.b_dec)
    close(found.residual, expected.residual)
    assert torch.equal(found.fired, expected.fired) and int(found.active) == int(expected.active)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=2e-6)
    assert (found.threshold is None) == (expected.threshold is None)
    if found.threshold is not None:
        assert expected.threshold.abs().max() > 0
        close(found.threshold, expected.threshold)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dead", [0, 1, 30])
@pytest.mark.parametrize("table", [True, False], ids=["dense dead", "sparse dead"])
def test_sparse_step_equals_dense_step(ops, architecture, dead, table, monkeypatch):
    """``dead`` latents never fire (their biases are low) and are trained by AuxK, by a small table or by codes."""
    monkeypatch.setattr(sparse_ops, "DENSE_AUX", 100 if table else 0)
    model, x = random_model(architecture)
    latents = torch.arange(3, 90, 3)[:dead] if dead else NONE
    with torch.no_grad():
        model.b_enc[latents] -= 0.5
    aux = 0 if architecture == "relu" else 4
    want = wanted(6, weight=0.7, dead=latents, aux_k=aux)
    room = Gradient(*(torch.full_like(t, float("nan")) for t in vars(Gradient.empty(model.W_dec.detach())).values()))
    expected = exact(model, x, want)
    compare(step.sparse(model, x, want, ops), expected)
    compare(step.sparse(model, x, want, ops, room=room), expected)
    compare(step.dense(copy.deepcopy(model), x, want), expected)
    with torch.no_grad():
        close(step.reconstruct(model, x, want, ops) - x, expected.residual)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_leave_atoms_on_the_sphere(ops, architecture):
    model, x = random_model(architecture)
    found = step.sparse(model, x, wanted(6, weight=0.1), ops)
    assert float((found.latents.dec * model.W_dec.detach()).sum(1).abs().max()) < 1e-5
    assert float(found.latents.dec.norm()) > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("offset", [-1.5, -100.0])
def test_batches_with_too_few_positive_scores(ops, architecture, offset):
    """Fewer than k n positives, and none at all."""
    model, x = random_model(architecture, offset=offset)
    want = wanted(20, weight=0.5)
    expected = exact(model, x, want)
    found = step.sparse(model, x, want, ops)
    assert int(expected.active) < 20 * len(x) and (offset > -100 or int(expected.active) == 0)
    for field in ("dec", "enc", "bias"):
        close(getattr(found.latents, field), getattr(expected.latents, field))
    close(found.b_dec, expected.b_dec)
    assert int(found.active) == int(expected.active)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=2e-6)
    assert found.cut == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("n", "d", "m", "k"), [(1, 16, 90, 6), (1, 1, 21, 3), (40, 5, 21, 50), (600, 3, 25, 2)])
def test_odd_shapes(ops, architecture, n, d, m, k):
    model, x = random_model(architecture, n=n, d=d, m=m, k=k)
    want = wanted(k, weight=0.3, dead=T([0, 20]), aux_k=0 if architecture == "relu" else 9)
    found, expected = step.sparse(model, x, want, ops), exact(model, x, want)
    for field in ("enc", "bias"):
        close(getattr(found.latents, field), getattr(expected.latents, field), rel=4e-6)
    # in one dimension the projection leaves nothing of the atoms' gradient but rounding
    scale = float(found.b_dec.norm()) + float(found.latents.enc.norm())
    assert float((found.latents.dec - expected.latents.dec).norm()) < 1e-5 * max(scale, 1)
    close(found.b_dec, expected.b_dec, rel=1e-5)
    assert torch.equal(found.fired, expected.fired)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_that_are_all_alike_stay_finite(ops, architecture):
    model, x = random_model(architecture)
    for rows in (torch.zeros(9, 16), x[:1].expand(9, 16).contiguous(), model.b_dec.detach().expand(9, 16).contiguous()):
        found = step.sparse(model, rows, wanted(6, weight=0.3, dead=T([2, 4]), aux_k=3), ops)
        for part in (*vars(found.latents).values(), found.b_dec, found.loss):
            assert torch.isfinite(part).all()


def test_matryoshka_of_one_prefix_is_batchtopk(ops):
    model, x = random_model("batchtopk")
    other, _ = random_model("matryoshka")
    other.ends = (90,)
    one, two = (step.sparse(m, x, wanted(6, dead=T([3]), aux_k=2), ops) for m in (model, other))
    for field in ("dec", "enc", "bias"):
        assert torch.equal(getattr(one.latents, field), getattr(two.latents, field))
    assert torch.equal(one.loss, two.loss)


# ---------------------------------------------------------------------------------------------- worked numbers


def plain(architecture, d, *, k=1, ends=None, **more):
    """Encoder and atoms are the axes."""
    model = SparseAutoencoder(d, d, architecture=architecture, k=k, ends=ends, **more)
    with torch.no_grad():
        model.W_enc.copy_(torch.eye(d))
        model.W_dec.copy_(torch.eye(d))
    return model.train()


def both_steps(model, x, want):
    return [
        step.dense(copy.deepcopy(model), x, want),
        *(step.sparse(model, x, want, module) for module in OPS.values()),
    ]


def test_relu_worked_example():
    for found in both_steps(plain("relu", 2), T([[3.0, -1.0]]), wanted(1, weight=0.1)):
        assert float(found.loss) == pytest.approx(1.3)
        assert found.residual.tolist() == [[0, 1]] and found.fired.tolist() == [True, False]
        # z_0 = 3 is exact, the penalty alone pulls: 0.1 x into the encoder row, 0.1 into its bias
        assert found.latents.enc.flatten().tolist() == pytest.approx([0.3, -0.1, 0, 0])
        assert found.latents.bias.tolist() == pytest.approx([0.1, 0])


def test_matryoshka_worked_example():
    """x = (3, 2, 1), z = (3, 2, 0), prefixes of 1 and 3 atoms: losses 5 and 1, mean 3."""
    for found in both_steps(plain("matryoshka", 3, k=2, ends=(1, 3)), T([[3.0, 2.0, 1.0]]), wanted(2)):
        assert float(found.loss) == pytest.approx(3)
        assert found.residual.tolist() == [[0, 0, -1]]
        # grads of the prefixes: (0, -2, -1) and (0, 0, -1); the first atom is in both, the second in one
        expected = T([[0.0, 3 * -2, 3 * -2], [0, 0, 2 * -1], [0, 0, 0]])
        torch.testing.assert_close(found.latents.dec, expected)


def test_batchtopk_worked_example():
    x = T([[5.0, 4.0, 3.0], [2.0, 1.0, 0.5]])
    for found in both_steps(plain("batchtopk", 3, k=2), x, wanted(2)):
        assert found.residual.tolist() == [[0, 0, 0], [0, -1, -0.5]] and int(found.active) == 4
        assert float(found.loss) == pytest.approx(1.25 / 2)
    for module in OPS.values():
        assert step.sparse(plain("batchtopk", 3, k=2), x, wanted(2), module).cut == 2


def test_jumprelu_worked_numbers():
    """a = 0.3, theta = 0.2996, eps = 0.001: dz/dtheta = -299.6, dL0/dtheta = -1000, dz/da = 1, dL0/da = 0."""
    model = plain("jumprelu", 1, threshold=0.2996, bandwidth=0.001)
    # x_hat = x: only the penalty (L0 / 2 - 1)^2 is left, whose derivative by L0 is 2 (1/2 - 1) / 2 = -1/2
    for found in both_steps(model, T([[0.3]]), wanted(2, weight=1.0)):
        assert float(found.threshold) == pytest.approx(500, rel=1e-4)
        assert float(found.loss) == pytest.approx(0.25) and float(found.latents.bias) == pytest.approx(0, abs=1e-6)
    # with the atom turned round, x_hat = -0.3 and the loss is (2 z)^2 / ...: dL/dz = 2 * (-0.6) * (-1) = 1.2
    with torch.no_grad():
        model.W_dec.mul_(-1)
    for found in both_steps(model, T([[0.3]]), wanted(2)):
        assert float(found.threshold) == pytest.approx(-299.6 * 1.2, rel=1e-4)
        assert float(found.latents.bias) == pytest.approx(1.2) and int(found.active) == 1
    # closed at a = theta exactly, and the window still lends the threshold a derivative: x_hat = 0, dL/dz = 0.5992
    with torch.no_grad():
        model.threshold.fill_(0.3)
    for found in both_steps(model, T([[0.3]]), wanted(2)):
        assert int(found.active) == 0 and float(found.latents.bias) == 0
        assert float(found.threshold) == pytest.approx(-300 * 0.6, rel=1e-4)


def test_auxk_worked_example():
    """e = ((2, 0), (0, 2)), the dead latent explains ((1, 0), (0, 0)): L_aux = 1.25, weight 1/8."""
    x, encoder, bias, decoder = T([[2.0, 0.0], [0.0, 2.0]]), T([[0.5, -9.0]]), torch.zeros(1), T([[1.0, 0.0]])
    for module in OPS.values():
        loss, found = sparse_ops.auxiliary(module, x, -x, encoder, bias, decoder, k=5, alpha=0.125)
        assert float(loss) == pytest.approx(0.125 * 1.25)
        # d/dz of alpha * mean |e - z D|^2 / 2 at the open entry: 0.125 / 2 * (1 - 2) = -0.0625; x = (2, 0)
        assert found.bias.tolist() == pytest.approx([-0.0625])
        assert found.enc.flatten().tolist() == pytest.approx([-0.125, 0])
