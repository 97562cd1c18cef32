"""Decoupled top-K distillation: the worked numbers, the chain rule, bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn import functional as F

from biosae.errors import InputError
from biosae.sae.objectives import distil_top_k, top_logits

T = torch.tensor
few = hypothesis_settings(max_examples=40, deadline=None)


def logits(*p: float) -> torch.Tensor:
    return T([p], dtype=torch.float64).log()


def full_kl(teacher: torch.Tensor, student: torch.Tensor) -> float:
    p = teacher.softmax(1)
    return float((p * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1).mean())


def test_worked_numbers():
    """P_T = (.6, .3, .1), P_S = (.5, .2, .3), K = 2."""
    student, teacher = logits(0.5, 0.2, 0.3), top_logits(logits(0.6, 0.3, 0.1) + 3.0, 2)
    found = distil_top_k(student - 1.0, teacher)
    assert float(found.mass) == pytest.approx(0.116322, abs=1e-6)
    # the conditional KL itself is 0.005388; it enters with the mass 0.9
    assert float(found.conditional) / 0.9 == pytest.approx(0.005388, abs=1e-6)
    assert float(found.total) == pytest.approx(0.121171, abs=1e-6)
    assert float(found.total) == pytest.approx(full_kl(logits(0.6, 0.3, 0.1), student))  # a tail of one class
    warm = distil_top_k(student, teacher, temperature=2)
    assert float(warm.conditional) / 0.9 == pytest.approx(0.0015, abs=1e-6)
    assert float(warm.total) == pytest.approx(0.117672, abs=1e-6)
    squared = distil_top_k(student, teacher, temperature=2, squared_factor=True)
    assert float(squared.conditional) == pytest.approx(4 * float(warm.conditional))
    assert float(squared.mass) == pytest.approx(float(warm.mass))


@few
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.1, 5))
def test_at_most_the_full_kl_with_the_tail_as_the_difference(seed, k, temperature):
    g = torch.Generator().manual_seed(seed)
    teacher, student = (2 * torch.randn(5, 10, generator=g, dtype=torch.float64) for _ in range(2))
    top = top_logits(teacher, k)
    found = distil_top_k(student, top)
    assert 0 <= float(found.total) <= full_kl(teacher, student) + 1e-4
    if k >= 10:  # nothing is left out
        assert float(found.mass) == 0 and float(found.total) == pytest.approx(full_kl(teacher, student))
    else:
        p, q = teacher.softmax(1), student.softmax(1)
        rest = torch.ones(5, 10, dtype=torch.bool).scatter_(1, top.classes, False)
        p_rest, q_rest = p[rest].view(5, -1), q[rest].view(5, -1)
        p_tail, q_tail = (r / r.sum(1, keepdim=True) for r in (p_rest, q_rest))
        tail = (p_rest.sum(1) * (p_tail * (p_tail / q_tail).log()).sum(1)).mean()
        assert float(found.total + tail) == pytest.approx(full_kl(teacher, student), abs=1e-4)
    assert float(distil_top_k(teacher, top, temperature=temperature).total) == pytest.approx(0, abs=1e-12)


def test_gradients_are_finite_for_a_certain_teacher_and_masked_classes():
    teacher = T([[100.0, 0.0, -float("inf"), -50.0]])
    student = T([[0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    found = distil_top_k(student, top_logits(teacher, 3))
    found.total.backward()
    assert torch.isfinite(found.total) and torch.isfinite(student.grad).all()
    assert float(student.grad[0, 0]) < 0  # towards the teacher


def test_descent_reaches_the_teacher_on_its_top_classes():
    g = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(8, 20, generator=g)
    student = torch.zeros(8, 20, requires_grad=True)
    top = top_logits(teacher, 5)
    adam = torch.optim.Adam([student], lr=0.1)
    for _ in range(400):
        adam.zero_grad()
        distil_top_k(student, top).total.backward()
        adam.step()
    found = student.detach().log_softmax(1).gather(1, top.classes)
    torch.testing.assert_close(found, top.log_probabilities, atol=1e-3, rtol=1e-3)


def test_ties_go_to_the_lower_class_and_wrong_input_is_named():
    top = top_logits(T([[1.0, 2.0, 2.0, 2.0]]), 2)
    assert top.classes.tolist() == [[1, 2]]
    np.testing.assert_allclose(top.log_probabilities, F.log_softmax(T([[1.0, 2.0, 2.0, 2.0]]), 1)[:, 1:3])
    with pytest.raises(InputError, match="temperature=0"):
        distil_top_k(torch.zeros(1, 4), top, temperature=0)
    with pytest.raises(InputError, match="the student has 2 rows"):
        distil_top_k(torch.zeros(2, 4), top)
