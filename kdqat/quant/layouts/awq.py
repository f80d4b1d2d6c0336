"""AWQ's GEMM layout: unsigned 4-bit codes in int32 words along the *outputs*, in an order that suits its kernel.

`qweight` [I, O / 8] and `qzeros` [N, O / 8]; of the eight outputs of a word, nibble 0 (the lowest) holds output 0,
nibble 1 output 2, then 4, 6, 1, 3, 5, 7. Sources: AutoAWQ, `gemm.py`; its way back is compressed-tensors' converter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.quant.layouts.words import pack_words, unpack_words

BITS = 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output in nibble i


def pack(codes: Tensor) -> Tensor:
    """Unsigned codes [O, I] (or zero points [O, N]) -> int32 [I, O / 8].

    Raises:
        ValueError: if O is no multiple of 8.
    """
    rows = codes.shape[0]
    if rows % len(_ORDER):
        raise ValueError(f"AWQ packs 8 outputs to a word, and {rows} outputs are no multiple of 8")
    words = codes.t().reshape(codes.shape[1], -1, len(_ORDER))
    return pack_words(words[:, :, list(_ORDER)].flatten(1), BITS)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack`: int32 [I, O / 8] -> unsigned codes [O, I], int16."""
    width, num_words = packed.shape
    words = unpack_words(packed, BITS, num_words * len(_ORDER)).reshape(width, num_words, len(_ORDER))
    back = torch.tensor(_ORDER, device=packed.device).argsort()
    return words[:, :, back].flatten(1).t()
