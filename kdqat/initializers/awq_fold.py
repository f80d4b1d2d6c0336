"""Where AWQ's scales go: which folds of a family a block has, and how a producer and its consumers take a scale."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdqat.models.roles import Fold
from kdqat.quant import FakeQuantLayer
from kdqat.quant.kinds import kind_of


@dataclass(frozen=True)
class PresentFold:
    """A fold of the family as one block has it."""

    producer: nn.Module
    consumers: tuple[nn.Module, ...]
    quantized: tuple[str, ...]  # full names of the consumers whose weight is rounded
    unit_offset: bool

    @property
    def heard(self) -> str:
        """The layer whose inputs stand for those of all consumers."""
        return self.quantized[0]


def foldable(folds: Sequence[Fold], block: nn.Module, prefix: str, quantized: Collection[str]) -> list[PresentFold]:
    """The folds of `block` that have a consumer among the layers `quantized` (full names).

    Left out are norms without weights, and producers as wide as none of their consumers: v before o under grouped
    queries, where one row of v makes several inputs of o.
    """
    modules = dict(block.named_modules())
    found = []
    for fold in folds:
        consumers = [suffix for suffix in fold.consumers if suffix in modules]
        names = tuple(f"{prefix}.{suffix}" for suffix in consumers if f"{prefix}.{suffix}" in quantized)
        producer: Any = modules.get(fold.producer)
        if not names or producer is None or getattr(producer, "weight", None) is None:
            continue
        width = len(producer.weight) if producer.weight.ndim == 1 else len(_matrix(producer))
        if any(_matrix(modules[suffix]).shape[1] != width for suffix in consumers):
            continue
        found.append(PresentFold(producer, tuple(modules[s] for s in consumers), names, fold.unit_offset))
    return found


@torch.no_grad()
def multiply_inputs(layer: nn.Module, scale: Tensor) -> None:
    """The weight's columns times `scale` [I]."""
    _matrix(layer).mul_(scale)


@torch.no_grad()
def divide_outputs(producer: Any, scale: Tensor, *, unit_offset: bool) -> None:
    """What a norm or a linear layer gives, divided by `scale` [features].

    Args:
        unit_offset: of a norm that multiplies by 1 + weight.
    """
    weight = producer.weight
    if weight.ndim > 1:
        _matrix(producer).div_(scale.unsqueeze(1))
    elif unit_offset:
        weight.copy_((weight.float() + 1) / scale - 1)
    else:
        weight.div_(scale)
    if getattr(producer, "bias", None) is not None:
        producer.bias.div_(scale)


def _matrix(layer: Any) -> Tensor:
    """The weight as [O, I], sharing its memory."""
    if isinstance(layer, FakeQuantLayer):
        return layer.as_matrix(layer.weight)
    return kind_of(layer).as_matrix(layer, layer.weight)
