"""Round to nearest: the range of the weights themselves, by the spec's scale rule. The baseline of every table."""

from __future__ import annotations

import torch

from kdqat.initializers.base import Initializer
from kdqat.types import BlockView


class RTN(Initializer):
    """Scales from each group's range; a quantizer with a start of its own (SEQ) gets that one.

    Quantizers that follow the live range (MinMax) have these anyway.
    """

    @torch.no_grad()
    def initialize(self, block: BlockView) -> None:
        for layer in block.layers.values():
            quantizer = layer.weight_fake_quantizer
            if quantizer is not None and quantizer.uses_stored_qparams:
                groups = quantizer.groups(layer.as_matrix(layer.weight))
                quantizer.load_qparams(quantizer.initial_qparams(groups))
