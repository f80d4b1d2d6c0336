"""Fake quantization as pure functions, for every number format. Modules around them only hold state.

    integer zero point   value = scale * (level - zero_point)
    minimum              value = scale * level + minimum
    otherwise            value = scale * level                level: a number of the grid (`formats.py`)

Gradients pass rounding by the straight-through estimator (STE, https://arxiv.org/abs/1308.3432). Arithmetic is fp32.
Shapes: groups [O, N, G] (O rows, N groups, G group size); scale and zero_point broadcast to it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kdqat.quant.formats import Grid, half_gap, nearest
from kdqat.spec import QuantSpec
from kdqat.types import QParams

STE = Literal["plain", "clipped", "trust", "attenuated"]

ATTENUATION_WIDTH = 0.25  # share of half a step, next to a threshold, in which "attenuated" lets the gradient fall to 0


class _Replace(torch.autograd.Function):
    """See `replace_ste`; a Function, because x.detach() arithmetic would cost three passes and keep nothing useful."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _ScaleGradient(torch.autograd.Function):
    """See `scale_gradient`; the factor is computed in the backward pass, so that nothing new is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sharing: float, qmax: Tensor) -> Tensor:
        ctx.save_for_backward(qmax)
        ctx.sharing = sharing
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (qmax,) = ctx.saved_tensors
        return grad * torch.rsqrt(ctx.sharing * qmax), None, None


def round_ste(x: Tensor) -> Tensor:
    """round(x) with gradient 1."""
    return replace_ste(x, x.detach().round())


def replace_ste(x: Tensor, value: Tensor) -> Tensor:
    """`value` exactly, of the shape of x, with the gradient of x.

    Never `x.to(dtype).float()`: autograd casts the gradient too, and in fp16 1e-9 becomes 0 and 1e5 inf; in fp8
    nearly every gradient is 0.
    """
    return _Replace.apply(x, value)


def scale_gradient(x: Tensor, sharing: float, qmax: Tensor) -> Tensor:
    """x exactly, with its gradient divided by sqrt(sharing * qmax), as LSQ does for a scale that `sharing` share."""
    return _ScaleGradient.apply(x, sharing, qmax)


def fake_quantize(groups: Tensor, qparams: QParams, grid: Grid, spec: QuantSpec, ste: STE = "clipped") -> Tensor:
    """dequantize(quantize(groups)) bit for bit, with gradients for groups, scale and zero point.

    The gradient to a weight is 1 where its STE lets it through, else 0:
        plain        everywhere
        clipped      where the weight lies in the grid's range; the scale then gets LSQ's gradient (arXiv 1902.08153,
                     eq. 3), an integer zero point -scale from clipped weights, a minimum 1 from clipped weights
        trust        where rounding moved the weight by at most half a step (QuEST, arXiv 2502.05003): clipped weights
                     up to half a step outside the range still learn
        attenuated   as clipped, but falling linearly to 0 within ATTENUATION_WIDTH of a rounding threshold: weights
                     that would oscillate across it (arXiv 2203.11086) move less. This ramp is kdqat's own.
    """
    scale, zero_point = qparams
    if spec.zero_point == "minimum":
        return scale * _level_ste((groups - zero_point) / scale, grid.low, grid.high, grid, ste) + zero_point
    steps = groups / scale
    if spec.zero_point == "integer":
        return scale * _level_ste(steps, grid.low - zero_point, grid.high - zero_point, grid, ste)
    return scale * _level_ste(steps, grid.low, grid.high, grid, ste)


def _level_ste(steps: Tensor, low: Tensor, high: Tensor, grid: Grid, ste: STE) -> Tensor:
    """The level nearest to `steps` within low ... high, with the gradient that `ste` says."""
    clipped = torch.clamp(steps, low, high)
    level = nearest(clipped.detach(), grid)
    if ste == "clipped":
        return replace_ste(clipped, level)
    if ste == "plain":
        return replace_ste(steps, level)
    gap = half_gap(clipped.detach(), level, grid)
    distance = (level - steps).detach().abs()
    if ste == "trust":
        return replace_ste(steps * (distance <= gap), level)
    share = ((gap - distance) / (ATTENUATION_WIDTH * gap)).clamp(0, 1)
    return replace_ste(clipped * share, level)


def fake_quantize_backward(
    grad: Tensor, groups: Tensor, qparams: QParams, grid: Grid, spec: QuantSpec, ste: STE = "clipped"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `fake_quantize` in closed form, from its inputs alone: nothing of the forward pass is needed.

    With steps t, level L and the share m of the gradient that the STE lets through to the weight:
        weight m, scale L - m t, integer zero point -scale where t is clipped, minimum 1 - m; all times `grad`.

    Returns:
        Gradients of groups [O, N, G], of the scale and of the zero point before they are summed over what shares them
        (None: no gradient).
    """
    scale, zero_point = qparams
    low, high = grid.low, grid.high
    if spec.zero_point == "integer":
        low, high = low - zero_point, high - zero_point
    steps = ((groups - zero_point) if spec.zero_point == "minimum" else groups) / scale
    clipped = torch.clamp(steps, low, high)
    level = nearest(clipped, grid)
    of_groups, of_bounds = _split_gradient(grad, steps, clipped, level, grid, ste)
    of_scale = grad * level - of_groups * steps
    of_zero = None
    if spec.zero_point == "minimum":
        of_zero = grad - of_groups
    elif spec.zero_point == "integer" and of_bounds is not None:
        of_zero = -of_bounds * scale
    return of_groups, of_scale, of_zero


def _split_gradient(
    grad: Tensor, steps: Tensor, clipped: Tensor, level: Tensor, grid: Grid, ste: STE
) -> tuple[Tensor, Tensor | None]:
    """What `ste` lets through to the weight, and, from clipped weights, to the ends of the range (None: nothing)."""
    if ste == "plain":
        return grad, None
    inside = steps == clipped
    if ste == "clipped":
        return grad * inside, grad * ~inside
    gap, distance = half_gap(clipped, level, grid), (level - steps).abs()
    if ste == "trust":
        return grad * (distance <= gap), None
    through = grad * ((gap - distance) / (ATTENUATION_WIDTH * gap)).clamp(0, 1)
    return through * inside, through * ~inside


def quantize(groups: Tensor, qparams: QParams, grid: Grid, spec: QuantSpec) -> Tensor:
    """Levels of `groups` (of integers with a zero point: codes), fp32."""
    scale, zero_point = qparams
    if spec.zero_point == "minimum":
        return nearest(torch.clamp((groups - zero_point) / scale, grid.low, grid.high), grid)
    steps = groups / scale
    if spec.zero_point == "integer":
        return torch.clamp(torch.round(steps) + zero_point, grid.low, grid.high)
    return nearest(torch.clamp(steps, grid.low, grid.high), grid)


def dequantize(levels: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """Values of `levels`: what every reader of the stored codes computes."""
    scale, zero_point = qparams
    if spec.zero_point == "minimum":
        return scale * levels + zero_point
    return scale * (levels - zero_point) if spec.zero_point == "integer" else scale * levels
