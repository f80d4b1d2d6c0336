"""QuEST (https://arxiv.org/abs/2502.05003): ranges of normal numbers, and a gradient only where rounding is trusted.

The grid has 2^b levels without a zero. Its step follows from the live root mean square, with the clipping value that
loses least on normal numbers (scale rule "gaussian"); the spec's `hadamard` makes blocks of inputs close to normal
first, weights (channel, group) and dynamic activations (token) alike. The gradient passes where rounding moved a number
by at most half a step: numbers far outside the range get none. The mask lies in the rotated space, as in the paper.
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


class QuEST(FakeQuantizer):
    """Gaussian ranges of the live tensor under the trust gradient.

    Args:
        spec, shape: see FakeQuantizer; presets are QUEST_W4A4, QUEST_W4A16, QUEST_W3A16 and QUEST_W2A16.
        ste: "trust" is the paper's.

    Raises:
        ValueError: for a spec with another scale rule.
    """

    uses_stored_qparams: ClassVar[bool] = False
    live_range: ClassVar[bool] = True

    def __init__(self, spec: QuantSpec, shape: torch.Size, ste: STE = "trust") -> None:
        super().__init__(spec, shape, ste)
        if spec.scale_rule != "gaussian":
            raise ValueError(
                f"QuEST needs scale_rule='gaussian' and zero_point='half', not {spec.scale_rule!r}: "
                "use a preset such as QUEST_W4A16, or the MinMax quantizer"
            )

    def qparams(self, groups: Tensor) -> QParams:
        return choose_qparams(groups.detach(), self.grid, self.spec)
