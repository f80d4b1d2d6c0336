"""GPTQ: unsigned codes in int32 words along the inputs, and zero points that version 1 stores less one.

`qweight` [I * b / 32, O] holds inputs 8 r ... 8 r + 7 of 4 bits in row r; `qzeros` [N, O * b / 32] is packed along the
outputs; `g_idx` [I] names each input's group. Version 1 stores zero - 1, by each code and wrapping around, so that its
readers, which add 1 without wrapping, cannot hold a zero point of 0; version 2 ("gptq_v2") stores it as it is. 3 bits
are the dense 10-1-10-1-10 pattern. Sources: AutoGPTQ and GPTQModel, qlinear `pack`; vLLM's gptq kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.quant.layouts.words import pack_words, unpack_words


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [O, I] -> `qweight` [I * b / 32, O], int32."""
    return pack_words(codes, bits).t().contiguous()


def unpack_weight(qweight: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of `pack_weight` for `width` inputs: [O, I], int16."""
    return unpack_words(qweight.t().contiguous(), bits, width)


def pack_zero_points(zero_points: Tensor, bits: int, *, version: int) -> Tensor:
    """Unsigned zero points [O, N] -> `qzeros` [N, O * b / 32], int32.

    Raises:
        ValueError: for a zero point of 0 under version 1.
    """
    if version == 1:
        if (zero_points < 1).any():
            raise ValueError("GPTQ version 1 stores zero point - 1 and cannot hold a zero point of 0: use gptq_v2")
        zero_points = zero_points - 1
    return pack_words(zero_points.t().contiguous(), bits)


def unpack_zero_points(qzeros: Tensor, bits: int, rows: int, *, version: int) -> Tensor:
    """Inverse of `pack_zero_points` for `rows` outputs: [O, N], int16; version 1: 1 ... 2^b."""
    return unpack_words(qzeros, bits, rows).t() + (1 if version == 1 else 0)


def group_index(width: int, group_size: int) -> Tensor:
    """`g_idx` [I] of groups that follow each other (desc_act: false), int32."""
    return (torch.arange(width) // group_size).to(torch.int32)
