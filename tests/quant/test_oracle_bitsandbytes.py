"""bitsandbytes stores the same NF4: codes, double-quantized scales and dequantized values, bit for bit."""

from __future__ import annotations

import pytest
import torch

from kdqat.quant import MinMax
from kdqat.quant.dynamic_map import DYNAMIC_MAP
from kdqat.quant.scales import encode_double
from kdqat.spec import PRESETS, number_format
from kdqat.spec.formats import NF4

bnb = pytest.importorskip("bitsandbytes.functional", reason="the oracle bitsandbytes is not installed")

SHAPES = [(8, 64), (64, 576), (33, 1024)]  # 8, 576 and 528 scales: less than a block of 256, and parts of one
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def weights(shape: tuple[int, int]) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02
    weight[0, :64] = 0
    return weight


def unpacked(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Its codes: the first value of two in the high nibble."""
    return torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1).reshape(shape).to(torch.int16)


def packed(codes: torch.Tensor) -> torch.Tensor:
    first, second = codes.to(torch.uint8).flatten().unflatten(0, (-1, 2)).unbind(1)
    return (first << 4 | second).reshape(-1, 1)


def test_the_codebook_is_theirs_to_the_last_bit():
    assert torch.equal(torch.tensor(NF4), bnb.get_4bit_type("nf4", device="cpu"))
    assert number_format("nf4").levels == NF4


@every_shape
def test_nf4_codes_scales_and_values_are_theirs(shape):
    weight = weights(shape)
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = MinMax(PRESETS["NF4"].weight, weight.shape)
    scale = ours.stored_qparams(weight).scale
    codes = ours.codes(weight)
    assert torch.equal(codes, unpacked(theirs, shape))
    assert torch.equal(packed(codes), theirs)
    full = scale.flatten()[state.absmax != 0]  # a block of zeros has scale 1 here and 0 there
    assert torch.equal(full, state.absmax[state.absmax != 0])
    assert torch.equal(ours(weight), bnb.dequantize_4bit(theirs, state))


def doubled(weight: torch.Tensor):
    """(our quantizer, our scale codes, their codes, their state) of double quantization."""
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = MinMax(PRESETS["NF4_DOUBLE"].weight, weight.shape)
    absmax = weight.reshape(-1, 64).abs().amax(1)
    return ours, encode_double(absmax, ours.second_level(weight)).to(torch.uint8), theirs, state


@every_shape
def test_double_quantized_scales_are_theirs_code_by_code(shape):
    """Their CPU kernel finds the code through a table: its thresholds are off by up to 2e-5, ours are the middles."""
    weight = weights(shape)
    ours, codes, _, state = doubled(weight)
    second = ours.second_level(weight)
    assert torch.equal(torch.tensor(DYNAMIC_MAP), state.state2.code)
    assert torch.equal(second["scale_mean"], state.offset.reshape(1))
    assert torch.equal(second["scale_absmax"], state.state2.absmax)
    differing = codes != state.absmax
    assert differing.float().mean() < 0.01
    middles = (state.state2.code[1:] + state.state2.code[:-1]) / 2
    blocks = state.state2.absmax.repeat_interleave(256)[: codes.numel()]
    normal = ((weight.reshape(-1, 64).abs().amax(1) - state.offset) / blocks)[differing]
    assert ((normal.unsqueeze(1) - middles).abs().amin(1) < 2e-5).all()
    read = bnb.dequantize_blockwise(codes, state.state2) + state.offset
    assert torch.equal(ours.stored_qparams(weight).scale.flatten(), read)


@every_shape
def test_they_read_our_double_quantized_weights_as_we_do(shape):
    """Few codes differ: they round weights under the scale before its own rounding, we under the scale that is read."""
    weight = weights(shape)
    ours, scale_codes, theirs, state = doubled(weight)
    codes = ours.codes(weight)
    read_theirs = bnb.dequantize_4bit(theirs, state)
    state.absmax = scale_codes
    assert torch.equal(bnb.dequantize_4bit(packed(codes), state), ours(weight))
    differing = codes != unpacked(theirs, shape)
    assert differing.float().mean() < 0.01 and (codes - unpacked(theirs, shape)).abs().max() <= 1
    assert (ours(weight) - weight).square().sum() <= (read_theirs - weight).square().sum() * (1 + 1e-6)
