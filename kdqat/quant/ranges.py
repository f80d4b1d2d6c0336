"""From a range to a scale: `QuantSpec.scale_rule` as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.quant.formats import Grid, power_of_two
from kdqat.quant.grouping import shared_dims
from kdqat.spec import QuantSpec
from kdqat.spec.scale_dtype import NESTED
from kdqat.types import QParams

# Clipping value of a normal variable, in standard deviations, with the least squared error on a grid of 2^b levels
# without a zero; b = 1 ... 8 (QuEST, arXiv 2502.05003, its code).
GAUSSIAN_CLIP = (0.797885, 1.493535, 2.051068, 2.513931, 2.916094, 3.276597, 3.601050, 3.884939)


def choose_qparams(groups: Tensor, grid: Grid, spec: QuantSpec, shrink: float | Tensor = 1.0) -> QParams:
    """The scale and zero point that `spec.scale_rule` gives the values in `groups`, before storage rounding.

    Args:
        groups: [O, N, G] fp32.
        grid: the levels; a bit schedule may have changed those of the spec.
        spec: its symmetry, rule, zero point and granularity count here.
        shrink: the range is multiplied by it first (a search for clipping, learned clipping); broadcasts to the scale.

    Returns:
        QParams of shape `spec.qparam_shape` (dynamic ranges: one row a token); a group of zeros gets scale 1.
        Where 1 would do harm, on grids without a zero and in scales with a second level, it gets next to nothing.
    """
    dims = shared_dims(spec)
    if spec.symmetric:
        scale = _symmetric_scale(groups, grid, spec, dims, shrink)
        zero_point = torch.zeros_like(scale)
    else:
        low, high = groups.amin(dims, keepdim=True), groups.amax(dims, keepdim=True)
        if spec.zero_point == "integer" or spec.scale_dtype == "k6":
            low, high = low.clamp(max=0), high.clamp(min=0)
        low, high = low * shrink, high * shrink
        scale = (high - low) / (grid.high - grid.low)
        zero_point = low
        if spec.zero_point == "integer":
            zero_point = (grid.low - low / torch.where(scale == 0, 1.0, scale)).round().clamp(grid.low, grid.high)
    harms = spec.zero_point == "half" or spec.scale_dtype in NESTED
    scale = torch.where(scale == 0, torch.finfo(torch.float32).tiny if harms else 1.0, scale)
    if spec.granularity == "tensor":
        return QParams(scale.reshape(1), zero_point.reshape(1))
    return QParams(scale, zero_point)


def _symmetric_scale(
    groups: Tensor, grid: Grid, spec: QuantSpec, dims: tuple[int, ...], shrink: float | Tensor
) -> Tensor:
    if spec.scale_rule == "signed_max":
        low, high = groups.amin(dims, keepdim=True), groups.amax(dims, keepdim=True)
        return torch.where(-low >= high, low, high) * shrink / grid.low
    magnitude = groups.abs()
    if spec.scale_rule == "mean":
        return magnitude.mean(dims, keepdim=True) * shrink / grid.high
    if spec.scale_rule == "gaussian":
        rms = groups.square().mean(dims, keepdim=True).sqrt()
        return gaussian_clip(grid) * rms * shrink / grid.high
    absmax = magnitude.amax(dims, keepdim=True) * shrink
    if spec.scale_rule == "mx":
        return mx_scale(absmax, torch.frexp(grid.high).exponent - 1)
    if spec.scale_rule == "pre_shift":
        return pre_shifted_scale(absmax / grid.high, spec.number.exponent_bits)
    return absmax / (grid.high + 0.5 if spec.scale_rule == "absmax_half" else grid.high)


def gaussian_clip(grid: Grid) -> Tensor:
    """GAUSSIAN_CLIP for the grid's number of bits, 0-D; stays a tensor, so that a bit schedule does not recompile."""
    table = torch.tensor(GAUSSIAN_CLIP, device=grid.high.device)
    bits = torch.log2(2 * grid.high + 1).round().long()
    return table[bits.reshape(1) - 1].squeeze(0)  # a 0-D index would be read on the host


def mx_scale(absmax: Tensor, max_exponent: int | Tensor) -> Tensor:
    """2^(floor(log2 absmax) - emax): OCP MX v1.0, section 6.3. Zero stays zero."""
    exponent = torch.frexp(absmax).exponent - 1 - max_exponent
    return torch.where(absmax == 0, 0.0, power_of_two(exponent.clamp(-126, 127).to(torch.int32)))


def pre_shifted_scale(scale: Tensor, exponent_bits: int) -> Tensor:
    """One scale for the tensor, shifted down by a power of two for each feature (LLM-FP4, eqs. 14 and 15).

    In the paper's terms scale = 2^-b~ and the result is 2^-(rho~ + b_ori): rho~ belongs to the feature of the largest
    range, b_ori = clip(round(b~ - rho~), 0, 2^e - 1).

    Args:
        scale: [1, 1, I], each feature's own.
        exponent_bits: e of the format; the shift is added to its exponent.
    """
    largest = scale.amax().clamp(min=torch.finfo(torch.float32).tiny)
    return largest * pre_shift(scale, largest, exponent_bits)


def pre_shift(scale: Tensor, largest: Tensor, exponent_bits: int) -> Tensor:
    """2^-b_ori for each feature, exact powers of two in 2^-(2^e - 1) ... 1."""
    ratio = (scale / largest).clamp(min=2.0**-126)
    shift = torch.round(-torch.log2(ratio)).clamp(0, 2**exponent_bits - 1)
    return power_of_two(-shift.to(torch.int32))


def fold_pre_shift(weight: Tensor, shift: Tensor) -> Tensor:
    """The weight that goes with activations whose pre-shift is left out (LLM-FP4, section 3.4): exact, 2^k only.

    With X_j = 2^-b_ori,j X'_j, X W^T = X' (2^-b_ori W)^T; X' then has one scale for the tensor, the largest.

    Args:
        weight: [O, I], levels or values, any float dtype.
        shift: 2^-b_ori of `pre_shift`, I numbers in any shape.
    """
    return weight * shift.reshape(1, -1).to(weight.dtype)
