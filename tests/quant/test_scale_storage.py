"""What a scale is stored as: rounding is idempotent, the bits counted are those stored, and nothing becomes zero."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from kdqat.initializers import MSEGrid
from kdqat.quant import LSQ, MinMax
from kdqat.quant.scales import (
    SCALE_FLOOR,
    decode_double,
    encode_double,
    fit,
    round_minimum,
    round_scale,
    second_level_shapes,
)
from kdqat.spec import PRESETS, QuantSpec, ScaleDtype
from tests.quant import packing

DTYPES = get_args(ScaleDtype)
SHAPE = (12, 16, 1)  # [O, N, 1]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
nested = pytest.mark.parametrize("name", ["NVFP4", "NF4_DOUBLE", "GGUF_Q4_K"])


def scales(spread: float = 1.0) -> torch.Tensor:
    return torch.exp2(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * spread - 6)


def spec_of(dtype: str) -> QuantSpec:
    minimum = {"symmetric": False, "zero_point": "minimum"} if dtype == "k6" else {}
    return QuantSpec(format="int4", granularity="group", group_size=4, scale_dtype=dtype, **minimum)


@every_dtype
@pytest.mark.parametrize("spread", [0.1, 1.0, 8.0])
def test_what_was_rounded_once_is_rounded_to_itself(dtype, spread):
    scale = scales(spread)
    second = fit(dtype, scale, -scale)
    stored = round_scale(dtype, scale, second)
    assert stored.shape == SHAPE and stored.dtype == torch.float32
    assert torch.equal(round_scale(dtype, stored, second), stored)
    if dtype in ("float32", "float16", "bfloat16", "k6"):
        minimum = round_minimum(dtype, -scale, second)
        assert minimum.shape == SHAPE and torch.equal(round_minimum(dtype, minimum, second), minimum)
    if spread == 0.1:  # scales of one magnitude are stored to a few per cent at worst; powers of two within sqrt(2)
        error = (stored / scale - 1).abs().max()
        assert error <= {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "e8m0": 0.42}.get(dtype, 0.07)


@every_dtype
def test_the_second_level_has_the_shapes_that_are_declared_and_the_quantizer_holds_them(dtype):
    second = fit(dtype, scales(), -scales())
    declared = second_level_shapes(dtype, SHAPE)
    assert {name: tuple(tensor.shape) for name, tensor in second.items()} == declared
    assert all(tensor.dtype == torch.float32 for tensor in second.values())
    quantizer = LSQ(spec_of(dtype), torch.Size((12, 64)))
    assert {name: tuple(quantizer.get_buffer(name).shape) for name in declared} == declared
    assert (dtype in ("e4m3_global", "double", "k6")) == bool(declared)


def stored_bytes(dtype: str, scale: torch.Tensor, second: dict[str, torch.Tensor]) -> tuple[int, torch.Tensor]:
    """(bytes of an actual encoding, the scales read back from it)."""
    extra = 4 * sum(tensor.numel() for tensor in second.values())
    if dtype in ("float32", "float16", "bfloat16"):
        encoded = round_scale(dtype, scale, second).to(getattr(torch, dtype))
        return encoded.nbytes, encoded.float()
    if dtype == "e8m0":
        encoded = packing.e8m0(round_scale(dtype, scale, second))
        return encoded.nbytes, encoded.view(torch.float8_e8m0fnu).float()
    if dtype in ("e4m3", "e4m3_global"):
        divisor = second.get("global_scale", torch.ones(1))
        encoded = (round_scale(dtype, scale, second) * divisor).to(torch.float8_e4m3fn)
        return encoded.nbytes + extra, encoded.float() / divisor
    assert dtype == "double"
    encoded = encode_double(scale, second).to(torch.uint8)
    return encoded.nbytes + extra, decode_double(encoded.long(), second).reshape(scale.shape)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "k6"])
def test_the_bits_that_are_counted_are_those_of_an_encoding_that_reads_back(dtype):
    scale = torch.cat((scales(),) * 3)  # 576 of them: two whole blocks of double quantization and a part of one
    second = fit(dtype, scale)
    num_bytes, again = stored_bytes(dtype, scale, second)
    assert torch.equal(again, round_scale(dtype, scale, second))
    assert spec_of(dtype).storage_bits((36, 64)) == 36 * 64 * 4 + 8 * num_bytes


def test_k6_is_six_bits_for_scales_and_minima_and_two_halves_for_eight_groups():
    scale, minimum = scales(), -scales().flip(0) * 3
    second = fit("k6", scale, minimum)
    codes = (round_scale("k6", scale, second).reshape(12, 2, 8) / second["super_scale"]).round()
    minima = (-round_minimum("k6", minimum, second).reshape(12, 2, 8) / second["super_minimum"]).round()
    assert codes.min() >= 1 and codes.max() == 63 and minima.min() >= 0 and minima.max() == 63
    assert torch.equal((codes * second["super_scale"]).reshape(SHAPE), round_scale("k6", scale, second))
    for name in ("super_scale", "super_minimum"):
        assert torch.equal(second[name].half().float(), second[name])
    largest = scale.reshape(12, 2, 8).amax(2, keepdim=True)
    torch.testing.assert_close(second["super_scale"], largest / 63, rtol=2**-11, atol=0)
    num_bytes = packing.six_bits(codes.reshape(24, 8), minima.reshape(24, 8)).nbytes + 2 * 2 * 24
    assert spec_of("k6").storage_bits((12, 64)) == 12 * 64 * 4 + 8 * num_bytes


def test_a_positive_minimum_is_stored_as_zero_by_k6_because_its_range_holds_zero():
    second = fit("k6", scales(), torch.full(SHAPE, 0.5))
    assert (round_minimum("k6", torch.full(SHAPE, 0.5), second) == 0).all()


def test_e8m0_scales_are_exact_powers_of_two_that_torchs_e8m0_holds():
    stored = round_scale("e8m0", scales(20.0), {})
    assert torch.equal(stored, torch.exp2(torch.log2(stored).round()))
    assert torch.equal(stored.to(torch.float8_e8m0fnu).float(), stored)
    exponents = torch.arange(-126, 128, dtype=torch.float32)
    assert torch.equal(round_scale("e8m0", torch.exp2(exponents), {}), torch.exp2(exponents))
    assert round_scale("e8m0", torch.tensor([1.41, 1.42, 5.6, 5.7]), {}).tolist() == [1, 2, 4, 8]  # nearest in log2


@every_dtype
def test_extreme_scales_are_stored_as_finite_numbers_that_are_not_zero(dtype):
    scale = torch.tensor([0.0, 1e-45, 1e-30, 1e-8, 1.0, 1e8, 1e30, 1e35]).repeat(24).reshape(SHAPE)
    for part in (scale, scale[:, :8].repeat(1, 2, 1) * 0, scale * 0 + 1e30, scale * 0 + 1e-30):
        second = fit(dtype, part, -part)
        assert all(tensor.isfinite().all() for tensor in second.values())
        stored = round_scale(dtype, part, second)
        assert stored.isfinite().all() and (stored != 0).all()
        assert dtype == "double" or (stored > 0).all()  # where the mean is far larger, 0 lies within rounding


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_plain_scale_keeps_its_sign_and_stays_above_the_floor(dtype):
    scale = torch.tensor([-1e-9, -0.0, 0.0, 1e-9, -3.0, 3.0])
    assert round_scale(dtype, scale, {}).tolist() == [-SCALE_FLOOR, *[SCALE_FLOOR] * 3, -3, 3]


@pytest.mark.parametrize("dtype", ["e8m0", "e4m3", "e4m3_global", "k6"])
def test_a_learned_scale_that_turned_negative_is_stored_as_the_smallest_there_is(dtype):
    second = fit(dtype, scales(), -scales())
    smallest = round_scale(dtype, torch.full(SHAPE, 1e-45), second)
    assert torch.equal(round_scale(dtype, -scales(), second), smallest) and (smallest > 0).all()


@nested
def test_groups_of_zeros_stay_zero_and_leave_the_scales_of_the_others_alone(name):
    spec = PRESETS[name].weight
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0)) * 1e-3
    holed = weight.clone()
    holed[3], holed[:, :64] = 0, 0
    plain, other = (MinMax(spec, weight.shape)(x) for x in (weight, holed))
    assert (other[holed == 0] == 0).all()
    kept = holed != 0
    error, before = ((x[kept] - weight[kept]).square().mean() for x in (other, plain))
    assert error < 1.02 * before
    if name == "NVFP4":  # one number for the tensor: the others do not change at all
        assert torch.equal(other[kept], plain[kept])


@nested
def test_a_tensor_of_zeros_stays_zero_and_has_finite_scales_and_gradients(name):
    weight = torch.zeros(16, 512, requires_grad=True)
    for method in (LSQ, MinMax):
        quantizer = method(PRESETS[name].weight, weight.shape)
        if method is LSQ:
            quantizer.load_qparams(MSEGrid(num_steps=3).search(weight.detach(), quantizer))
        values = quantizer(weight)
        values.sum().backward()
        assert (values == 0).all() and weight.grad.isfinite().all()
        assert quantizer.stored_qparams(weight).scale.isfinite().all()


@pytest.mark.parametrize("name", PRESETS)
def test_the_stored_scales_of_every_preset_are_fixed_points_and_the_values_too(name):
    """Quantizing what was read back with its own scales changes nothing."""
    spec = PRESETS[name].weight
    weight = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    quantizer = LSQ(spec, weight.shape)
    quantizer.load_qparams(MinMax(spec, weight.shape).qparams(quantizer.groups(weight)))
    values, stored = quantizer(weight).detach(), quantizer.stored_qparams(weight)
    assert torch.equal(quantizer.values(quantizer.codes(weight), stored), values)
    again = LSQ(spec, weight.shape)
    again.load_qparams(type(stored)(*(x.detach() for x in stored)), quantizer.second_level(weight))
    assert all(torch.equal(a, b) for a, b in zip(again.stored_qparams(values), stored, strict=True))
    if spec.zero_point != "minimum":  # (scale * code + minimum - minimum) / scale is rounded twice
        assert torch.equal(again(values), values)
