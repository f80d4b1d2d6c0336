"""What block layouts share: the parts of a quantized weight, fp16 numbers as bytes, two nibbles in a byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """A weight as it is stored: codes int16 [O, I], scale and minimum fp32 [O, N], second level by name [O, N / 8]."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None
    second: Mapping[str, Tensor] = {}


def half_bytes(numbers: Tensor) -> Tensor:
    """fp32 numbers [..] that are fp16 numbers, as bytes [.., 2], the low one first.

    Raises:
        ValueError: if one is no fp16 number: it would be rounded.
    """
    stored = numbers.to(torch.float16)
    if not torch.equal(stored.float(), numbers):
        raise ValueError("a scale is no fp16 number, so that storing it would round it: train with scale_dtype float16")
    return stored.unsqueeze(-1).contiguous().view(torch.uint8)


def halves(stored: Tensor) -> Tensor:
    """The inverse of `half_bytes`: bytes [.., 2] as fp32 [..]."""
    return stored.contiguous().view(torch.float16).squeeze(-1).float()


def join_nibbles(codes: Tensor) -> Tensor:
    """Codes 0 ... 15 [.., 2h] as bytes [.., h]: the first half low, the second half high."""
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def split_nibbles(stored: Tensor) -> Tensor:
    """The inverse of `join_nibbles`, int16."""
    return torch.cat([stored & 0x0F, stored >> 4], dim=-1).to(torch.int16)
