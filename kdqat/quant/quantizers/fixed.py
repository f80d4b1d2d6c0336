"""Scales that stay as they were loaded: what a saved student is evaluated and exported with.

Also the quantizer of training with frozen scales (NVIDIA QAD, https://arxiv.org/abs/2601.20088, trains so).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdqat.quant.quantizer import FakeQuantizer
from kdqat.types import QParams


class Fixed(FakeQuantizer):
    """The initializer's (or the saved) scale and zero point, as they are; weights get the clipped STE."""

    reads_tensor: ClassVar[bool] = False

    def qparams(self, groups: Tensor) -> QParams:
        return QParams(self.scale, self.zero_point)
