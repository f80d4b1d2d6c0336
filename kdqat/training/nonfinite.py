"""When the loss stops being a number: which layer started it, and what its scales look like."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kdqat.models import SplitModel, Teacher
from kdqat.quant import FakeQuantizer, FakeQuantLayer
from kdqat.training.step import StepSums
from kdqat.types import Batch, Outputs, TopKOutputs


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite; the message names step, layer and scales. The run's checkpoints are whole."""


def require_finite(loss: float, step: StepSums, number: int, student: SplitModel, teacher: Teacher | None) -> None:
    """Check the loss of a whole optimizer step. All ranks raise at the same step, before the weights change: a rank
    alone would leave the others waiting, and under FSDP2 the forward passes that find the layer need them all.

    Args:
        loss: summed over micro-batches and ranks.
        step: what this rank added to it.
        number: of the step.

    Raises:
        NonFiniteLossError: saying where it began.
    """
    if math.isfinite(loss):
        return
    broken = step.first_broken()
    batch = broken if broken is not None else step.micro_batches[-1][1]
    message = explain(number, loss, student, None if teacher is None else teacher.outputs(batch), batch)
    if broken is None:
        message = f"step {number}: the loss of another process is {loss}; its message says more"
    raise NonFiniteLossError(message)


def explain(step: int, loss: float, student: SplitModel, teacher: Outputs | TopKOutputs | None, batch: Batch) -> str:
    """One line on where a non-finite loss came from: the teacher, or the first layer whose output is not finite.

    Runs the student once more, without a graph, with a hook on every leaf module.
    """
    where = f"step {step}: the loss is {loss}"
    if isinstance(teacher, TopKOutputs) and bool(teacher.log_probs.isnan().any() | teacher.log_tail.isnan().any()):
        return f"{where}; the cached teacher's log-probabilities are not numbers: delete its folder, run `kdqat cache`"
    if isinstance(teacher, Outputs) and not bool(torch.isfinite(teacher.hidden).all()):
        return f"{where}; the teacher's hidden states are not finite: load it in float32 or bfloat16"
    culprit: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if not culprit and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                culprit.append(_describe(name, module))

        return hook

    modules = [(n, m) for n, m in student.model.named_modules() if not isinstance(m, FakeQuantizer)]
    leaves = [(n, m) for n, m in modules if not any(m.children()) or isinstance(m, FakeQuantLayer)]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            answer = student(batch)
            answer.head(answer.hidden[:, -1:])
    finally:
        for handle in handles:
            handle.remove()
    found = culprit[0] if culprit else "no single layer: every output is finite, the loss itself overflows"
    return f"{where}; {found}; lower the learning rate or clip gradients, and resume from the last checkpoint"


def _describe(name: str, module: nn.Module) -> str:
    text = f"first at layer {name}"
    if isinstance(module, FakeQuantLayer) and module.weight_fake_quantizer is not None:
        scale = module.weight_fake_quantizer.scale.detach()
        text += f" (scales {scale.min().item():.3g} to {scale.max().item():.3g}"
        text += f", {int((~torch.isfinite(module.weight)).sum())} non-finite weights)"
    return text
