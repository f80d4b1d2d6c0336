"""Learned step size quantization (LSQ), https://arxiv.org/abs/1902.08153.

The scale is a parameter. Its gradient is round(w/s) - w/s inside the range and qmin or qmax outside (eq. 3), which
falls out of autograd through `round_ste(clamp(w / s))`. It is multiplied by g = 1/sqrt(N * qmax) (section 2.2), so
that a step moves scale and weights by comparable shares; Adam's own normalisation cancels g, gradient clipping and
SGD do not. A learned zero point follows LSQ+ (https://arxiv.org/abs/2004.09576): gradient only from clipped weights.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kdqat.quant.functional import STE, scale_gradient
from kdqat.quant.quantizer import FakeQuantizer
from kdqat.spec import QuantSpec
from kdqat.types import QParams


class LSQ(FakeQuantizer):
    """Learned scales, and optionally learned zero points.

    Args:
        spec, shape: see FakeQuantizer.
        learn_zero_point: train the zero point of an asymmetric spec; it is stored rounded to a code.
        gradient_scale: N in 1/sqrt(N * qmax): "shared" counts the weights that share a scale, "layer" the weights
            of the whole layer (as ParetoQ's code does), "none" leaves the gradient alone.
        ste: "clipped" is the paper's.

    Raises:
        ValueError: if learn_zero_point is asked of a symmetric spec.
    """

    reads_tensor: ClassVar[bool] = False

    def __init__(
        self,
        spec: QuantSpec,
        shape: torch.Size,
        learn_zero_point: bool = False,
        gradient_scale: Literal["shared", "layer", "none"] = "shared",
        ste: STE = "clipped",
    ) -> None:
        super().__init__(spec, shape, ste)
        if learn_zero_point and spec.symmetric:
            raise ValueError("learn_zero_point=True needs a spec with symmetric=False, e.g. W4A16_ASYM_G64")
        if gradient_scale not in ("shared", "layer", "none"):
            raise ValueError(f"gradient_scale {gradient_scale!r} is unknown: use shared, layer or none")
        self.learn_zero_point = learn_zero_point
        self.gradient_scale = gradient_scale
        self.learn("scale", *(["zero_point"] if learn_zero_point else []))

    def qparams(self, groups: Tensor) -> QParams:
        if self.gradient_scale == "none" or not torch.is_grad_enabled():
            return QParams(self.scale, self.zero_point)
        num_weights = math.prod(self.shape)
        sharing = num_weights if self.gradient_scale == "layer" else num_weights / self.scale.numel()
        zero_point = scale_gradient(self.zero_point, sharing, self.qmax) if self.learn_zero_point else self.zero_point
        return QParams(scale_gradient(self.scale, sharing, self.qmax), zero_point)
