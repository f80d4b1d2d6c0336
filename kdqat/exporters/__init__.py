"""Deployable folders of a trained student."""

from kdqat.exporters.awq import AWQ
from kdqat.exporters.base import Exporter
from kdqat.exporters.compressed_tensors import CompressedTensors
from kdqat.exporters.dequantized import DequantizedHF
from kdqat.exporters.gguf import GGUF
from kdqat.exporters.gptq import GPTQ
from kdqat.exporters.onnx import ONNX
from kdqat.exporters.torchao import TorchAO

__all__ = ["AWQ", "GGUF", "GPTQ", "ONNX", "CompressedTensors", "DequantizedHF", "Exporter", "TorchAO"]
