"""Says when training runs and weights stay where they are.

bf16 keeps 8 bits of a number, and an update below 1/512 of a weight is lost when it is rounded to nearest; a learning
rate far too small, or a schedule at zero, looks the same: the loss is noise around a constant.
"""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from kdqat.callbacks.checksum import local_part
from kdqat.training import Observer
from kdqat.training.signals import note

log = logging.getLogger(__name__)

_SAMPLE = 1024  # elements of a tensor


class NothingMoved(Observer):
    """Compares a sample of every trained tensor between looks and warns, once, if most of it has never changed.

    Only steps count in which a tensor had a gradient and a learning rate above zero: warm-up from zero and freeze
    windows are no finding. Embeddings that only look up are left out, since a token that is not in the text never
    moves. Under FSDP2 the first process looks at its own shards.

    Args:
        every_n_steps: optimizer steps between looks.
        share: of the elements looked at that may stay where they were.

    Raises:
        ValueError: for numbers outside of their range.
    """

    def __init__(self, *, every_n_steps: int = 50, share: float = 0.5) -> None:
        if every_n_steps < 1 or not 0 < share < 1:
            raise ValueError("NothingMoved: every_n_steps >= 1 and 0 < share < 1 are needed")
        self.every_n_steps, self.share = every_n_steps, share
        self._watched: list[_Watched] = []
        self._said = False

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        table = _only_looks_up(module.student.model)
        self._said, self._watched = False, []
        if not trainer.is_global_zero:
            return
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                self._watched += [_Watched(p, group) for p in group["params"] if p is not table]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if self._said or trainer.fit_loop._should_accumulate():
            return
        for watched in self._watched:
            # the gradients of the step are still there; what a freeze window dropped is not
            watched.steps += watched.parameter.grad is not None and _moves(watched.group["lr"])
        if trainer.global_step % self.every_n_steps == 0:
            self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        due = [watched for watched in self._watched if watched.steps >= self.every_n_steps and watched.start.numel()]
        if not due:
            return
        for watched in due:
            watched.moved |= watched.start != _sample(watched.parameter)
        still = torch.stack([(~watched.moved).sum() for watched in due]).tolist()
        elements = sum(watched.start.numel() for watched in due)
        if sum(still) <= self.share * elements:
            return
        self._said = True
        note(trainer, trainer.global_step, "nothing_moved", sum(still) / elements)
        whole = sum(count == watched.start.numel() for count, watched in zip(still, due, strict=True))
        bf16 = any(watched.parameter.dtype == torch.bfloat16 for watched in due)
        log.warning(
            "NothingMoved: step %d: %.0f %% of the trained elements (sampled) have never changed, in %d of %d tensors "
            "not one; %s",
            trainer.global_step, 100 * sum(still) / elements, whole, len(due),
            "bf16 weights lose updates below 1/512 of themselves: train in model.student.dtype float32, or with an "
            "optimizer that rounds stochastically (docs/optimizers.md)" if bf16
            else "the learning rate is too small for the weights, or the gradients are zero: raise lr",
        )  # fmt: skip

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self._watched = []


class _Watched:
    """A parameter, where it began, and what of it has moved."""

    def __init__(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        self.parameter, self.group, self.steps = parameter, group, 0
        self.start = _sample(parameter)
        self.moved = torch.zeros_like(self.start, dtype=torch.bool)


def _moves(rate: float | Tensor) -> bool:
    """Whether a learning rate is above zero; one that lies on a device is not read for that."""
    return bool(rate > 0) if not isinstance(rate, Tensor) or rate.device.type == "cpu" else True


def _sample(parameter: nn.Parameter) -> Tensor:
    flat = local_part(parameter).detach().flatten()
    return flat[:: max(1, -(-flat.numel() // _SAMPLE))].clone()


def _only_looks_up(model: Any) -> nn.Parameter | None:
    """The embedding table, unless the head computes with it too."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or (head is not None and head.weight is embedding.weight):
        return None
    return embedding.weight
