"""Cross-entropy with the labels: plain QAT without a teacher, or the language-model term beside a KL.

Mind its weight beside a KL: published "0.5 KL + 0.5 CE" often sums the KL over a sequence and averages the
cross-entropy over tokens, which is about T : 1 and not 1 : 1. Here all terms of a sum share one reduction.
"""

from __future__ import annotations

from torch import Tensor

from kdqat.losses.chunk import ClosedForm
from kdqat.losses.logits import LogitLoss
from kdqat.metrics import token_nll


class CrossEntropy(LogitLoss):
    """-log q[label]. Needs no teacher; with one, the KL to it is logged as well.

    Args:
        reduction: see `DistillLoss`.
        chunk_tokens: see `LogitLoss`.
    """

    needs_teacher = False

    @property
    def closed_form(self) -> ClosedForm:
        """See `LogitLoss`."""
        return ClosedForm("nll")

    def token_loss(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """[n, V], [n, V] or [0], [n] -> [n]."""
        return token_nll(student_logits, labels)
