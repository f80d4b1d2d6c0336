"""GGUF blocks: codes and scales of a weight as the bytes that llama.cpp reads, and back (ggml-quants.c, ggml-common.h).

A row of I inputs is a row of blocks. A nibble of the first half of a block is the low one of its byte, of the second
half the high one. Values, of a code q:

    q4_0    32 inputs in 18 bytes    fp16 d, nibbles              d * (q - 8)
    q4_1    32 inputs in 20 bytes    fp16 d, fp16 m, nibbles      d * q + m
    q8_0    32 inputs in 34 bytes    fp16 d, int8                 d * q
    mxfp4   32 inputs in 17 bytes    exponent e, nibbles          2^(e - 127) * e2m1(q)
    q4_k    256 inputs in 144 bytes  `gguf_k.py`

Packing refuses what bytes would not give back: nothing here rounds. Codes are those of `FakeQuantizer.codes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kdqat.quant.layouts.gguf_k import pack_q4_k, unpack_q4_k
from kdqat.quant.layouts.packing import Blocks, half_bytes, halves, join_nibbles, split_nibbles

_GROUP = 32


class GGUFLayout(NamedTuple):
    """One block type: its inputs and bytes, and the preset whose students fit it bit for bit."""

    block_size: int
    num_bytes: int
    preset: str
    pack: Callable[[Blocks], Tensor]
    unpack: Callable[[Tensor], Blocks]


def pack_gguf(kind: str, blocks: Blocks) -> Tensor:
    """Bytes [O, bytes of a row], uint8, of `blocks`.

    Args:
        kind: a key of LAYOUTS.

    Raises:
        ValueError: if the width is no multiple of the block, or a code or scale is none that this type stores.
    """
    layout, width = LAYOUTS[kind], blocks.codes.shape[1]
    if width % layout.block_size:
        raise ValueError(f"{kind} holds blocks of {layout.block_size} inputs, which do not divide width {width}")
    return layout.pack(blocks).contiguous()


def unpack_gguf(kind: str, rows: Tensor) -> Blocks:
    """The inverse of `pack_gguf`; rows uint8 [O, bytes of a row].

    Raises:
        ValueError: if a row is no whole number of blocks.
    """
    if rows.shape[1] % LAYOUTS[kind].num_bytes:
        raise ValueError(f"{kind} has blocks of {LAYOUTS[kind].num_bytes} bytes, and a row here {rows.shape[1]} bytes")
    return LAYOUTS[kind].unpack(rows)


def _pack_q4_0(blocks: Blocks) -> Tensor:
    codes = join_nibbles(_grouped(blocks.codes, -8, 7) + 8)
    return torch.cat([half_bytes(blocks.scale), codes], dim=2).flatten(1)


def _unpack_q4_0(rows: Tensor) -> Blocks:
    blocks = rows.unflatten(1, (-1, 18))
    return Blocks((split_nibbles(blocks[..., 2:]) - 8).flatten(1), halves(blocks[..., :2]))


def _pack_q4_1(blocks: Blocks) -> Tensor:
    assert blocks.minimum is not None
    codes = join_nibbles(_grouped(blocks.codes, 0, 15))
    return torch.cat([half_bytes(blocks.scale), half_bytes(blocks.minimum), codes], dim=2).flatten(1)


def _unpack_q4_1(rows: Tensor) -> Blocks:
    blocks = rows.unflatten(1, (-1, 20))
    codes = split_nibbles(blocks[..., 4:]).flatten(1)
    return Blocks(codes, halves(blocks[..., :2]), halves(blocks[..., 2:4]))


def _pack_q8_0(blocks: Blocks) -> Tensor:
    codes = _grouped(blocks.codes, -128, 127).to(torch.int8).view(torch.uint8)
    return torch.cat([half_bytes(blocks.scale), codes], dim=2).flatten(1)


def _unpack_q8_0(rows: Tensor) -> Blocks:
    blocks = rows.unflatten(1, (-1, 34))
    codes = blocks[..., 2:].contiguous().view(torch.int8).to(torch.int16)
    return Blocks(codes.flatten(1), halves(blocks[..., :2]))


def _pack_mxfp4(blocks: Blocks) -> Tensor:
    mantissa, exponent = torch.frexp(blocks.scale)  # a power of two is 0.5 * 2^exponent
    stored = exponent - 1 + 127
    if bool((mantissa != 0.5).any() or (stored < 1).any() or (stored > 254).any()):
        raise ValueError("mxfp4 stores powers of two from 2^-126 to 2^127 as scales, and here are others")
    codes = join_nibbles(_grouped(blocks.codes, 0, 15))
    return torch.cat([stored.to(torch.uint8).unsqueeze(2), codes], dim=2).flatten(1)


def _unpack_mxfp4(rows: Tensor) -> Blocks:
    blocks = rows.unflatten(1, (-1, 17))
    exponent = blocks[..., 0].to(torch.int32) - 127
    scale = torch.ldexp(torch.ones(exponent.shape), exponent)
    return Blocks(split_nibbles(blocks[..., 1:]).flatten(1), scale)


def _grouped(codes: Tensor, low: int, high: int) -> Tensor:
    """Codes [O, I] as [O, N, 32], within low ... high."""
    if bool((codes < low).any() or (codes > high).any()):
        raise ValueError(f"codes {int(codes.min())} ... {int(codes.max())} do not lie within {low} ... {high}")
    return codes.unflatten(1, (-1, _GROUP))


LAYOUTS: dict[str, GGUFLayout] = {
    "q4_0": GGUFLayout(_GROUP, 18, "GGUF_Q4_0", _pack_q4_0, _unpack_q4_0),
    "q4_1": GGUFLayout(_GROUP, 20, "GGUF_Q4_1", _pack_q4_1, _unpack_q4_1),
    "q8_0": GGUFLayout(_GROUP, 34, "GGUF_Q8_0", _pack_q8_0, _unpack_q8_0),
    "mxfp4": GGUFLayout(_GROUP, 17, "MXFP4_A16", _pack_mxfp4, _unpack_mxfp4),
    "q4_k": GGUFLayout(256, 144, "GGUF_Q4_K", pack_q4_k, unpack_q4_k),
}
