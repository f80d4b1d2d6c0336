"""The gradients of a head that is one matmul, added up over chunks and handed to autograd at the end.

Letters in shapes: N positions that count, n rows of a chunk, H hidden width, V vocabulary.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class HeadGradient:
    """Sums of the gradients of rows [N, H], weight [V, H] and bias [V]; nothing is computed for what is frozen.

    Rows are in `dtype`, in fp32 where that is fp16; weight and bias in fp32, in which 16-bit products are added up too.
    All in float64 where the inputs are.

    Args:
        dtype: of the head's matmul.
    """

    def __init__(self, rows: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        exact = torch.promote_types(dtype, torch.float32)
        self.inputs = (rows, weight, bias)
        self._sums = [
            _zeros(rows, exact if dtype == torch.float16 else dtype),
            _zeros(weight, exact),
            _zeros(bias, exact),
        ]

    @property
    def wanted(self) -> bool:
        """Whether there is anything to compute."""
        return any(total is not None for total in self._sums)

    def add(self, part: slice, gradient: Tensor, rows: Tensor, weight: Tensor) -> None:
        """Add a chunk.

        Args:
            part: which of the N rows.
            gradient: of the chunk's logits [n, V].
            rows, weight: what they were made of, [n, H] and [V, H], in the same dtype.
        """
        of_rows, of_weight, of_bias = self._sums
        if of_rows is not None:
            add_product(of_rows[part], gradient, weight, True)  # each row belongs to one chunk
        if of_weight is not None:
            add_product(of_weight, gradient.t(), rows)
        if of_bias is not None:
            of_bias += gradient.sum(0, dtype=of_bias.dtype)

    def attach(self, value: Tensor, scale: float) -> Tensor:
        """`value`, 0-D, with these gradients times `scale` as its gradient; once."""
        sums, self._sums = self._sums, []
        return _Known.apply(value, sums, scale, *self.inputs)


def add_product(total: Tensor, left: Tensor, right: Tensor, fresh: bool = False) -> None:
    """total += left @ right, in the dtype of `total`, which may be wider than that of the factors; `fresh`: it is 0."""
    if total.dtype == left.dtype and fresh:
        torch.mm(left, right, out=total)
    elif total.dtype == left.dtype:
        total.addmm_(left, right)
    elif adds_in_fp32(total.device.type, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    elif left.dtype == torch.float16:  # sums over a vocabulary or a chunk may lie beyond 65504
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    else:
        total += left @ right


@cache
def adds_in_fp32(device: str, dtype: torch.dtype) -> bool:
    """Whether one kernel adds a product of `dtype` to an fp32 sum: CUDA does since torch 2.10, CPUs do not.

    It is tried, once: the operator existed before with other rules.
    """
    if dtype not in (torch.bfloat16, torch.float16) or device == "cpu":
        return False
    total = torch.ones(16, 16, device=device)
    factor = torch.eye(16, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return bool((total == 1 + torch.eye(16, device=device)).all())


class _Known(torch.autograd.Function):
    """A number whose gradients are known."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: list[Tensor | None], scale: float, *inputs: Tensor | None
    ) -> Tensor:
        # not save_for_backward: it would hold the weight's gradient while autograd takes it, which then copies
        ctx.gradients, ctx.scale = gradients, scale
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, from_above: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a loss on logits goes backward once: its gradients are handed on, so compute it anew")
        gradients, ctx.gradients = ctx.gradients, None
        factor = from_above * ctx.scale
        scaled = (g if g is None else g.mul_(factor).to(t) for g, t in zip(gradients, ctx.dtypes, strict=True))
        return None, None, None, *scaled


def _zeros(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or not (tensor.requires_grad and torch.is_grad_enabled()):
        return None
    return torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False)
