"""Bytes the loss needs beside what it is given: one chunk of logits, the head in the autocast dtype, gathered rows.

    kernel      chunk_tokens * V * (student logits + teacher logits): KL and cross-entropy on CUDA
    compiled    chunk_tokens * V * (student logits + teacher logits + gradient of the student's)
    eager       chunk_tokens * V * the most that exists at once in token_loss and its gradient, counted

The eager number is counted on a few small logits, with the recipe's own losses: forward KL and JSD differ twofold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdqat.losses import DistillLoss, WeightedSum
from kdqat.losses.logits import LogitLoss, closed_form_of
from kdqat.models import SplitModel
from kdqat.training.planner.live import LiveBytes
from kdqat.training.planner.student import dtype_bytes
from kdqat.training.planner.trace import Rows

EAGER_FACTOR = 1.5  # of the compiled formula, where a loss cannot be counted on logits alone
_SAMPLE = (8, 512)


@dataclass(frozen=True)
class LossCost:
    """Bytes."""

    temporaries: int  # the most that exists at once
    head_gradient: int  # fp32, exists when the backward pass of the blocks begins
    made: int  # by an eager pass over all targets and its gradient


def flat(loss: DistillLoss) -> list[DistillLoss]:
    """The loss, or the terms of a weighted sum."""
    if not isinstance(loss, WeightedSum):
        return [loss]
    return [leaf for term in loss.terms if isinstance(term, DistillLoss) for leaf in flat(term)]


def loss_cost(
    loss: DistillLoss, split: SplitModel, rows: Rows, *, autocast: torch.dtype | None,
    teacher_dtype: torch.dtype | None, compiled: bool, device: str,
) -> LossCost:  # fmt: skip
    """Of one micro-batch.

    Args:
        teacher_dtype: of its logits; None without a teacher.
    """
    terms = [term for term in flat(loss) if isinstance(term, LogitLoss)]
    if not terms:
        return LossCost(0, 0, 0)
    head = split.model.get_output_embeddings().weight  # type: ignore[operator]
    vocabulary, hidden = head.shape
    targets = rows.batch_size * (rows.seq_len - 1)
    chunk_tokens = min(targets, *(term.chunk_tokens for term in terms))
    own = autocast or head.dtype
    eager, made = bytes_per_logit(terms, own, teacher_dtype)
    per_logit = _compiled_bytes(own, teacher_dtype) if compiled else eager
    if device == "cuda" and split.projects and not split.transforms and all(map(closed_form_of, terms)):
        per_logit = _compiled_bytes(own, teacher_dtype) - dtype_bytes(own)  # the gradient replaces the logits
    cast = head.numel() * dtype_bytes(own) if own != head.dtype else 0
    owner = split.model.get_output_embeddings()  # type: ignore[operator]
    if getattr(owner, "weight_fake_quantizer", None) is not None:
        cast += head.numel() * 4  # the fake-quantized weight, made once and kept through the chunks
    per_row = 2 * dtype_bytes(head.dtype) + (dtype_bytes(teacher_dtype) if teacher_dtype is not None else 0)
    gradient = head.numel() * 4 if head.requires_grad else 0
    temporaries = round(chunk_tokens * vocabulary * per_logit) + cast + targets * hidden * per_row
    return LossCost(temporaries, gradient, round(targets * vocabulary * made))


def bytes_per_logit(terms: list[LogitLoss], own: torch.dtype, teacher: torch.dtype | None) -> tuple[float, float]:
    """(the most that exists at once, all that is made) while the terms and the gradient of their sum are computed
    eagerly, logits included."""
    noise = torch.Generator().manual_seed(0)  # the run's own numbers stay where they are
    student_logits = torch.randn(_SAMPLE, generator=noise).to(own)
    teacher_logits = torch.empty(0) if teacher is None else torch.randn(_SAMPLE, generator=noise).to(teacher)
    labels = torch.zeros(_SAMPLE[0], dtype=torch.long)
    given = sum(t.numel() * t.element_size() for t in (student_logits, teacher_logits))
    student_logits.requires_grad_()
    with LiveBytes() as live:
        try:
            total = torch.stack([term.token_loss(student_logits, teacher_logits, labels).sum() for term in terms]).sum()
            torch.autograd.grad(total, student_logits)
        except (RuntimeError, ValueError, TypeError, IndexError):  # a loss that needs more than a chunk shows
            guess = EAGER_FACTOR * _compiled_bytes(own, teacher)
            return guess, guess
    return (given + live.peak) / student_logits.numel(), (given + live.made) / student_logits.numel()


def _compiled_bytes(own: torch.dtype, teacher: torch.dtype | None) -> float:
    return 2 * dtype_bytes(own) + (dtype_bytes(teacher) if teacher is not None else 0)
