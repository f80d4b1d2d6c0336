"""Base of the losses that need nothing but logits: they write one function per token, the rest is shared.

The shared part selects the positions that count, runs the heads chunk by chunk (`chunked.py`), and logs the plain
KL to the teacher beside the loss, whatever the loss is. `WeightedSum` calls the same per-token functions, so that
several such losses cost one pass of the heads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kdqat.losses.base import DistillLoss
from kdqat.losses.chunk import ClosedForm, Terms, TokenLoss
from kdqat.losses.chunked import sum_over_tokens
from kdqat.losses.select import Reduction
from kdqat.metrics import token_kl
from kdqat.types import Batch, LossParts, Outputs, TopKOutputs


class LogitLoss(DistillLoss):
    """A loss that is a sum over tokens of a function of both models' logits.

    Args:
        reduction: see `DistillLoss`.
        chunk_tokens: tokens whose logits exist at a time, default 1024: with V = 128256 three bf16 tensors of 250 MiB.
            Fewer take less memory, but read and write the sum of the head's gradient more often.

    Attributes:
        compiled: see `compile_chunks`.

    Raises:
        ValueError: for an unknown reduction or chunk_tokens below 1.
    """

    def __init__(self, *, reduction: Reduction = "token_mean", chunk_tokens: int = 1024) -> None:
        super().__init__(reduction=reduction)
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}: 1024 suits most models")
        self.chunk_tokens = chunk_tokens
        self.compiled = False

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

    @property
    def closed_form(self) -> ClosedForm | None:
        """What `token_loss` is, where a kernel computes it with its gradient; None: `token_loss` is called."""
        return None

    def compile_chunks(self) -> None:
        """torch.compile from here on what lies between the logits of a chunk and their gradient, where the student's
        head is a projection: no fp32 tensor [chunk_tokens, V] exists then. Another length compiles nothing anew."""
        self.compiled = True

    def forward(self, student: Outputs, teacher: Outputs | TopKOutputs | None, batch: Batch) -> LossParts:
        """The loss of one micro-batch; `by_name` has this loss, and "kl" = KL[p; q] if there is a teacher.

        Raises:
            ValueError: if the loss needs a teacher and gets None, or the models do not fit together.
        """
        self.check_teacher(teacher)
        total, by_name = sum_logit_losses({self.name: self}, [1.0], student, teacher, batch, compiled=self.compiled)
        return LossParts(total, self.num_targets(batch), by_name)


def sum_logit_losses(
    losses: Mapping[str, LogitLoss],
    weights: Sequence[float],
    student: Outputs,
    teacher: Outputs | TopKOutputs | None,
    batch: Batch,
    *,
    compiled: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum over tokens of `losses`, 0-D and differentiable; and of each of them and of their monitors the
    sum by name, detached. The heads run once per chunk.

    The smallest `chunk_tokens` among the losses holds for all.
    """
    terms = terms_of(losses, weights, teacher is not None)
    plain_kl = next((name for name, loss in losses.items() if loss.is_kl), None)
    chunk_tokens = min(loss.chunk_tokens for loss in losses.values())
    sums = sum_over_tokens(terms, student, teacher, batch, chunk_tokens=chunk_tokens, compiled=compiled)
    return sums.total, sums.by_name if plain_kl is None else {**sums.by_name, "kl": sums.by_name[plain_kl]}


def terms_of(losses: Mapping[str, LogitLoss], weights: Sequence[float], with_teacher: bool) -> Terms:
    """What `sum_over_tokens` is asked for: the losses, and with a teacher their monitors, the plain KL only once."""
    monitors: dict[str, TokenLoss] = {}
    for loss in losses.values() if with_teacher else ():
        monitors.update(loss.monitors())
    if any(loss.is_kl for loss in losses.values()):
        monitors.pop("kl", None)
    watched = [ClosedForm("kl") if function is _kl else None for function in monitors.values()]
    closed = (*(closed_form_of(loss) for loss in losses.values()), *watched)
    return Terms({name: loss.token_loss for name, loss in losses.items()}, tuple(weights), monitors, closed)


def closed_form_of(loss: LogitLoss) -> ClosedForm | None:
    """The loss's closed form, unless a subclass has another `token_loss` than the class that names it."""
    owner: Any = next(cls for cls in type(loss).__mro__ if "closed_form" in vars(cls))
    return loss.closed_form if type(loss).token_loss is owner.token_loss else None


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
