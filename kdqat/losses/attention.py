"""Attention transfer: the KL between the teacher's and the student's attention distributions.

MiniLM (https://arxiv.org/abs/2002.10957, section 3.1) distils KL[A_teacher; A_student], averaged over heads and query
tokens, of the last layer only (layers=[-1]); TinyBERT (https://arxiv.org/abs/1909.10351, eq. 7) takes all layers,
by MSE on the scores before the softmax. Here it is MiniLM's KL, on the layers you list. It needs attention maps, so
eager attention and O(T^2) memory: for short sequences, or few layers.

Letters in shapes: B batch, A heads, T tokens, N positions that count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.losses.base import DistillLoss, check_layers, extra, paired_layers
from kdqat.losses.select import Reduction, rows_at, target_positions
from kdqat.types import Batch, LossParts, Outputs, TopKOutputs

_FLOOR = 1e-12  # below it a probability counts as this: a masked key has 0 in both maps, and 0 * log 0 must be 0


class AttentionTransfer(DistillLoss):
    """Per query token: KL[a_teacher; a_student] over the keys, averaged over heads and the chosen layers.

    The queries are the positions that predict a target, as in all losses.

    Args:
        layers: indices into `extras["attentions"]`, negative from the end; None: all. [-1] is MiniLM.
        reduction: see `DistillLoss`.

    Raises:
        ValueError: for an empty list of layers; in `forward` for models of different depth or number of heads, a
            layer that does not exist, or missing attentions.
    """

    wants = frozenset({"attentions"})

    def __init__(self, layers: list[int] | None = None, *, reduction: Reduction = "token_mean") -> None:
        super().__init__(reduction=reduction)
        check_layers(layers)
        self.layers = layers

    def forward(self, student: Outputs, teacher: Outputs | TopKOutputs | None, batch: Batch) -> LossParts:
        """The summed KL; `by_name` has "attention_transfer"."""
        self.check_teacher(teacher)
        assert teacher is not None
        positions = target_positions(batch)
        pairs = paired_layers(extra(student, "attentions", self), extra(teacher, "attentions", self), self.layers)
        # select queries before computing: a padded query may attend to nothing, which is a row of NaN
        divergences = [
            _attention_kl(
                rows_at(theirs.transpose(1, 2), positions, batch), rows_at(ours.transpose(1, 2), positions, batch)
            ).sum()
            for ours, theirs in pairs
        ]
        total = torch.stack(divergences).mean()
        return LossParts(total, self.num_targets(batch), {self.name: total.detach()})


def _attention_kl(teacher: Tensor, student: Tensor) -> Tensor:  # [N, A, T], [N, A, T] -> [N]
    dtype = torch.promote_types(student.dtype, torch.float32)
    teacher, student = teacher.to(dtype), student.to(dtype)
    log_ratio = teacher.clamp_min(_FLOOR).log() - student.clamp_min(_FLOOR).log()
    return (teacher * log_ratio).sum(-1).mean(-1)
