"""Scales as a quantized checkpoint stores them: the student starts from its codes."""

from __future__ import annotations

import torch

from kdqat.initializers.rtn import RTN
from kdqat.models.packed import STORED
from kdqat.models.packed_layers import StoredLayer
from kdqat.types import BlockView


class StoredScales(RTN):
    """Scales and zero points of a student that was loaded from a compressed-tensors, GPTQ or AWQ folder.

    Layers that were stored otherwise than the plan has them, or not quantized, get RTN's scales.
    """

    @torch.no_grad()
    def initialize(self, block: BlockView) -> None:
        super().initialize(block)
        for name, layer in block.layers.items():
            stored: StoredLayer | None = getattr(layer, STORED, None)
            quantizer = layer.weight_fake_quantizer
            if stored is None or quantizer is None or quantizer.spec != stored.scheme.weight:
                continue
            if not quantizer.uses_stored_qparams:
                raise ValueError(
                    f"layer {name}: {type(quantizer).__name__} takes its range from the live weight and not the "
                    "checkpoint's scales: use LSQ or Fixed, or the RTN initializer"
                )
            quantizer.load_qparams(stored.qparams, stored.second_level or None)
