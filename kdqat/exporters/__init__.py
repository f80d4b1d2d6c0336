"""Deployable folders of a trained student."""

from kdqat.exporters.awq import AWQ
from kdqat.exporters.base import Exporter
from kdqat.exporters.compressed_tensors import CompressedTensors
from kdqat.exporters.dequantized import DequantizedHF
from kdqat.exporters.gptq import GPTQ

__all__ = ["AWQ", "GPTQ", "CompressedTensors", "DequantizedHF", "Exporter"]
