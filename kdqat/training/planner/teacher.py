"""Bytes of the teacher: what stays on the device, what its forward pass needs for a moment, what it answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from kdqat.models import CachedTeacher, FrozenTeacher, SharedTeacher, SplitModel, blocks_of
from kdqat.models.top_k import ids_dtype
from kdqat.training.module import KDQATModule
from kdqat.training.planner.live import LiveBytes
from kdqat.training.planner.student import block_bytes, matmul_parameters, meta_teacher, nbytes
from kdqat.training.planner.trace import Rows, fake_run, num_experts


@dataclass(frozen=True, kw_only=True)
class TeacherCost:
    """Bytes on one device (before sharding), and matmul weights for the time."""

    weights: int = 0
    working: int = 0  # the most of its forward pass, its answer included
    answer: int = 0  # exists until the loss is done
    largest_block: int = 0
    inside: int = 0
    head: int = 0
    dtype: torch.dtype | None = None
    note: str = ""


def teacher_cost(module: KDQATModule, student: SplitModel, rows: Rows, device: str) -> TeacherCost:
    """Of the module's teacher for one micro-batch."""
    teacher, wants = module.teacher, module.loss.wants if module.loss is not None else frozenset()
    if teacher is None:
        return TeacherCost()
    if isinstance(teacher, SharedTeacher):
        peak, answer = _forward(student, rows, wants, device)
        inside, head = matmul_parameters(student)
        dtype = next(student.parameters()).dtype
        return TeacherCost(working=peak, answer=answer, inside=inside, head=head, dtype=dtype)
    if isinstance(teacher, CachedTeacher):
        return _cached(module, teacher, rows)
    live = teacher if isinstance(teacher, FrozenTeacher) else FrozenTeacher()
    note = "" if live is teacher else f"{type(teacher).__name__}: counted like a FrozenTeacher of the student's source"
    split = meta_teacher(module, live)
    peak, answer = _forward(split, rows, wants, device)
    blocks = block_bytes(split)
    weights = nbytes(split)
    if live.fp8:
        weights -= sum(_linear_elements(block) for block in blocks_of(split.model))  # one byte instead of two
    if live.offload:
        weights = nbytes(split) - sum(blocks) + 2 * max(blocks)
    inside, head = matmul_parameters(split)
    return TeacherCost(
        weights=weights, working=peak, answer=answer, largest_block=max(blocks), inside=inside, head=head,
        dtype=next(split.parameters()).dtype, note=note,
    )  # fmt: skip


def _cached(module: KDQATModule, teacher: CachedTeacher, rows: Rows) -> TeacherCost:
    """A cache answers k tokens with their log-probabilities, or the hidden states for a head that is there."""
    tokens = rows.batch_size * rows.seq_len
    head = meta_teacher(module, teacher.teacher).model.get_output_embeddings().weight  # type: ignore[operator]
    if teacher.kind == "top_k":
        stored = tokens * (teacher.k * (ids_dtype(len(head)).itemsize + torch.float16.itemsize) + 4)
        answer = tokens * (teacher.k * (torch.int64.itemsize + 4) + 4)  # ids, log-probabilities, the tail
        return TeacherCost(working=stored + answer + 4 * tokens * teacher.k, answer=answer, dtype=torch.float32)
    answer = tokens * head.shape[1] * head.itemsize
    size = head.numel() * head.itemsize
    return TeacherCost(weights=size, working=answer, answer=answer, head=head.numel(), dtype=head.dtype)


def _forward(split: SplitModel, rows: Rows, wants: frozenset[str], device: str) -> tuple[int, int]:
    """(peak, bytes of the answer) of a forward pass without a graph."""
    with fake_run(split, device, None, rows) as (fakes, batch), LiveBytes(num_experts(split)) as live, torch.no_grad():
        answer = functional_call(split, fakes, (batch, wants))
        given = {t.untyped_storage()._cdata: t.untyped_storage() for t in tree_leaves((answer.hidden, answer.extras))}
    return live.peak, sum(int(storage.nbytes()) for storage in given.values())


def _linear_elements(block: nn.Module) -> int:
    return sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
