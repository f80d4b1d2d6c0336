"""What happens around training steps."""

from kdqat.callbacks.lora import LoraAdapters
from kdqat.callbacks.progress import ProgressLine
from kdqat.callbacks.stop import StopOnSignal

__all__ = ["LoraAdapters", "ProgressLine", "StopOnSignal"]
