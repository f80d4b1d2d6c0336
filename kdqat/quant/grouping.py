"""How a tensor is seen while it is rounded: [rows, I] <-> [rows, N, G], and the Hadamard rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.spec import QuantSpec


def to_groups(tensor: Tensor, spec: QuantSpec) -> Tensor:
    """View `tensor` [.., I] as [rows, N, G], G elements to a scale; [rows, 1, I] where a row is not cut."""
    width = tensor.shape[-1]
    return tensor.reshape(-1, width // (spec.group_size or width), spec.group_size or width)


def from_groups(groups: Tensor) -> Tensor:
    """Inverse of `to_groups` for a matrix: [rows, N, G] -> [rows, N * G]."""
    return groups.reshape(groups.shape[0], -1)


def shared_dims(spec: QuantSpec) -> tuple[int, ...]:
    """The dimensions of [rows, N, G] along which elements share a scale."""
    return {"tensor": (0, 1, 2), "feature": (0, 1)}.get(spec.granularity, (2,))


def rotate(tensor: Tensor, block: int | None) -> Tensor:
    """Multiply blocks of `block` last-dimension elements by the orthogonal Hadamard matrix, its own inverse.

    Butterflies and not a matmul: they stay fp32 under autocast. None leaves the tensor alone.
    """
    if block is None:
        return tensor
    x, width = tensor.reshape(-1, block), 1
    while width < block:
        pairs = x.reshape(-1, block // (2 * width), 2, width)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2).reshape(-1, block)
        width *= 2
    return (x * block**-0.5).reshape(tensor.shape)
