"""One chunk of tokens: the teacher's part in it, and the way from the student's logits to the sums of the losses.

`chunk_sums` is pure and sees tensors and functions only, so that torch.compile can fuse it; the heads stay outside.

Letters in shapes: N positions that count, n rows of a chunk, k kept tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kdqat.losses.select import rows_at
from kdqat.losses.top_k import TopKRows, dense_log_probs
from kdqat.metrics import check_same_vocabulary
from kdqat.types import Batch, Outputs, TopKOutputs

TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(student logits [n, V], teacher logits [n, V], labels [n]) -> [n]. Teacher logits are [0] without a teacher."""

TeacherChunk = Tensor | TopKRows | None
"""The teacher's logits [n, V], its top k, or no teacher."""


class ClosedForm(NamedTuple):
    """A loss that the kernel in `kernels/` knows: T^2 KL[p_T; q_T], or the negative log-likelihood of the label."""

    kind: Literal["kl", "nll"]
    temperature: float = 1.0


class Terms(NamedTuple):
    """What is summed over tokens."""

    losses: Mapping[str, TokenLoss]
    weights: tuple[float, ...]  # one for each loss: what is trained is their weighted sum
    monitors: Mapping[str, TokenLoss]  # logged only: no gradient
    # Of losses, then monitors; None: only the function knows; (): nothing is known.
    closed: tuple[ClosedForm | None, ...] = ()

    def total(self, sums: Sequence[Tensor]) -> Tensor:
        """The weighted sum of `sums`, which are those of the losses, then of the monitors."""
        weighted = [weight * value for weight, value in zip(self.weights, sums, strict=False)]
        return torch.stack(weighted).sum()

    def named(self, sums: Sequence[Tensor]) -> dict[str, Tensor]:
        """`sums` by name, detached."""
        return {name: value.detach() for name, value in zip([*self.losses, *self.monitors], sums, strict=True)}


class TokenSums(NamedTuple):
    """What comes out, 0-D."""

    total: Tensor  # the weighted sum, attached to the student
    by_name: dict[str, Tensor]  # each loss and monitor, unweighted and detached


class TeacherRows:
    """The teacher's answers at the N `positions` [N] that count.

    Raises:
        ValueError: if it answered for other positions than the batch's.
    """

    def __init__(self, teacher: Outputs | TopKOutputs | None, positions: Tensor, batch: Batch) -> None:
        self._hidden: Tensor | None = None
        self._top_k: TopKRows | None = None
        if isinstance(teacher, TopKOutputs):
            ids, *stored = (rows_at(values.detach(), positions, batch) for values in teacher[:3])
            self._top_k = TopKRows(ids.long(), *stored)
            self._largest_id = int(ids.max()) if ids.numel() else -1
        elif teacher is not None:
            self._hidden, self._head = rows_at(teacher.hidden.detach(), positions, batch), teacher.head

    def chunk(self, rows: slice, student_logits: Tensor) -> TeacherChunk:
        """The teacher's part at `rows`: logits in its own dtype, or the top k; no graph.

        Args:
            rows: of the N.
            student_logits: [any, V], for their V.

        Raises:
            ValueError: if the vocabularies differ.
        """
        if self._top_k is not None:
            if self._largest_id >= student_logits.shape[-1]:
                raise ValueError(
                    f"the teacher kept token {self._largest_id} and the student has {student_logits.shape[-1]} "
                    "logits: keep the top k of a teacher with the student's tokenizer, its vocabulary cut likewise"
                )
            return take(self._top_k, rows)
        if self._hidden is None:
            return None
        # autocast off: it would round an fp16 or fp32 teacher to bf16; and a weight it casts and caches under
        # no_grad would reach the student without gradient where both share a head
        with torch.no_grad(), torch.autocast(self._hidden.device.type, enabled=False):
            logits = self._head(self._hidden[rows])
        check_same_vocabulary(logits, student_logits)
        return logits


def take(teacher: TeacherChunk, rows: slice) -> TeacherChunk:
    """`rows` of a chunk."""
    if isinstance(teacher, TopKRows):
        return TopKRows(*(values[rows] for values in teacher))
    return None if teacher is None else teacher[rows]


def chunk_sums(
    losses: tuple[TokenLoss, ...],
    monitors: tuple[TokenLoss, ...],
    transform: Callable[[Tensor], Tensor] | None,
    logits: Tensor,
    teacher: TeacherChunk,
    labels: Tensor,
) -> tuple[Tensor, ...]:
    """The sums over n tokens of `losses`, differentiable in `logits` [n, V], then of `monitors`; 0-D each.

    Args:
        transform: what makes the student's logits of `logits` (see `Projection`); None: they are.
        labels: [n].
    """
    student = logits if transform is None else transform(logits)
    if isinstance(teacher, TopKRows):
        teacher = dense_log_probs(teacher, student)
    elif teacher is None:
        teacher = student.new_empty(0)
    sums = [loss(student, teacher, labels).sum() for loss in losses]
    # monitors come last: recomputation stops at the last tensor that backward needs, so they run once
    with torch.no_grad():
        sums += [monitor(student, teacher, labels).sum() for monitor in monitors]
    return tuple(sums)
