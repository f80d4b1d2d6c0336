"""`pack-quantized` of compressed-tensors: signed codes in int32 words.

A weight [O, I] is packed along its inputs into [O, ceil(I * b / 32)] as code + 2^(b-1); integer zero points [O, N] are
packed along the outputs into [ceil(O * b / 32), N]. Codes and zero points of an asymmetric grid are 0 ... 2^b - 1 in
kdqat and -2^(b-1) ... 2^(b-1) - 1 there, which is the same word: only a symmetric code needs the shift.
Oracle: compressed_tensors.compressors.pack_quantized.helpers (0.20).
"""

from __future__ import annotations

from torch import Tensor

from kdqat.quant.layouts.words import pack_words, unpack_words


def pack_weight(codes: Tensor, bits: int, *, symmetric: bool) -> Tensor:
    """Codes [O, I], signed if symmetric, else 0 ... 2^b - 1 -> `weight_packed` [O, ceil(I * b / 32)], int32."""
    return pack_words(codes + _shift(bits, symmetric), bits)


def unpack_weight(packed: Tensor, bits: int, width: int, *, symmetric: bool) -> Tensor:
    """Inverse of `pack_weight` for `width` inputs: codes [O, I], int16."""
    return unpack_words(packed, bits, width) - _shift(bits, symmetric)


def pack_zero_points(zero_points: Tensor, bits: int) -> Tensor:
    """Zero points [O, N], 0 ... 2^b - 1 -> `weight_zero_point` [ceil(O * b / 32), N], int32."""
    return pack_words(zero_points.t(), bits).t().contiguous()


def unpack_zero_points(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Inverse of `pack_zero_points` for `rows` outputs: [O, N], int16."""
    return unpack_words(packed.t().contiguous(), bits, rows).t()


def _shift(bits: int, symmetric: bool) -> int:
    return 2 ** (bits - 1) if symmetric else 0
