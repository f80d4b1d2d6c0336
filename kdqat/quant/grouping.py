"""[O, I] <-> [O, N, G] for every granularity: the one place that knows who shares a scale."""

from __future__ import annotations

from torch import Tensor

from kdqat.spec import QuantSpec


def to_groups(tensor: Tensor, spec: QuantSpec) -> Tensor:
    """View `tensor` [O, I] as [O, N, G], G elements to a scale; [O, 1, I] for channel and tensor."""
    out_features, in_features = tensor.shape
    return tensor.reshape(out_features, -1, spec.group_size or in_features)


def from_groups(groups: Tensor) -> Tensor:
    """Inverse of `to_groups`: [O, N, G] -> [O, N * G]."""
    return groups.reshape(groups.shape[0], -1)
