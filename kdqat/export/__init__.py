"""Deployable folders of a trained student."""

from kdqat.export.base import Exporter
from kdqat.export.dequantized import DequantizedHF

__all__ = ["DequantizedHF", "Exporter"]
