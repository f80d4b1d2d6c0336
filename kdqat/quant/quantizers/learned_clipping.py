"""Learned weight clipping of OmniQuant (https://arxiv.org/abs/2308.13137): a learned share of the live range.

    symmetric    scale = sigmoid(gamma) * scale of the full range
    asymmetric   max * sigmoid(gamma) and min * sigmoid(gamma_min) are the ends of the grid

The range follows the weights, and the factor, between 0 and 1, is trained through the scale that it gives: with the
clipped STE d w_hat / d scale is LSQ's. The paper's rounded zero point passes no gradient, and neither does ours; a
minimum (zero_point="minimum") is a real number and passes it. gamma starts at 4, a factor of 0.982.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdqat.quant.functional import STE, replace_ste
from kdqat.quant.grouping import shared_dims
from kdqat.quant.quantizer import FakeQuantizer
from kdqat.quant.ranges import choose_qparams
from kdqat.spec import QuantSpec
from kdqat.types import QParams


class LearnedClipping(FakeQuantizer):
    """The live range, times a learned factor for each scale (asymmetric: one for each end).

    Args:
        spec, shape: see FakeQuantizer. A dynamic range of activations has one factor (or two) for the tensor.
        start: of gamma; sigmoid(4) = 0.982.
        ste: "clipped" is the paper's.

    Attributes:
        gamma, gamma_min: Parameters of the scale's shape; gamma_min of asymmetric specs only.
    """

    uses_stored_qparams: ClassVar[bool] = False

    def __init__(self, spec: QuantSpec, shape: torch.Size, start: float = 4.0, ste: STE = "clipped") -> None:
        super().__init__(spec, shape, ste)
        self.gamma = nn.Parameter(torch.full_like(self.scale, start))
        if not spec.symmetric:
            self.gamma_min = nn.Parameter(torch.full_like(self.scale, start))

    def qparams(self, groups: Tensor) -> QParams:
        groups, share = groups.detach(), torch.sigmoid(self.gamma)
        if self.spec.symmetric:
            scale, zero_point = choose_qparams(groups, self.grid, self.spec, share.detach())
            # by hand, because a power of two (scale rule "mx") has no gradient of its own; the other rules are linear
            return QParams(replace_ste(scale * (share / share.detach()), scale), zero_point)
        dims = shared_dims(self.spec)
        low, high = groups.amin(dims, keepdim=True), groups.amax(dims, keepdim=True)
        ends = torch.cat((low * torch.sigmoid(self.gamma_min), high * share), dim=dims[0])
        return choose_qparams(ends, self.grid, self.spec)
