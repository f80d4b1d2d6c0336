"""Sums of per-token losses over the vocabulary without ever holding [tokens, V].

4096 tokens of a 128k vocabulary are 2 GiB of fp32, and a KL wants several such tensors for each model. So the
hidden rows that count go through the heads `chunk_tokens` at a time; each chunk runs under activation
checkpointing, which keeps its hidden rows only and makes the logits again in the backward pass. The price is a
second pass of both heads. The idea is that of Liger's fused linear losses (https://arxiv.org/abs/2410.10989),
here in plain PyTorch so that any head works: biased, soft-capped, quantized, sharded.

Letters in shapes: N positions that count, n rows of a chunk, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdqat.losses.select import rows_at, target_positions
from kdqat.metrics import check_same_vocabulary
from kdqat.types import Batch, Outputs

TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(student logits [n, V], teacher logits [n, V], labels [n]) -> [n]. Teacher logits are [0] without a teacher."""


def sum_over_tokens(
    losses: Mapping[str, TokenLoss],
    monitors: Mapping[str, TokenLoss],
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    chunk_tokens: int,
) -> dict[str, Tensor]:
    """The sum over all target tokens of each of `losses` and `monitors`, by name, 0-D.

    Each head is called once per chunk, for all of them. Losses carry gradient to the student's hidden states and
    head, monitors do not, and nothing reaches the teacher. A batch without targets gives zeros that are still
    attached to the student, so that every rank of a distributed run has a backward pass.

    Raises:
        ValueError: if the vocabularies differ, or a model answered for other positions than the batch's.
    """
    positions = target_positions(batch)
    labels = batch.labels.flatten().index_select(0, positions + 1)
    student_rows = rows_at(student.hidden, positions, batch)
    teacher_rows = None if teacher is None else rows_at(teacher.hidden.detach(), positions, batch)

    def run_chunk(student_rows: Tensor, teacher_rows: Tensor | None, labels: Tensor) -> tuple[Tensor, ...]:
        student_logits = student.head(student_rows)
        teacher_logits = _teacher_logits(teacher, teacher_rows, student_logits)
        sums = [loss(student_logits, teacher_logits, labels).sum() for loss in losses.values()]
        # monitors come last: recomputation stops at the last tensor that backward needs, so they run once
        with torch.no_grad():
            sums += [monitor(student_logits, teacher_logits, labels).sum() for monitor in monitors.values()]
        return tuple(sums)

    totals: tuple[Tensor, ...] | None = None
    recompute = len(positions) > chunk_tokens  # a single chunk is within the memory we were given anyway
    for start in range(0, max(len(positions), 1), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        chunk = (student_rows[rows], None if teacher_rows is None else teacher_rows[rows], labels[rows])
        sums = checkpoint(run_chunk, *chunk, use_reentrant=False) if recompute else run_chunk(*chunk)
        totals = sums if totals is None else tuple(a + b for a, b in zip(totals, sums, strict=True))
    assert totals is not None
    return dict(zip([*losses, *monitors], totals, strict=True))


def _teacher_logits(teacher: Outputs | None, teacher_rows: Tensor | None, student_logits: Tensor) -> Tensor:
    """The teacher's logits [n, V] in the teacher's own dtype, without a graph; [0] without a teacher."""
    if teacher is None or teacher_rows is None:
        return student_logits.new_empty(0)
    # autocast off: it would round an fp16 or fp32 teacher to bf16; and a weight it casts and caches under
    # no_grad would reach the student without gradient where both share a head
    with torch.no_grad(), torch.autocast(teacher_rows.device.type, enabled=False):
        logits = teacher.head(teacher_rows)
    check_same_vocabulary(logits, student_logits)
    return logits
