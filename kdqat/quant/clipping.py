"""The range that loses least: clipping searched on a grid, for every format, as a pure function."""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.quant import scales
from kdqat.quant.formats import Grid
from kdqat.quant.functional import fake_quantize
from kdqat.quant.grouping import shared_dims
from kdqat.quant.ranges import choose_qparams
from kdqat.spec import QuantSpec
from kdqat.types import QParams


def search_clipping(
    groups: Tensor, grid: Grid, spec: QuantSpec, num_steps: int, smallest: float, norm: float = 2.0
) -> QParams:
    """For every scale, the range from the full one down to `smallest` times it with the least sum |w - w_hat|^norm.

    Every candidate is judged as it will be stored: scales of nested formats under a second level that is fitted to the
    full ranges and to the candidates. The full range is kept where nothing is better. No gradient.

    Args:
        groups: [O, N, G] fp32.
        num_steps: points on the grid, the full range included.
    """
    groups = groups.detach()
    best = choose_qparams(groups, grid, spec)
    best_error = _error(groups, as_stored(best, spec), grid, spec, norm)
    for step in range(1, num_steps):
        trial = choose_qparams(groups, grid, spec, 1.0 - (1.0 - smallest) * step / (num_steps - 1))
        error = _error(groups, as_stored(trial, spec), grid, spec, norm)
        better = error < best_error
        best = QParams(*(torch.where(better, new, old) for new, old in zip(trial, best, strict=True)))
        best_error = torch.where(better, error, best_error)
    return best


def as_stored(qparams: QParams, spec: QuantSpec) -> QParams:
    """`qparams` of a whole tensor as they are read back, with a second level fitted to them; no gradient."""
    second = scales.fit(spec.scale_dtype, qparams.scale, qparams.zero_point)
    scale = scales.round_scale(spec.scale_dtype, qparams.scale, second)
    if spec.zero_point == "minimum":
        return QParams(scale, scales.round_minimum(spec.scale_dtype, qparams.zero_point, second))
    return QParams(scale, qparams.zero_point)


def _error(groups: Tensor, qparams: QParams, grid: Grid, spec: QuantSpec, norm: float) -> Tensor:
    """Summed over whatever shares a scale, in the shape of the scale."""
    error = (fake_quantize(groups, qparams, grid, spec) - groups).abs().pow(norm)
    error = error.sum(shared_dims(spec), keepdim=True)
    return error.reshape(1) if spec.granularity == "tensor" else error
