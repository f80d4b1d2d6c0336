"""Stretched elastic quantization (SEQ) of ParetoQ, https://arxiv.org/abs/2502.02631, for 1, 1.58 and 2 bits.

The paper learns alpha, the end of the range, for each row; n levels cut -alpha ... alpha into equal parts:

    2 bits    alpha * {-3/4, -1/4, 1/4, 3/4}   int2 with zero_point "half"    scale = alpha / 2
    1.58      alpha * {-2/3, 0, 2/3}           ternary                        scale = 2 alpha / 3
    1         alpha * {-1, 1}                  binary                         scale = 2 alpha

Stored and learned is the scale. The gradients are those of the paper's code. A weight learns where |w| < 0.99 alpha;
alpha gets (w_hat - w) / alpha there and, outside, +-3/4 for 2 bits and +-1 for ternary (not the 2/3 of its outermost
level). Binary: a weight learns where |w| <= alpha, and alpha gets the sign everywhere; 0 counts as positive, because a
code has no third value. The sum is multiplied by 1 / sqrt(weights of the layer) and handed to the scale by the chain
rule.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kdqat.quant.functional import dequantize, quantize, replace_ste, scale_gradient
from kdqat.quant.quantizer import FakeQuantizer
from kdqat.quant.ranges import choose_qparams
from kdqat.spec import QuantSpec
from kdqat.spec.quant_spec import ScaleRule
from kdqat.types import QParams

_INSIDE = 0.99  # of alpha; the code clips there, so that W / alpha = 1 does not round to a level of its own


class SEQ(FakeQuantizer):
    """Learned ranges for the lowest widths; starts at alpha = max |w| (binary: mean |w|), whatever the scale rule.

    Args:
        spec, shape: see FakeQuantizer. Integers with zero_point "half" may be wider, for bit schedules.

    Raises:
        ValueError: for a format that is none of int* with zero_point "half", ternary and binary.
    """

    def __init__(self, spec: QuantSpec, shape: torch.Size) -> None:
        super().__init__(spec, shape)
        if spec.number.kind != "integer" or (spec.zero_point != "half" and spec.format != "ternary"):
            raise ValueError(
                "SEQ is for int2 with zero_point='half' (preset W2A16_HALF), ternary and binary, "
                f"not {spec.format} with zero_point={spec.zero_point!r}: use LSQ there"
            )
        self.learn("scale")

    def initial_qparams(self, groups: Tensor) -> QParams:
        # absmax_half is absmax / (qmax + 1/2), that is alpha = absmax
        rule: ScaleRule = "mean" if self.spec.format == "binary" else "absmax_half"
        return choose_qparams(groups, self.grid, replace(self.spec, scale_rule=rule))

    def qparams(self, groups: Tensor) -> QParams:
        # 2^(b-1) - 1 of the paper's gradient scale is 1 for all its formats
        one = (self.qmax - 0.5).clamp(min=1.0)
        return QParams(scale_gradient(self.scale, math.prod(self.shape), one), self.zero_point)

    def fake_quantize(self, groups: Tensor, qparams: QParams) -> Tensor:
        levels = quantize(groups, qparams, self.grid, self.spec).detach()
        steps = (groups / qparams.scale).detach()
        if self.spec.format == "binary":
            inside, slope = steps.abs() <= self.qmax, levels
        else:
            alpha = self.qmax + 0.5  # in steps
            inside = steps.abs() < _INSIDE * alpha
            end = alpha - self.grid.offset  # n - shift: 3/2 for both formats
            slope = torch.where(inside, levels - steps, torch.copysign(end, steps))
        learns = groups * inside + qparams.scale * slope
        return replace_ste(learns, dequantize(levels, qparams, self.spec))
