"""torchao's MX, NVFP4 and float8 prototypes compute the same scales, codes and values."""

from __future__ import annotations

import pytest
import torch

from kdqat.quant import LSQ, MinMax
from kdqat.quant.formats import decode, encode, grid_of
from kdqat.spec import PRESETS, QuantSpec
from kdqat.types import QParams
from tests.quant import packing

mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao's MX is not installed")
from torchao.prototype.mx_formats import constants, kernels, nvfp4_tensor  # noqa: E402
from torchao.quantization.quant_primitives import _choose_scale_float8, _quantize_affine_float8  # noqa: E402

SHAPE = (32, 576)
ELEMENTS = {
    "MXFP4": torch.float4_e2m1fn_x2,
    "MXFP6": constants.DTYPE_FP6_E2M3,
    "MXFP6_E3M2": constants.DTYPE_FP6_E3M2,
    "MXFP8": torch.float8_e4m3fn,
    "MXFP8_E5M2": torch.float8_e5m2,
}


def weights(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("seed", range(3))
def test_mx_scales_codes_and_values_are_theirs_bit_for_bit(name, seed):
    weight = weights(seed)
    quantizer = MinMax(PRESETS[name].weight, weight.shape)
    scale, data = mx_tensor.to_mx(weight, ELEMENTS[name], 32)
    assert torch.equal(packing.e8m0(quantizer.stored_qparams(weight).scale.squeeze(-1)), scale.view(torch.uint8))
    codes = quantizer.codes(weight)
    theirs = packing.pairs(codes) if name == "MXFP4" else codes.to(torch.uint8)
    assert torch.equal(data.view(torch.uint8), theirs)
    read = mx_tensor.to_dtype(data, scale, ELEMENTS[name], 32, torch.float32)
    assert torch.equal(read, quantizer(weight))


@pytest.mark.parametrize(
    ("name", "write", "read"),
    [
        ("e2m1", kernels.f32_to_f4_unpacked, kernels.f4_unpacked_to_f32),
        ("e2m3", kernels.f32_to_f6_e2m3_unpacked, kernels.f6_e2m3_unpacked_to_f32),
        ("e3m2", kernels.f32_to_f6_e3m2_unpacked, kernels.f6_e3m2_unpacked_to_f32),
    ],
)
def test_every_code_of_the_small_floats_means_the_same_number(name, write, read):
    spec = QuantSpec(format=name)
    codes = torch.arange(2**spec.bits)
    values = decode(codes, spec)
    assert torch.equal(read(codes.to(torch.uint8)), values)
    assert torch.equal(write(values), encode(values, grid_of(spec)).to(torch.uint8))


def test_nvfp4_in_one_level_gives_their_scales_and_codes():
    weight = weights(0) * 50
    spec = QuantSpec(format="e2m1", granularity="group", group_size=16, scale_dtype="e4m3")
    quantizer = MinMax(spec, weight.shape)
    scale, data = nvfp4_tensor.nvfp4_quantize(weight)
    assert torch.equal(quantizer.stored_qparams(weight).scale.squeeze(-1), scale.float())
    differing = (packing.pairs(quantizer.codes(weight)) != data).float().mean()
    assert differing < 1e-3  # they multiply by 1 / scale: a value on a threshold may fall to the other side


def test_nvfp4_in_two_levels_gives_their_values_under_their_tensor_scale():
    """They store 1 / our global scale, and multiply where compressed-tensors and we divide."""
    weight = weights(1)
    per_tensor = nvfp4_tensor.per_tensor_amax_to_scale(weight.abs().max())
    scale, data = nvfp4_tensor.nvfp4_quantize(weight, per_tensor_scale=per_tensor)
    quantizer = LSQ(PRESETS["NVFP4"].weight, weight.shape)
    wanted = MinMax(PRESETS["NVFP4"].weight, weight.shape).qparams(quantizer.groups(weight))
    quantizer.load_qparams(wanted, {"global_scale": (1 / per_tensor).reshape(1)})
    ours = quantizer.stored_qparams(weight).scale.squeeze(-1) * quantizer.get_buffer("global_scale")
    same = ours.to(torch.float8_e4m3fn).float() == scale.float()
    assert same.float().mean() > 0.995
    differing = packing.pairs(quantizer.codes(weight)).unflatten(-1, (-1, 8)) != data.unflatten(-1, (-1, 8))
    assert differing[same].float().mean() < 1e-3


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_float8_scales_and_codes_are_theirs(granularity):
    weight = weights(2)
    block = list(SHAPE) if granularity == "tensor" else [1, SHAPE[1]]
    theirs = _choose_scale_float8(weight, block)
    quantizer = LSQ(QuantSpec(format="e4m3", granularity=granularity), weight.shape)
    ours = MinMax(quantizer.spec, weight.shape).stored_qparams(weight).scale
    torch.testing.assert_close(ours.flatten(), theirs.flatten(), rtol=2**-23, atol=0)  # 1 / 448 once more rounded
    quantizer.load_qparams(QParams(theirs.reshape(ours.shape), torch.zeros_like(ours)))
    data = _quantize_affine_float8(weight, theirs)
    assert torch.equal(quantizer.codes(weight).to(torch.uint8), data.view(torch.uint8))
    assert torch.equal(quantizer(weight), data.float() * theirs)
