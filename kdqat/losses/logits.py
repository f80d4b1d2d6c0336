"""Base of the losses that need nothing but logits: they write one function per token, the rest is shared.

The shared part selects the positions that count, runs the heads chunk by chunk (`chunked.py`), and logs the plain
KL to the teacher beside the loss, whatever the loss is. `WeightedSum` calls the same per-token functions, so that
several such losses cost one pass of the heads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from kdqat.losses.base import DistillLoss
from kdqat.losses.chunked import TokenLoss, sum_over_tokens
from kdqat.losses.select import Reduction
from kdqat.metrics import token_kl
from kdqat.types import Batch, LossParts, Outputs


class LogitLoss(DistillLoss):
    """A loss that is a sum over tokens of a function of both models' logits.

    Args:
        reduction: see `DistillLoss`.
        chunk_tokens: tokens whose logits exist at a time: a handful of fp32 tensors [chunk_tokens, V]. Smaller
            costs more kernel launches, nothing else.

    Raises:
        ValueError: for an unknown reduction or chunk_tokens below 1.
    """

    def __init__(self, *, reduction: Reduction = "token_mean", chunk_tokens: int = 1024) -> None:
        super().__init__(reduction=reduction)
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}: 1024 suits most models")
        self.chunk_tokens = chunk_tokens

    @abstractmethod
    def token_loss(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each token: [n, V], [n, V] and the labels these rows predict [n] -> [n], in fp32.

        Pure. `teacher_logits` has no gradient; it is [0] where there is no teacher, which only a loss with
        `needs_teacher = False` gets to see.
        """

    def monitors(self) -> Mapping[str, TokenLoss]:
        """What else to log per token, by name, when there is a teacher; without gradient."""
        return {"kl": _kl}

    @property
    def is_kl(self) -> bool:
        """Whether `token_loss` is the plain KL[p; q], so that it need not be computed again for the log."""
        return False

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> LossParts:
        """The loss of one micro-batch; `by_name` has this loss, and "kl" = KL[p; q] if there is a teacher.

        Raises:
            ValueError: if the loss needs a teacher and gets None, or the models do not fit together.
        """
        self.check_teacher(teacher)
        sums = sum_logit_losses({self.name: self}, student, teacher, batch)
        by_name = {name: value.detach() for name, value in sums.items()}
        return LossParts(sums[self.name], self.num_targets(batch), by_name)


def sum_logit_losses(
    losses: Mapping[str, LogitLoss], student: Outputs, teacher: Outputs | None, batch: Batch
) -> dict[str, Tensor]:
    """Sums over tokens of each of `losses` and of their monitors, by name, 0-D; the heads run once per chunk.

    The smallest `chunk_tokens` among the losses holds for all.
    """
    monitors: dict[str, TokenLoss] = {}
    if teacher is not None:
        for loss in losses.values():
            monitors.update(loss.monitors())
    plain_kl = next((name for name, loss in losses.items() if loss.is_kl), None)
    if plain_kl is not None:
        monitors.pop("kl", None)
    sums = sum_over_tokens(
        {name: loss.token_loss for name, loss in losses.items()},
        monitors,
        student,
        teacher,
        batch,
        chunk_tokens=min(loss.chunk_tokens for loss in losses.values()),
    )
    return sums if plain_kl is None else {**sums, "kl": sums[plain_kl]}


def check_temperature(temperature: float) -> None:
    """
    Raises:
        ValueError: for a temperature of zero or less.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}: 1.0 compares the models as they are")


def check_fraction(key: str, value: float) -> None:
    """
    Raises:
        ValueError: if `value` is not in [0, 1]; the message names `key`.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{key} must lie in [0, 1], not {value}")


def _kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    return token_kl(teacher_logits, student_logits)
