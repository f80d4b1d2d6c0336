"""Integer fake quantization as pure functions. Modules around them only hold state.

value = scale * (code - zero_point), code in qmin ... qmax; rounding is half to even (torch.round), gradients pass
rounding by the straight-through estimator (STE, https://arxiv.org/abs/1308.3432). All arithmetic is fp32.

Shapes: groups [O, N, G] (O out, N groups, G group size); scale and zero_point broadcast to it: [O, N, 1] or [1].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdqat.spec import QuantSpec
from kdqat.types import QParams

STE = Literal["plain", "clipped"]

# Smallest magnitude a scale may have: the smallest fp16 number. A learned scale that crosses zero stays finite.
SCALE_FLOOR = 2.0**-24


def round_ste(x: Tensor) -> Tensor:
    """round(x) with gradient 1. The sum is exact: round(x) - x is representable for |x| < 2^23."""
    return x + (x.round() - x).detach()


@torch.library.custom_op("kdqat::round_to_dtype", mutates_args=())
def _round_to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x on the grid of `dtype`, as fp32. Opaque to torch.compile, whose inductor drops the way to fp16 and back: it
    keeps fused values in fp32, and the student would train with scales that no file stores."""
    return x.to(dtype).float()


@_round_to_dtype.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x)


def round_to_dtype_ste(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to `dtype`, still fp32, with gradient 1.

    Never `x.to(dtype).float()`: autograd casts the gradient too, and in fp16 1e-9 becomes 0 and 1e5 inf.
    """
    if dtype == torch.float32:
        return x
    rounded = _round_to_dtype(x.detach(), dtype) if torch.compiler.is_compiling() else x.detach().to(dtype).float()
    return x + (rounded - x).detach()


def floor_magnitude_ste(scale: Tensor) -> Tensor:
    """Keep |scale| >= SCALE_FLOOR and its sign (signed_max scales may be negative), with gradient 1."""
    floored = torch.where(scale < 0, scale.clamp(max=-SCALE_FLOOR), scale.clamp(min=SCALE_FLOOR))
    return scale + (floored - scale).detach()


def choose_qparams(groups: Tensor, qmin: Tensor, qmax: Tensor, spec: QuantSpec, shrink: float = 1.0) -> QParams:
    """The scale and zero point that `spec.scale_rule` gives the values in `groups`, before storage rounding.

    Args:
        groups: [O, N, G] fp32.
        qmin, qmax: 0-D, the codes' range.
        spec: its symmetric, scale_rule and granularity count here.
        shrink: the range is multiplied by it first (the MSE grid search).

    Returns:
        QParams of shape `spec.qparam_shape`; a group of zeros gets scale 1.
    """
    dims = (0, 1, 2) if spec.granularity == "tensor" else (2,)
    if spec.symmetric:
        if spec.scale_rule == "signed_max":
            low, high = groups.amin(dims, keepdim=True), groups.amax(dims, keepdim=True)
            extreme = torch.where(-low >= high, low, high)
            scale = extreme * shrink / qmin
        else:
            levels = qmax + 0.5 if spec.scale_rule == "absmax_half" else qmax
            scale = groups.abs().amax(dims, keepdim=True) * shrink / levels
        zero_point = torch.zeros_like(scale)
    else:
        low = groups.amin(dims, keepdim=True).clamp(max=0) * shrink
        high = groups.amax(dims, keepdim=True).clamp(min=0) * shrink
        scale = (high - low) / (qmax - qmin)
        zero_point = (qmin - low / torch.where(scale == 0, 1.0, scale)).round().clamp(qmin, qmax)
    scale = torch.where(scale == 0, 1.0, scale)
    if spec.granularity == "tensor":
        return QParams(scale.reshape(1), zero_point.reshape(1))
    return QParams(scale, zero_point)


def quantize(groups: Tensor, scale: Tensor, zero_point: Tensor, qmin: Tensor, qmax: Tensor) -> Tensor:
    """Codes of `groups`, as fp32 whole numbers in qmin ... qmax."""
    return torch.clamp(torch.round(groups / scale) + zero_point, qmin, qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values of `codes`: scale * (code - zero_point)."""
    return scale * (codes - zero_point)


def fake_quantize(
    groups: Tensor, scale: Tensor, zero_point: Tensor, qmin: Tensor, qmax: Tensor, ste: STE = "clipped"
) -> Tensor:
    """dequantize(quantize(groups)) bit for bit, with gradients for groups, scale and zero_point.

    ste="plain": gradient 1 to every element. ste="clipped": 1 where qmin <= groups/scale + zero_point <= qmax, else
    0; with it the scale gets the gradient of LSQ (arXiv 1902.08153, eq. 3), the zero point -scale outside the range.
    """
    steps = groups / scale
    low, high = qmin - zero_point, qmax - zero_point
    if ste == "plain":
        rounded = steps + (torch.clamp(torch.round(steps), low, high) - steps).detach()
    else:
        rounded = round_ste(torch.clamp(steps, low, high))
    return scale * rounded
