"""The "max" optimizer of Hugging Face's optimum-quanto, the backend of https://arxiv.org/abs/2406.17415.

int2 and int4: scale = (max - min) / (2^b - 1) and a float shift, min, for each group: value = scale * code + min.
int8: scale = max |w| / 127 for each channel. That is what RTN does under such specs; this class takes no other ones, so
that a row of a table with its name is what the name says. Groups are those of the plan: `quanto_scheme` (kdqat.spec)
gives quanto's own.
"""

from __future__ import annotations

import torch

from kdqat.initializers.base import Initializer
from kdqat.initializers.rewrite import naming
from kdqat.quant.ranges import choose_qparams
from kdqat.spec import QuantSpec
from kdqat.types import BlockView


class QuantoMax(Initializer):
    """Scale and minimum from the ends of each group (8 bits: the scale from the largest magnitude of a channel)."""

    @torch.no_grad()
    def initialize(self, block: BlockView) -> None:
        for name, layer in block.layers.items():
            quantizer = layer.weight_fake_quantizer
            if quantizer is None:
                continue
            with naming(name):
                _require_quanto(quantizer.spec)
                groups = quantizer.groups(layer.as_matrix(layer.weight))
                quantizer.load_qparams(choose_qparams(groups, quantizer.grid, quantizer.spec))


def _require_quanto(spec: QuantSpec) -> None:
    affine = spec.number.kind == "integer" and spec.zero_point == "minimum"
    absmax = spec.format == "int8" and spec.zero_point == "none" and spec.scale_rule == "absmax"
    if spec.hadamard is not None or not (affine or absmax):
        raise ValueError(
            f"QuantoMax is for integers with zero_point 'minimum', and for symmetric int8, not {spec.format} with "
            f"zero_point={spec.zero_point!r}: use quanto_scheme(bits, width), GGUF_Q4_1 or W8A16"
        )
