"""Deployable folders of a trained student."""

from kdqat.exporters.base import Exporter
from kdqat.exporters.dequantized import DequantizedHF

__all__ = ["DequantizedHF", "Exporter"]
