"""Min-max fake quantization: the range follows the live weights at every step, nothing is learned.

What round-to-nearest (RTN) does once, done at every forward pass; the scale counts as a constant for the gradient
(plain STE), as in LLM-QAT (https://arxiv.org/abs/2305.17888) and torchao's QAT.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdqat.quant.functional import STE
from kdqat.quant.quantizer import FakeQuantizer
from kdqat.quant.ranges import choose_qparams
from kdqat.spec import QuantSpec
from kdqat.types import QParams


class MinMax(FakeQuantizer):
    """Ranges from the live tensor by the spec's scale rule; with unchanged weights this is RTN.

    It is also the quantizer of dynamic activations, where "live" is what an engine does.

    Args:
        spec, shape, ste: see FakeQuantizer.
    """

    uses_stored_qparams: ClassVar[bool] = False
    live_range: ClassVar[bool] = True

    def __init__(self, spec: QuantSpec, shape: torch.Size, ste: STE = "plain") -> None:
        super().__init__(spec, shape, ste)

    def qparams(self, groups: Tensor) -> QParams:
        return choose_qparams(groups.detach(), self.grid, self.spec)
