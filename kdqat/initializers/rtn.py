"""Round to nearest: the range of the weights themselves, by the spec's scale rule. The baseline of every table."""

from __future__ import annotations

import torch

from kdqat.initializers.base import Initializer
from kdqat.quant.functional import choose_qparams
from kdqat.quant.grouping import to_groups
from kdqat.types import BlockView


class RTN(Initializer):
    """Scales from each group's range. Quantizers that follow the live range (MinMax) have these anyway."""

    @torch.no_grad()
    def initialize(self, block: BlockView) -> None:
        for layer in block.layers.values():
            quantizer = layer.weight_fake_quantizer
            if quantizer is not None and quantizer.uses_stored_qparams:
                groups = to_groups(layer.weight.float(), quantizer.spec)
                quantizer.load_qparams(choose_qparams(groups, quantizer.qmin, quantizer.qmax, quantizer.spec))
