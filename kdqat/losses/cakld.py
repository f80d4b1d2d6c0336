"""Confidence-aware KL (CAKLD) of BitDistiller, https://arxiv.org/abs/2402.10631:

    gamma KL[q; p] + (1 - gamma) KL[p; q]

A confident teacher (gamma near 1) is followed mode-seeking, an unsure one mode-covering. In the authors' code
(train/train.py and train/mytrainer.py) gamma is one constant, measured before training: the mean over about 20
batches of the teacher's *largest* token probability. The paper is said to define it with the probability of the
label tokens instead; that is from secondary sources and not checked here. The code also masks labels without
shifting them, which we do not repeat; its "sum over a sequence, mean over the batch" is reduction="sequence_sum".
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kdqat.losses.chunk import TokenLoss
from kdqat.losses.logits import LogitLoss, check_fraction
from kdqat.losses.select import Reduction
from kdqat.metrics import kl_divergence, log_probs, token_confidence


class CAKLD(LogitLoss):
    """gamma KL[q; p] + (1 - gamma) KL[p; q].

    Every run logs "teacher_confidence", the teacher's mean largest probability: a few steps with any gamma give
    the constant for the data at hand.

    Args:
        gamma: the constant in [0, 1], as in BitDistiller. None: each token's own largest teacher probability, a
            variant of ours that needs no measurement (a mean per batch would make the loss depend on how the
            step is cut into micro-batches).
        reduction: see `DistillLoss`; "sequence_sum" is BitDistiller's.
        chunk_tokens: see `LogitLoss`.

    Raises:
        ValueError: for a gamma outside [0, 1].
    """

    def __init__(self, gamma: float | None, *, reduction: Reduction = "token_mean", chunk_tokens: int = 1024) -> None:
        super().__init__(reduction=reduction, chunk_tokens=chunk_tokens)
        if gamma is not None:
            check_fraction("gamma", gamma)
        self.gamma = gamma

    def token_loss(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """[n, V], [n, V], [n] -> [n]."""
        log_p, log_q = log_probs(teacher_logits), log_probs(student_logits)
        gamma = log_p.amax(-1).exp() if self.gamma is None else self.gamma
        return gamma * kl_divergence(log_q, log_p) + (1 - gamma) * kl_divergence(log_p, log_q)

    def monitors(self) -> Mapping[str, TokenLoss]:
        """ "kl", and the confidence that gamma is the mean of."""
        return {**super().monitors(), "teacher_confidence": _confidence}


def _confidence(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    return token_confidence(teacher_logits)
