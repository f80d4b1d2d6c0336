"""GGUF's Q4_K: super-blocks of 8 groups, whose scales and minima are 6-bit multiples of one fp16 number each.

144 bytes for 256 inputs: fp16 d and dmin, 12 bytes of 6-bit multiples s and t, 128 of nibbles (two groups share 32
bytes, the first low). value = (d * s) * q - dmin * t. Of the 12 bytes the first four hold s of the groups 0 to 3, the
next four t of them; the last four have the low nibbles of s and t of the groups 4 to 7, whose two highest bits are the
highest of the bytes before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.quant.layouts.packing import Blocks, half_bytes, halves, join_nibbles, split_nibbles

_SUPER = 8


def pack_q4_k(blocks: Blocks) -> Tensor:
    """Bytes [O, I / 256 * 144]; `blocks.second` has super_scale and super_minimum.

    Raises:
        ValueError: if a scale or minimum is no 6-bit multiple of its super-block's number.
    """
    assert blocks.minimum is not None
    d, dmin = blocks.second["super_scale"], blocks.second["super_minimum"]
    multiples = _join_six(_multiples(blocks.scale, d, "scale"), _multiples(-blocks.minimum, dmin, "minimum"))
    codes = join_nibbles(blocks.codes.unflatten(1, (-1, 4, 64))).flatten(2)
    return torch.cat([half_bytes(d), half_bytes(dmin), multiples, codes], dim=2).flatten(1)


def unpack_q4_k(rows: Tensor) -> Blocks:
    """The inverse of `pack_q4_k`."""
    blocks = rows.unflatten(1, (-1, 144))
    d, dmin = halves(blocks[..., :2]), halves(blocks[..., 2:4])
    s, t = _split_six(blocks[..., 4:16])
    codes = split_nibbles(blocks[..., 16:].unflatten(2, (4, 32))).flatten(1)
    scale, minimum = (s.float() * d.unsqueeze(2)).flatten(1), -(t.float() * dmin.unsqueeze(2)).flatten(1)
    return Blocks(codes, scale, minimum, {"super_scale": d, "super_minimum": dmin})


def _multiples(numbers: Tensor, unit: Tensor, what: str) -> Tensor:
    """[O, N] -> [O, N / 8, 8] uint8: how many units each number is."""
    numbers, unit = numbers.unflatten(1, (-1, _SUPER)), unit.unsqueeze(2)
    multiples = torch.where(unit == 0, 0.0, numbers / unit).round()
    if bool((multiples < 0).any() or (multiples > 63).any()) or not torch.equal(multiples * unit, numbers):
        raise ValueError(f"a {what} is no multiple 0 ... 63 of its super-block's: train with scale_dtype k6")
    return multiples.to(torch.uint8)


def _join_six(s: Tensor, t: Tensor) -> Tensor:
    first = s[..., :4] | (s[..., 4:] >> 4 << 6)
    second = t[..., :4] | (t[..., 4:] >> 4 << 6)
    return torch.cat([first, second, (s[..., 4:] & 0x0F) | (t[..., 4:] << 4)], dim=-1)


def _split_six(stored: Tensor) -> tuple[Tensor, Tensor]:
    first, second, low = stored.unflatten(-1, (3, 4)).unbind(-2)
    s = torch.cat([first & 0x3F, (low & 0x0F) | (first >> 6 << 4)], dim=-1)
    t = torch.cat([second & 0x3F, (low >> 4) | (second >> 6 << 4)], dim=-1)
    return s, t
