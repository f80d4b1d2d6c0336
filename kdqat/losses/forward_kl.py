"""Forward KL: T^2 KL[p_T; q_T], the loss of knowledge distillation, https://arxiv.org/abs/1503.02531.

p_T = softmax(teacher / T), q_T = softmax(student / T). It is the soft cross-entropy minus the teacher's entropy,
so its gradient is (q - p), and it is 0 for a perfect student. Mode covering: the student must put mass wherever
the teacher does. The factor T^2 keeps the size of the gradient when T changes.
"""

from __future__ import annotations

from torch import Tensor

from kdqat.losses.chunk import ClosedForm
from kdqat.losses.logits import LogitLoss, check_temperature
from kdqat.losses.select import Reduction
from kdqat.metrics import kl_divergence, log_probs


class ForwardKL(LogitLoss):
    """T^2 KL[p_T; q_T].

    Args:
        temperature: T; 1.0, the default, is what most work on language models uses.
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

    @property
    def is_kl(self) -> bool:
        """At T = 1 this loss is the KL that every loss logs."""
        return self.temperature == 1.0

    @property
    def closed_form(self) -> ClosedForm:
        """See `LogitLoss`."""
        return ClosedForm("kl", self.temperature)

    def token_loss(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """[n, V], [n, V], [n] -> [n]."""
        log_p = log_probs(teacher_logits, self.temperature)
        log_q = log_probs(student_logits, self.temperature)
        return self.temperature**2 * kl_divergence(log_p, log_q)
