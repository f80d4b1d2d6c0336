"""FP4 (e2m1) in bytes, and its scales, as compressed-tensors stores NVFP4 and MXFP4.

Two codes to a byte, the even input in the low nibble; a code is sign, two exponent bits, one mantissa bit, as
`formats.encode` gives it. A scale of NVFP4 is an e4m3 number that a global fp32 scale divides; one of MXFP4 is the byte
e + 127 of a power of two 2^e (e8m0). Oracle: compressed_tensors.compressors.nvfp4 and mxfp4 (0.20).
"""

from __future__ import annotations

import torch
from torch import Tensor

_BIAS = 127


def pack_fp4(codes: Tensor) -> Tensor:
    """e2m1 codes 0 ... 15, [O, I] with I even -> uint8 [O, I / 2]."""
    if codes.shape[-1] % 2:
        raise ValueError(f"FP4 packs two codes to a byte, and {codes.shape[-1]} inputs are no multiple of 2")
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_fp4(packed: Tensor) -> Tensor:
    """Inverse of `pack_fp4`: codes [O, I], int16."""
    return torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2).to(torch.int16)


def encode_e4m3(scale: Tensor, global_scale: Tensor) -> Tensor:
    """Scales as stored (fp32, e4m3 / global) -> float8_e4m3fn."""
    return (scale * global_scale).to(torch.float8_e4m3fn)


def decode_e4m3(stored: Tensor, global_scale: Tensor) -> Tensor:
    """Inverse of `encode_e4m3`, fp32."""
    return stored.float() / global_scale


def encode_e8m0(scale: Tensor) -> Tensor:
    """Powers of two, fp32 -> uint8 exponents with bias 127."""
    return (torch.frexp(scale).exponent - 1 + _BIAS).to(torch.uint8)


def decode_e8m0(stored: Tensor) -> Tensor:
    """Inverse of `encode_e8m0`, fp32; byte 0 is 2^-127, a subnormal."""
    return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.to(torch.int32) - _BIAS)
