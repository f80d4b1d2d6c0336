"""The Triton kernels, launched: as plain functions in eager execution, as operators of torch for torch.compile.

The compiler sees through the operators and calls the kernels without a dispatcher in between; eager execution saves its
20 us a call as well. Needs triton; `kernels/__init__.py` imports this file on first use and only where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
import triton
from torch import Tensor

from kdqat.quant.kernels.triton_kernels import backward_kernel, fake_quantize_kernel

FORWARD_TILE = 2048  # elements a program handles, or one group if that is longer
BACKWARD_TILE = 1024  # more registers for each


def _launch(kernel: Any, tile: int, tensors: Sequence[Tensor | None], constants: Sequence[int], **more: Any) -> None:
    group, per_tensor, kind, half, levels, zero, rule, stored, tiny = constants
    x, unread = tensors[0], tensors[-5]  # where there is nothing the constants leave the pointer unread: any will do
    assert x is not None
    num_groups, pad = x.numel() // group, triton.next_power_of_2(group)
    groups = max(1, tile // pad)
    kernel[(triton.cdiv(num_groups, groups),)](
        *[unread if tensor is None else tensor for tensor in tensors],
        num_groups,
        G=group, PAD=pad, GROUPS=groups, PER_TENSOR=bool(per_tensor), KIND=kind, HALF=bool(half), LEVELS=levels,
        ZERO=zero, RULE=rule, STORED=stored, TINY=bool(tiny), **more,
        num_warps=min(16, max(4, groups * pad // (tile // 4))),
    )  # fmt: skip


def _forward(kernel: Any, x: Tensor, *rest: Any) -> Tensor:
    *tensors, constants, dtype = rest
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(kernel, FORWARD_TILE, [x, out, *tensors], constants)
    return out


def _backward(kernel: Any, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, constants, ste, weight, learns = rest
    grad, x = grad.contiguous(), x.contiguous()
    of_x = torch.empty_like(x) if weight else torch.empty(0, dtype=x.dtype, device=x.device)
    of_scale, of_zero = (
        torch.empty(x.numel() // constants[0] if learns else 0, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    _launch(
        kernel,
        BACKWARD_TILE,
        [grad, x, of_x, of_scale, of_zero, *tensors],
        constants,
        STE=ste,
        WEIGHT=weight,
        LEARNS=learns,
    )
    return of_x, of_scale, of_zero


def fake_quantize(
    x: Tensor, scale: Tensor | None, zero_point: Tensor | None, low: Tensor, high: Tensor, mantissa_bits: Tensor | None,
    min_exponent: Tensor | None, levels: Tensor | None, constants: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Fake-quantized x [.., I] in `dtype`; scale None: found in the same pass."""
    tensors = (scale, zero_point, low, high, mantissa_bits, min_exponent, levels)
    return _forward(fake_quantize_kernel, x, *tensors, constants, dtype)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, low: Tensor, high: Tensor,
    mantissa_bits: Tensor | None, min_exponent: Tensor | None, levels: Tensor | None, constants: Sequence[int],
    ste: int, weight: bool, learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, if it wants one (`weight`), and of scale and zero point [num_groups], if they learn; or empty."""
    tensors = (scale, zero_point, low, high, mantissa_bits, min_exponent, levels)
    return _backward(backward_kernel, grad, x, *tensors, constants, ste, weight, learns)


@wraps(fake_quantize)
def _traced(*arguments: Any) -> Tensor:
    return _forward(torch.library.wrap_triton(fake_quantize_kernel), *arguments)


@wraps(fake_quantize_backward)
def _traced_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(torch.library.wrap_triton(backward_kernel), *arguments)


fake_quantize_op = torch.library.triton_op("kdqat::fake_quantize", _traced, mutates_args=())
backward_op = torch.library.triton_op("kdqat::fake_quantize_backward", _traced_backward, mutates_args=())
