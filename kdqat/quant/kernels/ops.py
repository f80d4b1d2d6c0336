"""The Triton kernels, launched: as plain functions in eager execution, as operators of torch for torch.compile.

The compiler takes an operator as it is; eager execution saves the dispatcher's 20 us a call. Needs triton;
`kernels/__init__.py` imports this file on first use and only where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from kdqat.quant.kernels.triton_kernels import backward_kernel, fake_quantize_kernel

FORWARD_TILE = 2048  # elements a program handles, or one group if that is longer
BACKWARD_TILE = 1024  # more registers for each


def _launch(kernel: Any, tile: int, tensors: Sequence[Tensor | None], constants: Sequence[int], **more: Any) -> None:
    group, per_tensor, kind, half, levels, zero, rule, stored, tiny = constants
    x = tensors[0]
    assert x is not None
    num_groups, pad = x.numel() // group, triton.next_power_of_2(group)
    groups = max(1, tile // pad)
    kernel[(triton.cdiv(num_groups, groups),)](
        *[x if tensor is None else tensor for tensor in tensors],  # a pointer that the constants leave unread
        num_groups,
        G=group, PAD=pad, GROUPS=groups, PER_TENSOR=bool(per_tensor), KIND=kind, HALF=bool(half), LEVELS=levels,
        ZERO=zero, RULE=rule, STORED=stored, TINY=bool(tiny), **more,
        num_warps=min(16, max(4, groups * pad // (tile // 4))), enable_fp_fusion=False,
    )  # fmt: skip


def fake_quantize(
    x: Tensor, scale: Tensor | None, zero_point: Tensor | None, low: Tensor, high: Tensor, mantissa_bits: Tensor | None,
    min_exponent: Tensor | None, levels: Tensor | None, constants: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Fake-quantized x [.., I] in `dtype`; scale None: found in the same pass."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    tensors = [x, out, scale, zero_point, low, high, mantissa_bits, min_exponent, levels]
    _launch(fake_quantize_kernel, FORWARD_TILE, tensors, constants)
    return out


fake_quantize_op = torch.library.custom_op("kdqat::fake_quantize", fake_quantize, mutates_args=())


@fake_quantize_op.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty(x.shape, dtype=rest[-1], device=x.device)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, low: Tensor, high: Tensor,
    mantissa_bits: Tensor | None, min_exponent: Tensor | None, levels: Tensor | None, constants: Sequence[int],
    ste: int, learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and of scale and zero point [num_groups], empty where nothing learns."""
    grad, x = grad.contiguous(), x.contiguous()
    of_x = torch.empty_like(x)
    of_scale, of_zero = (_per_group(x, constants, learns) for _ in range(2))
    tensors = [grad, x, of_x, of_scale, of_zero, scale, zero_point, low, high, mantissa_bits, min_exponent, levels]
    _launch(backward_kernel, BACKWARD_TILE, tensors, constants, STE=ste, LEARNS=learns)
    return of_x, of_scale, of_zero


backward_op = torch.library.custom_op("kdqat::fake_quantize_backward", fake_quantize_backward, mutates_args=())


@backward_op.register_fake
def _(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    constants, _, learns = rest[-3:]
    per_group = (_per_group(x, constants, learns) for _ in range(2))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), *per_group  # type: ignore[return-value]


def _per_group(x: Tensor, constants: Sequence[int], learns: bool) -> Tensor:
    return torch.empty(x.numel() // constants[0] if learns else 0, device=x.device)
