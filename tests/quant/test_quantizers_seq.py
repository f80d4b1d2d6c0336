"""SEQ: the gradients of ParetoQ's code (written out here in its own alpha), its start, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdqat.initializers import RTN
from kdqat.quant import LSQ, SEQ, FakeQuantLinear
from kdqat.spec import LayerScheme, QuantSpec, preset
from kdqat.types import BlockView, QParams

TWO_BITS = QuantSpec(format="int2", zero_point="half")
TERNARY, BINARY = QuantSpec(format="ternary"), QuantSpec(format="binary", zero_point="half")
PER_ALPHA = {"int2": 1 / 2, "ternary": 2 / 3, "binary": 2.0}  # scale = this * alpha


def paretoq(weight, gradient, alpha, format):
    """(dW, dalpha) [O, 1] of the paper's autograd functions (shared/methods/core.md, 5.3)."""
    x, norm = weight / alpha, weight.numel() ** -0.5
    if format == "binary":
        return gradient * (x.abs() <= 1), (gradient * weight.sign()).sum(1, keepdim=True) * norm
    n, shift = {"int2": (2, 0.5), "ternary": (1.5, 0.0)}[format]
    w_hat = ((x.clamp(-0.99, 0.99) * n - shift).round() + shift) / n
    inside = x.abs() < 0.99
    share = torch.where(inside, w_hat - x, x.sign() * (n - shift) / n)
    return gradient * inside, (gradient * share).sum(1, keepdim=True) * norm


@pytest.mark.parametrize("spec", [TWO_BITS, TERNARY, BINARY], ids=lambda spec: spec.format)
def test_gradients_are_those_of_the_papers_code(spec):
    torch.manual_seed(0)
    weight, gradient, alpha = torch.randn(3, 64), torch.randn(3, 64), torch.tensor([[0.7], [1.5], [2.0]])
    weight[0, :2] = 0.7 * torch.tensor([0.985, 0.995])  # either side of 0.99 alpha
    quantizer, factor = SEQ(spec, weight.shape), PER_ALPHA[spec.format]
    quantizer.load_qparams(QParams(factor * alpha[:, None], torch.zeros(3, 1, 1)))
    latent = weight.clone().requires_grad_()
    quantizer(latent).backward(gradient)
    dw, dalpha = paretoq(weight, gradient, alpha, spec.format)
    assert torch.equal(latent.grad, dw)
    torch.testing.assert_close(quantizer.scale.grad[:, 0], dalpha / factor)


def test_beyond_the_range_a_ternary_alpha_gets_its_end_and_not_its_level():
    quantizer = SEQ(TERNARY, torch.Size((1, 1)))  # scale 1: alpha 1.5
    quantizer(torch.tensor([[-4.0]])).sum().backward()
    assert quantizer.scale.grad.item() == -1.5
    lsq = LSQ(TERNARY, torch.Size((1, 1)), gradient_scale="none")
    lsq(torch.tensor([[-4.0]])).sum().backward()
    assert lsq.scale.grad.item() == -1.0


@pytest.mark.parametrize("name", ["W2A16_HALF", "TERNARY", "TERNARY_G64", "BINARY"])
def test_rtn_starts_it_at_the_papers_alpha_whatever_the_scale_rule(name):
    torch.manual_seed(0)
    layer = FakeQuantLinear.wrap(nn.Linear(128, 4), LayerScheme(weight=preset(name).weight), SEQ)
    RTN().initialize(BlockView(0, {"layer": layer}))
    quantizer = layer.weight_fake_quantizer
    magnitude = quantizer.groups(layer.weight).abs().detach()
    alpha = magnitude.mean(2, keepdim=True) if name == "BINARY" else magnitude.amax(2, keepdim=True)
    scale = alpha * PER_ALPHA[quantizer.spec.format]
    torch.testing.assert_close(quantizer.scale.detach(), scale.to(getattr(torch, quantizer.spec.scale_dtype)).float())


def test_other_quantizers_start_by_the_scale_rule_of_the_spec():
    layer = FakeQuantLinear.wrap(nn.Linear(128, 4), preset("W2A16_HALF"), LSQ)
    RTN().initialize(BlockView(0, {"layer": layer}))
    absmax = layer.weight.abs().amax(1)[:, None, None]
    torch.testing.assert_close(layer.weight_fake_quantizer.scale, (absmax / 1.5).half().float())


@pytest.mark.parametrize("spec", [QuantSpec(format="int2"), QuantSpec(format="e2m1"), preset("W2A16_ASYM").weight])
def test_formats_the_paper_does_not_have_are_refused(spec):
    with pytest.raises(ValueError, match=r"SEQ is for int2 with zero_point='half'.*use LSQ there"):
        SEQ(spec, torch.Size((4, 8)))
