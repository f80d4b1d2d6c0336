"""Student against teacher, layer by layer: what each lost of the signal (docs/signals.md has the formulas)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdqat.metrics import sqnr_db
from kdqat.training.probe.capture import Seen
from kdqat.training.probe.stacks import Values, joined, stacked


@torch.no_grad()
def compare(student: Seen, teacher: Seen, positions: Tensor | None = None) -> Values:
    """Of every layer and block that both have: mean_abs, variance, max_abs (the student's, and `teacher_*`), gain,
    sqnr_db, cosine; of attention: entropy and teacher_entropy.

    Args:
        positions: [n] indices of the tokens that count among B * T; None: all.

    Raises:
        ValueError: if the two models are not built alike.
    """
    for name, output in student.outputs.items():
        if name not in teacher.outputs or teacher.outputs[name].shape != output.shape:
            other = tuple(teacher.outputs[name].shape) if name in teacher.outputs else "no such output"
            raise ValueError(
                f"signals: {name} answers {tuple(output.shape)} in the student, and the teacher has {other}: comparing "
                "layer by layer needs a teacher of the student's architecture; leave SignalLog out, or set "
                "model.teacher.path to the student's own source"
            )
    # where the teacher's dtype differs, so do the pairs
    pairs = {name: (teacher.outputs[name].detach(), output.detach()) for name, output in student.outputs.items()}
    parts = [_pair(names, *stacks) for names, stacks in stacked(pairs, positions)]
    for metric, entropies in (("entropy", student.entropy), ("teacher_entropy", teacher.entropy)):
        if entropies:
            parts.append({metric: (list(entropies), _mean(torch.stack(list(entropies.values())), positions))})
    return joined(parts)


def _pair(names: list[str], teacher: Tensor, student: Tensor) -> Values:
    """Of outputs [L, n, O]."""
    values: dict[str, Tensor] = {}
    for prefix, y in (("", student), ("teacher_", teacher)):
        values[f"{prefix}mean_abs"] = y.abs().mean((1, 2))
        values[f"{prefix}variance"] = y.var((1, 2), correction=0)
        values[f"{prefix}max_abs"] = y.abs().amax((1, 2))
    values["gain"] = student.square().mean((1, 2)) / teacher.square().mean((1, 2))
    values["sqnr_db"] = torch.vmap(sqnr_db)(teacher, student)
    values["cosine"] = F.cosine_similarity(teacher, student, dim=-1).mean(1)
    return {metric: (names, value) for metric, value in values.items()}


def _mean(entropy: Tensor, positions: Tensor | None) -> Tensor:
    """[L, B, heads, T] over heads and the tokens that count: [L]."""
    by_token = entropy.mean(2).flatten(1)
    return (by_token if positions is None else by_token[:, positions]).mean(1)
