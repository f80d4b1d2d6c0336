"""Layouts against golden words, against the formats' own packers, and back again."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale, decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

from kdqat.quant.layouts import awq, fp4, gptq, pack_quantized, words

NUMBERS = torch.Generator().manual_seed(0)
every_width = pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])


def unsigned(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=NUMBERS)


def hexadecimal(packed: torch.Tensor) -> list[str]:
    return [f"{int(word) & 0xFFFFFFFF:08x}" for word in packed.flatten()]


@every_width
@pytest.mark.parametrize("n", [1, 8, 31, 32, 33, 64, 172])
def test_words_give_back_every_code_they_were_packed_from(bits, n):
    codes = unsigned(bits, 3, n)
    packed = words.pack_words(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (3, -(-n * bits // 32))
    assert torch.equal(words.unpack_words(packed, bits, n).long(), codes)


def test_a_code_that_does_not_fit_and_a_wrong_number_of_words_are_refused():
    with pytest.raises(ValueError, match="do not fit 4 unsigned bits"):
        words.pack_words(torch.tensor([[16]]), 4)
    with pytest.raises(ValueError, match="do not fit"):
        words.pack_words(torch.tensor([[-1]]), 4)
    with pytest.raises(ValueError, match="take 1 words, not 2"):
        words.unpack_words(torch.zeros(1, 2, dtype=torch.int32), 4, 8)


def test_golden_words_of_each_format():
    row = torch.arange(-8, 8).reshape(1, 16)
    assert hexadecimal(pack_quantized.pack_weight(row, 4, symmetric=True)) == ["76543210", "fedcba98"]
    assert hexadecimal(pack_quantized.pack_zero_points(torch.arange(8).reshape(8, 1), 4)) == ["76543210"]
    assert hexadecimal(gptq.pack_weight(torch.arange(8).reshape(1, 8), 4)) == ["76543210"]
    eights = torch.full((8, 1), 8)
    assert hexadecimal(gptq.pack_zero_points(eights, 4, version=1)) == ["77777777"]
    assert hexadecimal(gptq.pack_zero_points(eights, 4, version=2)) == ["88888888"]
    assert hexadecimal(awq.pack(torch.arange(8).reshape(8, 1))) == ["75316420"]
    assert fp4.pack_fp4(torch.tensor([[1, 2]])).item() == 0x21


@every_width
def test_pack_quantized_is_what_compressed_tensors_packs_and_unpacks(bits):
    codes = unsigned(bits, 24, 172)
    signed, half = (codes - 2 ** (bits - 1)).to(torch.int8), 2 ** (bits - 1)
    packed = pack_quantized.pack_weight(signed.long(), bits, symmetric=True)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(packed, pack_quantized.pack_weight(codes, bits, symmetric=False))
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size((24, 172))), signed)
    assert torch.equal(pack_quantized.unpack_weight(packed, bits, 172, symmetric=True).long(), codes - half)
    zeros = pack_quantized.pack_zero_points(codes[:, :5], bits)
    assert torch.equal(zeros, pack_to_int32(signed[:, :5], bits, packed_dim=0))
    assert torch.equal(pack_quantized.unpack_zero_points(zeros, bits, 24).long(), codes[:, :5])


def test_gptq_in_three_bits_is_the_pattern_of_ten_one_ten_one_ten():
    codes = unsigned(3, 1, 32)[0]
    expected = [0, 0, 0]  # AutoGPTQ's qlinear, written out
    for i in range(10):
        expected[0] |= int(codes[i]) << (3 * i)
    expected[0] |= (int(codes[10]) << 30) & 0xFFFFFFFF
    expected[1] |= (int(codes[10]) >> 2) & 1
    for i in range(10):
        expected[1] |= int(codes[11 + i]) << (3 * i + 1)
    expected[1] |= (int(codes[21]) << 31) & 0xFFFFFFFF
    expected[2] |= (int(codes[21]) >> 1) & 3
    for i in range(10):
        expected[2] |= int(codes[22 + i]) << (3 * i + 2)
    assert hexadecimal(gptq.pack_weight(codes[None], 3)) == [f"{word:08x}" for word in expected]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_gives_back_weights_and_zero_points(bits, version):
    codes, zeros = unsigned(bits, 64, 96), unsigned(bits, 64, 3).clamp(min=1)
    assert torch.equal(gptq.unpack_weight(gptq.pack_weight(codes, bits), bits, 96).long(), codes)
    qzeros = gptq.pack_zero_points(zeros, bits, version=version)
    assert qzeros.shape == (3, 64 * bits // 32)
    assert torch.equal(gptq.unpack_zero_points(qzeros, bits, 64, version=version).long(), zeros)


def test_gptq_version_1_refuses_a_zero_point_of_0():
    with pytest.raises(ValueError, match="use gptq_v2"):
        gptq.pack_zero_points(torch.zeros(8, 1), 4, version=1)


def test_awq_is_what_compressed_tensors_converts_from():
    codes = unsigned(4, 24, 10)
    packed = awq.pack(codes)
    assert packed.shape == (10, 3) and torch.equal(awq.unpack(packed).long(), codes)
    weight, zeros = AutoAWQConverter.unpack_awq(packed, packed, 4)
    theirs, _ = AutoAWQConverter.reverse_awq_order(weight, zeros, 4)
    assert torch.equal((theirs & 15).t().long(), codes)
    with pytest.raises(ValueError, match="172 outputs are no multiple of 8"):
        awq.pack(unsigned(4, 172, 2))


def test_fp4_is_what_compressed_tensors_packs_and_unpacks():
    codes = unsigned(4, 6, 32)
    packed = fp4.pack_fp4(codes)
    assert torch.equal(fp4.unpack_fp4(packed).long(), codes)
    values = unpack_fp4_from_uint8(packed, 6, 32, dtype=torch.float32)
    assert torch.equal(pack_fp4_to_uint8(values), packed)
    assert values[codes == 7].unique().tolist() == [6.0] and values[codes == 15].unique().tolist() == [-6.0]


def test_scales_of_mxfp4_and_nvfp4_come_back_as_they_were():
    exponents = torch.arange(-126, 128)
    powers = torch.ldexp(torch.ones(254), exponents)
    stored = fp4.encode_e8m0(powers)
    assert torch.equal(stored.long(), exponents + 127) and torch.equal(fp4.decode_e8m0(stored), powers)
    assert torch.equal(compress_mx_scale(powers, torch.uint8), stored)
    assert torch.equal(decompress_mx_scale(stored).float(), powers)
    eights = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for divisor in (1.0, 3.7, 1234.5, 0.0123):
        scale = fp4.decode_e4m3(eights, torch.tensor([divisor]))
        assert torch.equal(fp4.encode_e4m3(scale, torch.tensor([divisor])).view(torch.uint8), eights.view(torch.uint8))
