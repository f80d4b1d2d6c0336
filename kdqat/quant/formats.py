"""Grids: the levels of a number format as tensors, and rounding to the nearest of them.

A `Grid` is in units of the scale: integers, halves, minifloat numbers or a codebook. Its numbers are tensors and not
Python constants, so that a change of bits (or of the split of a minifloat's bits) recompiles nothing. All in fp32;
ties go to the even code (floats: to the even significand, so that 1.5 becomes 2 where there is no mantissa), except in
codebooks, where they go down (as bitsandbytes does).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdqat.spec import QuantSpec
from kdqat.spec.formats import Kind

_FP32_BIAS, _FP32_MANTISSA = 127, 23


class Grid(NamedTuple):
    """Which levels there are. `low` and `high` are the extreme ones, 0-D fp32.

    `offset` of integers: 0, or 1/2 for a grid without a zero. Floats: `mantissa_bits` and `min_exponent` (of the
    smallest normal number), 0-D int32. Codebooks: `levels` [L], ascending.
    """

    kind: Kind
    low: Tensor
    high: Tensor
    offset: float = 0.0
    mantissa_bits: Tensor | None = None
    min_exponent: Tensor | None = None
    levels: Tensor | None = None


def grid_of(spec: QuantSpec) -> Grid:
    """The grid of `spec`, on the default device."""
    number, (low, high) = spec.number, spec.qrange()
    extremes = torch.tensor(float(low)), torch.tensor(float(high))
    if number.kind == "integer":
        return Grid("integer", *extremes, offset=0.5 if spec.zero_point == "half" else 0.0)
    if number.kind == "codebook":
        return Grid("codebook", *extremes, levels=torch.tensor(number.levels))
    bits = torch.tensor(number.mantissa_bits, dtype=torch.int32)
    return Grid(
        "float", *extremes, mantissa_bits=bits, min_exponent=torch.tensor(number.min_exponent, dtype=torch.int32)
    )


def nearest(x: Tensor, grid: Grid) -> Tensor:
    """The level nearest to each x (any shape, fp32), which should lie within low ... high; no gradient of its own."""
    if grid.kind == "integer":
        return torch.round(x - grid.offset) + grid.offset if grid.offset else torch.round(x)
    if grid.kind == "float":
        step = float_step(x, grid)
        return torch.round(x / step) * step
    assert grid.levels is not None
    middles = (grid.levels[1:] + grid.levels[:-1]) / 2
    return grid.levels[torch.bucketize(x, middles)]


def float_step(x: Tensor, grid: Grid) -> Tensor:
    """Distance of neighbouring levels in the binade of x: 2^(max(floor(log2 |x|), min_exponent) - mantissa_bits).

    The exponent is read off the fp32 bits, exactly; log2 is not exact next to powers of two.
    """
    assert grid.mantissa_bits is not None and grid.min_exponent is not None
    bits = x.detach().contiguous().view(torch.int32)
    exponent = ((bits >> _FP32_MANTISSA) & 0xFF) - _FP32_BIAS
    return power_of_two(torch.maximum(exponent, grid.min_exponent) - grid.mantissa_bits)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as fp32, exactly; exponent int32 in -126 ... 127."""
    return ((exponent + _FP32_BIAS) << _FP32_MANTISSA).view(torch.float32)


def half_gap(x: Tensor, level: Tensor, grid: Grid) -> Tensor:
    """Half the distance between `level`, the nearest to x in low ... high, and its neighbour on the side of x.

    At the last level of a codebook it is that to the only neighbour, as if the grid went on.
    """
    if grid.kind == "integer":
        return torch.full_like(x, 0.5)
    if grid.kind == "float":
        return float_step(x, grid) / 2
    assert grid.levels is not None
    index, last = torch.searchsorted(grid.levels, level), grid.levels.numel() - 1
    upwards = (x >= level) & (index < last)
    return (grid.levels[torch.where(upwards, index + 1, index - 1)] - level).abs() / 2


def encode(levels: Tensor, grid: Grid) -> Tensor:
    """Storage codes of `levels`, int16.

    Integers: the level (level - 1/2 without a zero). Floats: sign, exponent, mantissa from the highest bit down; the
    sign of zero is kept. Codebooks: the index.
    """
    if grid.kind == "integer":
        return (levels - grid.offset).to(torch.int16)
    if grid.kind == "codebook":
        assert grid.levels is not None
        return torch.searchsorted(grid.levels, levels.contiguous()).to(torch.int16)
    return _encode_float(levels, grid).to(torch.int16)


def decode(codes: Tensor, spec: QuantSpec) -> Tensor:
    """Inverse of `encode`: levels as fp32, from the table that `spec` declares."""
    if spec.number.kind == "integer":
        return codes.float() + (0.5 if spec.zero_point == "half" else 0.0)
    table = torch.tensor(spec.number.code_values(), device=codes.device)
    return table[codes.long()]


def _encode_float(levels: Tensor, grid: Grid) -> Tensor:
    assert grid.mantissa_bits is not None and grid.min_exponent is not None
    step = float_step(levels, grid)
    significand = (levels.abs() / step).to(torch.int32)  # 2^m ... 2^(m+1)-1, below 2^m for subnormals
    step_exponent = (step.contiguous().view(torch.int32) >> _FP32_MANTISSA) - _FP32_BIAS
    binade = step_exponent + grid.mantissa_bits - grid.min_exponent  # 0: subnormals and the first normals
    magnitude = (binade << grid.mantissa_bits) + significand  # the hidden bit carries into the exponent
    return magnitude | (torch.signbit(levels).to(torch.int32) << _width_below_sign(grid))


def _width_below_sign(grid: Grid) -> Tensor:
    """Exponent and mantissa bits together, as 0-D int32: min_exponent = 2 - 2^(e-1) gives e."""
    assert grid.mantissa_bits is not None and grid.min_exponent is not None
    exponent_bits = torch.log2(2.0 - grid.min_exponent).round().to(torch.int32) + 1
    return exponent_bits + grid.mantissa_bits
