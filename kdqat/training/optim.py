"""Parameter groups by owner, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kdqat.quant import FakeQuantizer


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in groups named "weights", "scales" and "vectors", by who owns them, not by name.

    Scales (and zero points) of fake quantizers get no weight decay, which would pull the grid together; vectors
    (norms, biases) get none by custom. Empty groups are left out.

    Raises:
        ValueError: if nothing is trainable.
    """
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "scales": [], "vectors": []}
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            own = "scales" if isinstance(module, FakeQuantizer) else "weights" if parameter.ndim >= 2 else "vectors"
            groups[own].append(parameter)
    if not any(groups.values()):
        raise ValueError("nothing to train: every parameter is frozen")
    return [
        {"name": name, "params": parameters, **({} if name == "weights" else {"weight_decay": 0.0})}
        for name, parameters in groups.items()
        if parameters
    ]


def scale_learning_rate(optimizer: Optimizer, ratio: float) -> None:
    """Multiply the learning rate of the "scales" group by `ratio`; before a scheduler is built on the optimizer."""
    for group in optimizer.param_groups:
        if group.get("name") == "scales":
            group["lr"] = group["lr"] * ratio  # not in place: of some optimizers it is a tensor


class WarmupCosine(LambdaLR):
    """Linear warm-up, then a cosine down to a share of the learning rate.

    Args:
        optimizer: given by the module.
        warmup_steps: optimizer steps from 0 to the full rate.
        total_steps: steps until the end of the cosine; None: the length of the run.
        final_ratio: the last learning rate, as a share of the full one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        final_ratio: float = 0.0,
    ) -> None:
        if warmup_steps < 0 or not 0 <= final_ratio <= 1 or (total_steps is not None and total_steps <= warmup_steps):
            raise ValueError("WarmupCosine needs warmup_steps >= 0, total_steps > warmup_steps, 0 <= final_ratio <= 1")
        self.warmup_steps, self.total_steps, self.final_ratio = warmup_steps, total_steps, final_ratio
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """The share of the full learning rate at optimizer step `step`, from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.total_steps is None:
            return 1.0  # only for the very first call: `finish_at` follows before the first step
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    def finish_at(self, total_steps: int) -> None:
        """Set the end of the cosine, unless the recipe did."""
        if self.total_steps is None:
            if total_steps <= self.warmup_steps:
                raise ValueError(f"warmup_steps {self.warmup_steps} does not fit into a run of {total_steps} steps")
            self.total_steps = total_steps


def gradients(parameters: Iterable[nn.Parameter]) -> list[Any]:
    """The local parts of all gradients that exist."""
    grads = (p.grad for p in parameters if p.grad is not None)
    return [g.to_local() if hasattr(g, "to_local") else g for g in grads]


def scheduled(optimizer: Optimizer, factory: Callable[[Optimizer], Any], total_steps: int) -> Any:
    """The schedule that `factory` makes; a WarmupCosine without an end of its own ends with the run."""
    scheduler = factory(optimizer)
    if isinstance(scheduler, WarmupCosine):
        scheduler.finish_at(total_steps)
    return scheduler
