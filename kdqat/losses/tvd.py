"""Total variation distance: 1/2 sum_v |p_v - q_v|, the largest difference in probability of any event.

Symmetric and bounded by 1. Used for sequence distillation in f-distill, https://arxiv.org/abs/2307.15190, and in
DistiLLM's code. Its gradient vanishes on tokens whose probabilities differ little in absolute terms, so the tail of
the vocabulary is hardly trained.
"""

from __future__ import annotations

from torch import Tensor

from kdqat.losses.logits import LogitLoss
from kdqat.metrics import log_probs


class TVD(LogitLoss):
    """1/2 sum |p - q|.

    Args:
        reduction: see `DistillLoss`.
        chunk_tokens: see `LogitLoss`.
    """

    def token_loss(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """[n, V], [n, V], [n] -> [n]."""
        return 0.5 * (log_probs(teacher_logits).exp() - log_probs(student_logits).exp()).abs().sum(-1)
