"""compressed-tensors (vLLM's format) stores and reads the same NVFP4 and MXFP4."""

from __future__ import annotations

import pytest
import torch

from kdqat.quant import LSQ, MinMax
from kdqat.quant.formats import decode
from kdqat.spec import PRESETS, QuantSpec
from kdqat.types import QParams
from tests.quant import packing

ct = pytest.importorskip("compressed_tensors.quantization", reason="the oracle compressed-tensors is not installed")
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam  # noqa: E402

SHAPE = (32, 576)
NVFP4 = ct.QuantizationArgs(
    num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
)


def mx(bits: int) -> ct.QuantizationArgs:
    return ct.QuantizationArgs(num_bits=bits, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)


def weights(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.02


def their_scale(weight: torch.Tensor, args, global_scale=None) -> torch.Tensor:
    """Their scale [O, N], fp32."""
    groups = weight.unflatten(-1, (-1, args.group_size))
    return calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=global_scale)[0].float()


@pytest.mark.parametrize("seed", range(5))
def test_nvfp4s_global_scale_is_theirs_to_the_last_bit_but_one(seed):
    """448 / (absmax / 6) here, 448 * 6 / absmax there."""
    weight = weights(seed)
    ours = MinMax(PRESETS["NVFP4"].weight, weight.shape).second_level(weight)["global_scale"]
    torch.testing.assert_close(ours, generate_gparam(weight.min(), weight.max()), rtol=2**-23, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_under_our_global_scale_nvfp4s_scales_values_and_codes_are_theirs_bit_for_bit(seed):
    weight = weights(seed)
    quantizer = MinMax(PRESETS["NVFP4"].weight, weight.shape)
    global_scale = quantizer.second_level(weight)["global_scale"]
    stored = quantizer.stored_qparams(weight).scale.squeeze(-1)
    theirs = their_scale(weight, NVFP4, global_scale)
    assert torch.equal(stored, theirs / global_scale)
    assert torch.equal(theirs.to(torch.float8_e4m3fn).float(), theirs)
    values = quantizer(weight)
    assert torch.equal(fake_quantize(weight, theirs, None, NVFP4, global_scale=global_scale), values)
    codes = quantizer.codes(weight)
    levels = unpack_fp4_from_uint8(packing.pairs(codes), *SHAPE, dtype=torch.float32)
    assert torch.equal(levels, decode(codes, quantizer.spec))
    assert torch.equal(dequantize(levels, theirs, args=NVFP4, global_scale=global_scale), values)


def test_a_group_of_zeros_has_another_scale_there_and_the_same_values():
    weight = weights(0)
    weight[:, :32] = 0
    quantizer = MinMax(PRESETS["NVFP4"].weight, weight.shape)
    global_scale = quantizer.second_level(weight)["global_scale"]
    theirs = their_scale(weight, NVFP4, global_scale)
    assert (theirs[:, :2] == 0.125).all()  # ours is the smallest e4m3, 2^-9
    assert torch.equal(quantizer.stored_qparams(weight).scale[:, 2:, 0], (theirs / global_scale)[:, 2:])
    assert torch.equal(fake_quantize(weight, theirs, None, NVFP4, global_scale=global_scale), quantizer(weight))


@pytest.mark.parametrize(("name", "bits"), [("MXFP4", 4), ("MXFP6", 6), ("MXFP8", 8)])
def test_under_their_mx_scales_values_are_theirs_bit_for_bit(name, bits):
    weight, args = weights(1), mx(bits)
    theirs = their_scale(weight, args)
    quantizer = LSQ(PRESETS[name].weight, weight.shape)
    quantizer.load_qparams(QParams(theirs.unsqueeze(-1), torch.zeros_like(quantizer.scale)))
    assert torch.equal(quantizer.stored_qparams(weight).scale.squeeze(-1), theirs)
    values = quantizer(weight)
    assert torch.equal(fake_quantize(weight, theirs, None, args), values)
    levels = decode(quantizer.codes(weight), quantizer.spec)
    assert torch.equal(dequantize(levels, theirs, args=args), values)
    if bits == 4:
        codes = packing.pairs(quantizer.codes(weight))
        assert torch.equal(unpack_fp4_from_uint8(codes, *SHAPE, dtype=torch.float32), levels)


@pytest.mark.parametrize(("name", "bits", "edge"), [("MXFP4", 4, 1.75), ("MXFP6", 6, 1.9375), ("MXFP8", 8, 1.75)])
def test_their_mx_scale_is_one_binade_up_where_the_largest_value_would_round_out_of_range(name, bits, edge):
    """OCP's rule, ours, takes the floor of log2; theirs rounds the mantissa first. Both are legal MX."""
    weight = weights(2)
    ours = MinMax(PRESETS[name].weight, weight.shape).stored_qparams(weight).scale.squeeze(-1)
    theirs = their_scale(weight, mx(bits))
    absmax = weight.unflatten(-1, (-1, 32)).abs().amax(-1)
    mantissa = torch.frexp(absmax).mantissa * 2
    assert torch.equal(theirs / ours, torch.where(mantissa >= edge, 2.0, 1.0))
    assert 0 < (theirs != ours).float().mean() < 0.5


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_fp8_values_are_theirs_bit_for_bit(granularity):
    weight = weights(3)
    args = ct.QuantizationArgs(num_bits=8, type="float", strategy=granularity)
    dims = (1,) if granularity == "channel" else (0, 1)
    low, high = weight.amin(dims, keepdim=True), weight.amax(dims, keepdim=True)
    theirs, _ = calculate_qparams(low, high, args)
    quantizer = MinMax(QuantSpec(format="e4m3", granularity=granularity), weight.shape)
    assert torch.equal(quantizer.stored_qparams(weight).scale.flatten(), theirs.flatten())
    assert torch.equal(fake_quantize(weight, theirs, None, args), quantizer(weight))
