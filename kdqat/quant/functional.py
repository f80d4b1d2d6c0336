"""Fake quantization as pure functions, for every number format. Modules around them only hold state.

    integer zero point   value = scale * (level - zero_point)
    minimum              value = scale * level + minimum
    otherwise            value = scale * level                level: a number of the grid (`formats.py`)

Gradients pass rounding by the straight-through estimator (STE, https://arxiv.org/abs/1308.3432). Arithmetic is fp32.
Shapes: groups [O, N, G] (O rows, N groups, G group size); scale and zero_point broadcast to it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdqat.quant.formats import Grid, half_gap, nearest
from kdqat.spec import QuantSpec
from kdqat.types import QParams

STE = Literal["plain", "clipped", "trust", "attenuated"]

ATTENUATION_WIDTH = 0.25  # share of half a step, next to a threshold, in which "attenuated" lets the gradient fall to 0


def round_ste(x: Tensor) -> Tensor:
    """round(x) with gradient 1."""
    return replace_ste(x, x.round())


def replace_ste(x: Tensor, value: Tensor) -> Tensor:
    """`value` exactly, with the gradient of x: the difference below is exactly zero.

    Never `x.to(dtype).float()`: autograd casts the gradient too, and in fp16 1e-9 becomes 0 and 1e5 inf; in fp8
    nearly every gradient is 0.
    """
    return value.detach() + (x - x.detach())


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """x exactly, with its gradient multiplied by `factor`: the difference below is exactly zero."""
    return x.detach() + (x - x.detach()) * factor


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
