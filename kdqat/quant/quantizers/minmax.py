"""Min-max fake quantization: the range follows the live weights at every step, nothing is learned.

What round-to-nearest (RTN) does once, done at every forward pass; the scale counts as a constant for the gradient
(plain STE), as in LLM-QAT (https://arxiv.org/abs/2305.17888) and torchao's QAT.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdqat.quant.functional import STE, choose_qparams
from kdqat.quant.quantizer import FakeQuantizer
from kdqat.types import QParams


class MinMax(FakeQuantizer):
    """Ranges from the live weight by the spec's scale rule; with unchanged weights this is RTN."""

    ste: ClassVar[STE] = "plain"
    uses_stored_qparams: ClassVar[bool] = False

    def qparams(self, groups: Tensor) -> QParams:
        return choose_qparams(groups.detach(), self.qmin, self.qmax, self.spec)
