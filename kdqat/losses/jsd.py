"""Generalized Jensen-Shannon divergence, between forward and reverse KL (GKD, https://arxiv.org/abs/2306.13649).

m = beta p + (1 - beta) q;  JSD_beta = beta KL[p; m] + (1 - beta) KL[q; m]. It is bounded by log 2, so a token on
which the models disagree entirely cannot dominate a batch. At the ends the formula is 0; beta = 0 is KL[p; q] and
beta = 1 is KL[q; p] by convention (the limits of JSD_beta / beta and JSD_beta / (1 - beta)), as in TRL's
GKDTrainer. Hence the jump: near an end the loss is small (JSD_.1 is about a tenth of the KL), at the end it is not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdqat.losses.logits import LogitLoss, check_fraction, check_temperature
from kdqat.losses.select import Reduction
from kdqat.metrics import kl_divergence, log_probs


class GeneralizedJSD(LogitLoss):
    """T^2 JSD_beta between p_T and q_T.

    Args:
        beta: weight of the teacher in the mixture, in [0, 1]; 0.5 is the symmetric divergence.
        temperature: T, default 1.0. The factor T^2 keeps the size of the gradient, as in `ForwardKL`; TRL has none.
        reduction: see `DistillLoss`.
        chunk_tokens: see `LogitLoss`.

    Raises:
        ValueError: for a beta outside [0, 1] or a temperature of zero or less.
    """

    def __init__(
        self,
        beta: float = 0.5,
        *,
        temperature: float = 1.0,
        reduction: Reduction = "token_mean",
        chunk_tokens: int = 1024,
    ) -> None:
        super().__init__(reduction=reduction, chunk_tokens=chunk_tokens)
        check_fraction("beta", beta)
        check_temperature(temperature)
        self.beta = beta
        self.temperature = temperature

    def token_loss(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """[n, V], [n, V], [n] -> [n]."""
        log_p = log_probs(teacher_logits, self.temperature)
        log_q = log_probs(student_logits, self.temperature)
        return self.temperature**2 * self._divergence(log_p, log_q)

    def _divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.beta == 0:
            return kl_divergence(log_p, log_q)
        if self.beta == 1:
            return kl_divergence(log_q, log_p)
        # in logarithms: p and q themselves underflow long before their logarithms do
        log_m = torch.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))
        return self.beta * kl_divergence(log_p, log_m) + (1 - self.beta) * kl_divergence(log_q, log_m)
