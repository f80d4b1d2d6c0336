"""Fake quantization of weights: pure functions, quantizers, the layer that carries them, and the swap."""

from kdqat.quant.coverage import Coverage, measure_coverage, require_coverage
from kdqat.quant.linear import FakeQuantLinear
from kdqat.quant.quantizer import FakeQuantizer, QuantizerFactory
from kdqat.quant.quantizers.fixed import Fixed
from kdqat.quant.quantizers.lsq import LSQ
from kdqat.quant.quantizers.minmax import MinMax
from kdqat.quant.swap import apply_plan, fake_quant_layers, full_precision, strip_fake_quant

__all__ = [
    "LSQ",
    "Coverage",
    "FakeQuantLinear",
    "FakeQuantizer",
    "Fixed",
    "MinMax",
    "QuantizerFactory",
    "apply_plan",
    "fake_quant_layers",
    "full_precision",
    "measure_coverage",
    "require_coverage",
    "strip_fake_quant",
]
