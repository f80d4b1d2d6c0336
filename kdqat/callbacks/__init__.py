"""What happens around training steps."""

from kdqat.callbacks.gradient_log import GradientLog
from kdqat.callbacks.oscillation_log import OscillationLog
from kdqat.callbacks.progress import ProgressLine
from kdqat.callbacks.signal_log import SignalLog
from kdqat.callbacks.stop import StopOnSignal

__all__ = ["GradientLog", "OscillationLog", "ProgressLine", "SignalLog", "StopOnSignal"]
