"""llama.cpp's own Python package reads our codes and scales as we do, and rounds as we do where the rules agree.

Where they do not: it rounds weights under the scale before that is cast to fp16, we under the scale that is read back;
it rounds halves away from zero (or up), we to even.
"""

from __future__ import annotations

import pytest
import torch

from kdqat.quant import MinMax
from kdqat.spec import PRESETS, QuantSpec
from tests.quant import packing

quants = pytest.importorskip("gguf.quants", reason="the oracle gguf is not installed")
np = pytest.importorskip("numpy")

SHAPE = (32, 1024)


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.02


def ours(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes [blocks, 32], scale, zero point [blocks], values) of a preset."""
    quantizer = MinMax(PRESETS[name].weight, weight.shape)
    scale, zero_point = quantizer.stored_qparams(weight)
    return quantizer.codes(weight).reshape(-1, 32), scale.flatten(), zero_point.flatten(), quantizer(weight)


def blocks(name: str, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> np.ndarray:
    pack = {"GGUF_Q4_0": packing.q4_0, "GGUF_Q8_0": packing.q8_0, "MXFP4": packing.mxfp4}
    return packing.q4_1(codes, scale, zero_point) if name == "GGUF_Q4_1" else pack[name](codes, scale)


def codec(name: str) -> type:
    return getattr(quants, name.removeprefix("GGUF_"))


def their_codes(name: str, raw: np.ndarray) -> torch.Tensor:
    """Codes [blocks, 32] of packed blocks."""
    head = {"GGUF_Q4_0": 2, "GGUF_Q4_1": 4, "GGUF_Q8_0": 2, "MXFP4": 1}[name]
    data = torch.from_numpy(raw[:, head:].copy())
    if name == "GGUF_Q8_0":
        return data.view(torch.int8).to(torch.int16)
    codes = torch.cat((data & 15, data >> 4), dim=1).to(torch.int16)
    return codes - 8 if name == "GGUF_Q4_0" else codes


FORMATS = ["GGUF_Q4_0", "GGUF_Q4_1", "GGUF_Q8_0", "MXFP4"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_our_codes_in_their_blocks_are_read_as_our_values_bit_for_bit(name, seed):
    weight = weights(seed)
    weight[0, :32], weight[1, :64] = 0, 1e-3
    codes, scale, zero_point, values = ours(name, weight)
    raw = blocks(name, codes, scale, zero_point)
    assert raw.nbytes * 8 == PRESETS[name].weight.storage_bits(SHAPE)
    assert torch.equal(torch.from_numpy(codec(name).dequantize_blocks(raw)).reshape(SHAPE), values)
    assert torch.equal(their_codes(name, raw), codes)


@pytest.mark.parametrize("name", FORMATS)
def test_their_rounding_gives_our_codes_where_the_scale_is_a_number_of_its_dtype(name):
    """Each block's extreme value is chosen so that the scale is the same before and after its cast."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.rand(1024, 32, generator=generator) * 2 - 1
    power = torch.exp2(torch.randint(-12, -5, (1024, 1), generator=generator).float())
    if name == "GGUF_Q4_0":
        steps = steps * 7.4
        steps[:, 5] = -8
    elif name == "GGUF_Q8_0":
        steps = steps * 126
        steps[:, 5] = 127
    elif name == "GGUF_Q4_1":
        steps = (steps + 1) * 7.5
        steps[:, 5], steps[:, 6] = 0, 15
        steps = steps - 4
    weight = (steps * power).reshape(SHAPE)
    codes, scale, zero_point, _ = ours(name, weight)
    raw = codec(name).quantize_blocks(weight.reshape(-1, 32).numpy())
    theirs = their_codes(name, raw)
    if name == "MXFP4":  # they store +0 for both zeros
        codes = torch.where(codes == 8, 0, codes)
    assert (codes != theirs).sum() == 0
    assert np.array_equal(raw, blocks(name, theirs, scale, zero_point))


@pytest.mark.parametrize(("name", "share"), [("GGUF_Q4_0", 1e-3), ("GGUF_Q4_1", 3e-3), ("GGUF_Q8_0", 1e-2)])
def test_on_any_weights_few_codes_differ_and_then_by_one(name, share):
    """Measured: 0.04 % of the codes of Q4_0, 0.15 % of Q4_1, 0.7 % of Q8_0."""
    weight = weights(7)
    codes, scale, zero_point, values = ours(name, weight)
    raw = codec(name).quantize_blocks(weight.reshape(-1, 32).numpy())
    assert np.array_equal(raw[:, :2], blocks(name, codes, scale, zero_point)[:, :2])  # the scales are the same
    theirs = their_codes(name, raw)
    assert 0 < (codes != theirs).float().mean() < share and (codes - theirs).abs().max() <= 1
    read = torch.from_numpy(codec(name).dequantize_blocks(raw)).reshape(SHAPE)
    assert (values - weight).square().sum() <= (read - weight).square().sum()  # ours fit the scale that is read


def test_ties_go_to_even_here_and_away_from_zero_there():
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([-8, 0.5, 1.5, 2.5, -0.5, -1.5])
    quantizer = MinMax(PRESETS["GGUF_Q4_0"].weight, weight.shape)
    assert quantizer.codes(weight)[0, :6].tolist() == [-8, 0, 2, 2, 0, -2]
    assert their_codes("GGUF_Q4_0", quants.Q4_0.quantize_blocks(weight.numpy()))[0, :6].tolist() == [-8, 1, 2, 3, 0, -1]


def test_q4_k_reads_our_super_blocks_as_our_values_bit_for_bit():
    weight = weights(3)
    weight[0, :32] = 0
    weight[1] = weight[1].abs()  # minima of 0
    quantizer = MinMax(PRESETS["GGUF_Q4_K"].weight, weight.shape)
    scale, minimum = quantizer.stored_qparams(weight)
    second = quantizer.second_level(weight)
    super_scale, super_minimum = (second[name].flatten() for name in ("super_scale", "super_minimum"))
    scales = (scale.reshape(-1, 8) / super_scale.unsqueeze(1)).round()
    minima = (-minimum.reshape(-1, 8) / super_minimum.unsqueeze(1)).round()
    raw = packing.q4_k(quantizer.codes(weight).reshape(-1, 8, 32), scales, minima, super_scale, super_minimum)
    assert raw.nbytes * 8 == PRESETS["GGUF_Q4_K"].weight.storage_bits(SHAPE)
    assert torch.equal(torch.from_numpy(quants.Q4_K.dequantize_blocks(raw)).reshape(SHAPE), quantizer(weight))


def test_nvfp4_without_a_global_scale_is_read_as_our_values_bit_for_bit():
    spec = QuantSpec(format="e2m1", granularity="group", group_size=16, scale_dtype="e4m3")
    weight = weights(4) * 50  # llama.cpp puts a scale for the tensor into a tensor of its own
    quantizer = MinMax(spec, weight.shape)
    scale = quantizer.stored_qparams(weight).scale.reshape(-1, 4)
    raw = packing.nvfp4_gguf(quantizer.codes(weight).reshape(-1, 64), scale)
    read = torch.from_numpy(quants.NVFP4.dequantize_blocks(raw).astype(np.float32)).reshape(SHAPE)
    assert torch.equal(read, quantizer(weight))
    assert raw.nbytes * 8 == spec.storage_bits(SHAPE)
