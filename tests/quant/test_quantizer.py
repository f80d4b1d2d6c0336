"""What the base class of all quantizers does: state, storage rounding, codes, bit changes."""

from __future__ import annotations

import pytest
import torch

from kdqat.quant import LSQ, Fixed, MinMax
from kdqat.types import QParams
from tests.quant.specs import ALL_GRIDS, fixed, make_spec, spec_id

SHAPE = torch.Size((8, 32))


@pytest.mark.parametrize("spec", ALL_GRIDS, ids=spec_id)
def test_codes_survive_quantize_dequantize_quantize_with_stored_qparams(spec):
    """Re-quantizing with recomputed ranges moves codes; with the stored ones none may move."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    stored = MinMax(spec, SHAPE).stored_qparams(weight)
    quantizer = fixed(spec, SHAPE, *stored)
    values = quantizer(weight)
    assert torch.equal(quantizer.codes(values), quantizer.codes(weight))
    assert torch.equal(quantizer(values), values)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_scale_in_the_forward_pass_is_the_one_that_is_stored(dtype):
    spec = make_spec(4, scale_dtype=dtype)
    quantizer = fixed(spec, SHAPE, 1.0)
    quantizer.scale.fill_(0.0123456)  # as a step of training leaves it: loading would round it
    stored = quantizer.stored_qparams(torch.randn(SHAPE)).scale
    assert stored.dtype == torch.float32
    assert torch.equal(stored, quantizer.scale.to(getattr(torch, dtype)).float())
    values = quantizer(torch.full(SHAPE, 0.0123))
    assert torch.equal(values, stored.reshape(8, 1).expand(SHAPE))
    assert (dtype == "float32") == torch.equal(values[0, :1], quantizer.scale.flatten()[:1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_loaded_scale_is_rounded_at_once_so_that_training_starts_from_what_is_stored(dtype):
    quantizer = fixed(make_spec(4, scale_dtype=dtype), SHAPE, 0.0123456)
    rounded = torch.full((8, 1, 1), 0.0123456).to(getattr(torch, dtype)).float()
    assert torch.equal(quantizer.scale, rounded) and not (rounded == 0.0123456).any()


def test_a_learned_zero_point_is_stored_as_one_of_the_codes():
    quantizer = LSQ(make_spec(4, symmetric=False), SHAPE, learn_zero_point=True)
    points = torch.tensor([-3.0, 0.4, 0.6, 7.5, 8.5, 14.9, 15.2, 99.0])
    quantizer.load_qparams(QParams(torch.ones(8, 1, 1), points.reshape(8, 1, 1)))
    stored = quantizer.stored_qparams(torch.randn(SHAPE)).zero_point
    assert stored.flatten().tolist() == [0, 0, 1, 8, 8, 15, 15, 15]


def test_a_learned_scale_that_reaches_zero_or_turns_negative_stays_finite():
    quantizer = LSQ(make_spec(4, scale_dtype="float16"), SHAPE)
    scales = torch.tensor([0.0, 1e-30, -1e-30, -0.5, 0.5, 1e-6, -1e-6, -0.0])
    quantizer.scale.data.copy_(scales.reshape(8, 1, 1))
    weight = torch.ones(SHAPE, requires_grad=True)
    values = quantizer(weight)
    values.sum().backward()
    assert values.isfinite().all() and weight.grad.isfinite().all() and quantizer.scale.grad.isfinite().all()
    stored = quantizer.stored_qparams(weight).scale.flatten()
    assert (stored != 0).all() and torch.equal(stored < 0, scales < 0)
    assert (values[3:5, 0] == 1.0).all()


def test_codes_are_int16_in_the_layout_of_the_weight():
    quantizer = fixed(make_spec(4, "group", symmetric=False), (2, 16), 1.0, 3.0)
    weight = torch.arange(-16.0, 16.0).reshape(2, 16)
    codes = quantizer.codes(weight)
    assert codes.dtype == torch.int16
    assert torch.equal(codes, (weight + 3).clamp(0, 15).to(torch.int16))


def test_learning_a_zero_point_needs_an_asymmetric_spec():
    with pytest.raises(ValueError, match=r"symmetric=False, e\.g\. W4A16_ASYM_G64"):
        LSQ(make_spec(4), SHAPE, learn_zero_point=True)
    with pytest.raises(ValueError, match="use shared, layer or none"):
        LSQ(make_spec(4), SHAPE, gradient_scale="tensor")


def test_a_spec_that_does_not_fit_the_shape_is_refused_in_the_constructor():
    with pytest.raises(ValueError, match="does not divide"):
        LSQ(make_spec(4, "group", group_size=64), SHAPE)


def test_only_what_is_learned_is_a_parameter():
    def learned(quantizer) -> list[str]:
        return [name for name, _ in quantizer.named_parameters()]

    asymmetric = make_spec(4, symmetric=False)
    assert learned(LSQ(asymmetric, SHAPE)) == ["scale"]
    assert sorted(learned(LSQ(asymmetric, SHAPE, learn_zero_point=True))) == ["scale", "zero_point"]
    assert learned(MinMax(asymmetric, SHAPE)) == learned(Fixed(asymmetric, SHAPE)) == []


def test_scales_of_another_shape_or_for_live_ranges_are_refused():
    quantizer = LSQ(make_spec(4), SHAPE)
    with pytest.raises(ValueError, match=r"scale of shape \(1,\) given, \(8, 1, 1\) expected"):
        quantizer.load_qparams(QParams(torch.ones(1), torch.zeros(1)))
    with pytest.raises(ValueError, match="zero_point of shape"):
        quantizer.load_qparams(QParams(torch.ones(8, 1, 1), torch.zeros(1)))
    with pytest.raises(ValueError, match=r"MinMax recomputes its ranges from the live weight.*RTN"):
        MinMax(make_spec(4), SHAPE).load_qparams(QParams(torch.ones(8, 1, 1), torch.zeros(8, 1, 1)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_changing_bits_keeps_the_covered_range_and_the_tensors(symmetric):
    quantizer = LSQ(make_spec(4, symmetric=symmetric), SHAPE)
    quantizer.load_qparams(QParams(torch.full((8, 1, 1), 0.3), torch.zeros(8, 1, 1)))
    tensors = {name: tensor.data_ptr() for name, tensor in quantizer.state_dict(keep_vars=True).items()}
    top = (quantizer.scale * quantizer.qmax).clone()
    for bits in (8, 2, 3, 4):
        quantizer.set_bits(bits)
        assert (quantizer.qmin.item(), quantizer.qmax.item()) == quantizer.spec.qrange(bits)
        torch.testing.assert_close(quantizer.scale * quantizer.qmax, top)
        assert quantizer(torch.randn(SHAPE) * 100)[0].unique().numel() <= 2**bits
    assert {name: t.data_ptr() for name, t in quantizer.state_dict(keep_vars=True).items()} == tensors
    torch.testing.assert_close(quantizer.scale, torch.full((8, 1, 1), 0.3))


def test_a_zero_point_follows_the_width_and_comes_back_from_a_wider_grid():
    quantizer = fixed(make_spec(4, symmetric=False), SHAPE, 0.3, 5.0)
    quantizer.set_bits(8)
    assert quantizer.zero_point.unique().tolist() == [85]  # 5 of 15 is 85 of 255
    quantizer.set_bits(4)
    assert quantizer.zero_point.unique().tolist() == [5]


def test_bits_that_no_grid_has_are_refused_and_change_nothing():
    quantizer = fixed(make_spec(4), SHAPE, 0.3)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    for bits in (1, 0, 9):
        with pytest.raises(ValueError, match=r"int1 has no symmetric grid|bits must be 1 to 8"):
            quantizer.set_bits(bits)
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())


def test_the_repr_says_the_format():
    text = repr(LSQ(make_spec(3, "group"), SHAPE))
    assert "int3" in text and "group_size=8" in text
