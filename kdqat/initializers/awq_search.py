"""The searches of AWQ (https://arxiv.org/abs/2306.00978) as pure functions: a scale for each input, a clipping for each
group. Both are judged by a layer's squared output error, tr(D H D^T) with D = W^ - W and H the sum of x x^T.

The authors run the consuming module (attention, the MLP) for every candidate; here the error is that of the consuming
linear layers themselves, which needs H alone and no forward pass, however much text there is.
Letters: O outputs, I inputs, N groups of G inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdqat.quant import FakeQuantizer
from kdqat.quant.clipping import as_stored
from kdqat.quant.functional import fake_quantize
from kdqat.quant.grouping import rotate, shared_dims
from kdqat.quant.ranges import choose_qparams
from kdqat.types import QParams

_SMALLEST = 1e-4  # of a scale before it is centred around 1; the authors' code


def search_scale(
    weights: Sequence[tuple[Tensor, FakeQuantizer]], hessian: Tensor, magnitude: Tensor, *, num_ratios: int
) -> Tensor:
    """The scale s = magnitude^r of least error for all `weights` [O, I] that read the same inputs, r in 0 ... 1.

    W diag(s) is rounded and divided by s again. Scales are centred: sqrt(max * min) = 1; r = 0 is RTN.

    Args:
        hessian: [I, I].
        magnitude: [I], mean |x|.

    Returns:
        [I] fp32.
    """
    best, least = torch.ones_like(magnitude), float("inf")
    for step in range(num_ratios):
        scale = magnitude.pow(step / num_ratios).clamp(min=_SMALLEST)
        scale = scale / (scale.amax() * scale.amin()).sqrt()
        error = 0.0
        for weight, quantizer in weights:
            lost = rounded(weight * scale, quantizer) / scale - weight
            error += float(((lost @ hessian) * lost).sum())
        if error < least:
            best, least = scale, error
    return best


def search_clip(
    weight: Tensor, quantizer: FakeQuantizer, hessian: Tensor, *, num_steps: int, max_shrink: float
) -> QParams:
    """For every scale of `weight` [O, I] the range, from the full one down to 1 - `max_shrink` of it, with the least
    error of what its own inputs add to the output.

    Args:
        hessian: [I, I].
        num_steps: into which the way from 1 to 0 is cut.

    Returns:
        QParams before they are stored.
    """
    spec, grid, groups = quantizer.spec, quantizer.grid, quantizer.groups(weight)
    own = _diagonal_blocks(rotate(rotate(hessian, spec.hadamard).T, spec.hadamard), groups.shape[2])
    best, least = choose_qparams(groups, grid, spec), None
    for step in range(max(1, round(max_shrink * num_steps))):
        trial = choose_qparams(groups, grid, spec, 1 - step / num_steps)
        lost = fake_quantize(groups, as_stored(trial, spec), grid, spec) - groups
        error = (torch.einsum("ong,ngh->onh", lost, own) * lost).sum(shared_dims(spec), keepdim=True)
        error = error.reshape(1) if spec.granularity == "tensor" else error
        if least is None:
            best, least = trial, error
            continue
        better = error < least
        best = QParams(*(torch.where(better, new, old) for new, old in zip(trial, best, strict=True)))
        least = torch.where(better, error, least)
    return best


def rounded(weight: Tensor, quantizer: FakeQuantizer) -> Tensor:
    """`weight` [O, I] on its grid, at the scales that RTN would store for it."""
    groups = quantizer.groups(weight)
    stored = as_stored(choose_qparams(groups, quantizer.grid, quantizer.spec), quantizer.spec)
    values = fake_quantize(groups, stored, quantizer.grid, quantizer.spec).reshape(weight.shape)
    return rotate(values, quantizer.spec.hadamard)


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """[I, I] -> [N, G, G]."""
    num = len(matrix) // size
    return matrix.reshape(num, size, num, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
