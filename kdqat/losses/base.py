"""What a distillation loss is: a sum over the tokens of a micro-batch, and the number it will be divided by.

A loss never divides. The training module divides the summed loss by the `num` of the whole optimizer step, over
micro-batches and ranks; a mean of means would weight a short micro-batch like a long one.

`reduction` says what `num` counts, and thereby what a published loss weight or learning rate means. PyTorch's
kl_div(reduction="batchmean") on [B, T, V] divides by B alone: LLM-QAT, BitDistiller and Qualcomm's example train
on the *sum* over a sequence ("sequence_sum"), T times the mean per token ("token_mean") of ModelOpt or TRL.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import get_args

from torch import Tensor, nn

from kdqat.losses.select import Reduction, num_targets
from kdqat.types import Batch, LossParts, Outputs, TopKOutputs


class DistillLoss(nn.Module, ABC):
    """Base of all losses. A new one subclasses this and writes `forward`, or, if it needs nothing but logits,
    subclasses `kdqat.losses.logits.LogitLoss` and writes `token_loss`.

    Args:
        reduction: "token_mean": `num` counts target tokens. "sequence_sum": it counts the sequences with a target.

    Attributes:
        wants: what the models put into `Outputs.extras`: "hidden_states", "attentions".
        needs_teacher: whether `forward` raises without a teacher.

    Raises:
        ValueError: for an unknown reduction.
    """

    wants: frozenset[str] = frozenset()
    needs_teacher: bool = True

    def __init__(self, *, reduction: Reduction = "token_mean") -> None:
        super().__init__()
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction {reduction!r} is unknown: use {' or '.join(get_args(Reduction))}")
        self.reduction: Reduction = reduction

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs | TopKOutputs | None, batch: Batch) -> LossParts:
        """The loss of one micro-batch, not divided by anything.

        Raises:
            ValueError: if the loss needs a teacher and gets None, or needs extras that are not there.
        """

    def compile_chunks(self) -> None:
        """torch.compile what a loss on logits does chunk by chunk; other losses have nothing of the kind."""

    @property
    def name(self) -> str:
        """The key of this loss in `LossParts.by_name`: its class in snake case, e.g. "forward_kl"."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def num_targets(self, batch: Batch) -> Tensor:
        """`LossParts.num` of this batch, 0-D int64, known before the forward pass."""
        return num_targets(batch, self.reduction)

    def check_teacher(self, teacher: Outputs | TopKOutputs | None) -> None:
        """
        Raises:
            ValueError: if this loss needs a teacher and there is none.
        """
        if self.needs_teacher and teacher is None:
            raise ValueError(
                f"{type(self).__name__} compares with a teacher and there is none: set model.teacher "
                "(e.g. FrozenTeacher), or train on CrossEntropy"
            )


def extra(outputs: Outputs | TopKOutputs, key: str, loss: DistillLoss) -> tuple[Tensor, ...]:
    """`outputs.extras[key]`, one tensor per layer.

    Raises:
        ValueError: if the model did not give it.
    """
    if not outputs.extras.get(key):
        raise ValueError(
            f"{type(loss).__name__} needs {key!r} and the model gave none: call it with the loss's `wants`; "
            "attentions need attn_implementation='eager', and a cached teacher holds logits only"
        )
    return outputs.extras[key]


def paired_layers(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], layers: list[int] | None
) -> list[tuple[Tensor, Tensor]]:
    """The (student, teacher) tensors of the chosen `layers` (indices, negative from the end), or of all.

    Raises:
        ValueError: if the models differ in depth or in shape, or a layer does not exist.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"the student has {len(student)} layers of this kind, the teacher {len(teacher)}: comparing layer "
            "by layer needs equal depth; use a loss on logits instead"
        )
    chosen = range(len(student)) if layers is None else layers
    outside = [index for index in chosen if not -len(student) <= index < len(student)]
    if outside:
        raise ValueError(f"layers {outside} do not exist: use indices 0 ... {len(student) - 1}, or negative ones")
    pairs = [(student[index], teacher[index].detach()) for index in chosen]
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise ValueError(
                f"a layer is {tuple(ours.shape)} in the student and {tuple(theirs.shape)} in the teacher: "
                "comparing layer by layer needs equal widths; use a loss on logits instead"
            )
    return pairs


def check_layers(layers: list[int] | None) -> None:
    """
    Raises:
        ValueError: for an empty list of layers, which would train nothing.
    """
    if layers is not None and not layers:
        raise ValueError("layers is empty: list indices such as [-1], or leave it out for all layers")
