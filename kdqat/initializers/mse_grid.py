"""Clipping searched on a grid: per scale, the shrunken range with the least weight error.

The classic start for learned scales (used by GPTQ's `mse` option, https://arxiv.org/abs/2210.17323, and LSQ+). A
small weight error is not a small model error: without training, per-channel W4 of SmolLM2 is *worse* after this
search than RTN (docs/log.md). With training it is the better start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdqat.initializers.base import Initializer
from kdqat.quant.clipping import search_clipping
from kdqat.quant.quantizer import FakeQuantizer
from kdqat.types import BlockView, QParams


class MSEGrid(Initializer):
    """For every scale, try `num_steps` ranges from the full one down to `smallest` times it; keep the best.

    Args:
        num_steps: points on the grid.
        smallest: the last point, as a share of the full range.
        norm: p of the error sum |w - w_hat|^p; 2 is the MSE, GPTQ uses 2.4.

    Raises:
        ValueError: for a grid that is none.
    """

    def __init__(self, *, num_steps: int = 60, smallest: float = 0.4, norm: float = 2.0) -> None:
        if num_steps < 2 or not 0 < smallest < 1 or norm <= 0:
            raise ValueError("MSEGrid needs num_steps >= 2, 0 < smallest < 1 and norm > 0")
        self.num_steps, self.smallest, self.norm = num_steps, smallest, norm

    @torch.no_grad()
    def initialize(self, block: BlockView) -> None:
        for name, layer in block.layers.items():
            quantizer = layer.weight_fake_quantizer
            if quantizer is not None:
                try:
                    quantizer.load_qparams(self.search(layer.as_matrix(layer.weight), quantizer))
                except ValueError as error:
                    raise ValueError(f"layer {name}: {error}") from None

    def search(self, weight: Tensor, quantizer: FakeQuantizer) -> QParams:
        """The best scale and zero point for `weight` [O, I], of shape `spec.qparam_shape`."""
        groups = quantizer.groups(weight)
        return search_clipping(groups, quantizer.grid, quantizer.spec, self.num_steps, self.smallest, self.norm)
