"""Checksums of tensors, the same however a tensor is spread over devices.

Each element's bits are mixed by a fixed function and the results are added in 64 bits: a sum over shards is the sum of
the whole, and elements that move in opposite directions do not cancel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 22  # elements mixed at a time: the integers take twice the room of fp32


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """One number for each tensor; collective where some are sharded (FSDP2)."""
    if not tensors:
        return {}
    sharded = [hasattr(tensor, "to_local") for tensor in tensors.values()]
    sums = torch.stack([_bit_sum(local_part(tensor)) for tensor in tensors.values()])
    if any(sharded):
        whole = sums.clone()
        dist.all_reduce(whole)
        sums = torch.where(torch.tensor(sharded, device=sums.device), whole, sums)
    return dict(zip(tensors, sums.tolist(), strict=True))


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _bit_sum(tensor: Tensor) -> Tensor:
    bits = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for piece in bits.split(_PIECE):
        x = piece.to(torch.int64)
        x = (x ^ (x >> 15)) * 0x2C1B3C6D
        x = (x ^ (x >> 12)) * 0x297A2D39
        total += (x ^ (x >> 15)).sum()
    return total
