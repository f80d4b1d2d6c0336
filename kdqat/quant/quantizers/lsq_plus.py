"""LSQ+ (https://arxiv.org/abs/2004.09576): learned step size and learned offset, for activations.

x_hat = s * clip(round((x - beta) / s), qmin, qmax) + beta. The offset is the spec's zero point (integer: a code, stored
rounded; minimum: a real number, the paper's beta with codes from 0); its gradient comes from clipped values only.
Symmetric specs and minifloats learn the scale alone, which is LSQ (https://arxiv.org/abs/1902.08153) on activations.
Ranges start from calibration (`kdqat.calibrate`). The gradient is multiplied by 1/sqrt(N * qmax), N the features of
one token: a batch of any size then gives the step size the same share.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdqat.quant.functional import STE, scale_gradient
from kdqat.quant.quantizer import FakeQuantizer
from kdqat.spec import QuantSpec
from kdqat.types import QParams


class LSQPlus(FakeQuantizer):
    """Static activation ranges that training moves.

    Args:
        spec, shape, ste: see FakeQuantizer.
        learn_zero_point: train the offset too, where the spec has one.

    Raises:
        ValueError: for a dynamic spec.
    """

    reads_tensor: ClassVar[bool] = False

    def __init__(self, spec: QuantSpec, shape: torch.Size, learn_zero_point: bool = True, ste: STE = "clipped") -> None:
        super().__init__(spec, shape, ste)
        self.learn_zero_point = learn_zero_point and not spec.symmetric
        self.learn("scale", *(["zero_point"] if self.learn_zero_point else []))

    def qparams(self, groups: Tensor) -> QParams:
        sharing = self.shape[-1] / self.scale.numel()  # features of a token that share a scale
        zero_point = scale_gradient(self.zero_point, sharing, self.qmax) if self.learn_zero_point else self.zero_point
        return QParams(scale_gradient(self.scale, sharing, self.qmax), zero_point)
