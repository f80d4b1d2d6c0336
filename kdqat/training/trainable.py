"""What is trained: everything, or the fake quantizers' own parameters and nothing else (LoraAdapters: what it adds).

"scales" is the idea of PEQA (https://arxiv.org/abs/2305.14152) and of EfficientQAT's second phase: gradients and
optimizer state exist for a few numbers a group only. PEQA freezes the integers as well; here the latent weights are
frozen and a code may still move by one where its scale does, as the quantizer's own rounding says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from kdqat.initializers import Initializer
from kdqat.models import Teacher
from kdqat.quant import FakeQuantizer, LoraAdapter
from kdqat.training.edits import StudentEdit

Trainable = Literal["all", "scales"]
_SHARES = "computes with the student's own weights"
_REMEDY = "set trainable: scales, train LoraAdapters, or use a FrozenTeacher"


def freeze_all_but(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[nn.Parameter]:
    """Freeze every parameter that no module of these kinds owns; returns those that were not frozen before."""
    owned = _owned(model, kinds)
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in owned]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def freeze_all_but_scales(model: nn.Module) -> list[nn.Parameter]:
    """Freeze every parameter that no fake quantizer owns; returns those that were not frozen before.

    Raises:
        ValueError: if nothing is left to train; then nothing is frozen.
    """
    if not any(p.requires_grad for m in model.modules() if isinstance(m, FakeQuantizer) for p in m.parameters()):
        raise ValueError(
            "model.trainable: scales leaves nothing to train: no fake quantizer has parameters of its own (MinMax, "
            "Fixed and QuEST never do); use LSQ, SEQ or LearnedClipping as quantizer, or trainable: all"
        )
    return freeze_all_but(model, (FakeQuantizer,))


def require_source_weights(teacher: Teacher | None, initializer: Initializer) -> None:
    """
    Raises:
        ValueError: if the teacher computes with the student's weights and `initializer` rewrites these.
    """
    if teacher is not None and teacher.shares_weights and initializer.rewrites_weights:
        raise ValueError(
            f"model.teacher {type(teacher).__name__} computes with the student's own weights, and "
            f"{type(initializer).__name__} rewrites them before the first step: use another initializer (MSEGrid), or "
            "a FrozenTeacher"
        )


def require_rest(teacher: Teacher | None, trainable: Trainable, edits: Iterable[StudentEdit]) -> None:
    """Asked before anything is computed, by what the run says it will do.

    Raises:
        ValueError: if the teacher computes with the student's weights and nothing leaves them at rest.
    """
    shares = teacher is not None and teacher.shares_weights
    if shares and trainable != "scales" and not any(edit.rests_weights for edit in edits):
        name = type(teacher).__name__
        raise ValueError(f"model.teacher {name} {_SHARES}, and trainable: {trainable} moves them: {_REMEDY}")


def require_weights_at_rest(teacher: Teacher | None, model: nn.Module) -> None:
    """Asked when all edits are made: what trains may be scales and adapters, which the teacher switches off.

    Raises:
        ValueError: if the teacher computes with the student's weights and training would move one.
    """
    if teacher is None or not teacher.shares_weights:
        return
    added = _owned(model, (FakeQuantizer, LoraAdapter))
    moving = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in added]
    if moving:
        raise ValueError(
            f"model.teacher {type(teacher).__name__} {_SHARES}, and training would move {len(moving)} of them "
            f"({moving[0]}): {_REMEDY}"
        )


def _owned(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> set[int]:
    return {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}
