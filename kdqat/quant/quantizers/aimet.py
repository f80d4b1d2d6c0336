"""AIMET's learned ranges, the quantizer of Qualcomm's KD-QAT example (shared with "Oh! We Freeze", arXiv 2403.18159).

AIMET trains the ends of the range, theta. Stored and learned here are `scale` and `zero_point`, the same degrees of
freedom: symmetric theta_max = scale * qmax; asymmetric theta_min = -scale * zero_point and theta_max = theta_min +
scale * (2^b - 1). Gradients are AIMET's formulas by the chain rule, with q = w_hat / scale:

    d scale        sum g * (q - mask * w / scale)   = qmax * d theta_max in the symmetric case
    d zero_point   sum g * -scale * (1 - mask)      = -scale * (d theta_min + d theta_max)
    dw             g where theta_min <= w <= theta_max

mask is 1 where the *rounded* code lies in the grid, and theta_min = -theta_max although the grid has one more level
below: both differ from LSQ by half a step or one, and there is no gradient scale. Under Adam a step of the scale equals
qmax steps of theta: AIMET's own pace is `scale_lr_ratio` 1/qmax (1/7 for 4 bits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.quant.functional import dequantize, quantize, replace_ste
from kdqat.quant.quantizer import FakeQuantizer
from kdqat.spec import QuantSpec
from kdqat.types import QParams


class AIMETRange(FakeQuantizer):
    """Learned ranges of integers; start them at the range of the weights (RTN).

    Args:
        spec, shape: see FakeQuantizer. Asymmetric specs learn a real zero point and store it rounded to a code.

    Raises:
        ValueError: for a format that AIMET does not have.
    """

    def __init__(self, spec: QuantSpec, shape: torch.Size) -> None:
        super().__init__(spec, shape)
        if spec.number.kind != "integer" or spec.zero_point not in ("none", "integer"):
            raise ValueError(
                f"AIMETRange is for integers with zero_point 'none' or 'integer', not {spec.format} with "
                f"zero_point={spec.zero_point!r}: use LSQ there"
            )
        self.learn("scale", *([] if spec.symmetric else ["zero_point"]))

    def qparams(self, groups: Tensor) -> QParams:
        return QParams(self.scale, self.zero_point)

    def fake_quantize(self, groups: Tensor, qparams: QParams) -> Tensor:
        scale, zero_point = qparams
        codes = quantize(groups, qparams, self.grid, self.spec).detach()
        levels = codes - zero_point.detach()
        steps = (groups / scale).detach()
        below, above = self._ends()
        within = steps.round() + zero_point.detach() == codes  # the rounded code needed no clipping
        learns = groups * ((steps >= below) & (steps <= above)) + scale * (levels - steps * within)
        if not self.spec.symmetric:
            learns = learns - scale.detach() * zero_point * ~within
        return replace_ste(learns, dequantize(codes, qparams, self.spec))

    def _ends(self) -> tuple[Tensor, Tensor]:
        """theta_min and theta_max in steps; the zero point as it is learned, not as it is stored."""
        if self.spec.symmetric:
            return -self.qmax, self.qmax
        zero_point = self.zero_point.detach()
        return self.qmin - zero_point, self.qmax - zero_point
