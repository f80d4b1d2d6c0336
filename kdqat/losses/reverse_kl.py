"""Reverse KL: T^2 KL[q_T; p_T], mode seeking: the student may drop what the teacher does, but not invent.

The divergence of MiniLLM, https://arxiv.org/abs/2306.08543, here per token on the given text (MiniLLM samples
from the student and takes a policy gradient over sequences).
"""

from __future__ import annotations

from torch import Tensor

from kdqat.losses.logits import LogitLoss, check_temperature
from kdqat.losses.select import Reduction
from kdqat.metrics import kl_divergence, log_probs


class ReverseKL(LogitLoss):
    """T^2 KL[q_T; p_T].

    Args:
        temperature: T, default 1.0.
        reduction: see `DistillLoss`.
        chunk_tokens: see `LogitLoss`.

    Raises:
        ValueError: for a temperature of zero or less.
    """

    def __init__(
        self, temperature: float = 1.0, *, reduction: Reduction = "token_mean", chunk_tokens: int = 1024
    ) -> None:
        super().__init__(reduction=reduction, chunk_tokens=chunk_tokens)
        check_temperature(temperature)
        self.temperature = temperature

    def token_loss(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """[n, V], [n, V], [n] -> [n]."""
        log_p = log_probs(teacher_logits, self.temperature)
        log_q = log_probs(student_logits, self.temperature)
        return self.temperature**2 * kl_divergence(log_q, log_p)
