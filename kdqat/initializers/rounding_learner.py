"""RoundingLearner: stands in for a weight's fake quantizer while SignRound learns how that weight is rounded.

    w^ = dequantize(nearest(w / s + gap * V)),   s from the range [low_share * min, high_share * max] of each group

V moves a weight by at most half the distance to a neighbouring level (`gap`; 1 on integers), so that it chooses between
rounding up and down, on every grid of kdqat. Scales are rounded to what is stored in every forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdqat.quant import FakeQuantizer
from kdqat.quant.formats import half_gap, nearest
from kdqat.quant.functional import fake_quantize, replace_ste
from kdqat.quant.grouping import rotate, shared_dims
from kdqat.types import QParams


class RoundingLearner(nn.Module):
    """Differentiable values of one weight.

    Args:
        quantizer: of the weight; gets RTN's scales, and with them its second level, which then stays.
        weight: the matrix [O, I]; a constant here.

    Attributes:
        offset: V, [O, N, G] in -1/2 ... 1/2.
        shares: [2, *shape of the scale] in 0 ... 1, of the lower and the upper end of each range.
    """

    def __init__(self, quantizer: FakeQuantizer, weight: Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer
        self._groups = quantizer.groups(weight.detach())
        quantizer.load_qparams(quantizer.initial_qparams(self._groups))
        dims = shared_dims(quantizer.spec)
        self._ends = torch.cat([self._groups.amin(dims, keepdim=True), self._groups.amax(dims, keepdim=True)], dim=2)
        self.offset = nn.Parameter(torch.zeros_like(self._groups))
        self.shares = nn.Parameter(torch.ones_like(self._ends))

    def forward(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The learned values, in the shape of the weight `tensor` [O, I] and in `dtype` (None: its own)."""
        values = self.values(self.qparams()).reshape(tensor.shape)
        return rotate(values, self.quantizer.spec.hadamard).to(tensor.dtype if dtype is None else dtype)

    def qparams(self) -> QParams:
        """Scale and zero point as stored, with the gradient of those that are wanted."""
        spec = self.quantizer.spec
        if spec.scale_rule in ("mean", "gaussian"):  # not made of the ends; they scale with the weights
            wanted = self.quantizer.initial_qparams(self._groups * self.shares[..., 1:])
        else:
            wanted = self.quantizer.initial_qparams(self._ends * self.shares)
        stored = self.quantizer.as_stored(wanted)
        zero_point = stored.zero_point
        if spec.zero_point == "minimum":
            zero_point = replace_ste(wanted.zero_point, zero_point)
        return QParams(replace_ste(wanted.scale, stored.scale), zero_point)

    def values(self, qparams: QParams) -> Tensor:
        """The values [O, N, G] on the grid of `qparams`, rotated where the spec rotates."""
        grid, spec = self.quantizer.grid, self.quantizer.spec
        moved = self._groups + qparams.scale * (self._gap(qparams) * self.offset)
        return fake_quantize(moved, qparams, grid, spec)

    @torch.no_grad()
    def step(self, rate: float, gradients: tuple[Tensor | None, Tensor | None]) -> None:
        """One step of signed gradient descent on V and the ranges."""
        for parameter, gradient, low, high in zip(self.learned(), gradients, (-0.5, 0.0), (0.5, 1.0), strict=True):
            if gradient is not None:
                parameter.sub_(gradient.sign(), alpha=rate).clamp_(low, high)

    def learned(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.offset, self.shares

    @torch.no_grad()
    def _gap(self, qparams: QParams) -> Tensor | float:
        """The distance from each weight's level to its neighbour, in steps."""
        grid = self.quantizer.grid
        if grid.kind == "integer":
            return 1.0
        clipped = torch.clamp(self._groups / qparams.scale, grid.low, grid.high)
        return 2 * half_gap(clipped, nearest(clipped, grid), grid)
