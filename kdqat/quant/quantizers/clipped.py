"""MSE-searched clipping: at every forward pass the live range is shrunk to the one with the least weight error.

The search of GPTQ's `mse` option (https://arxiv.org/abs/2210.17323), repeated while the weights move, so that the range
stays the best one for them. Nothing is learned; as in `MinMax` the scale counts as a constant for the gradient.

What it costs: `num_steps` fake quantizations of the tensor at every forward pass instead of one. With 20 steps forward
and backward of a weight [576, 1536] took 13 times as long as `MinMax` (one CPU core). `MSEGrid` with LSQ searches once
and learns from there.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdqat.quant.clipping import search_clipping
from kdqat.quant.functional import STE
from kdqat.quant.quantizer import FakeQuantizer
from kdqat.spec import QuantSpec
from kdqat.types import QParams


class MSEClip(FakeQuantizer):
    """Ranges from the live tensor, clipped where the error is least.

    Args:
        spec, shape: see FakeQuantizer.
        num_steps: ranges tried for each scale, the full one included.
        smallest: the smallest of them, as a share of the full range.
        norm: p of the error sum |w - w_hat|^p; 2 is the MSE, GPTQ uses 2.4.
        ste: "plain" lets clipped weights learn as well.

    Raises:
        ValueError: for a grid of ranges that is none.
    """

    uses_stored_qparams: ClassVar[bool] = False

    def __init__(
        self,
        spec: QuantSpec,
        shape: torch.Size,
        num_steps: int = 20,
        smallest: float = 0.4,
        norm: float = 2.0,
        ste: STE = "plain",
    ) -> None:
        super().__init__(spec, shape, ste)
        if num_steps < 2 or not 0 < smallest < 1 or norm <= 0:
            raise ValueError("MSEClip needs num_steps >= 2, 0 < smallest < 1 and norm > 0")
        self.num_steps, self.smallest, self.norm = num_steps, smallest, norm

    def qparams(self, groups: Tensor) -> QParams:
        return search_clipping(groups.detach(), self.grid, self.spec, self.num_steps, self.smallest, self.norm)
