"""Learned ranges (AIMET), learned and searched clipping: gradients by hand, by formula, by plain autograd."""

from __future__ import annotations

import math

import pytest
import torch

from kdqat.quant import AIMETRange, LearnedClipping, MinMax, MSEClip
from kdqat.quant.functional import round_ste
from kdqat.spec import QuantSpec
from kdqat.types import QParams
from tests.quant.specs import GRANULARITIES, NESTED_GRIDS, SOME_GRIDS, make_spec, spec_id

WEIGHT, GRADIENT = torch.tensor([[-1.0, -0.6, 0.2, 0.34, 0.9]]), torch.tensor([[1.0, -2.0, 0.5, 1.0, 3.0]])


def started(quantizer, scale: float, zero_point: float = 0.0):
    quantizer.load_qparams(
        QParams(torch.full_like(quantizer.scale, scale), torch.full_like(quantizer.zero_point, zero_point))
    )
    return quantizer


def test_aimets_range_is_open_by_one_level_below_and_clips_by_the_rounded_code():
    """In steps: -7.5 lies in the grid but not in theta; 7.3 and -8.4 round into the grid, so they count as inside."""
    quantizer = started(AIMETRange(make_spec(4), torch.Size((1, 4))), 1.0)
    weight = torch.tensor([[-8.4, -7.6, 7.3, 7.6]], requires_grad=True)
    quantizer(weight).backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert not weight.grad.any()
    expected = (-8 + 8.4) + 10 * (-8 + 7.6) + 100 * (7 - 7.3) + 1000 * 7
    assert quantizer.scale.grad.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_asymmetric_range_gets_aimets_gradients_by_the_chain_rule(granularity):
    torch.manual_seed(0)
    spec = make_spec(3, granularity, symmetric=False)
    quantizer = started(AIMETRange(spec, torch.Size((4, 16))), 0.3, 3.0)
    weight, gradient = torch.randn(4, 16), torch.randn(4, 16)
    quantizer(weight).backward(gradient)
    # the sheet's, core.md 1.2, for each scale: delta, min, max, t1, t2
    delta, low, high, steps = 0.3, -0.9, 0.3 * 4, 7
    code = (weight / delta).round() + 3
    mask = ((code >= 0) & (code <= steps)).float()
    level = code.clamp(0, steps) - 3
    t1 = gradient * (level - mask * weight / delta) / steps
    t2 = steps / (high - low) ** 2 * gradient * delta * (1 - mask)
    groups = [(-t1 + high * t2), (t1 - low * t2)]
    dlow, dhigh = (quantizer.groups(g).sum((0, 1, 2) if granularity == "tensor" else 2).reshape(-1) for g in groups)
    torch.testing.assert_close(quantizer.scale.grad.reshape(-1), -3 * dlow + (steps - 3) * dhigh)
    torch.testing.assert_close(quantizer.zero_point.grad.reshape(-1), -delta * (dlow + dhigh))


def test_aimets_learned_zero_point_is_real_and_its_ends_decide_which_weights_learn():
    quantizer = started(AIMETRange(make_spec(2, symmetric=False), torch.Size((1, 4))), 1.0, 1.4)  # -1.4 ... 1.6
    weight = torch.tensor([[-1.45, -1.35, 1.55, 1.65]], requires_grad=True)
    quantizer(weight).sum().backward()
    assert weight.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert quantizer.stored_qparams(weight).zero_point.item() == 1.0


@pytest.mark.parametrize("spec", [QuantSpec(format="int2", zero_point="half"), QuantSpec(format="e2m1")])
def test_aimet_refuses_what_aimet_does_not_have(spec):
    with pytest.raises(ValueError, match=r"AIMETRange is for integers .* use LSQ there"):
        AIMETRange(spec, torch.Size((4, 8)))


def test_learned_clipping_trains_its_factor_through_the_scale():
    """sigmoid(gamma) = 0.7 of absmax 1 is step 0.1 of the golden vector, whose ds is 12.6; d sigmoid = 0.7 * 0.3."""
    quantizer = LearnedClipping(make_spec(4), torch.Size((1, 5)), start=math.log(0.7 / 0.3))
    weight = WEIGHT.clone().requires_grad_()
    w_hat = quantizer(weight)
    w_hat.backward(GRADIENT)
    torch.testing.assert_close(w_hat, torch.tensor([[-0.8, -0.6, 0.2, 0.3, 0.7]]))
    assert quantizer.gamma.grad.item() == pytest.approx(12.6 / 7 * 0.7 * 0.3, rel=1e-5)
    assert torch.equal(weight.grad, torch.tensor([[0.0, -2.0, 0.5, 1.0, 0.0]]))


def test_a_power_of_two_scale_passes_the_gradient_of_the_scale_it_rounds():
    spec = QuantSpec(format="e2m1", granularity="group", group_size=16, scale_rule="mx", scale_dtype="e8m0")
    quantizer = LearnedClipping(spec, torch.Size((1, 16)), start=0.0)
    weight = torch.linspace(-7, 7, 16).reshape(1, 16)  # half of absmax 7 is 3.5: scale 2^(1 - 2)
    quantizer(weight).backward(torch.ones(1, 16).mul_(weight))
    assert quantizer.stored_qparams(weight).scale.item() == 0.5
    level = quantizer(weight).detach() / 0.5
    ds = (weight * torch.where((weight / 0.5).abs() <= 6, level - weight / 0.5, level)).sum()
    assert quantizer.gamma.grad.item() == pytest.approx(ds.item() * 0.5 * (1 - 0.5), rel=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_asymmetric_learned_clipping_is_omniquants(granularity):
    """shared/methods/wide.md, A12, in plain autograd: one factor for the maximum, one for the minimum.

    Clipped before it is rounded, as everywhere in kdqat; their code rounds first.
    """
    torch.manual_seed(0)
    quantizer = LearnedClipping(make_spec(3, granularity, symmetric=False), torch.Size((4, 16)))
    with torch.no_grad():
        quantizer.gamma.uniform_(-1, 2)
        quantizer.gamma_min.uniform_(-1, 2)
    weight, gradient = torch.randn(4, 16), torch.randn(4, 16)
    w_hat = quantizer(weight)
    w_hat.backward(gradient)
    gamma, gamma_min = (p.detach().clone().requires_grad_() for p in (quantizer.gamma, quantizer.gamma_min))
    groups = quantizer.groups(weight)
    dims = (0, 1, 2) if granularity == "tensor" else (2,)
    low = gamma_min.sigmoid() * groups.amin(dims, keepdim=True)
    scale = (gamma.sigmoid() * groups.amax(dims, keepdim=True) - low) / 7
    zero_point = -(low / scale).round().detach()
    theirs = scale * round_ste((groups / scale).clamp(-zero_point, 7 - zero_point))
    theirs.backward(quantizer.groups(gradient))
    torch.testing.assert_close(w_hat, theirs.reshape(4, 16))
    torch.testing.assert_close(quantizer.gamma.grad, gamma.grad)
    torch.testing.assert_close(quantizer.gamma_min.grad, gamma_min.grad)


def test_the_clipping_factor_follows_the_weights():
    quantizer = LearnedClipping(make_spec(4), torch.Size((1, 5)))
    one, two = (quantizer.stored_qparams(WEIGHT * k).scale for k in (1, 2))
    torch.testing.assert_close(two, 2 * one)
    torch.testing.assert_close(one.squeeze(), torch.sigmoid(torch.tensor(4.0)) / 7)


@pytest.mark.parametrize("spec", [s for s in [*SOME_GRIDS, *NESTED_GRIDS] if s.scale_rule != "mx"], ids=spec_id)
def test_searched_clipping_never_loses_to_the_full_range_and_finds_an_outlier(spec):
    torch.manual_seed(0)
    weight = torch.randn(6, 32)
    weight[:, 0] *= 3
    errors = [
        (quantizer(weight) - weight).square().sum().item()
        for quantizer in (MSEClip(spec, weight.shape), MinMax(spec, weight.shape))
    ]
    # each group is judged before the others of its super-block are chosen, and with them their common scale
    assert errors[0] <= errors[1] * (1.1 if spec.scale_dtype == "k6" else 1 + 1e-5)
    if spec.format in ("int2", "int3") and spec.zero_point == "none":
        assert errors[0] < 0.9 * errors[1]


def test_searched_clipping_lets_every_weight_learn_and_checks_its_grid():
    weight = WEIGHT.clone().requires_grad_()
    MSEClip(make_spec(2), WEIGHT.shape)(weight).backward(GRADIENT)
    assert torch.equal(weight.grad, GRADIENT)
    for bad in ({"num_steps": 1}, {"smallest": 1.0}, {"norm": 0.0}):
        with pytest.raises(ValueError, match="MSEClip needs num_steps >= 2"):
            MSEClip(make_spec(2), WEIGHT.shape, **bad)


@pytest.mark.parametrize("spec", [*NESTED_GRIDS, QuantSpec(format="int2", zero_point="half")], ids=spec_id)
def test_a_group_of_zeros_stays_near_zero_and_spoils_no_other(spec):
    """With a scale of 1 its half step is 0.5, and a second level that reaches to 1 leaves the others nothing."""
    torch.manual_seed(0)
    weight = torch.randn(4, 64) * 1e-6
    before = (MinMax(spec, weight.shape)(weight) - weight)[1:, 16:].square().sum()
    weight[0], weight[:, :16] = 0, 0
    values = MinMax(spec, weight.shape)(weight)
    assert values[0].abs().max() < 1e-7
    assert (values - weight)[1:, 16:].square().sum() < 1.5 * before
