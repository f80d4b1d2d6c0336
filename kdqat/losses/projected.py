"""The sums of `chunked.py` where the student's head is one matmul: the gradient is made with the logits.

A chunk's logits, and their gradient g, exist once: rows @ W.T, then the losses and g by autograd over the chunk's
logits alone, then g @ W for the rows and g.T @ rows added to the weight's gradient. The backward pass only multiplies
by what comes from above. So both heads run once, where checkpointing runs them twice, and W is cast (and fake-
quantized) once a micro-batch. It is what Liger's fused linear losses do (https://arxiv.org/abs/2410.10989), for any
loss: nobody derives a gradient by hand, but for forward KL and cross-entropy, which have a kernel on CUDA (`kernels/`).

The weight's gradient is summed in fp32 over the chunks and reaches an fp32 weight as it is; a plain head under
autocast rounds it to 16 bits first.

What exists at a time, in bytes of 16 bits, beside the weight's gradient: W's cast [V, H], twice the rows [N, H], and
[n, V] three times: the student's logits, the teacher's, and g. Compiled, nothing else. Eager, the losses run over a
few of the rows at a time, and g replaces the logits it was made from.

Letters in shapes: N positions that count, n rows of a chunk, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kdqat.losses import kernels
from kdqat.losses.chunk import TeacherChunk, TeacherRows, Terms, TokenSums, chunk_sums, take
from kdqat.losses.head_gradient import HeadGradient
from kdqat.losses.top_k import TopKRows
from kdqat.types import Projection

EAGER_LOGITS = 2**23  # how many an eager loss sees at a time: it makes about eight fp32 tensors of that size

FP16_SCALE = 1024.0
"""What g is multiplied by in fp16, over the sum of the |weights|. Of a KL or cross-entropy g is q - p, at most 1, but
most of its V entries lie below fp16's 6e-5 and would round to nothing; a GradScaler comes too late, in the backward
pass. The room of 64 up to fp16's end is for T times that at a temperature, and q log(q / p) of the reverse KL."""


def sum_projected(
    terms: Terms,
    rows: Tensor,
    projection: Projection,
    teacher: TeacherRows,
    labels: Tensor,
    *,
    chunk_tokens: int,
    compiled: bool = False,
) -> TokenSums:
    """As `chunked.sum_over_tokens`, of the student's `rows` [N, H] through `projection`, with `labels` [N].

    The matmul runs in autocast's dtype where autocast is on, as nn.Linear does.
    """
    weight, bias, transform = projection
    dtype = _matmul_dtype(weight)
    gradient = HeadGradient(rows, weight, bias, dtype)
    scale = FP16_SCALE / (sum(map(abs, terms.weights)) or 1.0) if dtype == torch.float16 else 1.0
    with torch.no_grad():
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        no_logits = weight.new_empty(0, len(weight))
        no_logits = no_logits if transform is None else transform(no_logits)  # [0, V], cut
        zero = weight.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        totals = [zero] * (len(terms.losses) + len(terms.monitors))
        for start in range(0, len(rows), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            chunk = rows[part].to(dtype)
            sums, of_logits = value_and_grad(
                terms,
                transform,
                F.linear(chunk, weight, bias),
                teacher.chunk(part, no_logits),
                labels[part],
                scale=scale if gradient.wanted else None,
                compiled=compiled,
            )
            totals = [total + value for total, value in zip(totals, sums, strict=True)]
            if of_logits is not None:
                gradient.add(part, of_logits, chunk, weight)
            del of_logits  # before the next chunk's logits are made
        total = terms.total(totals)
    if gradient.wanted:
        total = gradient.attach(total, 1 / scale)
    return TokenSums(total, terms.named(totals))


def value_and_grad(
    terms: Terms,
    transform: Callable[[Tensor], Tensor] | None,
    logits: Tensor,
    teacher: TeacherChunk,
    labels: Tensor,
    *,
    scale: float | None = 1.0,
    compiled: bool = False,
) -> tuple[list[Tensor], Tensor | None]:
    """The sums of a chunk, and the gradient of their weighted total.

    Args:
        transform: see `Projection`.
        logits: [n, V], before `transform`; spent afterwards: the gradient may lie in their memory.
        teacher, labels: of these n rows.
        scale: multiplies the gradient; None: none is wanted.
        compiled: see `chunked.sum_over_tokens`.

    Returns:
        The sum of each loss, then of each monitor, 0-D and detached; the gradient [n, V] in the dtype of `logits`.
    """
    factors = kernels.factors_of(terms, transform, logits, teacher)
    if factors is not None:
        assert not isinstance(teacher, TopKRows)
        return kernels.value_and_grad(terms, factors, logits, teacher, labels, scale)
    run = _compiled_chunk_sums() if compiled else chunk_sums
    step = len(logits) if compiled else max(1, EAGER_LOGITS // logits.shape[1])
    totals: list[Tensor] = []
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        seen = (logits[part].detach(), take(teacher, part), labels[part])
        if compiled:
            _mark_rows_dynamic(*seen)
        with torch.set_grad_enabled(scale is not None):
            seen[0].requires_grad_(scale is not None)
            sums = run(tuple(terms.losses.values()), tuple(terms.monitors.values()), transform, *seen)
        values = [value.detach() for value in sums]
        totals = [a + b for a, b in zip(totals, values, strict=True)] if totals else values
        if scale is None:
            continue
        gradient = _gradient(sums, terms.weights, seen[0], scale)
        if step >= len(logits):
            return totals, gradient
        logits[part] = gradient
        del gradient, sums
    return totals, None if scale is None else logits


def _gradient(sums: tuple[Tensor, ...], weights: tuple[float, ...], logits: Tensor, scale: float) -> Tensor:
    carrying = [(value, weight) for value, weight in zip(sums, weights, strict=False) if value.requires_grad]
    if not carrying:
        return torch.zeros_like(logits)
    from_above = [value.new_full((), weight * scale) for value, weight in carrying]
    return torch.autograd.grad([value for value, _ in carrying], logits, from_above)[0]


@cache
def _compiled_chunk_sums() -> Callable[..., tuple[Tensor, ...]]:
    # one for all losses: dynamo keeps its graphs by function and tells them apart by what they were called with. The
    # gradient comes from AOTAutograd's backward graph, which makes it of the 16-bit logits and sums over the vocabulary
    return torch.compile(chunk_sums)


def _mark_rows_dynamic(logits: Tensor, teacher: TeacherChunk, labels: Tensor) -> None:
    """One graph for all n: the last chunk of a batch is shorter, and another length in every batch."""
    answers = [] if teacher is None else [teacher] if isinstance(teacher, Tensor) else [*teacher]
    for tensor in (logits, labels, *answers):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def _matmul_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    # autocast leaves float64 alone
    cast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else weight.dtype
