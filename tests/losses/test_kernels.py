"""The kernel for KL and cross-entropy computes what autograd does; where it runs: see tests/quant/test_kernels.py."""

from __future__ import annotations

import os

import pytest
import torch

from kdqat.losses import CrossEntropy, ForwardKL, LogitLoss, ReverseKL, kernels, projected
from kdqat.losses.chunk import Terms
from kdqat.losses.logits import terms_of
from kdqat.quant.kernels import AVAILABLE

CPU = pytest.param("cpu", marks=pytest.mark.skipif(not AVAILABLE, reason="triton is not installed"))
DEVICES = [CPU, pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = {
    "kl": ([ForwardKL()], [1.0]),
    "kl, T=2": ([ForwardKL(2.0)], [0.7]),
    "kl + ce": ([ForwardKL(), CrossEntropy()], [1.0, 0.3]),
    "kl, T=0.5, + ce": ([ForwardKL(0.5), CrossEntropy()], [1.0, 0.3]),
    "ce": ([CrossEntropy()], [1.0]),
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("tests/conftest.py chose no interpreter: there is a GPU")
        monkeypatch.setattr("kdqat.quant.kernels.DEVICES", ("cpu", "cuda"))
    return request.param


def make_terms(losses: list[LogitLoss], weights: list[float], with_teacher: bool) -> Terms:
    return terms_of({loss.name: loss for loss in losses}, weights, with_teacher)


def both_ways(terms: Terms, logits, teacher, labels, scale=1.0) -> list[tuple]:
    """(sums, gradient) of the kernel, and of autograd in float64."""
    found = []
    for dtype in (logits.dtype, torch.float64):
        answer = None if teacher is None else teacher.to(dtype)
        sums, gradient = projected.value_and_grad(terms, None, logits.to(dtype, copy=True), answer, labels, scale=scale)
        found.append((torch.stack(sums).double().cpu(), None if gradient is None else gradient.double().cpu()))
    return found


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize(("losses", "weights"), CASES.values(), ids=CASES)
def test_value_and_gradient_are_those_of_autograd(losses, weights, with_teacher, device):
    if not with_teacher and any(loss.needs_teacher for loss in losses):
        pytest.skip("a KL has a teacher")
    torch.manual_seed(0)
    logits, teacher = (torch.randn(7, 5003, device=device) * 4 for _ in range(2))  # beyond one block, and ragged
    labels = torch.randint(0, 5003, (7,), device=device)
    terms = make_terms(losses, weights, with_teacher)
    assert kernels.factors_of(terms, None, logits, teacher if with_teacher else None) is not None
    (sums, gradient), (exact, exact_gradient) = both_ways(terms, logits, teacher if with_teacher else None, labels, 3.0)
    torch.testing.assert_close(sums, exact, rtol=1e-5, atol=1e-5)
    assert (gradient - exact_gradient).norm() <= 1e-6 * exact_gradient.norm()


def test_a_teacher_that_says_the_same_costs_nothing_and_teaches_nothing(device):
    logits = torch.randn(3, 4100, device=device) * 20
    labels = torch.zeros(3, dtype=torch.long, device=device)
    (sums, gradient), _ = both_ways(make_terms([ForwardKL()], [1.0], True), logits, logits.clone(), labels)
    assert sums.abs().max() < 1e-4 and gradient.abs().max() < 1e-6


def test_forbidden_tokens_make_no_nan(device):
    logits, teacher = torch.randn(2, 300, device=device), torch.randn(2, 300, device=device)
    teacher[:, 5] = -torch.inf
    logits[:, 5] = -torch.inf
    labels = torch.ones(2, dtype=torch.long, device=device)
    (sums, gradient), (exact, exact_gradient) = both_ways(
        make_terms([ForwardKL()], [1.0], True), logits, teacher, labels
    )
    torch.testing.assert_close(sums, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-4, atol=1e-6)


def test_without_a_wish_for_gradients_the_logits_stay(device):
    logits, teacher = torch.randn(2, 300, device=device), torch.randn(2, 300, device=device)
    before = logits.clone()
    terms = make_terms([ForwardKL()], [1.0], True)
    labels = torch.ones(2, dtype=torch.long, device=device)
    _, gradient = projected.value_and_grad(terms, None, logits, teacher, labels, scale=None)
    assert gradient is None and torch.equal(logits, before)


def test_other_losses_other_heads_and_other_devices_take_the_general_way(monkeypatch):
    logits = torch.randn(2, 30)
    kl = make_terms([ForwardKL()], [1.0], True)
    assert kernels.factors_of(kl, None, logits, logits) is None  # a CPU
    monkeypatch.setattr("kdqat.quant.kernels.DEVICES", ("cpu",))
    monkeypatch.setattr("kdqat.quant.kernels.AVAILABLE", True)
    assert kernels.factors_of(kl, None, logits, logits) is not None
    assert kernels.factors_of(kl, torch.tanh, logits, logits) is None
    assert kernels.factors_of(make_terms([ReverseKL()], [1.0], True), None, logits, logits) is None
    two = make_terms([ForwardKL(2.0)], [1.0], True)
    assert kernels.factors_of(two, None, logits, logits) == kernels.Factors(4.0, 0.0, 0.0, 2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_get_a_16_bit_gradient(dtype):
    logits, teacher = (torch.randn(64, 128256, device="cuda", dtype=dtype) * 3 for _ in range(2))
    labels = torch.randint(0, 128256, (64,), device="cuda")
    (sums, gradient), (exact, exact_gradient) = both_ways(
        make_terms([ForwardKL(), CrossEntropy()], [1.0, 0.3], True), logits, teacher, labels, 1024.0
    )
    torch.testing.assert_close(sums, exact, rtol=1e-4, atol=1e-4)
    assert (gradient - exact_gradient).norm() <= 0.004 * exact_gradient.norm()


def test_a_subclass_with_another_token_loss_is_what_it_says(monkeypatch):
    class Doubled(ForwardKL):
        def token_loss(self, student_logits, teacher_logits, labels):
            return 2 * super().token_loss(student_logits, teacher_logits, labels)

    monkeypatch.setattr("kdqat.quant.kernels.DEVICES", ("cpu",))
    monkeypatch.setattr("kdqat.quant.kernels.AVAILABLE", True)
    logits = torch.randn(2, 30)
    assert kernels.factors_of(make_terms([Doubled()], [1.0], True), None, logits, logits) is None
