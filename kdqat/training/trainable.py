"""What is trained: everything, or the fake quantizers' own parameters and nothing else.

"scales" is the idea of PEQA (https://arxiv.org/abs/2305.14152) and of EfficientQAT's second phase: gradients and
optimizer state exist for a few numbers a group only. PEQA freezes the integers as well; here the latent weights are
frozen and a code may still move by one where its scale does, as the quantizer's own rounding says.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from kdqat.initializers import Initializer
from kdqat.models import Teacher
from kdqat.quant import FakeQuantizer

Trainable = Literal["all", "scales"]


def freeze_all_but_scales(model: nn.Module) -> list[nn.Parameter]:
    """Freeze every parameter that no fake quantizer owns; returns those that were not frozen before.

    Raises:
        ValueError: if nothing is left to train; then nothing is frozen.
    """
    owned = {id(p) for m in model.modules() if isinstance(m, FakeQuantizer) for p in m.parameters() if p.requires_grad}
    if not owned:
        raise ValueError(
            "model.trainable: scales leaves nothing to train: no fake quantizer has parameters of its own (MinMax, "
            "Fixed and QuEST never do); use LSQ, SEQ or LearnedClipping as quantizer, or trainable: all"
        )
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in owned]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def require_weights_at_rest(teacher: Teacher | None, trainable: Trainable, initializer: Initializer) -> None:
    """
    Raises:
        ValueError: if the teacher computes with the student's weights and these will not stay the source's.
    """
    if teacher is None or not teacher.shares_weights:
        return
    name = type(teacher).__name__
    if trainable != "scales":
        raise ValueError(
            f"model.teacher {name} computes with the student's own weights, and trainable: {trainable} moves them: set "
            "trainable: scales, or use a FrozenTeacher"
        )
    if initializer.rewrites_weights:
        raise ValueError(
            f"model.teacher {name} computes with the student's own weights, and {type(initializer).__name__} rewrites "
            "them before the first step: use another initializer (MSEGrid), or a FrozenTeacher"
        )
