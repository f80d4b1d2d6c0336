"""Deployable folders of a trained student."""

from kdqat.exporters.base import Exporter
from kdqat.exporters.dequantized import DequantizedHF
from kdqat.exporters.gguf import GGUF
from kdqat.exporters.onnx import ONNX
from kdqat.exporters.torchao import TorchAO

__all__ = ["GGUF", "ONNX", "DequantizedHF", "Exporter", "TorchAO"]
