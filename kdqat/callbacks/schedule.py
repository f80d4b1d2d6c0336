"""What is not trained from which optimizer step to which: the base of freezing that comes and goes.

Gradients are computed and dropped, before clipping and the optimizer: AdamW then neither moves a weight nor decays it,
nor updates its moments. `requires_grad` never changes, which DDP would not survive. What happens follows from
`trainer.global_step` alone, so that a resumed run does the same.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdqat.student import Student
from kdqat.training import Steer

log = logging.getLogger(__name__)


class Window(NamedTuple):
    """`parameters` are not trained in optimizer steps start <= step < stop, counted from 0; stop None: to the end."""

    start: int
    stop: int | None
    parameters: list[nn.Parameter]


class Schedule(Steer, ABC):
    """Drops gradients inside windows of steps."""

    def __init__(self) -> None:
        self._windows: list[Window] = []

    @abstractmethod
    def windows(self, student: Student) -> list[Window]:
        """What is not trained when.

        Raises:
            ValueError: if that is nothing.
        """

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        self._windows = self.windows(module.student)
        total, name = trainer.estimated_stepping_batches, type(self).__name__
        late = {w.start for w in self._windows if w.start >= total}  # steps are counted from 0
        late |= {w.stop for w in self._windows if w.stop is not None and w.stop > total}
        for step in sorted(late):
            log.warning("%s: what is to change at step %d lies beyond the run's %d steps", name, step, total)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Optimizer) -> None:
        step = trainer.global_step
        for window in self._windows:
            if window.start <= step and (window.stop is None or step < window.stop):
                for parameter in window.parameters:
                    parameter.grad = None

    def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        # under FSDP2, states are not loaded where a parameter has none yet
        parameters = list(trainer.strategy.model.parameters()) if module.parallel.shard else []  # type: ignore[union-attr]
        for optimizer in checkpoint["optimizer_states"] if parameters else ():
            states = optimizer.get("state")  # by number of the parameter; of the other processes empty
            if states:
                model = next(iter(states.values()))
                for number in {n for group in optimizer["param_groups"] for n in group["params"]} - set(states):
                    states[number] = _untouched(model, parameters[number].shape)

    def on_fit_end(self, trainer: L.Trainer, module: Any) -> None:
        self._windows = []


def _untouched(model: Mapping[str, Any], shape: torch.Size) -> dict[str, Any]:
    """What an optimizer begins with for a parameter of `shape`: zeros, with the keys of another one's state."""

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return type(value)()
        return torch.zeros(shape if value.ndim else (), dtype=value.dtype)

    return {key: zeros(value) for key, value in model.items()}


def trained(parameters: Collection[nn.Parameter | None], what: str) -> list[nn.Parameter]:
    """Those that are trained, each once.

    Raises:
        ValueError: if there are none; `what` names who wanted them.
    """
    found = {id(p): p for p in parameters if p is not None and p.requires_grad}
    if not found:
        raise ValueError(f"{what}: there is nothing to stop training, for nothing of it is trained")
    return list(found.values())
