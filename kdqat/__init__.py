"""kdqat: quantization-aware training and distillation.

Public names are resolved on first use (PEP 562): `import kdqat`, `kdqat --help` and `kdqat report` load no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "kdqat.api": ("cache", "evaluate", "export", "fit", "quantize", "signals"),
    "kdqat.allocate": ("BitAllocator", "ByImportance", "FromCheckpoint", "FromFile", "Knapsack", "Uniform"),
    "kdqat.callbacks": (
        "BitSchedule",
        "BlockProgressive",
        "Divergence",
        "Freeze",
        "FreezeWindow",
        "GradientLog",
        "LoraAdapters",
        "NothingMoved",
        "OscillationLog",
        "ScalesFirst",
        "SignalLog",
        "ZeroGradients",
    ),
    "kdqat.data": ("ChatTurns", "PackedText", "PythonDocs", "TextSource"),
    "kdqat.calibrate": ("Calibration",),
    "kdqat.evaluators": ("EmbeddingAgreement", "Evaluator", "Perplexity", "TeacherAgreement"),
    # AWQ and GPTQ are the initializers here; the formats of these names are kdqat.exporters.AWQ and .GPTQ
    "kdqat.exporters": ("GGUF", "ONNX", "CompressedTensors", "DequantizedHF", "Exporter", "TorchAO"),
    "kdqat.importance": (
        "LIM",
        "ZD",
        "ActivationNorm",
        "Fisher",
        "HessianTrace",
        "ImportanceScorer",
        "OutputKL",
        "WeightSQNR",
    ),
    "kdqat.initializers": (
        "AWQ",
        "FPQ",
        "GPTQ",
        "RTN",
        "Initializer",
        "MSEGrid",
        "QuantoMax",
        "SignRound",
        "StoredScales",
    ),
    "kdqat.losses": (
        "CAKLD",
        "TVD",
        "AttentionTransfer",
        "CrossEntropy",
        "DistillLoss",
        "ForwardKL",
        "GeneralizedJSD",
        "HiddenStates",
        "ReverseKL",
        "WeightedSum",
    ),
    "kdqat.models": ("CachedTeacher", "FrozenTeacher", "ModelSource", "SharedTeacher", "Teacher"),
    "kdqat.quant": (
        "LSQ",
        "SEQ",
        "AIMETRange",
        "FakeQuantizer",
        "FakeQuantLayer",
        "FakeQuantLinear",
        "Fixed",
        "LSQPlus",
        "LearnedClipping",
        "MSEClip",
        "MinMax",
        "QuEST",
        "apply_plan",
        "fake_quant_layers",
        "full_precision",
        "strip_fake_quant",
    ),
    "kdqat.spec": ("LayerScheme", "QuantPlan", "QuantSpec", "Scores", "preset", "quanto_scheme"),
    "kdqat.student": ("GGUFPlan", "GGUFScales", "Student", "load_student", "prepare_student", "save_student"),
    "kdqat.training": ("Checkpoints", "KDQATModule", "Parallel", "WarmupCosine"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kdqat' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
