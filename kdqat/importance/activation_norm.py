"""ActivationNorm: how large the inputs of a block or a layer are.

A weight's error is multiplied by the layer's input, so that the same error hurts more where inputs are large. The plain
baseline that other scores have to beat; residual streams grow with depth, so it favours late blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kdqat.calibrate import stream_blocks
from kdqat.importance.base import ImportanceScorer, Measured, Units, check_unit
from kdqat.models import SplitModel
from kdqat.spec import Unit
from kdqat.types import Batch


class ActivationNorm(ImportanceScorer):
    """Mean L2 norm over tokens of what goes in; larger = more bits.

    Args:
        unit: "block" takes the hidden states that enter the block, "layer" each layer's own input.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def __init__(self, *, unit: Unit = "block") -> None:
        self.unit = check_unit(self, unit)

    def measure(self, split: SplitModel, units: Units, batches: Sequence[Batch]) -> Measured:
        norms = {name: Norm() for name in units}
        for call in stream_blocks(split, batches, store=next(split.parameters()).device):
            inside = f"{call.prefix}."
            mine = {name: norm.update for name, norm in norms.items() if f"{name}.".startswith(inside) and call.prefix}
            if mine:
                call.run(on_input=mine)
        return Measured({name: norm.mean(name) for name, norm in norms.items()})


class Norm:
    """Mean L2 norm of rows, micro-batch by micro-batch."""

    def __init__(self) -> None:
        self._sum, self._num = 0.0, 0

    def update(self, x: Tensor) -> None:
        """Add rows [tokens, I]."""
        self._sum += float(torch.linalg.vector_norm(x.float(), dim=-1).sum(dtype=torch.float64))
        self._num += len(x)

    def mean(self, name: str) -> float:
        """Of all rows; `name` is for the error."""
        if not self._num:
            raise ValueError(f"score: layer {name} has seen no input: give more text")
        return self._sum / self._num
