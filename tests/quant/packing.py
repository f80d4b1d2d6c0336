"""Our codes and scales in the byte layouts of other libraries, for the tests that let those read them.

Block layouts of llama.cpp (ggml-common.h): the codes of inputs i and i + half share a byte, i in the low nibble.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def nibbles(codes: Tensor) -> np.ndarray:
    """Codes 0 ... 15 [blocks, G] -> [blocks, G / 2] bytes: the first half in the low nibbles."""
    first, second = codes.to(torch.uint8).chunk(2, dim=1)
    return (first | (second << 4)).numpy()


def pairs(codes: Tensor) -> Tensor:
    """Codes 0 ... 15 [.., I] -> [.., I / 2] uint8, neighbours in a byte, the first in the low nibble."""
    flat = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    return flat[..., 0] | (flat[..., 1] << 4)


def half(x: Tensor) -> np.ndarray:
    """[blocks] -> [blocks, 2] bytes of fp16; the numbers must lie on it."""
    assert torch.equal(x.half().float(), x)
    return x.half().reshape(-1, 1).numpy().view(np.uint8)


def q4_0(codes: Tensor, scale: Tensor) -> np.ndarray:
    """Codes -8 ... 7 [blocks, 32] and scale [blocks] -> blocks of 18 bytes."""
    return np.concatenate((half(scale), nibbles(codes + 8)), axis=1)


def q4_1(codes: Tensor, scale: Tensor, minimum: Tensor) -> np.ndarray:
    """Codes 0 ... 15 [blocks, 32], scale and minimum [blocks] -> blocks of 20 bytes."""
    return np.concatenate((half(scale), half(minimum), nibbles(codes)), axis=1)


def q8_0(codes: Tensor, scale: Tensor) -> np.ndarray:
    """Codes -127 ... 127 [blocks, 32] and scale [blocks] -> blocks of 34 bytes."""
    return np.concatenate((half(scale), codes.to(torch.int8).numpy().view(np.uint8)), axis=1)


def e8m0(scale: Tensor) -> Tensor:
    """Powers of two -> their biased exponent, uint8."""
    exponent = torch.frexp(scale).exponent - 1
    assert torch.equal(torch.ldexp(torch.ones_like(scale), exponent), scale)
    return (exponent + 127).to(torch.uint8)


def mxfp4(codes: Tensor, scale: Tensor) -> np.ndarray:
    """E2M1 codes [blocks, 32] and scale [blocks] -> blocks of 17 bytes."""
    return np.concatenate((e8m0(scale).reshape(-1, 1).numpy(), nibbles(codes)), axis=1)


def nvfp4_gguf(codes: Tensor, scale: Tensor) -> np.ndarray:
    """E2M1 codes [blocks, 64] and e4m3 scales [blocks, 4] -> blocks of 36 bytes: four scales, four groups of 16."""
    assert torch.equal(scale.to(torch.float8_e4m3fn).float(), scale)
    groups = np.concatenate([nibbles(group) for group in codes.split(16, dim=1)], axis=1)
    return np.concatenate((scale.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), groups), axis=1)


def six_bits(scales: Tensor, minima: Tensor) -> np.ndarray:
    """Eight 6-bit scales and minima [blocks, 8] -> the 12 bytes of a K-quant.

    Bytes 0-3 and 4-7: scales and minima 0-3, with the two high bits of scales and minima 4-7 on top of them;
    bytes 8-11: the low nibbles of scales 4-7, and of minima 4-7 in the high nibble.
    """
    (low_s, high_s), (low_m, high_m) = (x.to(torch.uint8).chunk(2, dim=1) for x in (scales, minima))
    parts = (low_s | (high_s >> 4) << 6, low_m | (high_m >> 4) << 6, (high_s & 15) | (high_m & 15) << 4)
    return torch.cat(parts, dim=1).numpy()


def q4_k(codes: Tensor, scales: Tensor, minima: Tensor, super_scale: Tensor, super_minimum: Tensor) -> np.ndarray:
    """Codes 0 ... 15 [blocks, 8, 32], 6-bit scales and minima [blocks, 8], super numbers [blocks] -> 144 bytes each."""
    groups = codes.to(torch.uint8).unflatten(1, (4, 2))  # neighbouring groups share bytes
    packed = (groups[:, :, 0] | groups[:, :, 1] << 4).flatten(1).numpy()
    return np.concatenate((half(super_scale), half(super_minimum), six_bits(scales, minima), packed), axis=1)
