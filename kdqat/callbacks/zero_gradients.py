"""Says which gradients are exactly zero: nothing there is trained, and a loss curve does not tell."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from kdqat.callbacks.arguments import check_numbers
from kdqat.callbacks.checksum import local_part
from kdqat.student import Student
from kdqat.training import Observer
from kdqat.training.signals import note

log = logging.getLogger(__name__)


class ZeroGradients(Observer):
    """Looks at the gradients of step 1 and then of every n-th, as they are before a freeze window drops them.

    Warns once for each optimizer group and role of which no gradient has an element other than zero.

    Args:
        every_n_steps: between looks; a look reads one number a parameter from the device.

    Raises:
        ValueError: for less than 1.
    """

    def __init__(self, *, every_n_steps: int = 200) -> None:
        check_numbers("ZeroGradients", every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self._said: set[str] = set()

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self._said = set()

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Optimizer) -> None:
        step = trainer.global_step
        if step % self.every_n_steps:
            return
        named = _named(optimizer, module.student)
        largest = _largest([parameter for _, parameter in named])
        alive = {label: False for label, _ in named}
        for (label, _), value in zip(named, largest, strict=True):
            alive[label] |= value != 0  # NaN is not zero
        # an adapter's second matrix starts at zero, and the first one's gradient with it
        dead = [label for label, lives in alive.items() if not lives and not (step == 0 and "lora_A" in label)]
        dead = [label for label in dead if label not in self._said]
        self._said.update(dead)
        if dead:
            note(trainer, step, "zero_gradients", float(len(dead)))
        if dead and trainer.is_global_zero:
            log.warning(
                "ZeroGradients: step %d: all gradients are exactly zero or missing for %s; nothing there is trained. "
                "Look for a loss that does not reach it, scales that clip everything, or fp16 gradients that vanish; "
                "freeze it (docs/freezing.md) if that is meant",
                step + 1, ", ".join(dead),
            )  # fmt: skip


def _named(optimizer: Optimizer, student: Student) -> list[tuple[str, nn.Parameter]]:
    """Every parameter of the optimizer with its label: "scales of down", or the group's name outside of layers."""
    roles = {ref.name: ref.role for ref in student.refs}
    labels: dict[int, str] = {}
    for name, parameter in student.model.named_parameters():
        parts = name.split(".")
        layers = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        role = next((roles[layer] for layer in layers if layer in roles), None)
        labels[id(parameter)] = (f" of {role}" if role else "") + (" (lora_A)" if "lora_A" in parts else "")
    return [
        (str(group.get("name", f"group {number}")) + labels.get(id(parameter), ""), parameter)
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    ]


def _largest(parameters: list[nn.Parameter]) -> list[float]:
    """The largest magnitude in each parameter's gradient, 0 where there is none; over all shards."""
    grads = [None if p.grad is None else local_part(p.grad) for p in parameters]
    there = [n for n, grad in enumerate(grads) if grad is not None and grad.numel()]
    values = torch.zeros(len(parameters), device=local_part(parameters[0]).device)
    if there:
        norms: list[Tensor] = list(torch._foreach_norm([grads[n] for n in there], float("inf")))  # type: ignore[misc]
        values[torch.tensor(there, device=values.device)] = torch.stack([norm.float() for norm in norms])
    if any(hasattr(p, "to_local") for p in parameters):
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()
