"""Quantizers of activations: dynamic and static ranges by token, tensor, group and feature."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kdqat.quant import LSQ, AIMETRange, Fixed, LearnedClipping, LSQPlus, MinMax, MSEClip, QuEST
from kdqat.quant.grouping import rotate
from tests.quant import specs
from tests.quant.specs import spec_id

SHAPE = torch.Size((1, 32))
LIVE = {
    "MinMax": MinMax,
    "MSEClip": partial(MSEClip, num_steps=4),
    "LearnedClipping": LearnedClipping,
    "QuEST": QuEST,
}
STORED = {"LSQ": LSQ, "LSQPlus": LSQPlus, "Fixed": Fixed, "AIMETRange": AIMETRange}


def takes(name, spec) -> bool:
    if name == "AIMETRange":
        return spec.number.kind == "integer"
    return name != "QuEST" or spec.scale_rule == "gaussian"


CASES = [
    pytest.param(factory, spec, id=f"{name}-{spec_id(spec)}")
    for quantizers, grids in ((LIVE, specs.DYNAMIC_GRIDS), (STORED, specs.STATIC_GRIDS))
    for name, factory in quantizers.items()
    for spec in grids
    if takes(name, spec)
]
every_case = pytest.mark.parametrize(("factory", "spec"), CASES)


def activations(*leading: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*leading, 32, generator=generator) * torch.logspace(-1, 1, 32)


def make(factory, spec):
    """Calibrated on other activations: static ranges, or what a dynamic spec stores of its scales."""
    quantizer = factory(spec, SHAPE)
    with torch.no_grad():
        calibration = quantizer.groups(activations(50) * 0.6)
        if quantizer.uses_stored_qparams:
            quantizer.load_qparams(quantizer.initial_qparams(calibration))
        elif spec.scale_dtype == "e4m3_global":
            quantizer.load_second_level({"global_scale": torch.tensor([448 * 6 / calibration.abs().max()])})
    return quantizer


@every_case
def test_codes_of_activations_give_exactly_the_forward_value(factory, spec):
    quantizer, x = make(factory, spec), activations(2, 5)
    values = quantizer(x)
    assert values.shape == x.shape and values.isfinite().all()
    assert torch.equal(quantizer.values(quantizer.codes(x), quantizer.stored_qparams(x)), values)
    assert (values - x).square().mean() < 0.1 * x.square().mean()


@every_case
def test_activations_of_any_leading_shape_and_dtype_are_rounded_alike(factory, spec):
    quantizer, x = make(factory, spec), activations(2, 5)
    assert torch.equal(quantizer(x.reshape(10, 32)), quantizer(x).reshape(10, 32))
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        assert torch.equal(quantizer(half), quantizer(half.float()).to(dtype))


@every_case
def test_gradients_reach_activations_and_what_is_learned(factory, spec):
    quantizer, x = make(factory, spec), activations(2, 5).requires_grad_()
    quantizer(x).backward(torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)))
    assert x.grad.isfinite().all() and x.grad.any()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@every_case
def test_forward_is_pure_and_its_state_loads_strictly(factory, spec):
    quantizer, x = make(factory, spec), activations(2, 5)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    expected = quantizer(x)
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    fresh = factory(spec, SHAPE)
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("spec", [s for s in specs.DYNAMIC_GRIDS if s.granularity != "tensor"], ids=spec_id)
def test_a_dynamic_range_belongs_to_its_token_alone(spec):
    quantizer, x = make(MinMax, spec), activations(6)
    louder = x.clone()
    louder[3] *= 100
    mine, other = quantizer(x), quantizer(louder)
    assert torch.equal(mine[:3], other[:3]) and torch.equal(mine[4:], other[4:])


@pytest.mark.parametrize("factory", STORED.values(), ids=STORED)
def test_stored_ranges_refuse_a_dynamic_spec(factory):
    with pytest.raises(ValueError, match="dynamic=True needs MinMax"):
        factory(specs.DYNAMIC_GRIDS[0], SHAPE)


def test_quest_rotates_rounds_and_rotates_back_and_its_mask_lies_in_the_rotated_space():
    spec = specs.DYNAMIC_GRIDS[2]
    quantizer, x = QuEST(spec, SHAPE), activations(3).requires_grad_()
    gradient = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    quantizer(x).backward(gradient)
    rotated = rotate(x.detach(), 16)
    step = 2.513931 / 7.5 * rotated.square().mean(1, keepdim=True).sqrt()
    level = (torch.round(rotated / step - 0.5) + 0.5).clamp(-7.5, 7.5)
    trusted = (step * level - rotated).abs() <= step / 2
    assert not trusted.all()
    torch.testing.assert_close(x.grad, rotate(rotate(gradient, 16) * trusted, 16))
    torch.testing.assert_close(quantizer(x), rotate(step * level, 16))
