"""GPTQ for one weight matrix (https://arxiv.org/abs/2210.17323): columns are rounded one after the other, and those
still to come make good what each lost, by the least output error |(W - W^) X|^2 = tr(D H D^T), H = X X^T.

With U^T U = H^-1, U upper triangular, column i loses e_i = (w_i - w^_i) / U_ii, later columns get w_j -= e_i U_ij, and
the sum of all |e_i|^2 is tr(D H D^T) exactly. Letters: O outputs, I inputs, D = W - W^.

A rotated spec (`hadamard`) is solved where it rounds: W and H are rotated, for X W^T is X R (W R)^T.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from kdqat.quant import FakeQuantizer
from kdqat.quant.clipping import search_clipping
from kdqat.quant.functional import dequantize, quantize
from kdqat.quant.grouping import rotate, to_groups
from kdqat.spec.scale_dtype import NESTED
from kdqat.types import QParams

log = logging.getLogger(__name__)

MSE_STEPS, MSE_SMALLEST, MSE_NORM = 80, 0.21, 2.4  # of the authors' code: grid 100, maxshrink 0.8


class Solution(NamedTuple):
    """What was found for one weight."""

    values: Tensor  # [O, I] on the grid, rotated where the spec rotates
    qparams: QParams  # as stored
    error: float  # the accumulated column error: tr(D H D^T) of the damped H


def factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """U [I, I] fp32, upper triangular with U^T U = (H + lambda)^-1, and the damped H in fp64.

    lambda is `damping` times the mean of the diagonal, ten times as much where that is no positive matrix yet.

    Raises:
        ValueError: for inputs that are not finite, or if no damping helps.
    """
    plain = hessian.double()
    if not plain.isfinite().all():
        raise ValueError("its inputs are not finite; use calibration text and a dtype under which they are")
    unit = plain.diagonal().mean() * torch.eye(len(plain), dtype=plain.dtype, device=plain.device)
    for attempt in range(4):
        share = damping * 10**attempt
        damped = plain + share * unit
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper.float(), damped
        log.warning("GPTQ: a Hessian is not positive with a damping of %g: trying ten times as much", share)
    raise ValueError("its Hessian is singular under any damping: give more calibration text or raise damping")


@torch.no_grad()
def solve(
    weight: Tensor,
    hessian: Tensor,
    quantizer: FakeQuantizer,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
    mse: bool = False,
) -> Solution:
    """Round `weight` on the grid of `quantizer`, whose stored scales are set on the way.

    Scales are those of RTN, or of the least weight error with `mse`: of a group as it is compensated when its turn
    comes, else (`static_groups`, no groups, or scales with a second level, which spans groups) of the weight as given.
    Inputs that are always zero round to nearest and disturb nobody; the authors' code sets their weights to zero.

    Args:
        weight: [O, I].
        hessian: [I, I], sum of x x^T over the layer's inputs; any factor.

    Raises:
        ValueError: as `factor`.
    """
    spec = quantizer.spec
    work = rotate(weight.float(), spec.hadamard).clone()
    hessian = rotate(rotate(hessian.float(), spec.hadamard).T, spec.hadamard).contiguous()
    dead = hessian.diagonal() <= 0
    hessian[dead, dead] = 1.0 if dead.all() else hessian.diagonal()[~dead].mean()
    width = work.shape[1]
    group = spec.group_size or width
    on_the_way = spec.granularity == "group" and not static_groups and spec.scale_dtype not in NESTED
    if on_the_way:  # a group must not reach into columns that wait for this block's updates
        block_size = max(group, block_size // group * group)
        found: list[QParams] = []
    else:
        quantizer.load_qparams(find_scales(to_groups(work, spec), quantizer, mse=mse))
        found = _by_group(quantizer.as_stored(QParams(quantizer.scale, quantizer.zero_point)), width // group)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else None
    if order is not None:
        work, hessian = work[:, order], hessian[order][:, order]
    group_of = (torch.arange(width) if order is None else order.cpu()).div(group, rounding_mode="floor").tolist()
    upper, _ = factor(hessian, damping)
    columns = work.T.contiguous()  # [I, O]: a column of the weight lies in one piece
    error = columns.new_zeros(())
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        block, u = columns[start:stop], upper[start:stop, start:stop]
        lost = torch.empty_like(block)
        for i in range(stop - start):
            if on_the_way and (start + i) % group == 0:
                wanted = find_scales(block[i : i + group].T.unsqueeze(1), quantizer, mse=mse)
                found.append(quantizer.as_stored(wanted))
            value = _nearest(block[i], found[group_of[start + i]], quantizer)
            lost[i] = (block[i] - value) / u[i, i]
            block[i + 1 :].addr_(u[i, i + 1 :], lost[i], alpha=-1)
            block[i] = value
        columns[stop:].addmm_(upper[start:stop, stop:].T, lost, alpha=-1)
        error += lost.square().sum()
    values = columns.T if order is None else columns.T[:, torch.argsort(order)]
    return Solution(values.contiguous(), _joined(found), float(error))


def find_scales(groups: Tensor, quantizer: FakeQuantizer, *, mse: bool) -> QParams:
    """Scale and zero point for `groups` [O, N, G] before they are stored."""
    if mse:
        return search_clipping(groups, quantizer.grid, quantizer.spec, MSE_STEPS, MSE_SMALLEST, MSE_NORM)
    return quantizer.initial_qparams(groups)


def _nearest(column: Tensor, qparams: QParams, quantizer: FakeQuantizer) -> Tensor:
    """One column [O] on its grid: the arithmetic of the quantizer."""
    levels = quantize(column.reshape(-1, 1, 1), qparams, quantizer.grid, quantizer.spec)
    return dequantize(levels, qparams, quantizer.spec).reshape(-1)


def _by_group(qparams: QParams, num_groups: int) -> list[QParams]:
    """One QParams for each group; where nothing is cut into groups the one there is."""
    if qparams.scale.ndim == 1:
        return [qparams]
    return [QParams(*(part[:, n : n + 1] for part in qparams)) for n in range(num_groups)]


def _joined(found: list[QParams]) -> QParams:
    return found[0] if len(found) == 1 else QParams(*(torch.cat(part, dim=1) for part in zip(*found, strict=True)))
