"""Fake quantization: pure functions, formats, quantizers, the layers that carry them, and the swap."""

from kdqat.quant import scales
from kdqat.quant.coverage import Coverage, measure_coverage, require_coverage
from kdqat.quant.experts import ExpertWeight, FakeQuantExperts
from kdqat.quant.kinds import matmul_weights
from kdqat.quant.kv import KVCacheFakeQuantizer, kv_caches
from kdqat.quant.layer import FakeQuantLayer, default_activation_quantizer
from kdqat.quant.lean import describe_ways
from kdqat.quant.linear import FakeQuantConv1D, FakeQuantLinear
from kdqat.quant.lora import LoraAdapter, Placement
from kdqat.quant.quantizer import FakeQuantizer, QuantizerFactory
from kdqat.quant.quantizers.aimet import AIMETRange
from kdqat.quant.quantizers.clipped import MSEClip
from kdqat.quant.quantizers.fixed import Fixed
from kdqat.quant.quantizers.learned_clipping import LearnedClipping
from kdqat.quant.quantizers.lsq import LSQ
from kdqat.quant.quantizers.lsq_plus import LSQPlus
from kdqat.quant.quantizers.minmax import MinMax
from kdqat.quant.quantizers.quest import QuEST
from kdqat.quant.quantizers.seq import SEQ
from kdqat.quant.state import load_stored_state, stored_state
from kdqat.quant.swap import QuantizedLayer, apply_plan, fake_quant_layers, full_precision, strip_fake_quant

__all__ = [
    "LSQ",
    "SEQ",
    "AIMETRange",
    "Coverage",
    "ExpertWeight",
    "FakeQuantConv1D",
    "FakeQuantExperts",
    "FakeQuantLayer",
    "FakeQuantLinear",
    "FakeQuantizer",
    "Fixed",
    "KVCacheFakeQuantizer",
    "LSQPlus",
    "LearnedClipping",
    "LoraAdapter",
    "MSEClip",
    "MinMax",
    "Placement",
    "QuEST",
    "QuantizedLayer",
    "QuantizerFactory",
    "apply_plan",
    "default_activation_quantizer",
    "describe_ways",
    "fake_quant_layers",
    "full_precision",
    "kv_caches",
    "load_stored_state",
    "matmul_weights",
    "measure_coverage",
    "require_coverage",
    "scales",
    "stored_state",
    "strip_fake_quant",
]
