"""Many small tensors as few large ones: a model has hundreds of layers and a handful of shapes, and a GPU that is
asked about one layer at a time spends its time on being asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Values: TypeAlias = dict[str, tuple[list[str], Tensor]]  # by metric: names, and their values [L]

LIMIT = 1 << 25  # numbers in one stack: 128 MB in fp32


def stacked(tensors: Mapping[str, tuple[Tensor, ...]], positions: Tensor | None = None) -> Iterator[tuple[list, list]]:
    """Names and, for each member of the tuples [B, T, F] of one shape, their stack [L, n, F] in fp32.

    Args:
        positions: [n] indices into B * T; None: all of them.
    """
    groups: dict[tuple, list[str]] = {}
    for name, members in tensors.items():
        groups.setdefault(tuple((m.shape, m.dtype) for m in members), []).append(name)
    for names in groups.values():
        largest = max(member.numel() for member in tensors[names[0]])
        size = max(1, LIMIT // max(largest, 1))
        for start in range(0, len(names), size):
            some = names[start : start + size]
            columns = zip(*(tensors[name] for name in some), strict=True)
            stacks = [torch.stack([m.flatten(0, -2) for m in column]).float() for column in columns]
            yield some, stacks if positions is None else [stack[:, positions] for stack in stacks]


def joined(parts: list[Values]) -> Values:
    """One table of several."""
    names: dict[str, list[str]] = {}
    tensors: dict[str, list[Tensor]] = {}
    for part in parts:
        for metric, (some, values) in part.items():
            names.setdefault(metric, []).extend(some)
            tensors.setdefault(metric, []).append(values)
    return {metric: (names[metric], torch.cat(tensors[metric])) for metric in names}
