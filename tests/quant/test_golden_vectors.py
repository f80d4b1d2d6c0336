"""Numbers worked out on paper for the published methods (shared/methods/core.md, section 9)."""

from __future__ import annotations

import pytest
import torch

from kdqat.quant import LSQ, SEQ, AIMETRange, Fixed, MinMax, QuEST
from kdqat.spec import QuantSpec
from kdqat.types import QParams
from tests.quant.specs import make_spec

WEIGHT, GRADIENT = [[-1.0, -0.6, 0.2, 0.34, 0.9]], [[1.0, -2.0, 0.5, 1.0, 3.0]]
W_HAT = [[-0.8, -0.6, 0.2, 0.3, 0.7]]


def backward(quantizer, scale: float = 0.1):
    """(W_hat, dW, ds) of the vector above with step 0.1, that is AIMET's theta_max 0.7."""
    if quantizer.uses_stored_qparams:
        quantizer.load_qparams(QParams(torch.full_like(quantizer.scale, scale), torch.zeros_like(quantizer.scale)))
    weight = torch.tensor(WEIGHT, requires_grad=True)
    w_hat = quantizer(weight)
    w_hat.backward(torch.tensor(GRADIENT))
    return w_hat.detach(), weight.grad, quantizer.scale.grad


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(
    ("gradient_scale", "ds"), [("shared", 2.129790), ("layer", 2.129790), ("none", 12.6)]
)  # fmt: skip
def test_lsq_gives_the_papers_values_and_gradients(granularity, gradient_scale, ds):
    quantizer = LSQ(make_spec(4, granularity), torch.Size((1, 5)), gradient_scale=gradient_scale)
    w_hat, dw, scale_gradient = backward(quantizer)
    torch.testing.assert_close(w_hat, torch.tensor(W_HAT))
    torch.testing.assert_close(dw, torch.tensor([[0.0, -2.0, 0.5, 1.0, 0.0]]))
    assert scale_gradient.item() == pytest.approx(ds, rel=1e-5)


def test_the_gradient_scale_counts_a_group_or_the_layer():
    """N is 4 weights to a scale or 16 in the layer; g = 1/sqrt(N * 7)."""
    torch.manual_seed(0)
    weight, grads = torch.randn(2, 8), {}
    for name in ("none", "shared", "layer"):
        quantizer = LSQ(make_spec(4, "group", group_size=4), torch.Size((2, 8)), gradient_scale=name)
        quantizer.load_qparams(QParams(torch.full((2, 2, 1), 0.1), torch.zeros(2, 2, 1)))
        quantizer(weight).square().sum().backward()
        grads[name] = quantizer.scale.grad
    torch.testing.assert_close(grads["shared"], grads["none"] / (4 * 7) ** 0.5)
    torch.testing.assert_close(grads["layer"], grads["none"] / (16 * 7) ** 0.5)


def test_aimets_grid_is_the_same_with_a_fixed_step():
    w_hat, dw, ds = backward(Fixed(make_spec(4), torch.Size((1, 5))))
    torch.testing.assert_close(w_hat, torch.tensor(W_HAT))
    torch.testing.assert_close(dw, torch.tensor([[0.0, -2.0, 0.5, 1.0, 0.0]]))
    assert ds is None


def test_min_max_takes_its_step_from_the_weights_and_passes_every_gradient():
    w_hat, dw, _ = backward(MinMax(make_spec(4), torch.Size((1, 5))))
    torch.testing.assert_close(w_hat, torch.tensor([[-7, -4, 1, 2, 6]]) / 7)  # -7 -4.2 1.4 2.38 6.3
    assert torch.equal(dw, torch.tensor(GRADIENT))


def test_a_learned_zero_point_gets_the_gradient_of_clipped_weights():
    """dw_hat/dz is -s where the code is clipped and 0 elsewhere; g as for the scale, with qmax 15."""
    quantizer = LSQ(make_spec(4, symmetric=False), torch.Size((1, 5)), learn_zero_point=True)
    quantizer.load_qparams(QParams(torch.full((1, 1, 1), 0.1), torch.full((1, 1, 1), 8.0)))
    weight = torch.tensor(WEIGHT, requires_grad=True)
    w_hat = quantizer(weight)
    w_hat.backward(torch.tensor(GRADIENT))
    torch.testing.assert_close(w_hat, torch.tensor(W_HAT))
    assert quantizer.zero_point.grad.item() == pytest.approx(-0.1 * (1 + 3) / (5 * 15) ** 0.5, rel=1e-5)
    assert quantizer.scale.grad.item() == pytest.approx(12.6 / (5 * 15) ** 0.5, rel=1e-5)


def test_aimets_learned_range_has_gradients_of_its_own():
    """-1 ... theta_max = 0.7 with step 0.1: dW of 0.9 and -1 is 0; d theta_max = ds / 7."""
    w_hat, dw, ds = backward(AIMETRange(make_spec(4), torch.Size((1, 5))))
    torch.testing.assert_close(w_hat, torch.tensor(W_HAT))
    torch.testing.assert_close(dw, torch.tensor([[0.0, -2.0, 0.5, 1.0, 0.0]]))
    assert ds.item() / 7 == pytest.approx(1.8, rel=1e-5)


@pytest.mark.parametrize(
    ("spec", "scale", "expected"),
    [
        (QuantSpec(format="int2", zero_point="half"), 1 / 2, [-0.75] * 3 + [-0.25] + [0.25] * 3 + [0.75] * 3),
        (QuantSpec(format="ternary"), 2 / 3, [-2 / 3] * 3 + [0.0] * 3 + [2 / 3] * 4),
        (QuantSpec(format="binary", zero_point="half"), 2.0, [-1.0] * 4 + [1.0] * 6),
    ],
    ids=["2 bits", "ternary", "binary"],
)
def test_seq_rounds_to_the_papers_levels_with_alpha_of_one(spec, scale, expected):
    weight = torch.tensor([[-1, -0.6, -0.5, -0.3, 0, 0.1, 0.5, 0.51, 0.9, 1]])
    quantizer = SEQ(spec, weight.shape)
    quantizer.load_qparams(QParams(torch.full((1, 1, 1), scale), torch.zeros(1, 1, 1)))
    torch.testing.assert_close(quantizer(weight), torch.tensor([expected]))


@pytest.mark.parametrize(
    ("format", "step", "trust"),
    [
        ("binary", 1.595769, 0.797885),
        ("int2", 0.995690, 0.497845),
        ("int3", 0.586020, 0.293010),
        ("int4", 0.335191, 0.167595),
    ],
)
def test_quest_takes_its_step_from_the_rms_and_trusts_half_of_it(format, step, trust):
    """Of an RMS of 1; `far` lies beyond the grid by a little less, or more, than half a step."""
    spec = QuantSpec(format=format, zero_point="half", scale_rule="gaussian")
    quantizer = QuEST(spec, torch.Size((1, 512)))
    end = quantizer.qmax.item() * step
    for far, gradient in ((end + 0.99 * trust, 1.0), (end + 1.01 * trust, 0.0)):
        rest = ((512 - far**2) / 511) ** 0.5
        weight = torch.cat((torch.tensor([[far]]), torch.full((1, 511), rest)), 1).requires_grad_()
        w_hat = quantizer(weight)
        w_hat.sum().backward()
        assert quantizer.stored_qparams(weight).scale.item() == pytest.approx(step, rel=1e-5)
        assert w_hat[0, 0].item() == pytest.approx(end, rel=1e-5) and weight.grad[0, 0] == gradient
