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

    Raises:
        ValueError: from `initialize`, naming the layer, if its quantizer takes no scales, or its weights do not fall
            back on their codes: rounded to bfloat16, some of 8 bits and an asymmetric grid fall on the next.
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
            if changed := _changed(quantizer.codes(layer.latent_matrix()).cpu(), stored):
                dtype = str(layer.weight.dtype).removeprefix("torch.")
                raise ValueError(
                    f"layer {name}: in {dtype} {changed} of its weights are not the codes that the checkpoint stores: "
                    "load it in float32 (student: {dtype: float32}) and leave its weights alone until here"
                )


def _changed(codes: torch.Tensor, stored: StoredLayer) -> int:
    """How many codes are not those stored; under a scale of 0 all mean the same."""
    scale = stored.qparams.scale
    return int(((codes != stored.codes).reshape(*scale.shape[:2], -1) & (scale != 0)).sum())
