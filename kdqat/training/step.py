"""What one optimizer step adds up: losses and counts over micro-batches and ranks, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.types import Batch, LossParts

# Divides sums over tokens while micro-batches add up, alike on all ranks: gradients keep a handy size until, at the end
# of the step, they are divided exactly.
HANDY_DIVISOR = 4096.0


class StepSums:
    """Everything summed since the weights last changed.

    Attributes:
        micro_batches: (loss, batch) of each, so that a loss that is no number can be traced to its batch.
    """

    def __init__(self) -> None:
        self.micro_batches: list[tuple[Tensor, Batch]] = []
        self._sums: dict[str, Tensor] = {}

    def add(self, parts: LossParts, batch: Batch) -> None:
        """Count one micro-batch."""
        self.micro_batches.append((parts.sum.detach(), batch))
        for name, value in {"num": parts.num, "loss": parts.sum, **parts.by_name}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()

    def over_ranks(self, world_size: int) -> dict[str, Tensor]:
        """The sums of all processes, by name: "num", "loss" and the loss's own."""
        return dict(zip(self._sums, summed_over_ranks(torch.stack(list(self._sums.values())), world_size), strict=True))

    def first_broken(self) -> Batch | None:
        """The first micro-batch whose loss is not finite."""
        return next((batch for loss, batch in self.micro_batches if not bool(torch.isfinite(loss))), None)


def summed_over_ranks(value: Tensor, world_size: int) -> Tensor:
    """The sum of `value` over all processes, on each of them."""
    if world_size > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
    return value
