"""Sums of per-token losses over the vocabulary without ever holding [tokens, V].

4096 tokens of a 128k vocabulary are 2 GiB of fp32, and a KL wants several such tensors for each model. So the
hidden rows that count go through the heads `chunk_tokens` at a time. There are two ways:

- The head is one matmul (`Outputs.projection`): the gradient is computed with the chunk, in `projected.py`.
- It is anything else: each chunk runs under activation checkpointing, here, which keeps its hidden rows only and
  makes the logits again in the backward pass. The price is a second pass of both heads.

The idea is that of Liger's fused linear losses (https://arxiv.org/abs/2410.10989), in plain PyTorch so that any loss
and any head works: biased, soft-capped, quantized, sharded.

Letters in shapes: N positions that count, n rows of a chunk, H hidden width, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdqat.losses.chunk import TeacherRows, Terms, TokenSums, chunk_sums
from kdqat.losses.projected import sum_projected
from kdqat.losses.select import rows_at, target_positions
from kdqat.types import Batch, Outputs, TopKOutputs


def sum_over_tokens(
    terms: Terms,
    student: Outputs,
    teacher: Outputs | TopKOutputs | None,
    batch: Batch,
    *,
    chunk_tokens: int,
    compiled: bool = False,
) -> TokenSums:
    """The sum over all target tokens of each loss and monitor of `terms`.

    Each head is called once per chunk, for all of them. Losses carry gradient to the student's hidden states and
    head, monitors do not, and nothing reaches the teacher. A batch without targets gives zeros that are still
    attached to the student, so that every rank of a distributed run has a backward pass.

    Args:
        chunk_tokens: n.
        compiled: let torch.compile fuse what is between the logits and their gradient, where the student's head is
            a projection.

    Raises:
        ValueError: if the vocabularies differ, or a model answered for other positions than the batch's.
    """
    positions = target_positions(batch)
    labels = batch.labels.flatten().index_select(0, positions + 1)
    student_rows = rows_at(student.hidden, positions, batch)
    teacher_rows = TeacherRows(teacher, positions, batch)
    if student.projection is None:
        return _sum_recomputed(terms, student_rows, student, teacher_rows, labels, chunk_tokens)
    projection = student.projection()
    return sum_projected(
        terms, student_rows, projection, teacher_rows, labels, chunk_tokens=chunk_tokens, compiled=compiled
    )


def _sum_recomputed(
    terms: Terms, student_rows: Tensor, student: Outputs, teacher: TeacherRows, labels: Tensor, chunk_tokens: int
) -> TokenSums:
    losses, monitors = tuple(terms.losses.values()), tuple(terms.monitors.values())

    def run_chunk(chunk: Tensor, rows: slice) -> tuple[Tensor, ...]:
        logits = student.head(chunk)
        return chunk_sums(losses, monitors, None, logits, teacher.chunk(rows, logits), labels[rows])

    totals: tuple[Tensor, ...] | None = None
    recompute = len(student_rows) > chunk_tokens  # a single chunk is within the memory we were given anyway
    for start in range(0, max(len(student_rows), 1), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        chunk = student_rows[rows]
        sums = checkpoint(run_chunk, chunk, rows, use_reentrant=False) if recompute else run_chunk(chunk, rows)
        totals = sums if totals is None else tuple(a + b for a, b in zip(totals, sums, strict=True))
    assert totals is not None
    return TokenSums(terms.total(totals), terms.named(totals))
