"""The arithmetic of fake quantization: scale rules by hand, round trips over all codes, gradients, storage rounding."""

from __future__ import annotations

import pytest
import torch

from kdqat.quant.formats import grid_of
from kdqat.quant.functional import dequantize, fake_quantize, quantize, replace_ste, round_ste
from kdqat.quant.grouping import from_groups, to_groups
from kdqat.quant.ranges import choose_qparams
from kdqat.quant.scales import SCALE_FLOOR, round_scale
from kdqat.spec import QuantSpec
from kdqat.types import QParams
from tests.quant.specs import ALL_GRIDS, make_spec, spec_id

ROWS = torch.tensor([[-3.0, 1.0, 2.0, 0.5], [0.25, 4.0, -1.0, 3.5]]).unsqueeze(1)  # [2, 1, 4]


@pytest.mark.parametrize(
    ("fields", "scale", "zero_point"),
    [
        ({"scale_rule": "absmax"}, [3 / 7, 4 / 7], [0, 0]),
        ({"scale_rule": "absmax_half"}, [3 / 7.5, 4 / 7.5], [0, 0]),
        ({"scale_rule": "signed_max"}, [3 / 8, -4 / 8], [0, 0]),  # the largest value falls on code -8
        ({"symmetric": False}, [5 / 15, 5 / 15], [9, 3]),
        ({"scale_rule": "mean"}, [6.5 / 4 / 7, 8.75 / 4 / 7], [0, 0]),
        ({"narrow": True}, [3 / 7, 4 / 7], [0, 0]),
        ({"bits": 2, "scale_rule": "absmax"}, [3 / 1, 4 / 1], [0, 0]),
        ({"bits": 2, "symmetric": False}, [5 / 3, 5 / 3], [2, 1]),  # 1.8 and 0.6
        ({"bits": 1, "symmetric": False}, [5, 5], [1, 0]),  # 0.6 and 0.2
    ],
    ids=str,
)
def test_every_scale_rule_follows_its_formula(fields, scale, zero_point):
    spec = make_spec(**{"bits": 4, **fields})
    ours = choose_qparams(ROWS, grid_of(spec), spec)
    torch.testing.assert_close(ours.scale, torch.tensor(scale).float().reshape(2, 1, 1))
    assert torch.equal(ours.zero_point, torch.tensor(zero_point).float().reshape(2, 1, 1))


def test_groups_and_tensors_share_scales_as_the_spec_says():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [5.0, 6.0, -7.0, 0.5]])
    group = make_spec(4, "group", group_size=2)
    assert torch.equal(to_groups(weight, group), weight.reshape(2, 2, 2))
    assert torch.equal(from_groups(to_groups(weight, group)), weight)
    scale = choose_qparams(to_groups(weight, group), grid_of(group), group).scale
    torch.testing.assert_close(scale, torch.tensor([[2.0, 4.0], [6.0, 7.0]]).unsqueeze(-1) / 7)
    tensor = make_spec(4, "tensor")
    scale, zero_point = choose_qparams(to_groups(weight, tensor), grid_of(tensor), tensor)
    assert scale.shape == zero_point.shape == (1,) and scale.item() == 1.0


def test_an_asymmetric_range_is_widened_to_hold_zero():
    spec = make_spec(4, symmetric=False)
    groups = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]]).unsqueeze(1)
    scale, zero_point = choose_qparams(groups, grid_of(spec), spec)
    torch.testing.assert_close(scale.flatten(), torch.full((2,), 3 / 15))
    assert zero_point.flatten().tolist() == [0, 15]


@pytest.mark.parametrize(
    ("scale_dtype", "scale", "minimum"), [("float16", [1 / 15, 2 / 15], [1, -3]), ("k6", [2 / 15, 3 / 15], [0, -3])]
)
def test_a_stored_minimum_is_the_lowest_value_and_only_that_of_k_quants_is_widened_to_zero(scale_dtype, scale, minimum):
    spec = QuantSpec(
        format="int4",
        granularity="group",
        group_size=3,
        symmetric=False,
        zero_point="minimum",
        scale_dtype=scale_dtype,
    )
    groups = torch.tensor([[1.0, 1.5, 2.0], [-1.0, -2.0, -3.0]]).unsqueeze(1)
    ours = choose_qparams(groups, grid_of(spec), spec)
    torch.testing.assert_close(ours.scale.flatten(), torch.tensor(scale))
    assert ours.zero_point.flatten().tolist() == minimum


def test_the_range_is_shrunk_before_the_scale_is_taken():
    for fields in ({}, {"scale_rule": "absmax_half"}, {"scale_rule": "signed_max"}, {"symmetric": False}):
        spec = make_spec(4, **fields)
        half, full = (choose_qparams(ROWS, grid_of(spec), spec, shrink) for shrink in (0.5, 1.0))
        torch.testing.assert_close(half.scale, full.scale / 2)
        assert torch.equal(half.zero_point, full.zero_point)


@pytest.mark.parametrize("spec", ALL_GRIDS, ids=spec_id)
@pytest.mark.parametrize("value", [0.0, 0.37, -0.37, 1e-30])
def test_zero_and_constant_groups_give_finite_scales_and_values(spec, value):
    groups = to_groups(torch.full((4, 16), value), spec)
    scale, zero_point = choose_qparams(groups, grid_of(spec), spec)
    assert scale.shape == zero_point.shape == spec.qparam_shape((4, 16))
    assert scale.isfinite().all() and (scale != 0).all()
    if value == 0:
        assert (scale == 1).all() and (zero_point == 0).all()
    values = fake_quantize(groups, QParams(scale, zero_point), grid_of(spec), spec)
    assert values.isfinite().all()
    torch.testing.assert_close(values, groups, rtol=1e-6, atol=1e-30)  # a constant lies on its own grid


@pytest.mark.parametrize("spec", ALL_GRIDS, ids=spec_id)
def test_every_code_survives_dequantize_and_quantize(spec):
    torch.manual_seed(0)
    grid, shape = grid_of(spec), torch.Size((4, 256))
    all_codes = torch.arange(grid.low.item(), grid.high.item() + 1).repeat(256 // 2**spec.bits)
    codes = to_groups(torch.stack([all_codes[torch.randperm(256)] for _ in range(4)]), spec)
    scale = torch.rand(spec.qparam_shape(shape)) + 1e-3
    zero_point = torch.zeros_like(scale)
    if not spec.symmetric:
        zero_point = torch.randint(0, int(grid.high) + 1, scale.shape).float()
    for sign in (1, -1) if spec.symmetric else (1,):  # a signed_max scale may be negative
        qparams = QParams(sign * scale, zero_point)
        assert torch.equal(quantize(dequantize(codes, qparams, spec), qparams, grid, spec), codes)


@pytest.mark.parametrize("spec", ALL_GRIDS, ids=spec_id)
@pytest.mark.parametrize("ste", ["plain", "clipped"])
@pytest.mark.parametrize("shrink", [1.0, 0.5])
def test_fake_quantize_equals_dequantized_codes_bit_for_bit(spec, ste, shrink):
    groups = to_groups(torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) * 0.02, spec)
    groups[0, 0, :4] = torch.tensor([100.0, -100.0, 0.0, -0.0])  # far outside the shrunken range
    scale, zero_point = choose_qparams(groups, grid_of(spec), spec, shrink)
    scale[0] = 1e-3
    qparams, grid = QParams(scale, zero_point), grid_of(spec)
    values = fake_quantize(groups, qparams, grid, spec, ste)
    assert torch.equal(values, dequantize(quantize(groups, qparams, grid, spec), qparams, spec))


def test_rounding_is_half_to_even_and_passes_the_gradient():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997], requires_grad=True)
    y = round_ste(x)
    assert y.tolist() == [-2, -2, 0, 0, 2, 2, 0]
    y.backward(torch.arange(7.0))
    assert torch.equal(x.grad, torch.arange(7.0))


W = torch.tensor([[[-0.95, -0.81, -0.4, 0.0, 0.3, 0.7, 0.71, 2.0]]])  # scale 0.1: -9.5 -8.1 -4 0 3 7 7.1 20
INSIDE = torch.tensor([[[0, 0, 1, 1, 1, 1, 0, 0.0]]])


def gradients(ste: str, zero_point: float = 0.0, *, symmetric: bool = True):
    spec = make_spec(4, symmetric=symmetric)
    groups, scale = W.clone().requires_grad_(), torch.full((1, 1, 1), 0.1, requires_grad=True)
    zero = torch.full((1, 1, 1), zero_point, requires_grad=True)
    values = fake_quantize(groups, QParams(scale, zero), grid_of(spec), spec, ste)
    values.sum().backward()
    return groups.grad, scale.grad, zero.grad


def test_the_plain_ste_passes_every_gradient():
    weight, _, zero_point = gradients("plain")
    assert torch.equal(weight, torch.ones_like(W))
    assert zero_point is None or zero_point == 0


def test_the_clipped_ste_passes_gradients_inside_the_range_only():
    weight, _, _ = gradients("clipped")
    torch.testing.assert_close(weight, INSIDE, rtol=1e-6, atol=0)
    weight, _, _ = gradients("clipped", zero_point=8.0, symmetric=False)  # the same grid, shifted
    torch.testing.assert_close(weight, INSIDE, rtol=1e-6, atol=0)


def test_the_clipped_ste_gives_scale_and_zero_point_the_gradients_of_lsq_plus():
    steps = W / 0.1
    by_hand = torch.where(steps < -8, -8, torch.where(steps > 7, 7, steps.round() - steps)).sum()
    _, scale, _ = gradients("clipped")
    torch.testing.assert_close(scale.squeeze(), by_hand, rtol=1e-4, atol=1e-5)
    _, _, zero_point = gradients("clipped", zero_point=8.0, symmetric=False)
    torch.testing.assert_close(zero_point.squeeze(), torch.tensor(-0.1 * 4))  # four weights are clipped


@pytest.mark.parametrize("gradient", [1e-9, 1e5, -3.7e-12, 7e4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounding_to_a_storage_dtype_leaves_any_gradient_exactly_as_it_is(gradient, dtype):
    x = torch.tensor([0.1, 0.0123, 3.3], requires_grad=True)
    y = replace_ste(x, round_scale(dtype, x.detach(), {}))
    assert y.dtype == torch.float32 and torch.equal(y, x.detach().to(getattr(torch, dtype)).float())
    y.backward(torch.full((3,), gradient))
    assert torch.equal(x.grad, torch.full((3,), gradient))


@pytest.mark.parametrize(("gradient", "becomes"), [(1e-9, 0.0), (1e5, float("inf"))])
def test_a_plain_cast_to_fp16_would_lose_the_gradient(gradient, becomes):
    """The trap that `replace_ste` is there for: autograd casts the gradient as well."""
    x = torch.tensor([0.1], requires_grad=True)
    x.to(torch.float16).float().backward(torch.tensor([gradient]))
    assert x.grad.item() == becomes


def test_a_plain_cast_to_fp8_would_lose_every_weight_gradient_and_ours_keeps_it():
    """A real weight of 0.02 under an absmax scale of 1e-4, a real gradient of 1e-3: in fp8 their product is 0."""
    spec = QuantSpec(format="e4m3")
    weight = (torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(0)) * 0.02).requires_grad_()
    qparams = choose_qparams(weight.detach(), grid_of(spec), spec)
    upstream = torch.full_like(weight, 1e-3)
    cast = (weight / qparams.scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * qparams.scale
    cast.backward(upstream)
    assert (weight.grad == 0).all()
    weight.grad = None
    ours = fake_quantize(weight, qparams, grid_of(spec), spec)
    assert torch.equal(ours, cast)
    ours.backward(upstream)
    torch.testing.assert_close(weight.grad, upstream)


def test_a_scale_is_kept_off_zero_with_its_sign_and_its_gradient():
    scale = torch.tensor([0.0, 1e-12, -1e-12, 0.5, -0.5, SCALE_FLOOR], requires_grad=True)
    expected = torch.tensor([SCALE_FLOOR, SCALE_FLOOR, -SCALE_FLOOR, 0.5, -0.5, SCALE_FLOOR])
    for dtype in ("float32", "float16"):  # the floor is a number that fp16 has
        assert torch.equal(round_scale(dtype, scale.detach(), {}), expected)
    replace_ste(scale, round_scale("float16", scale.detach(), {})).sum().backward()
    assert torch.equal(scale.grad, torch.ones(6))


def test_a_negative_scale_puts_the_largest_positive_value_on_the_lowest_code():
    spec = make_spec(4, scale_rule="signed_max")
    groups = torch.tensor([[[0.8, -0.7, 0.31, -0.09]]])
    scale, zero_point = choose_qparams(groups, grid_of(spec), spec)
    codes = quantize(groups, QParams(scale, zero_point), grid_of(spec), spec)
    assert scale.item() == pytest.approx(-0.1) and codes.flatten().tolist() == [-8, 7, -3, 1]
    values = fake_quantize(groups, QParams(scale, zero_point), grid_of(spec), spec)
    torch.testing.assert_close(values.flatten(), torch.tensor([0.8, -0.7, 0.3, -0.1]))
